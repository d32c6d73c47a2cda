"""What ``benchmarks.gpu`` writes of its journal: JSON, a Markdown page, a figure, and targets beside what was measured.

Nothing here imports torch, and every part of the page is made for a journal that ends anywhere.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu_journal import RUNNING, Found, Journal, Row, plain, replace_file
from benchmarks.gpu_table import Section
from benchmarks.results import markdown_table
from benchmarks.tasks import FROZEN, GRADIENTS, LEGEND, LOGPS, LOSS

OUR_LOSS, OUR_LOGPS = "ours: linear_dpo_loss", "ours: linear_logps"
BAD = ("failed", "error", "died", "timed out", RUNNING)
LEADING = ("check", "status", "value", "bound")
TRAILING = ("seconds", "error", "where", "note")
HIDDEN = ("key", "number", "shard", "began", "limit", "times_ms", "ours")


class Target(NamedTuple):
    """A number that is to be reached on an H200, bf16, N=8192 D=4096 V=128256, real hidden states."""

    name: str
    goal: float
    task: str
    contender: str
    read: Callable[[Row, Row], float]
    """From our row and the one of naive logits, the same formula in torch and the same dtype."""


def _gradient_multiple(ours: Row, naive: Row) -> float:
    return max(ours[name] / naive[name] for name in ("dX error", "dW error") if name in ours)


TARGETS = (
    Target("log-probs only, 1G, ms", 12.5, LOGPS, OUR_LOGPS, lambda row, _: row["ms"]),
    Target("loss with frozen head, 2G, ms", 24.0, FROZEN, OUR_LOSS, lambda row, _: row["ms"]),
    Target("linear_dpo_loss, 3G, ms", 36.0, LOSS, OUR_LOSS, lambda row, _: row["ms"]),
    Target("linear_dpo_loss, 3G, workspace MiB", 1024.0, LOSS, OUR_LOSS, lambda row, _: row["extra MiB"]),
    Target("linear_logps forward and backward, 4G, ms", 50.0, GRADIENTS, OUR_LOGPS, lambda row, _: row["ms"]),
    Target("linear_logps, 4G, workspace MiB", 300.0, GRADIENTS, OUR_LOGPS, lambda row, _: row["extra MiB"]),
    Target("log-prob of a token, error in nats", 1e-3, LOGPS, OUR_LOGPS, lambda row, _: row["token error"]),
    Target("log-prob of 1024 tokens, error in nats", 0.02, LOGPS, OUR_LOGPS, lambda row, _: row["response error"]),
    Target("gradients of 2G, error over torch's", 2.0, FROZEN, OUR_LOSS, _gradient_multiple),
    Target("gradients of 3G, error over torch's", 2.0, LOSS, OUR_LOSS, _gradient_multiple),
    Target("gradients of 4G, error over torch's", 2.0, GRADIENTS, OUR_LOGPS, _gradient_multiple),
)
TARGET_COLUMNS = ("target", "goal", "measured", "bare products, ms", "over these", "verdict")


def compare_targets(rows: Sequence[Row], *, dry_run: bool) -> list[Row]:
    """One line per target, whether it was measured or not."""
    found = {(row.get("task"), row.get("contender")): row for row in rows if row.get("inputs") == "real"}
    lines = []
    for target in TARGETS:
        line: Row = {"target": target.name, "goal": target.goal, "measured": "", "verdict": "not measured"}
        ours, naive = (found.get((target.task, name), {}) for name in (target.contender, "naive logits"))
        try:
            value = target.read(ours, naive)
            line["verdict"] = "met" if value <= target.goal else "missed"
            line["measured"] = value
            if target.name.endswith("ms"):
                line |= {"bare products, ms": ours["ms"] / ours["x own floor"], "over these": ours["x own floor"]}
        except (KeyError, ValueError, TypeError, ZeroDivisionError):
            line |= {"measured": "", "verdict": "not measured"}
        if dry_run and line["verdict"] != "not measured":
            line["verdict"] = "dry run"
        lines.append(line)
    return lines


def failures(found: Mapping[str, Found]) -> list[str]:
    """Every row that is not right and every section that did not end, in words."""
    lines = []
    for name, section in found.items():
        for row in section.rows:
            if row["status"] in BAD:
                what = row.get("error") or _value(row)
                where = f" ({row['where']})" if row.get("where") else ""
                lines.append(f"{name}: {row['key']}: {row['status']}: {what}{where}")
        if section.missing():
            lines.append(
                f"{name}: {len(section.missing())} checks were not reached: {', '.join(section.missing()[:8])}"
            )
        if section.status == "unfinished" or section.status.startswith(("skipped", "nothing")):
            lines.append(f"{name}: {section.status}")
    return lines


def _value(row: Row) -> str:
    if "bound" in row and "value" in row:
        return f"{row['value']}, at most {row['bound']} allowed"
    return "; ".join(f"{k} {v}" for k, v in row.items() if k not in (*HIDDEN, "check", "status"))[:300]


def publish(folder: Path, sections: Mapping[str, Section], *, dry_run: bool) -> None:
    """Write gpu.json and gpu.md anew from the journal."""
    found = Journal(folder / "gpu.jsonl").read()
    targets, failed = compare_targets(_rows(found, "head"), dry_run=dry_run), failures(found)
    result = {
        "date": datetime.date.today().isoformat(),
        "targets": targets,
        "failures": failed,
        "sections": {
            name: {"status": s.status, "seconds": s.seconds, **s.facts, "not reached": s.missing(), "rows": s.rows}
            for name, s in found.items()
        },
    }
    replace_file(folder / "gpu.json", json.dumps(plain(result), indent=1, allow_nan=False) + "\n")
    replace_file(folder / "gpu.md", page(found, sections, targets, failed))


def _rows(found: Mapping[str, Found], name: str) -> list[Row]:
    return found[name].rows if name in found else []


def summary(found: Mapping[str, Found], *, dry_run: bool) -> str:
    """What is printed last: the targets and the failures."""
    failed = failures(found)
    table = markdown_table(compare_targets(_rows(found, "head"), dry_run=dry_run), TARGET_COLUMNS)
    return "\n".join([table, *failed, f"{len(failed)} failures"])


def draw(folder: Path, found: Mapping[str, Found]) -> None:
    """The figure of the race on real hidden states, where it was run and matplotlib is there."""
    charted = [row for row in _rows(found, "head") if row.get("inputs") == "real" and row.get("contender")]
    if not any("ms" in row for row in charted):
        return
    facts = found["head"].facts
    try:
        from benchmarks.figures import draw_table

        draw_table(
            charted,
            folder / "head.png",
            title="A language-model head under preference training",
            subtitle=f"{facts.get('settings', '')}; {str(facts.get('real inputs', '')).split(';')[0]}",
        )
    except Exception as error:
        print(f"no figure: {type(error).__name__}: {error}")


def page(
    found: Mapping[str, Found], sections: Mapping[str, Section], targets: Sequence[Row], failed: Sequence[str]
) -> str:
    """The Markdown page."""
    facts = found["environment"].facts if "environment" in found else {}
    parts = [f"# {facts.get('device', 'benchmarks.gpu')}\n", _header(facts)]
    parts += ["## Targets\n", markdown_table(targets, TARGET_COLUMNS)]
    parts += ["## Failures\n", "".join(f"- {line}\n" for line in failed) or "None.\n"]
    ended = [{"section": n, "status": s.status, "seconds": s.seconds, "rows": len(s.by_key)} for n, s in found.items()]
    parts += ["## Sections\n", markdown_table(ended, ("section", "status", "seconds", "rows"))]
    for name, section in found.items():
        title = sections[name].title if name in sections else name
        parts.append(f"## {title}\n")
        if name != "environment":
            parts.append("".join(f"- {fact}: {value}\n" for fact, value in section.facts.items()))
        parts += [LEGEND + "\n"] if name in ("head", "shapes") else []
        parts.append(_table(section))
    return "\n".join(parts)


def _header(facts: Row) -> str:
    lines = [f"- {name} {version}\n" for name, version in dict(facts.get("versions", {})).items()]
    return "".join(lines) + f"\n```\n{facts.get('describe', '')}\n```\n"


def _table(section: Found) -> str:
    """All rows: checks first, then what contenders and kernels gave, each with the columns that its kind has."""
    checks = [row for row in section.rows if row["key"] == row["check"]]
    parts = [row for row in section.rows if row["key"] != row["check"]]
    return "\n".join(_some(rows) for rows in (checks, parts) if rows) or f"Nothing: {section.status}.\n"


def _some(rows: Sequence[Row]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = [name for name in LEADING if name in names]
    columns += [name for name in names if name not in (*LEADING, *TRAILING, *HIDDEN)]
    columns += [name for name in TRAILING if name in names]
    return markdown_table([{k: _cell(v) for k, v in row.items()} for row in rows], columns)


def _cell(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return ", ".join(f"{v:.3g}" if isinstance(v, float) else str(v) for v in value)
    return value.replace("|", "/").replace("\n", " ") if isinstance(value, str) else value
