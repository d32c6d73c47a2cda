"""What is uploaded, and what is said when the Hub does not take it. No test leaves this machine."""

from __future__ import annotations

import fnmatch
import inspect
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import CommitInfo, HfApi, RepoUrl
from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError
from huggingface_hub.utils import filter_repo_objects

from engine import cli
from engine.durable import seal


@pytest.fixture
def run(tmp_path):
    """The files of a finished run, some of them of no concern to others."""
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "README.md"):
        (folder / name).write_text(name)
    seal(folder, editable=("README.md",))
    for name in ("config.yaml", "metrics.jsonl", "checkpoint-4/model.safetensors", "tensorboard/events", "notes.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    return folder


@pytest.fixture
def hub(monkeypatch):
    """Stands in for the Hub: calls are bound to the signatures of huggingface_hub, and noted."""
    calls: list[tuple[str, dict]] = []

    class Api:
        def create_repo(self, *args, **kwargs):
            bound = inspect.signature(HfApi.create_repo).bind(self, *args, **kwargs).arguments
            calls.append(("create", bound))
            return RepoUrl(f"https://huggingface.co/{bound['repo_id']}")

        def repo_info(self, *args, **kwargs):
            bound = inspect.signature(HfApi.repo_info).bind(self, *args, **kwargs).arguments
            if bound["revision"] != "there":
                raise RevisionNotFoundError("404", response=SimpleNamespace(headers={}, request=None))

        def create_branch(self, *args, **kwargs):
            calls.append(("branch", inspect.signature(HfApi.create_branch).bind(self, *args, **kwargs).arguments))

        def upload_folder(self, *args, **kwargs):
            bound = inspect.signature(HfApi.upload_folder).bind(self, *args, **kwargs).arguments
            calls.append(("upload", bound))
            url = f"https://huggingface.co/{bound['repo_id']}/commit/abc"
            return CommitInfo(url, commit_message=bound["commit_message"], commit_description="", oid="abc")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_token")
    monkeypatch.setattr("engine.push.unreachable", lambda endpoint: None)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return calls


def sent(folder: Path, patterns: list[str]) -> set[str]:
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return {name for name in files if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)}


@pytest.mark.parametrize("private", [True, False])
def test_the_model_and_its_card_are_uploaded_and_nothing_else(private, run, hub, capsys):
    assert cli.main(["push", str(run), "me/dpo", *(["--private"] if private else [])]) == 0
    assert capsys.readouterr().out == "https://huggingface.co/me/dpo/commit/abc\n"
    (created, create), (uploaded, upload) = hub
    assert (created, create["repo_id"], create["private"], create["exist_ok"]) == (
        "create",
        "me/dpo",
        private or None,
        True,
    )
    assert (uploaded, upload["repo_id"], upload["folder_path"]) == ("upload", "me/dpo", run)
    assert sent(run, upload["allow_patterns"]) == {"config.json", "model.safetensors", "tokenizer.json", "README.md"}


@pytest.mark.parametrize(("branch", "made"), [("new", ["new"]), ("there", [])])
def test_a_branch_is_made_where_it_is_absent(branch, made, run, hub):
    assert cli.main(["push", str(run), "me/dpo", "--revision", branch]) == 0
    assert [call["branch"] for name, call in hub if name == "branch"] == made
    assert hub[-1][0] == "upload"
    assert hub[-1][1]["revision"] == branch


def test_no_part_of_an_earlier_model_stays(run, hub):
    """Loaders prefer one file to shards, and an adapter to a whole model."""
    assert cli.main(["push", str(run), "me/dpo"]) == 0
    (_, (_, upload)) = hub
    earlier = ["adapter_config.json", "adapter_model.safetensors", "model-00001-of-00002.safetensors"]
    earlier += ["model.safetensors.index.json", "pytorch_model.bin", "chat_template.jinja", "tokenizer.model"]
    others = ["README.md", ".gitattributes", "notes.md", "model-q4.gguf", "eval/results.json", "logo.png"]
    deleted = set(filter_repo_objects([*earlier, *others], allow_patterns=upload["delete_patterns"]))
    assert deleted == set(earlier)


def refused(*_, **__):
    response = SimpleNamespace(headers={}, request=None)
    raise HfHubHTTPError("403 Client Error.\n\nNo", response=response, server_message="you have no write\naccess")


@pytest.mark.parametrize(
    ("change", "name", "message"),
    [
        (
            lambda run, patch: patch.setattr(huggingface_hub, "get_token", lambda: None),
            "me/dpo",
            "run `hf auth login`, o",
        ),
        (lambda run, patch: None, "me/dpo/x", "me/dpo/x is no name of a repository"),
        (
            lambda run, patch: (run / "manifest.json").unlink(),
            "me/dpo",
            "is not finished: go on with `dpo train` and --r",
        ),
        (lambda run, patch: (run / "config.json").write_text("{other}"), "me/dpo", "config.json is damaged"),
        (lambda run, patch: (run / "README.md").unlink(), "me/dpo", "has no model card: put a README.md there"),
        (
            lambda run, patch: run.rename(run.parent / "x"),
            "me/dpo",
            "run is no folder: give the output folder of a run",
        ),
        (
            lambda run, patch: patch.setattr(huggingface_hub.HfApi, "create_repo", refused),
            "me/dpo",
            "you have no write access",
        ),
        (
            lambda run, patch: patch.setattr("engine.push.unreachable", lambda e: "no route"),
            "me/dpo",
            "no route; check",
        ),
    ],
    ids=["token", "name", "unfinished", "damaged", "card", "folder", "forbidden", "offline"],
)
def test_what_the_user_can_mend_is_one_line(change, name, message, run, hub, monkeypatch, capsys):
    change(run, monkeypatch)
    assert cli.main(["push", str(run), name]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not [call for call in hub if call[0] == "upload"]
