"""The tables of ``docs/converters.md``: ``python -m engine.config.convert.tables`` writes them into that file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..trl_keys import COMPARED, CONVERTED, NEW_RESULT, SAME_RESULT, STOPS
from .convert import TRAINERS
from .rules import Left, described

START = "<!-- tables: python -m engine.config.convert.tables -->\n"


def markdown() -> str:
    """What becomes of every key of every trainer."""
    parts = [_table("TRL", _trl())]
    for trainer in TRAINERS:
        texts = {key: described(rule) for key, rule in trainer.rules.items()}
        texts |= dict.fromkeys(sorted(trainer.same_names), "as TRL's key of that name")
        parts.append(_table(trainer.name, texts, trainer.defaults))
    return "\n".join(parts)


def _trl() -> dict[str, str]:
    compared = {key: f"; compared in {test}" for key, test in COMPARED.items()}
    texts = {key: "converted" + compared.get(key, "") for key in sorted(CONVERTED)}
    texts |= {key: described(Left("told", reason)) for key, reason in SAME_RESULT.items()}
    texts |= {key: described(Left("new", reason, harmless)) for key, (harmless, reason) in NEW_RESULT.items()}
    texts |= {key: described(Left("stop", reason, harmless)) for key, (harmless, reason) in STOPS.items()}
    return texts


def _table(name: str, texts: Mapping[str, str], defaults: Mapping[str, object] | None = None) -> str:
    lines = [f"### {name}\n", "| keys | what becomes of them |", "|---|---|"]
    grouped: dict[str, list[str]] = {}
    for key, text in texts.items():
        grouped.setdefault(text, []).append(f"`{key}`")
    lines += [f"| {', '.join(keys)} | {text} |" for text, keys in grouped.items()]
    if defaults:
        given = ", ".join(f"`{key}` {value}" for key, value in defaults.items())
        lines.append(f"\nWritten where the file is silent, by TRL's keys: {given}.")
    return "\n".join(lines) + "\n"


def rewritten(page: str) -> str:
    """A page with the tables of today."""
    return page.partition(START)[0] + START + "\n" + markdown()


def _main() -> None:
    path = Path(__file__).resolve().parents[3] / "docs" / "converters.md"
    path.write_text(rewritten(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    _main()
