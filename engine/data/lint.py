"""What is wrong with the data: every problem counted, and named by row.

Two kinds of problem. Those that leave nothing to learn from **drop** the row; the others only **count**, because the
row is still a defined, if perhaps unintended, training example. ``data.strict`` stops at either.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass

from engine.errors import UserError

ROWS_SHOWN = 5
ROWS_SAVED = 100


@dataclass(frozen=True)
class Problem:
    """One thing that lint looks for."""

    name: str
    drops: bool
    meaning: str
    advice: str


PROBLEMS = {
    problem.name: problem
    for problem in (
        Problem(
            "differing_prompts",
            True,
            "the two sides answer different prompts",
            "remove the rows, or give them one prompt",
        ),
        Problem(
            "prompt_too_long",
            True,
            "the prompt alone fills max_length, so no completion token is left",
            "raise data.max_length",
        ),
        Problem(
            "no_prompt_tokens",
            True,
            "the prompt has no token that could predict the first completion token",
            "give the rows a prompt, or use a tokenizer that writes BOS",
        ),
        Problem(
            "no_completion_tokens",
            True,
            "a completion has no token at all, so its log-prob is undefined",
            "remove the rows, or give them a completion",
        ),
        Problem(
            "empty_completion",
            False,
            "a completion has no text; what is learned is to stop at once",
            "remove the rows unless that is meant",
        ),
        Problem(
            "identical_completions",
            False,
            "two completions are the same tokens after truncation: a pair without gradient",
            "remove the rows, or raise data.max_length if truncation cut the difference",
        ),
        Problem(
            "boundary_merge",
            False,
            "the end of the prompt is tokenised differently before a completion, and is learned as part of it",
            "end prompts where a token ends, for example before a space",
        ),
        Problem(
            "double_bos",
            False,
            "the sequence begins with BOS twice",
            "remove BOS from the text or the chat template",
        ),
        Problem(
            "missing_eos",
            False,
            "a completion ends with neither EOS nor another special token",
            "end completions with EOS, or correct the chat template",
        ),
        Problem(
            "truncated",
            False,
            "a completion is cut at max_length",
            "raise data.max_length",
        ),
        Problem(
            "eos_lost",
            False,
            "truncation cut off a completion's EOS, so its end is not learned",
            "raise data.max_length",
        ),
        Problem(
            "duplicate",
            False,
            "prompt and completions are the same tokens as an earlier row's",
            "remove the copies unless the extra weight is meant",
        ),
    )
}


class LintReport:
    """Counts of rows and of problems, with the rows of each. Bounded: 8 bytes a problem and row."""

    def __init__(self, source: str):
        self.source = source
        self.layout = ""
        self.total = 0
        self.dropped = 0
        self._rows: dict[str, array[int]] = {}

    def add_row(self) -> None:
        """Count one more row of the source."""
        self.total += 1

    def add(self, problem: str, row: int) -> None:
        """Note a problem of a row, at most once for each row. A row may be dropped only once."""
        self._rows.setdefault(PROBLEMS[problem].name, array("q")).append(row)
        self.dropped += PROBLEMS[problem].drops

    @property
    def kept(self) -> int:
        """Rows that are left to train on."""
        return self.total - self.dropped

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
        if self.total == 0:
            raise UserError(f"{self.source}: the split has no rows; check data.dataset_train_split and its slice")
        if self.kept == 0:
            reasons = [f"{name} {count:,}" for name, count in self.counts.items() if PROBLEMS[name].drops]
            advice = next((PROBLEMS[name].advice for name in self.counts if PROBLEMS[name].drops), "check the file")
            raise UserError(f"{self.source}: none of {self.total:,} rows can be used ({', '.join(reasons)}); {advice}")

    def _first(self, name: str) -> str:
        rows = self._rows[name]
        more = ", ..." if len(rows) > ROWS_SHOWN else ""
        return ("row " if len(rows) == 1 else "rows ") + ", ".join(map(str, rows[:ROWS_SHOWN])) + more

    def format(self) -> str:
        """A table for people: each problem with its count, what happens to its rows, and the first of them."""
        layout = f"{self.layout} " if self.layout else ""
        head = f"{self.source}: {self.total:,} {layout}rows, {self.kept:,} kept, {self.dropped:,} dropped"
        if not self.counts:
            return f"{head}, no problems"
        lines = [f"{head} (rows are numbered from 0)"]
        width = max(len(name) for name in self.counts)
        digits = max(len(f"{count:,}") for count in self.counts.values())
        for name, count in self.counts.items():
            verb = "dropped" if PROBLEMS[name].drops else "kept"
            lines.append(f"  {name:<{width}}  {count:>{digits},}  {verb:<7}  {self._first(name)}")
            lines.append(f"  {'':<{width}}  {'':>{digits}}  {PROBLEMS[name].meaning}; {PROBLEMS[name].advice}")
        return "\n".join(lines)

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
