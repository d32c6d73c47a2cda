"""``dpo push``: the model of a run, or a merged one, uploaded to the Hub with its card."""

from __future__ import annotations

import json
from pathlib import Path

from .durable import MANIFEST, check_content, is_complete
from .errors import UserError
from .hub import unreachable
from .model.sources import first_line
from .paths import expanded
from .run_folder import CARD_FILE, METRICS_FILE, MODEL_FILES


def push(source: str, repo_id: str, *, private: bool = False, revision: str | None = None) -> str:
    """Upload the final model of a run: weights, tokenizer, configs and the model card, and nothing else of its folder.

    What an earlier model left in the repository, such as an adapter or other shards, is deleted; other files stay.

    Args:
        source: the output folder of a finished run, or a folder that ``dpo merge`` wrote.
        repo_id: ``owner/name``; it is created where it is absent.
        private: of a repository that is created.
        revision: a branch, which is created where it is absent; by default the main one.

    Returns:
        The address of the commit.

    Raises:
        UserError: no whole model there, no token, or what the Hub has to say.
    """
    folder = expanded(source)
    names = _uploaded(folder, source)
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, RevisionNotFoundError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"{repo_id} is no name of a repository: {first_line(error)}") from error
    if get_token() is None:
        raise UserError("the Hub takes no upload without a token: run `hf auth login`, or set HF_TOKEN")
    if not constants.HF_HUB_OFFLINE and (reason := unreachable(constants.ENDPOINT)) is not None:
        raise UserError(f"{constants.ENDPOINT} cannot be reached: {reason}; check the connection")
    api = HfApi()
    try:
        # The visibility of one that is there stays.
        repo_id = api.create_repo(repo_id, private=private or None, exist_ok=True).repo_id
        if revision is not None:
            try:
                api.repo_info(repo_id, revision=revision)
            except RevisionNotFoundError:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=names,
            delete_patterns=list(MODEL_FILES),
            revision=revision,
            commit_message=f"Upload {folder.resolve().name}",
        )
    except OfflineModeIsEnabled as error:
        raise UserError("HF_HUB_OFFLINE is set, so nothing is uploaded: unset it") from error
    except HfHubHTTPError as error:
        # The first line of some holds no more than the status.
        said = " ".join((error.server_message or "").split()) or first_line(error)
        raise UserError(f"{repo_id}: the Hub refused the upload: {said}") from error
    return str(commit.commit_url)


def _uploaded(folder: Path, source: str) -> list[str]:
    """The files of the final model, whose checksums fit, and its card."""
    if not folder.is_dir():
        raise UserError(f"{source} is no folder: give the output folder of a run, or one that `dpo merge` wrote")
    if not is_complete(folder):
        if (folder / METRICS_FILE).exists() and not (folder / MANIFEST).exists():
            raise UserError(f"{source} is not finished: go on with `dpo train` and --resume, then push it")
        if not (folder / MANIFEST).exists():
            raise UserError(f"{source} holds no model that `dpo train` or `dpo merge` wrote: it has no {MANIFEST}")
    check_content(folder, remedy="restore the file, or have the model written again")
    if not (folder / CARD_FILE).is_file():
        raise UserError(f"{source} has no model card: put a {CARD_FILE} there")
    files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    return [*files, CARD_FILE]
