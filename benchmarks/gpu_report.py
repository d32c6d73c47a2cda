"""What ``benchmarks.gpu`` writes and prints: JSON, a Markdown page, a figure, and targets beside what was measured."""

from __future__ import annotations

import datetime
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.contenders import FROZEN, GRADIENTS, LOGPS, LOSS
from benchmarks.measure import COLUMNS, LEGEND
from benchmarks.results import RESULTS, device_name, markdown_table

Row = dict[str, Any]
OUR_LOSS, OUR_LOGPS = "ours: linear_dpo_loss", "ours: linear_logps"


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
TARGET_COLUMNS = ("target", "goal", "measured", "bare products, ms", "verdict")


def compare_targets(rows: Sequence[Row], *, dry_run: bool) -> list[Row]:
    """One line per target, whether it was measured or not."""
    found = {(row["task"], row["contender"]): row for row in rows if row.get("inputs") == "real"}
    lines = []
    for target in TARGETS:
        line: Row = {"target": target.name, "goal": target.goal, "measured": "", "verdict": "not measured"}
        ours, naive = (found.get((target.task, name), {}) for name in (target.contender, "naive logits"))
        try:
            line["measured"] = target.read(ours, naive)
        except (KeyError, ValueError):
            lines.append(line)
            continue
        if target.name.endswith("ms"):
            line["bare products, ms"] = ours["ms"] / ours["x own floor"]
        line["verdict"] = "met" if line["measured"] <= target.goal else "missed"
        if dry_run:
            line["verdict"] = "dry run"
        lines.append(line)
    return lines


def failures(found: dict[str, Row]) -> list[str]:
    """Every section, check and backend that failed, in words."""
    lines = [f"{name}: {values['status']}" for name, values in found.items() if values["status"].startswith("failed")]
    checks = found.get("checks", {})
    for row in checks.get("rows", []):
        if not row["ok"]:
            what = row.get("error") or f"{row['value']:.4g}, at most {row['bound']:.4g} allowed"
            lines.append(f"check {row['check']}: {what}")
    for row in found.get("attention", {}).get("rows", []):
        if row.get("ok") is False:
            lines.append(f"attention backend {row['backend']} ({row['model']}): not equal to SDPA per segment")
    return lines


def publish(found: dict[str, Row], work: Path, output: Path | None, *, dry_run: bool) -> int:
    """Write everything to ``output`` (the device's folder by default, nowhere in a dry run) and print the targets."""
    head = found.get("head", {})
    targets = compare_targets(head.get("rows", []), dry_run=dry_run)
    failed = failures(found)
    log = "\n".join(f"==== {name}: {values['status']}\n{values.pop('log', '')}" for name, values in found.items())
    result = {"date": datetime.date.today().isoformat(), "targets": targets, "failures": failed, **found}
    (work / "gpu.json").write_text(json.dumps(result, indent=1) + "\n")
    (work / "gpu.md").write_text(page(found, targets, failed))
    (work / "gpu.log").write_text(log)
    _draw(head, work)
    folder = output or (None if dry_run else RESULTS / device_name())
    if folder is not None:
        shutil.copytree(work, folder, dirs_exist_ok=True)
    print("\n" + markdown_table(targets, TARGET_COLUMNS))
    for line in failed:
        print(line)
    print(f"{len(failed)} failures" + ("" if folder is None else f"; results are in {folder}"))
    return 1 if failed else 0


def _draw(head: Row, work: Path) -> None:
    charted = [row for row in head.get("rows", []) if row["inputs"] == "real"]
    if not charted:
        return
    try:
        from benchmarks.figures import draw_table

        draw_table(
            charted,
            work / "head.png",
            title="A language-model head under preference training",
            subtitle=f"{head.get('settings', '')}; {head.get('real inputs', '').split(';')[0]}; {device_name()}",
        )
    except ImportError as error:
        print(f"no figure: {error}")


def page(found: dict[str, Row], targets: Sequence[Row], failed: Sequence[str]) -> str:
    """The Markdown page."""
    environment, checks, head = (found.get(name, {}) for name in ("environment", "checks", "head"))
    parts = [f"# {environment.get('device', 'benchmarks.gpu')}\n", _header(environment)]
    parts += ["## Targets\n", markdown_table(targets, TARGET_COLUMNS)]
    parts += ["## Failures\n", "".join(f"- {line}\n" for line in failed) or "None.\n"]
    passed = sum(row["ok"] for row in checks.get("rows", []))
    parts += ["## Checks\n", f"{passed} of {checks.get('expected', 0)} passed.\n", _worst_checks(checks)]
    inputs = "".join(
        f"- {name}: {head[name]}\n" for name in ("settings", "real inputs", "random inputs") if name in head
    )
    parts += ["## The head\n", inputs, LEGEND + "\n", _table(head, ("inputs", *COLUMNS))]
    parts += ["## Other shapes, random inputs\n", _table(found.get("shapes", {}), ("shape", *COLUMNS[:8]))]
    columns: tuple[str, ...] = (
        "model",
        "backend",
        "dtype",
        "logp error, nats",
        "gradient error",
        "same bits twice",
        "ok",
        "note",
    )
    parts += [
        "## Attention backends, against SDPA per segment in float32\n",
        _table(found.get("attention", {}), columns),
    ]
    parts += ["## Training\n", _training(found.get("training", {}))]
    columns = ("task", "contender", "kernel", "ms per run")
    parts += ["## Kernels with the most time (profile.txt has more)\n", _table(found.get("profile", {}), columns)]
    sections = [{"section": name, **values} for name, values in found.items()]
    parts += ["## Sections\n", markdown_table(sections, ("section", "status", "seconds"))]
    return "\n".join(parts)


def _header(environment: Row) -> str:
    lines = [f"- {name} {version}\n" for name, version in environment.get("versions", {}).items()]
    if "bandwidth_tb_per_s" in environment:
        lines.append(f"- copies move {environment['bandwidth_tb_per_s']:.2f} TB/s, bytes read and written\n")
    return "".join(lines) + f"\n```\n{environment.get('describe', '')}\n```\n"


def _table(section: Row, columns: Sequence[str]) -> str:
    rows = section.get("rows", [])
    return markdown_table(rows, columns) if rows else f"Nothing: {section.get('status', 'not run')}.\n"


def _worst_checks(checks: Row) -> str:
    """Of each kind of check, the one nearest to its bound."""
    worst: dict[str, Row] = {}
    for row in checks.get("rows", []):
        kind = " ".join(row["check"].split()[:2])
        share = row.get("value", float("inf")) / row["bound"] if row["bound"] else float(not row["ok"])
        if kind not in worst or share > worst[kind]["share of bound"]:
            worst[kind] = {"kind": kind, "worst": row["check"], **row, "share of bound": share}
    return markdown_table(list(worst.values()), ("kind", "worst", "value", "bound", "ok")) if worst else ""


def _training(training: Row) -> str:
    if "rows" not in training:
        return f"Nothing: {training.get('status', 'not run')}.\n"
    names = [name for name in training if name.startswith("perf/")]
    lines = [f"- {training['model']}, {training['steps']} steps\n", *(f"- {n}: {training[n]:.4g}\n" for n in names)]
    first, last = training["first and last loss"]
    return "".join(lines) + f"- loss {first:.4f} at the first step, {last:.4f} at the last\n"
