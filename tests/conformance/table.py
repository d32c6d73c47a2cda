"""The committed tables ``docs/conformance*.md``: written by the sweep, read by a test.

That of the pinned transformers is ``docs/conformance.md``; that of another version has it in its name.
"""

from __future__ import annotations

from collections import Counter
from datetime import date
from pathlib import Path

import torch
import transformers

from tests.conformance.families import DROPOUT, SHORT
from tests.conformance.trial import (
    EQUAL,
    FAILS,
    GRAD_BOUND,
    LAYOUTS,
    LOGPS_BOUND,
    NOT_BUILT,
    NOT_CAUSAL,
    REFUSED,
    WRONG,
    Result,
)

_ROOT = Path(__file__).resolve().parents[2]
PATH = _ROOT / "docs" / "conformance.md"

_INTRODUCTION = """# How each model family runs

Written by `make conformance`, not by hand. {date}, transformers {transformers}, torch {torch}, CPU, float32.

**{equal} equal, {refused} refused, {not_causal} not causal, {not_built} not built, {fails} fail,
{wrong} silently wrong**, of all {total} model types that transformers maps to a causal language model.
Of the equal ones {layouts}.

Each family is built tiny from its default config, with random weights far from zero, dropout {dropout} wherever the
config has one, caps and scales of the logits switched on, every kind of layer that its code knows, local attention
that reaches {short} tokens, and as a decoder where its config can make it one. Saved and loaded as a user would, it is
compared in training mode with the same weights in transformers' own eager forward, one response at a time: log-probs
and all gradients, with and without shared prompts, and isolation (other tokens in one response leave every other
log-prob as it is: to the bit, to rounding with experts). The start-up check chooses the layout first, from the fastest
one on; it names no family.

- **equal**: log-probs within {logps:g} nats per token, every gradient within {grad:g} of its largest element (or of 1),
  isolated, and the start-up check accepts it. The columns show the largest errors found.
- **layout**: *shared*, the whole model on packs; *mixers in rows*, packs in which the modules that are named get one
  row a response; *rows*, the whole model on padded rows; *one row*, on one row at a time, both with the prompt in every
  row. The last column then says what the next better layout failed on. It was chosen for two models, with windows
  shorter and longer than the check's own probe, and must be the same for both.
- **refused**: causal, but no layout is exact; the start-up check of every command stops with the line given.
- **not causal**: refused likewise, and in the family's own eager forward the log-prob of a token was measured to change
  with the tokens behind it, so that their product is no probability of a text.
- **not built**: no tiny model, or no gradient of it by its own forward, for the reason that transformers gives. Such a
  model is still checked at start-up.
- **local**: attention of limited reach was part of the trial.
- **dropouts**: how many probabilities the engine found and set to 0.

| model type | class | verdict | layout | log-probs | gradients | isolated | local | dropouts | what the user is told |
|---|---|---|---|---|---|---|---|---|---|
"""


def render(results: list[Result]) -> str:
    """The whole page."""
    counts = Counter(r.verdict for r in results)
    head = _INTRODUCTION.format(
        date=date.today().isoformat(),
        transformers=transformers.__version__,
        torch=torch.__version__,
        equal=counts[EQUAL],
        refused=counts[REFUSED],
        not_causal=counts[NOT_CAUSAL],
        not_built=counts[NOT_BUILT],
        fails=counts[FAILS],
        wrong=counts[WRONG],
        total=len(results),
        layouts=_layouts(results),
        dropout=DROPOUT,
        short=SHORT,
        logps=LOGPS_BOUND,
        grad=GRAD_BOUND,
    )
    return head + "".join(_row(result) for result in results)


def _layouts(results: list[Result]) -> str:
    counts = Counter(r.layout for r in results if r.verdict == EQUAL)
    return ", ".join(f"{counts[name]} run in layout {name}" for name in LAYOUTS.values() if counts[name])


def _row(r: Result) -> str:
    numbers = ["", "", ""]
    if r.logps_error is not None:
        numbers = [f"{r.logps_error:.1e}", f"{r.grad_error:.1e}", "yes" if r.isolated else "no"]
    dropouts = str(r.dropouts) if r.dropouts else ""
    reason = r.reason.replace("|", "\\|").encode("ascii", "replace").decode()
    layout = f"{r.layout}: {r.mixers}" if r.mixers else r.layout
    cells = [r.model_type, r.class_name, r.verdict, layout, *numbers, "yes" if r.local else "", dropouts, reason]
    return "| " + " | ".join(cells) + " |\n"


def path_of(version: str) -> Path:
    """The table of a version of transformers."""
    pinned = f"transformers=={version}" in (_ROOT / "constraints.txt").read_text(encoding="utf-8").split()
    return PATH if pinned else PATH.with_name(f"conformance-{version}.md")


def tables() -> list[Path]:
    """All committed tables."""
    return sorted(PATH.parent.glob("conformance*.md"))


def read_rows(path: Path = PATH) -> list[dict[str, str]]:
    """The rows of a committed table by column name."""
    lines = [line for line in path.read_text(encoding="ascii").splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.replace("\\|", "/").strip("|").split("|")] for line in lines]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[1:]]
