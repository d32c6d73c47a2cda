"""Which files of a local folder belong to a split, as ``datasets`` finds them.

In this order: what the front matter of the folder's README.md says (``configs``), shards that begin with the name of
their split (``data/train_prefs-00000-of-00002.parquet``), then words in the names of files and folders
(``test/rows.jsonl``); files that name no split at all are ``train``.
"""

from __future__ import annotations

import glob
import re
from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError
from ..paths import expanded
from .readers import EXTENSIONS, data_extension

SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
}
_SHARD = re.compile(r"(?P<split>\w+(\.\w+)*)-\d{5}-of-\d{5}")
_NO_NAME = "(files that name no split)"


def files_of_split(path: Path, split: str, config: str | None) -> list[Path]:
    """The data files of a split of a folder, or a single file, which is one split.

    Args:
        config: a configuration of the folder; None is the only one, or the default.

    Raises:
        UserError: there is no such configuration or split.
    """
    if path.is_dir():
        return _folder_files(path, split, config)
    if config is not None:
        raise UserError(
            f"data.dataset_config={config} is for Hub datasets and folders that have configurations, but {path} is a "
            "file; remove it"
        )
    if split not in SPLIT_WORDS and split != _named_split(path, path.parent):
        raise UserError(f"{path} is one file without splits, so it has no split {split!r}; ask for train")
    return [path]


def matching_files(pattern: str) -> list[Path]:
    """The data files that a pattern such as ``data/*.jsonl`` or ``data/**`` stands for, in the order of their names.

    Raises:
        UserError: there is none.
    """
    found = sorted(Path(name) for name in glob.glob(str(expanded(pattern)), recursive=True))
    files = [path for path in found if path.is_file() and data_extension(path)]
    if not files:
        raise UserError(f"{pattern}: no data file fits this pattern ({', '.join(EXTENSIONS)}, each also with .gz)")
    return files


def _folder_files(folder: Path, split: str, config: str | None) -> list[Path]:
    configured = _configurations(folder)
    if configured:
        by_split = _of_configuration(folder, configured, config)
    else:
        if config is not None:
            folder = folder / config
            if not folder.is_dir():
                raise UserError(
                    f"data.dataset_config={config}: {folder.parent} has neither such a folder nor configs in its "
                    "README.md; remove it"
                )
        by_split = _by_name(folder)
    wanted = by_split.get(split) or by_split.get(SPLIT_WORDS.get(split, split))
    if wanted is None:
        found = ", ".join(sorted(name or _NO_NAME for name in by_split))
        raise UserError(f"{folder} has no split {split!r}; it has {found}")
    return wanted


def _by_name(folder: Path) -> dict[str, list[Path]]:
    files = sorted(f for f in folder.rglob("*") if f.is_file() and data_extension(f) and not _is_no_data(f, folder))
    if not files:
        raise UserError(f"{folder} holds no data files ({', '.join(EXTENSIONS)}, each also with .gz)")
    by_split: dict[str, list[Path]] = {}
    for file in files:
        by_split.setdefault(_named_split(file, folder) or "", []).append(file)
    return {"train": files} if set(by_split) == {""} else by_split


def _named_split(file: Path, folder: Path) -> str | None:
    """The split that a path names; the file's own name counts before its folders'."""
    parts = file.relative_to(folder).parts
    shard = _SHARD.match(file.name)
    if shard is not None and (file.parent.name == "data" or _word(shard["split"])):
        return SPLIT_WORDS.get(shard["split"], shard["split"])
    return next((split for part in reversed(parts) if (split := _word(part))), None)


def _word(name: str) -> str | None:
    return next((SPLIT_WORDS[word] for word in re.split(r"[^a-z]+", name.lower()) if word in SPLIT_WORDS), None)


def _is_no_data(file: Path, folder: Path) -> bool:
    if file.name in ("dataset_info.json", "dataset_infos.json"):
        return True
    return any(part.startswith((".", "_")) for part in file.relative_to(folder).parts)


def _configurations(folder: Path) -> list[dict[str, Any]]:
    """What the README.md of a folder lists; empty where it lists none that names files."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return []
    front = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    try:
        found = yaml.safe_load(front[1]) if front else None
    except yaml.YAMLError as error:
        raise UserError(f"{folder / 'README.md'}: its front matter is no YAML: {str(error).splitlines()[0]}") from None
    configs = found.get("configs") if isinstance(found, dict) else None
    listed = [c for c in configs if isinstance(c, dict)] if isinstance(configs, list) else []
    return [c for c in listed if "data_files" in c or "data_dir" in c]


def _of_configuration(folder: Path, configured: list[dict[str, Any]], config: str | None) -> dict[str, list[Path]]:
    names = {str(c.get("config_name", "default")): c for c in configured}
    if config is None:
        default = [name for name, c in names.items() if c.get("default") or name == "default"]
        config = default[0] if default else next(iter(names)) if len(names) == 1 else None
    if config not in names:
        asked = "several configurations" if config is None else f"no configuration {config!r}"
        raise UserError(f"{folder} has {asked}; set data.dataset_config to one of {', '.join(names)}")
    chosen = names[config]
    base = folder / str(chosen.get("data_dir") or "")
    given = chosen.get("data_files")
    if given is None:
        return _by_name(base)
    by_split: dict[str, list[Path]] = {}
    for entry in given if isinstance(given, list) else [given]:
        split, patterns = "train", entry
        if isinstance(entry, dict):
            split, patterns = entry.get("split", "train"), entry.get("path")
        for pattern in patterns if isinstance(patterns, list) else [patterns]:
            by_split.setdefault(str(split), []).extend(matching_files(str(base / str(pattern))))
    return by_split
