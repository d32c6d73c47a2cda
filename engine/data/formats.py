"""The layouts in which preference rows come, and the readers that turn their rows into examples.

=============  ======================================================================================================
format         columns
=============  ======================================================================================================
preference     ``prompt, chosen, rejected`` or ``chosen, rejected`` with an implicit prompt; strings or message lists
hh             ``chosen, rejected``: Anthropic dialogues, turns marked by ``\\n\\nHuman:`` and ``\\n\\nAssistant:``
sharegpt       ``conversations, chosen, rejected`` with from/value or role/content turns, optional ``system``
kwise          ``prompt, responses, ranking``: K >= 2 responses; ``ranking[i]`` is the rank of ``responses[i]``, and the
               smallest rank is the best
scored         ``prompt, responses, scores``, or ``completions`` with a text and a score each (``scored.py``)
tokenized      ``prompt_ids, chosen_ids, rejected_ids``
unpaired       ``prompt, completion, label``: one completion, desirable (true) or not (``unpaired.py``)
=============  ======================================================================================================

Optional everywhere: ``ref_chosen_logps`` and ``ref_rejected_logps`` (kwise: ``ref_logps``, one a response), and the
numbers of ``row_numbers.py``. For message lists: ``tools`` (list or JSON text) and ``chat_template_kwargs``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from ..errors import RowError
from .columns import ASSISTANT, COLUMNS, column
from .examples import (
    Example,
    Message,
    PromptsDifferError,
    answer_messages,
    finite_numbers,
    messages_of,
    prompt_messages,
    refuse_images,
    template_kwargs,
)
from .scored import read_scored
from .sources import Row
from .unpaired import read_unpaired

_HH_TURN = re.compile(r"\n\n(Human|Assistant):")


def reader_for(name: str, *, use_messages: bool) -> Callable[[Row], Example]:
    """The function that turns rows of a layout into examples.

    Args:
        name: one of ``COLUMNS``.
        use_messages: a chat template is in use, so that HH dialogues become messages; without it they stay text.

    The function raises UserError, naming file, row and column, for a row that does not fit the layout, and
    ``PromptsDifferError`` for one whose sides answer different prompts.
    """
    if name == "hh":
        return _read_hh_messages if use_messages else _read_hh_text
    return {
        "preference": _read_preference,
        "sharegpt": _read_sharegpt,
        "kwise": _read_kwise,
        "scored": read_scored,
        "tokenized": _read_tokenized,
        "unpaired": read_unpaired,
    }[name]


def _ref_logps(row: Row) -> tuple[float, float] | None:
    values = [row.data.get(name) for name in ("ref_chosen_logps", "ref_rejected_logps")]
    if values == [None, None]:
        return None
    return tuple(finite_numbers(values, row, "ref_chosen_logps and ref_rejected_logps", "bad_reference"))  # type: ignore[return-value]


def _is_conversation(value: Any) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and bool(value) and isinstance(value[0], dict))


def _read_preference(row: Row) -> Example:
    refuse_images(row)
    chosen, rejected = (column(row, name, "preference") for name in COLUMNS["preference"])
    prompt = column(row, "prompt", "preference") if "prompt" in row.data else None
    refs = _ref_logps(row)
    if isinstance(chosen, str) and isinstance(rejected, str) and (prompt is None or isinstance(prompt, str)):
        if prompt is None:
            prompt, chosen, rejected = split_implicit_prompt(chosen, rejected)
        return Example(row.index, row.where, "text", prompt, (chosen, rejected), refs)
    if not (_is_conversation(chosen) and _is_conversation(rejected)):
        kinds = {name: type(row.data[name]).__name__ for name in ("prompt", "chosen", "rejected") if name in row.data}
        listed = ", ".join(f"{name}: {kind}" for name, kind in kinds.items())
        raise RowError(
            "wrong_type", f"{row.where}: columns must all be text or all be non-empty message lists, got {listed}"
        )
    sides = messages_of(chosen, row, "chosen"), messages_of(rejected, row, "rejected")
    if _is_conversation(prompt):
        start = messages_of(prompt, row, "prompt")
    elif isinstance(prompt, str) and all(side[0]["role"] == "assistant" for side in sides):
        start = [{"role": "user", "content": prompt}]
    else:
        # Beside whole conversations a text prompt only repeats a turn that both sides begin with.
        start, *rest = split_implicit_prompt(*sides)
        sides = rest[0], rest[1]
        _refuse_lost_prompt(prompt, start, row)
        if not start or any(side[0]["role"] == "user" for side in sides):
            raise PromptsDifferError
    return Example(row.index, row.where, "messages", start, sides, refs, template_kwargs(row))


def _refuse_lost_prompt(prompt: Any, start: list[Message], row: Row) -> None:
    """Stop at a text prompt beside whole conversations that do not hold it, so that nobody would read it."""
    text = prompt.strip() if isinstance(prompt, str) else ""
    if start and text and not any(text in str(turn.get("content")) for turn in start):
        raise RowError(
            "unread_column",
            f"{row.where}: column 'prompt' is a text, and chosen and rejected are conversations that begin with other "
            "turns and do not hold it, so it would not be read; put it into them, or set data.columns: {prompt: null} "
            "to leave it out",
        )


def split_implicit_prompt(chosen, rejected):
    """Split what two strings or two message lists have in common off both.

    The prompt is the longest common prefix, in characters or whole turns; it leaves at least one character or turn to
    either side, and gives a space before the first difference to the completions (as TRL 1.x splits).
    """
    shorter = min(len(chosen), len(rejected))
    size = next((i for i in range(shorter) if chosen[i] != rejected[i]), None)
    if size is None:
        size = max(shorter - 1, 0)
    elif size > 0 and chosen[size - 1] == " ":
        size -= 1
    return chosen[:size], chosen[size:], rejected[size:]


def _split_dialogue(row: Row) -> tuple[str, str, str]:
    """Split both sides after their last ``\\n\\nAssistant:``."""
    heads, tails = [], []
    for name in COLUMNS["hh"]:
        text = column(row, name, "hh")
        if not isinstance(text, str) or ASSISTANT not in text:
            raise RowError(
                "no_dialogue",
                f"{row.where}: column {name!r} is not a dialogue with a '\\n\\nAssistant:' turn; "
                "set data.format: preference if these rows are plain text",
            )
        end = text.rindex(ASSISTANT) + len(ASSISTANT)
        heads.append(text[:end])
        tails.append(text[end:])
    if heads[0] != heads[1]:
        raise PromptsDifferError
    return heads[0], tails[0], tails[1]


def _read_hh_text(row: Row) -> Example:
    prompt, chosen, rejected = _split_dialogue(row)
    return Example(row.index, row.where, "text", prompt, (chosen, rejected), _ref_logps(row))


def _read_hh_messages(row: Row) -> Example:
    prompt, *completions = _split_dialogue(row)
    before, *marked = _HH_TURN.split(prompt.removesuffix(ASSISTANT))
    messages: list[Message] = [{"role": "system", "content": before.strip()}] if before.strip() else []
    for speaker, text in zip(marked[::2], marked[1::2], strict=True):
        role = "user" if speaker == "Human" else "assistant"
        if messages and messages[-1]["role"] == role:
            # Most templates refuse two turns of one speaker in a row.
            messages[-1]["content"] += "\n\n" + text.strip()
        else:
            messages.append({"role": role, "content": text.strip()})
    if not messages:
        raise RowError("bad_turn", f"{row.where}: the dialogue has no turn before its last '\\n\\nAssistant:'")
    answers = tuple([{"role": "assistant", "content": text.strip()}] for text in completions)
    return Example(row.index, row.where, "messages", messages, answers, _ref_logps(row), template_kwargs(row))


def _read_sharegpt(row: Row) -> Example:
    refuse_images(row)
    conversation, chosen, rejected = (column(row, name, "sharegpt") for name in COLUMNS["sharegpt"])
    prompt = messages_of(conversation, row, "conversations")
    system = row.data.get("system")
    if isinstance(system, str) and system and not (prompt and prompt[0]["role"] == "system"):
        prompt = [{"role": "system", "content": system}, *prompt]
    if not prompt:
        raise RowError("bad_turn", f"{row.where}: column 'conversations' has no turns")
    answers = (answer_messages(chosen, row, "chosen"), answer_messages(rejected, row, "rejected"))
    return Example(row.index, row.where, "messages", prompt, answers, _ref_logps(row), template_kwargs(row))


def _read_kwise(row: Row) -> Example:
    refuse_images(row)
    prompt, responses, ranking = (column(row, name, "kwise") for name in COLUMNS["kwise"])
    if not isinstance(responses, list) or len(responses) < 2:
        count = len(responses) if isinstance(responses, list) else type(responses).__name__
        raise RowError(
            "bad_ranking", f"{row.where}: column 'responses' needs a list of at least 2 responses, got {count}"
        )
    if not isinstance(ranking, list) or len(ranking) != len(responses):
        count = len(ranking) if isinstance(ranking, list) else type(ranking).__name__
        raise RowError(
            "bad_ranking",
            f"{row.where}: column 'ranking' needs one rank for each of {len(responses)} responses, got {count}",
        )
    ranks = finite_numbers(ranking, row, "'ranking'", "bad_ranking")
    if len(set(ranks)) < len(ranks):
        raise RowError(
            "bad_ranking", f"{row.where}: column 'ranking' has ties ({ranking}); every response needs its own rank"
        )
    order = sorted(range(len(ranks)), key=ranks.__getitem__)
    refs = row.data.get("ref_logps")
    if refs is not None:
        if not isinstance(refs, list) or len(refs) != len(responses):
            raise RowError(
                "bad_reference",
                f"{row.where}: column 'ref_logps' needs one number for each of {len(responses)} responses",
            )
        values = finite_numbers(refs, row, "'ref_logps'", "bad_reference")
        refs = tuple(values[i] for i in order)
    if isinstance(prompt, str):
        if not all(isinstance(response, str) for response in responses):
            raise RowError("wrong_type", f"{row.where}: column 'prompt' is text, so every response must be text, too")
        texts = tuple(responses[i] for i in order)
        return Example(row.index, row.where, "text", prompt, texts, refs, order=tuple(order))
    answers = tuple(answer_messages(responses[i], row, "responses") for i in order)
    start, kwargs = prompt_messages(prompt, row), template_kwargs(row)
    return Example(row.index, row.where, "messages", start, answers, refs, kwargs, order=tuple(order))


def _read_tokenized(row: Row) -> Example:
    parts = []
    for name in COLUMNS["tokenized"]:
        ids = column(row, name, "tokenized")
        if not isinstance(ids, list) or not all(isinstance(i, int) and i >= 0 for i in ids):
            raise RowError(
                "wrong_type", f"{row.where}: column {name!r} must be a list of token ids (whole numbers, 0 or more)"
            )
        parts.append(ids)
    return Example(row.index, row.where, "ids", parts[0], (parts[1], parts[2]), _ref_logps(row))
