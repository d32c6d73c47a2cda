"""What is wrong with the data: every problem counted, and named by row. The problems are those of ``problems.py``."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..errors import RowError, UserError
from .problems import PROBLEMS

ROWS_SHOWN = 5
ROWS_SAVED = 100


class LintReport:
    """Counts of rows and of problems, with the rows of each. Bounded: 8 bytes a problem and row.

    Args:
        tolerant: count rows that training would stop at, as ``dpo check`` does, instead of raising.
        counted: problems that would stop training, but shall only count.
    """

    def __init__(self, source: str, *, tolerant: bool = False, counted: frozenset[str] = frozenset()):
        self.source = source
        self._counted = counted
        self.tolerant = tolerant
        self.layout = ""
        self.total = 0
        self.dropped = 0
        self._left_out = 0
        self.ended: str | None = None
        """Why the source could not be read to its end, where the report is tolerant."""
        self._rows: dict[str, array[int]] = {}
        self._messages: dict[str, str] = {}

    def of(self, source: str) -> LintReport:
        """That of one set of a mixture: this is of one set."""
        return self

    def add_row(self) -> None:
        """Count one more row of the source."""
        self.total += 1

    def leave_out_row(self) -> None:
        """Take back the last row, which belongs to the other split."""
        self.total -= 1
        self._left_out += 1

    def add(self, problem: str, row: int) -> None:
        """Note a problem of a row, at most once for each row. A row may be dropped only once."""
        self._rows.setdefault(PROBLEMS[problem].name, array("q")).append(row)
        self.dropped += PROBLEMS[problem].drops

    def refuse(self, error: RowError, row: int) -> None:
        """Note that training stops at a row; raises ``error`` unless the report is tolerant, or only counts it."""
        if not self.tolerant and self.stops(error.problem):
            raise error
        self._messages.setdefault(error.problem, str(error))
        self.add(error.problem, row)

    def stops(self, problem: str) -> bool:
        """Whether training stops at rows with a problem."""
        return PROBLEMS[problem].stops and problem not in self._counted

    def effect(self, problem: str) -> str:
        """What becomes of the rows with a problem."""
        return "kept" if problem in self._counted else PROBLEMS[problem].effect

    @property
    def stopping(self) -> int:
        """Rows that training stops at."""
        rows = [rows for name, rows in self._rows.items() if self.stops(name)]
        return len(np.unique(np.concatenate(rows))) if rows else 0

    @property
    def kept(self) -> int:
        """Rows that are left to train on."""
        return self.total - self.dropped - self.stopping

    @property
    def counts(self) -> dict[str, int]:
        """Rows by problem, without the problems that no row has, in the order of ``PROBLEMS``."""
        return {name: len(self._rows[name]) for name in PROBLEMS if name in self._rows}

    def rows(self, problem: str) -> list[int]:
        """0-based source rows that have a problem."""
        return list(self._rows.get(problem, ()))

    def raise_if_strict(self, strict: bool) -> None:
        """With ``strict``, stop at the first kind of problem that there is."""
        if strict and self.counts:
            name, count = next(iter(self.counts.items()))
            problem = PROBLEMS[name]
            raise UserError(
                f"{self.source}: {name} in {count:,} of {self.total:,} rows ({self._first(name)}): {problem.meaning}; "
                f"{problem.advice}, or set data.strict: false"
            )

    def raise_if_empty(self) -> None:
        """Stop when no row is left."""
        if self.total == 0 and self._left_out:
            raise UserError(
                f"{self.source}: data.eval_fraction leaves this split none of {self._left_out:,} rows; give it another "
                "share, or set data.eval_dataset_name instead"
            )
        if self.total == 0:
            raise UserError(f"{self.source}: the split has no rows; check data.dataset_train_split and its slice")
        if self.kept == 0:
            lost = {name: count for name, count in self.counts.items() if self.effect(name) != "kept"}
            reasons = [f"{name} {count:,}" for name, count in lost.items()]
            advice = next((PROBLEMS[name].advice for name in lost), "check the file")
            raise UserError(f"{self.source}: none of {self.total:,} rows can be used ({', '.join(reasons)}); {advice}")

    def raise_if_promptless(self) -> None:
        """Stop when no row that is left has a text as its prompt: it is in a column that is not read, or lost."""
        empty = len(self._rows.get("empty_prompt", ()))
        if empty and empty == self.kept:
            raise UserError(
                f"{self.source}: the prompt is empty in all {empty:,} rows; name the column that holds it with "
                "data.columns: {prompt: COLUMN}, or let chosen and rejected begin with it"
            )

    def _first(self, name: str) -> str:
        rows = self._rows[name]
        more = ", ..." if len(rows) > ROWS_SHOWN else ""
        return ("row " if len(rows) == 1 else "rows ") + ", ".join(map(str, rows[:ROWS_SHOWN])) + more

    def format(self) -> str:
        """A table for people: each problem with its count, what happens to its rows, and the first of them."""
        layout = f"{self.layout} " if self.layout else ""
        head = f"{self.source}: {self.total:,} {layout}rows, {self.kept:,} kept, {self.dropped:,} dropped"
        if stopping := self.stopping:
            head += f", {stopping:,} that training stops at"
        if not self.counts:
            return f"{head}, no problems"
        lines = [f"{head} (rows are numbered from 0)"]
        width = max(len(name) for name in self.counts)
        digits = max(len(f"{count:,}") for count in self.counts.values())
        for name, count in self.counts.items():
            effect, indent = self.effect(name), f"  {'':<{width}}  {'':>{digits}}  "
            lines.append(f"  {name:<{width}}  {count:>{digits},}  {effect:<7}  {self._first(name)}")
            lines.append(f"{indent}{PROBLEMS[name].meaning}; {PROBLEMS[name].advice}")
            if name in self._messages:
                lines.append(f"{indent}the first: {self._messages[name]}")
        return "\n".join(lines)

    def state(self) -> dict[str, Any]:
        """JSON values that ``restored`` takes. Not of a tolerant report."""
        return {
            **{name: getattr(self, name) for name in ("source", "layout", "total", "dropped")},
            "left_out": self._left_out,
            "rows": {name: rows.tolist() for name, rows in self._rows.items()},
            "messages": self._messages,
        }

    @classmethod
    def restored(cls, state: Mapping[str, Any], *, counted: frozenset[str] = frozenset()) -> LintReport:
        """The report that ``state`` is of."""
        report = cls(state["source"], counted=counted)
        report.layout, report.total, report.dropped = state["layout"], state["total"], state["dropped"]
        report._left_out, report._messages = state["left_out"], dict(state["messages"])
        report._rows = {name: array("q", rows) for name, rows in state["rows"].items()}
        return report

    def to_dict(self) -> dict[str, object]:
        """For ``data.json``: totals, counts by problem, and the first rows of each."""
        return {
            "source": self.source,
            "layout": self.layout,
            "total": self.total,
            "kept": self.kept,
            "dropped": self.dropped,
            "counts": self.counts,
            "rows": {name: list(self._rows[name][:ROWS_SAVED]) for name in self.counts},
        }
