"""What is wrong with the data: every problem counted, and named by row.

Three kinds of problem. Rows that cannot be read as what they should be **stop** training; ``dpo check`` reads on and
lists them all. Those that leave nothing to learn from **drop** the row; the others only **count**, because the row
is still a defined, if perhaps unintended, training example. ``data.strict`` stops at any.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import numpy as np

from ..errors import RowError, UserError

ROWS_SHOWN = 5
ROWS_SAVED = 100


@dataclass(frozen=True)
class Problem:
    """One thing that lint looks for."""

    name: str
    drops: bool
    meaning: str
    advice: str
    stops: bool = False

    @property
    def effect(self) -> str:
        """What becomes of its rows."""
        return "stops" if self.stops else "dropped" if self.drops else "kept"


_STOPS = {
    "broken_row": ("a line or element that is no JSON object in UTF-8", "correct or remove it"),
    "missing_column": ("a column that the layout needs is missing", "add it, or set data.format"),
    "unread_column": (
        "a column that looks like a prompt, a system text or tools is not read",
        "name it with data.columns, or set its part to null there",
    ),
    "null_value": ("a column that the layout needs is empty", "fill it, or remove the rows"),
    "wrong_type": ("a column holds another type than its layout needs", "correct or remove the rows"),
    "bad_turn": (
        "a message has no role, no content or an unknown speaker, or there is none",
        "correct or remove the rows",
    ),
    "has_images": ("the row has images, but only text is supported", "remove the image columns"),
    "bad_ranking": ("not one rank for each of two or more responses, or ties", "correct or remove the rows"),
    "bad_score": ("not one finite score for each of two or more responses", "correct or remove the rows"),
    "bad_reference": ("reference log-probs that are not one finite number a response", "correct or remove the columns"),
    "bad_weight": (
        "a weight, a margin, a mask or weights of tokens are no such numbers, or not one for each token",
        "correct the rows, or leave the column out with data.columns: {weight: null}",
    ),
    "no_dialogue": ("a side has no '\\n\\nAssistant:' turn", "set data.format: preference if the rows are plain text"),
    "half_character": ("the text holds half of a surrogate pair", "correct or remove the rows"),
    "no_chat_template": ("messages, but no chat template is in use", "set data.chat_template to a Jinja file"),
    "template_refused": ("the chat template does not accept the row", "correct the rows, or use another template"),
    "unknown_token_id": (
        "a token id that the tokenizer does not have",
        "tokenise the rows with this model's tokenizer",
    ),
    "beyond_embedding": (
        "a token that the model has no embedding for: the tokenizer has more tokens than the model",
        "use the model's own tokenizer, or resize its embeddings",
    ),
    "not_a_pair": (
        "more or fewer than two responses, and the loss takes pairs",
        "set loss.loss_type to plackett_luce, or remove the rows",
    ),
    "over_budget": (
        "prompt and responses together are longer than packing.tokens_per_pack",
        "raise packing.tokens_per_pack, or lower data.max_length",
    ),
}

_TEMPLATE_ADVICE = "use a chat template that writes it, or set data.lost_text: count to train without it"
_LOST = {
    "lost_turn": ("the chat template leaves out what a turn says", _TEMPLATE_ADVICE),
    "lost_reasoning": ("the chat template leaves out the reasoning of a turn", _TEMPLATE_ADVICE),
    "lost_tool_calls": ("the chat template leaves out tool calls", _TEMPLATE_ADVICE),
    "lost_field": ("the chat template leaves out a text beside what a turn says", _TEMPLATE_ADVICE),
    "lost_tools": ("the chat template leaves out the tools that a row names", _TEMPLATE_ADVICE),
}
LOST = frozenset(_LOST)
"""Problems that ``data.lost_text`` decides on."""

PROBLEMS = {
    problem.name: problem
    for problem in (
        *(Problem(name, False, meaning, advice, stops=True) for name, (meaning, advice) in (_STOPS | _LOST).items()),
        Problem(
            "differing_prompts",
            True,
            "the two sides answer different prompts",
            "remove the rows, or give them one prompt",
        ),
        Problem(
            "no_scored_pair",
            True,
            "no two completions whose scores differ by data.min_score_gap as data.scored_pairs asks",
            "lower data.min_score_gap, or remove the rows",
        ),
        Problem(
            "tied_ranking",
            True,
            "two completions have the same score, or are closer than data.min_score_gap, so there is no ranking",
            "set data.scored_pairs to all and take a loss of pairs, or remove the rows",
        ),
        Problem(
            "tied_scores",
            False,
            "completions of the same score, or closer than data.min_score_gap, form no pair",
            "lower data.min_score_gap if it leaves out too many",
        ),
        Problem(
            "scores_reversed",
            False,
            "columns of scores put the rejected answer above the chosen one",
            "see which of the two is right; data.columns can exchange the sides",
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
            "nothing_counts",
            True,
            "a mask, or data.mask_pattern, leaves out every token of a completion",
            "correct the mask or the pattern, or remove the rows",
        ),
        Problem(
            "empty_completion",
            False,
            "a completion has no text; what is learned is to stop at once",
            "remove the rows unless that is meant",
        ),
        Problem(
            "empty_prompt",
            False,
            "the prompt has no text",
            "give the rows a prompt; where both sides hold it, they must begin with the same text",
        ),
        Problem(
            "prompt_repeated",
            False,
            "a completion begins with the whole prompt again",
            "take the prompt off the completions, or remove the prompt column",
        ),
        Problem(
            "odd_roles",
            False,
            "turns of unknown roles, a speaker twice in a row, a late system turn, or a completion that does not begin "
            "and end with the assistant, or begins with the mark of another speaker",
            "correct the turns",
        ),
        Problem(
            "control_token",
            False,
            "the text writes out one of the tokenizer's special tokens, which the model reads as the token itself",
            "remove it from the text",
        ),
        Problem(
            "damaged_text",
            False,
            "the text holds U+FFFD or NUL, which a wrong decoding leaves",
            "decode the source again, or remove the rows",
        ),
        Problem(
            "whitespace_difference",
            False,
            "two completions differ in white space alone",
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
            "double_eos",
            False,
            "a completion ends with EOS twice",
            "remove EOS from the text, or from the chat template",
        ),
        Problem(
            "eos_inside",
            False,
            "a completion holds EOS before its end, where generation stops",
            "remove it from the text",
        ),
        Problem(
            "missing_eos",
            False,
            "a completion ends with neither EOS nor another special token",
            "end completions with EOS, or correct the chat template",
        ),
        Problem(
            "other_end",
            False,
            "a completion ends with a special token at which generation does not stop",
            "make it the tokenizer's eos_token, or use a chat template that ends turns with EOS",
        ),
        Problem(
            "trained_row",
            False,
            "the row, with either answer as the chosen one, is in the training data, too, so it is not held out",
            "remove it from one of the two; data.eval_fraction splits by prompts",
        ),
        Problem(
            "trained_prompt",
            False,
            "the prompt of the row is in the training data, too, with other answers",
            "remove it from one of the two; data.eval_fraction splits by prompts",
        ),
        Problem("truncated", False, "a completion is cut at max_length", "raise data.max_length"),
        Problem(
            "eos_lost", False, "truncation cut off a completion's EOS: its end is not learned", "raise data.max_length"
        ),
        Problem(
            "duplicate",
            False,
            "prompt and completions are the same tokens as an earlier row's",
            "remove the copies unless the extra weight is meant",
        ),
        Problem(
            "contradiction",
            False,
            "an earlier row ranks the same completions of the same prompt the other way round",
            "keep one of the two",
        ),
    )
}


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
