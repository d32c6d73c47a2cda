"""From a source row to an example: columns by their parts, the layout, a system text, and nothing left unread."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ..config.schema import DataConfig
from ..errors import RowError, UserError
from .cells import Unreadable
from .columns import COLUMNS, PROMPTS, RESPONSES, SCORES, detect_format
from .examples import Example
from .foreign import ALWAYS, FOREIGN, SYSTEMS, Foreign
from .formats import reader_for
from .row_numbers import ROW_NUMBERS, with_numbers
from .sources import Row
from .stored import decode_text
from .turns import TurnForm, listed
from .unread import SYSTEM_NAMES, refuse_unread

_OPTIONAL = frozenset({"system", "input", "history", "tools", "chat_template_kwargs", "ref_logps", *ROW_NUMBERS}) | {
    f"ref_{side}_logps" for side in ("chosen", "rejected")
}
"""Parts whose column a row may lack."""
_OF_TURNS = frozenset({"system", "tools", "chat_template_kwargs"})
"""Parts that only a chat template writes."""
_OWN_READS = {
    "preference": ("prompt", "chosen", "rejected"),
    "scored": (*PROMPTS, *RESPONSES, *SCORES),
}


_NO_ANSWER = frozenset({"user", "system", "developer"})


class RowReader:
    """Turns the rows of one split into examples. The first row decides on the layout, unless ``data.format`` does.

    Args:
        data: the ``data`` section.
        use_messages: a chat template is in use.
    """

    def __init__(self, data: DataConfig, *, use_messages: bool):
        self._data = data
        self._use_messages = use_messages
        self._form = TurnForm(data)
        self.layout = ""
        """Name of the layout, once a row was read."""
        self._read: Callable[[Row], Example] | None = None
        self._reads: frozenset[str] = frozenset()
        self._as_turns = False
        self._ends_asked = False
        self._first: Row | None = None
        self._absent = {
            part: name for part, name in (data.columns or {}).items() if name is not None and part in _OPTIONAL
        }
        """Parts whose column no row had so far."""

    def __call__(self, row: Row) -> Example:
        """The example of a row.

        Raises:
            RowError: the row does not fit the layout, or says something that would not be read.
            PromptsDifferError: its sides answer different prompts.
        """
        row = self._prepared(row)
        if self._read is None:
            self._decide(row)
        assert self._read is not None
        for name in self._reads:
            if isinstance(value := row.data.get(name), Unreadable):
                raise RowError("broken_row", f"{row.where}: column {name!r} {value.reason}; correct or remove the row")
        self._refuse_unread_parts(row)
        example = self._read(row)
        self._refuse_shared_text(row, example)
        self._check_speakers(example)
        if example.kind == "text" and self._as_turns:
            if not self._use_messages:
                raise RowError("no_chat_template", f"{row.where}: {self._why_turns(row)}")
            example = _as_turns(example)
        self._refuse_parts_of_turns(row, example)
        before = example.prompt
        example = self._with_system(example, row)
        reads = self._reads if example.prompt is not before else self._reads.difference(SYSTEMS)
        refuse_unread(row, example, reads, self._data)
        return with_numbers(example, row)

    def _refuse_unread_parts(self, row: Row) -> None:
        """Stop at a part that ``data.columns`` names and that rows of the layout do not have."""
        for part in sorted(row.mapped - self._reads):
            found = (self._data.columns or {})[part]
            raise UserError(
                f"{row.where}: data.columns.{part} is {found}, but rows of the layout {self.layout} have no {part}; "
                f"they have {', '.join(sorted(self._reads - set(ALWAYS)))}; remove it, or set data.format"
            )

    def _refuse_parts_of_turns(self, row: Row, example: Example) -> None:
        """Stop at parts of conversations that ``data.columns`` names where a row is text, or token ids."""
        parts = sorted(row.mapped & _OF_TURNS) if example.kind != "messages" else ()
        for part in parts:
            what, advice = ("text", "data.format: conversation to read it, or ") if example.kind == "text" else ("", "")
            raise UserError(
                f"{row.where}: data.columns.{part} has no place in data.format: {self.layout} "
                f"({what or 'a list of token ids'} has no turns); set {advice}data.columns.{part}: null to leave it out"
            )

    def _why_turns(self, row: Row) -> str:
        """Why text is laid out as turns, which no chat template can write, and how it stays text."""
        changes = ["data.format: preference"] if self.layout == "conversation" else []
        changes += ["data.columns.system: null"] if any(name in row.data for name in SYSTEMS) else []
        changes += [f"data.columns.{part}: null" for part in ("history", "input") if part in row.mapped]
        causes = ["in columns that data.columns names"] if self.layout == "conversation" and row.mapped else []
        causes = causes or ([f"of the layout {self.layout}"] if self.layout in FOREIGN else [])
        if self._data.system is not None:
            changes.append("data.system: null")
            causes.append("beside data.system")
        keep = f", or {' and '.join(changes)} to keep it as text"
        return (
            f"text {' and '.join(causes) or 'beside a system text'} is laid out as turns, but no chat template is in "
            "use; set data.chat_template to a Jinja file"
            + (keep if self.layout not in FOREIGN or self.layout == "conversation" else "")
        )

    def lacks(self, row: Row) -> bool:
        """Note the columns of a row; whether one that ``data.columns`` names was in no row so far."""
        self._first = self._first or row
        if self._absent:
            self._absent = {part: name for part, name in self._absent.items() if name not in row.data}
        return bool(self._absent)

    def absent_column(self) -> tuple[RowError, int] | None:
        """The fault of an optional part whose column none of the rows that were read has, and the first row's index."""
        if self._first is None or not self._absent:
            return None
        row = self._first
        part, name = min(self._absent.items())
        message = f"{row.where}: data.columns.{part} is {name}; found columns {listed(row.data)}, and no row has {name}"
        return RowError("missing_column", message), row.index

    def _refuse_shared_text(self, row: Row, example: Example) -> None:
        """Stop where a prompt is only what two texts share, which differs from row to row, and is to be split by."""
        implicit = self.layout == "preference" and example.kind == "text" and row.data.get("prompt") is None
        if implicit and self._data.eval_fraction is not None:
            raise UserError(
                f"{row.where}: data.eval_fraction splits by prompts, but here they are only what chosen and rejected "
                "share; give prompts a column of their own, or set data.eval_dataset_name instead"
            )

    def _check_speakers(self, example: Example) -> None:
        """Stop at completions that do not begin with an answer, and at a prompt that ends with another one."""
        if example.kind != "messages":
            return
        firsts = [completion[0]["role"] for completion in example.completions if completion]
        # Of the standard layouts, lint counts what TRL takes: a prompt that is repeated, a user's turn.
        refused = _NO_ANSWER if self.layout in FOREIGN else _NO_ANSWER - {"user"}
        if found := next((role for role in firsts if role in refused), None):
            raise RowError(
                "bad_turn",
                f"{example.where}: a completion begins with a turn of the {found}, not with an answer; leave out what "
                "repeats the prompt",
            )
        if self._ends_asked and example.prompt and example.prompt[-1]["role"] == "assistant" and "assistant" in firsts:
            raise RowError(
                "bad_turn", f"{example.where}: the prompt ends with an answer; it must end with what is asked"
            )

    def decide(self, row: Row) -> str:
        """The name of the layout of a row.

        Raises:
            RowError: it has none.
        """
        row = self._prepared(row)
        self._decide(row)
        self._refuse_unread_parts(row)
        return self.layout

    def _prepared(self, row: Row) -> Row:
        """The row with columns by the names of their parts, and conversations that are stored as text decoded."""
        self.lacks(row)
        columns = dict(row.data)
        taken = {}
        for part, name in (self._data.columns or {}).items():
            for hidden in SYSTEM_NAMES if part == "system" else (part,):
                columns.pop(hidden, None) if hidden != name else None
            if name is None:
                continue
            if name in row.data:
                taken[part] = row.data[name]
                columns.pop(name, None)
            elif part not in _OPTIONAL:
                raise RowError(
                    "missing_column", f"{row.where}: data.columns.{part} is {name}; found columns {listed(row.data)}"
                )
        columns |= taken
        for name, value in columns.items():
            if isinstance(value, str):
                columns[name] = decode_text(value, row, name, self._form.is_turn)
        return replace(row, data=columns, form=self._form, mapped=frozenset(taken))

    def _decide(self, row: Row) -> None:
        name = self._data.format if self._data.format != "auto" else self._detect(row)
        if name in FOREIGN:
            variants = FOREIGN[name]
            foreign = next((v for v in variants if v.known_by(row.data)), variants[0])
            self._read = _foreign_reader(foreign, reader_for(foreign.base, use_messages=self._use_messages))
            self._reads = foreign.reads
        else:
            self._read = reader_for(name, use_messages=self._use_messages)
            self._reads = frozenset((*_OWN_READS.get(name, COLUMNS[name]), *ALWAYS))
        has_system = any(system in row.data for system in SYSTEMS)
        self._as_turns = (
            name in FOREIGN or self._data.system is not None or (name in ("scored", "kwise") and has_system)
        )
        self._ends_asked = name in FOREIGN and name != "conversation"
        self.layout = name

    def _detect(self, row: Row) -> str:
        """The layout by the columns, where those that ``data.columns`` names, or a system text, ask for turns."""
        decided = self._data.columns or {}
        name = detect_format(row, prompt_decided="prompt" in decided)
        parts = ("prompt", "chosen", "rejected", "completion", "input", "history")
        mapped = any(decided.get(part) for part in parts)
        asked = mapped or any(system in row.data for system in SYSTEMS)
        of_turns = {"preference": "conversation", "unpaired": "labelled"}.get(name, name)
        return of_turns if "prompt" in row.data and asked else name

    def _with_system(self, example: Example, row: Row) -> Example:
        """With the system text of the row, or of the configuration, before a conversation that has none."""
        if example.kind != "messages" or (example.prompt and example.prompt[0]["role"] in ("system", "developer")):
            return example
        own = [row.data.get(name) for name in SYSTEMS]
        text = next((text for text in own if isinstance(text, str) and text.strip()), self._data.system)
        if not text:
            return example
        return replace(example, prompt=[{"role": "system", "content": text}, *example.prompt])


def _foreign_reader(foreign: Foreign, read: Callable[[Row], Example]) -> Callable[[Row], Example]:
    return lambda row: read(foreign.standard(row))


def _as_turns(example: Example) -> Example:
    """A text prompt as the user's turn, text completions as the assistant's."""
    return replace(
        example,
        kind="messages",
        prompt=[{"role": "user", "content": example.prompt}],
        completions=tuple([{"role": "assistant", "content": text}] for text in example.completions),
    )
