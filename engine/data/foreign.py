"""Layouts of other tools and of well-known data sets, each turned into one of the standard layouts.

Their text is what people said, so it is read as turns: ``RowReader`` makes it user and assistant turns. Where answers
come with a label or a strength, they become two scored responses, and ties form no pair.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..errors import RowError
from .examples import PromptsDifferError, answer_messages, messages_of, needed
from .exchange import answer_of, last_answer_of, pair_of, split_answer, text_of, what_is_asked
from .labels import first_if, strength, winner
from .row_numbers import ROW_NUMBERS
from .sources import Row
from .turns import Message

SYSTEMS = ("system", "system_prompt")
ALWAYS = (
    *("tools", "chat_template_kwargs", "ref_chosen_logps", "ref_rejected_logps", "ref_logps", "images", "image"),
    *SYSTEMS,
    *ROW_NUMBERS,
)
"""Columns that every layout may have."""
_HELPSTEER_TURN = re.compile(r"\n?<extra_id_1>(Assistant|User)\n")
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")


@dataclass(frozen=True)
class Foreign:
    """A layout by its columns, and how a row of it becomes standard columns."""

    columns: tuple[str, ...]
    """Those that it is known by."""
    convert: Callable[[Row], dict[str, Any]]
    base: Literal["preference", "scored", "tokenized", "unpaired"] = "preference"
    """The standard layout that ``convert`` gives."""
    further: tuple[str, ...] = ()
    """Other columns that it reads, where they are there."""
    fits: Callable[[dict[str, Any]], bool] = lambda data: True
    """Whether the values, too, are those of the layout."""

    def standard(self, row: Row) -> Row:
        """The row in the columns of ``base``."""
        kept = {name: row.data[name] for name in ALWAYS if name in row.data}
        return replace(row, data=kept | self.convert(row))

    def known_by(self, data: dict[str, Any]) -> bool:
        """Whether a row has its columns."""
        return data.keys() >= set(self.columns) and self.fits(data)

    @property
    def reads(self) -> frozenset[str]:
        """Every column that may be read."""
        return frozenset((*self.columns, *self.further, *ALWAYS))


def _conversation(row: Row) -> dict[str, Any]:
    names = ("prompt", "chosen", "rejected")
    prompt, *sides = (row.data.get(name) for name in names)
    turns = [messages_of(side, row, "chosen or rejected") for side in sides if side and not isinstance(side, str)]
    if isinstance(prompt, str) and turns and all(side and side[0]["role"] != "assistant" for side in turns):
        # A text prompt beside whole conversations repeats a turn of theirs.
        return {name: row.data[name] for name in names if name in row.data}
    return pair_of(*names, below="input")(row)


def _llama_factory(row: Row) -> dict[str, Any]:
    answers = needed(row, "output")
    if len(answers) != 2:
        raise RowError("wrong_type", f"{row.where}: column 'output' needs two answers, the chosen one first")
    return {"prompt": what_is_asked(row, "instruction", "input"), "chosen": answers[0], "rejected": answers[1]}


def _ms_swift(row: Row) -> dict[str, Any]:
    if row.data.get("messages") is None:
        return pair_of("query", "response", "rejected_response")(row)
    turns = messages_of(row.data["messages"], row, "messages")
    if row.data.get("rejected_messages") is not None:
        return {"chosen": turns, "rejected": messages_of(row.data["rejected_messages"], row, "rejected_messages")}
    start, chosen = split_answer(turns, row, "messages", "that was chosen")
    rejected = needed(row, "rejected_response")
    if isinstance(rejected, list) and len(rejected) == 1 and isinstance(rejected[0], str):
        rejected = rejected[0]
    answer = answer_messages(rejected, row, "rejected_response")
    return {"prompt": start, "chosen": chosen, "rejected": answer}


def _openai(row: Row) -> dict[str, Any]:
    given = needed(row, "input")
    if not isinstance(given, dict) or "messages" not in given:
        raise RowError("wrong_type", f"{row.where}: column 'input' must be an object with messages")
    made = {
        "prompt": messages_of(given["messages"], row, "input"),
        "chosen": messages_of(needed(row, "preferred_output"), row, "preferred_output"),
        "rejected": messages_of(needed(row, "non_preferred_output"), row, "non_preferred_output"),
    }
    return made | ({"tools": given["tools"]} if given.get("tools") else {})


def _ranked(prompt: Any, items: Any, row: Row, name: str, answer: str, answers: Callable[[Any], Any]) -> dict[str, Any]:
    """Answers with a ``rank`` each, the smallest the best."""
    if not isinstance(items, list) or not all(isinstance(item, dict) and answer in item for item in items):
        raise RowError("wrong_type", f"{row.where}: column {name!r} must be a list of objects with {answer} and rank")
    ranks = [item.get("rank") for item in items]
    if not all(isinstance(rank, int | float) and not isinstance(rank, bool) for rank in ranks):
        raise RowError("bad_ranking", f"{row.where}: column {name!r} needs a number as every rank, got {ranks}")
    return {
        "prompt": prompt,
        "responses": [answers(item[answer]) for item in items],
        "scores": [-rank for rank in ranks],  # type: ignore[operator]
    }


def _nemo_rl(row: Row) -> dict[str, Any]:
    context = messages_of(needed(row, "context"), row, "context")

    def answers(value: Any) -> list[Message]:
        return answer_messages(value, row, "completions")

    return _ranked(context, needed(row, "completions"), row, "completions", "completion", answers)


def _nectar(row: Row) -> dict[str, Any]:
    prompt = _turns_marked_by(_HH_TURN, text_of(row, "prompt"), "Human")
    return _ranked(prompt, needed(row, "answers"), row, "answers", "answer", lambda text: text)


def _turns_marked_by(pattern: re.Pattern[str], text: str, user: str) -> str | list[Message]:
    """A dialogue in which a mark stands before turns; text before the first mark is the user's.

    Speakers take turns, so the mark of the one who speaks already is part of what is said.
    """
    turns: list[list[str]] = []
    last = 0
    for mark in pattern.finditer(text):
        speaker = "user" if mark[1] == user else "assistant"
        if not turns and text[: mark.start()].strip():
            turns.append(["user", ""])
        if turns and turns[-1][0] == speaker:
            continue
        if turns:
            turns[-1][1] = text[last : mark.start()]
        turns.append([speaker, ""])
        last = mark.end()
    if last == 0:
        return text
    turns[-1][1] = text[last:]
    if turns[-1][0] == "assistant" and not turns[-1][1].strip():
        turns.pop()
    return [{"role": role, "content": said.strip()} for role, said in turns]


def _labelled(prompt: Callable[[Row], Any], a: str, b: str, score: Callable[[Row], tuple[float, float]]):
    """Two answers and which of them is the better one."""

    def convert(row: Row) -> dict[str, Any]:
        responses = [needed(row, a), needed(row, b)]
        return {"prompt": prompt(row), "responses": responses, "scores": list(score(row))}

    return convert


def _helpsteer_prompt(row: Row) -> str | list[Message]:
    return _turns_marked_by(_HELPSTEER_TURN, text_of(row, "prompt"), "User")


def _arena(row: Row) -> dict[str, Any]:
    a, b = (messages_of(needed(row, name), row, name) for name in ("conversation_a", "conversation_b"))
    size = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)) - 1)
    if size < 1 or any(x != y for x, y in zip(a[size:], b[size:], strict=False) if "user" in (x["role"], y["role"])):
        raise PromptsDifferError
    return {"prompt": a[:size], "responses": [a[size:], b[size:]], "scores": list(winner(row))}


def _torchtune(row: Row) -> dict[str, Any]:
    names = {side: f"{side}_conversations" for side in ("chosen", "rejected")}
    return {side: messages_of(needed(row, name), row, name) for side, name in names.items()}


def _step_dpo(row: Row) -> dict[str, Any]:
    done = text_of(row, "initial_reason_steps")
    sides = {name: done + text_of(row, name) for name in ("chosen", "rejected")}
    return {"prompt": text_of(row, "prompt"), **sides}


def _input_ids(row: Row) -> dict[str, Any]:
    names = ("chosen", "rejected")
    ids = [needed(row, f"{name}_input_ids") for name in names]
    if "chosen_labels" not in row.data:
        return {"prompt_ids": needed(row, "prompt_input_ids"), "chosen_ids": ids[0], "rejected_ids": ids[1]}
    # Before TRL 0.12 both sides began with the prompt, whose labels were -100, and could end with padding.
    ends = []
    for name, side in zip(names, ids, strict=True):
        labels = needed(row, f"{name}_labels")
        if not isinstance(labels, list) or len(labels) != len(side):
            raise RowError("wrong_type", f"{row.where}: column '{name}_labels' needs one label for each token")
        trained = [i for i, label in enumerate(labels) if label != -100]
        if not trained or len(trained) != trained[-1] + 1 - trained[0]:
            raise RowError(
                "wrong_type", f"{row.where}: column '{name}_labels' must have one run of labels other than -100"
            )
        ends.append((trained[0], trained[-1] + 1))
    size = ends[0][0]
    if size != ends[1][0] or ids[0][:size] != ids[1][:size]:
        raise PromptsDifferError
    chosen, rejected = (side[size:end] for side, (_, end) in zip(ids, ends, strict=True))
    return {"prompt_ids": ids[0][:size], "chosen_ids": chosen, "rejected_ids": rejected}


def _is_pair_list(data: dict[str, Any]) -> bool:
    output = data.get("output")
    return isinstance(output, list) and all(isinstance(text, str) for text in output)


def _is_object(data: dict[str, Any]) -> bool:
    return isinstance(data.get("input"), dict)


def _pair(prompt: str, chosen: str = "chosen", rejected: str = "rejected", *, below: str | None = None) -> Foreign:
    further = ("history",) if below is None else ("history", below)
    return Foreign((prompt, chosen, rejected), pair_of(prompt, chosen, rejected, below), further=further)


def _one_of_two(
    prompt: Callable[[Row], Any], prompt_name: str, a: str, b: str, by: str, score: Callable[[Row], tuple[float, float]]
) -> Foreign:
    return Foreign((prompt_name, a, b, by), _labelled(prompt, a, b, score), "scored", further=("label",))


def _has_one_answer(data: dict[str, Any]) -> bool:
    return data.keys().isdisjoint(("chosen", "rejected", "rejected_response", "rejected_messages", "responses"))


def _one_answer(prompt: str, completion: str, label: str = "label", *, below: str | None = None) -> Foreign:
    convert, further = answer_of(prompt, completion, label, below), ("history", *(() if below is None else (below,)))
    return Foreign((prompt, completion, label), convert, "unpaired", further=further, fits=_has_one_answer)


def _conversations_with(label: str) -> tuple[Foreign, ...]:
    return tuple(
        Foreign((name, label), last_answer_of(name, label), "unpaired", fits=_has_one_answer)
        for name in ("messages", "conversations", "conversation")
    )


FOREIGN: dict[str, tuple[Foreign, ...]] = {
    "input_ids": (
        Foreign(
            ("chosen_input_ids", "rejected_input_ids"),
            _input_ids,
            "tokenized",
            further=("prompt_input_ids", "chosen_labels", "rejected_labels"),
        ),
    ),
    "openai": (Foreign(("input", "preferred_output", "non_preferred_output"), _openai, fits=_is_object),),
    "torchtune": (Foreign(("chosen_conversations", "rejected_conversations"), _torchtune),),
    "ms_swift": (
        Foreign(("messages", "rejected_response"), _ms_swift, further=("rejected_messages",)),
        Foreign(("messages", "rejected_messages"), _ms_swift),
        Foreign(("query", "response", "rejected_response"), _ms_swift, further=("history",)),
    ),
    "chosen_response": (
        _pair("instruction", "chosen_response", "rejected_response", below="input"),
        _pair("prompt", "chosen_response", "rejected_response"),
    ),
    "stack_exchange": (_pair("question", "response_j", "response_k"),),
    "llama_factory": (
        Foreign(("instruction", "output"), _llama_factory, further=("input", "history"), fits=_is_pair_list),
    ),
    "nemo_rl": (Foreign(("context", "completions"), _nemo_rl, "scored"),),
    "nectar": (Foreign(("prompt", "answers"), _nectar, "scored"),),
    "shp": (
        _one_of_two(
            lambda row: text_of(row, "history"),
            "history",
            "human_ref_A",
            "human_ref_B",
            "labels",
            first_if("labels", 1),
        ),
    ),
    "pku_saferlhf": (
        _one_of_two(
            lambda row: what_is_asked(row, "prompt"),
            *("prompt", "response_0", "response_1", "better_response_id"),
            first_if("better_response_id", 0),
        ),
    ),
    "helpsteer2": (
        _one_of_two(
            _helpsteer_prompt,
            *("prompt", "response_1", "response_2", "preference_strength"),
            strength("preference_strength"),
        ),
    ),
    "helpsteer3": (
        _one_of_two(
            lambda row: what_is_asked(row, "context"),
            *("context", "response1", "response2", "overall_preference"),
            strength("overall_preference"),
        ),
    ),
    "arena": (Foreign(("conversation_a", "conversation_b", "winner"), _arena, "scored", further=("label",)),),
    "step_dpo": (Foreign(("prompt", "initial_reason_steps", "chosen", "rejected"), _step_dpo),),
    "alpaca": (_pair("instruction", below="input"),),
    "question": (_pair("question", below="input"), _pair("query"), _pair("input"), _pair("problem")),
    "messages": tuple(map(_pair, ("messages", "conversation", "context_messages", "trajectory", "context", "history"))),
    "conversation": (Foreign(("prompt", "chosen", "rejected"), _conversation, further=("history", "input")),),
    "kto_tag": (
        _one_answer("instruction", "output", "kto_tag", below="input"),
        _one_answer("prompt", "response", "kto_tag"),
        *_conversations_with("kto_tag"),
    ),
    "labelled": (
        _one_answer("prompt", "response"),
        _one_answer("instruction", "completion", below="input"),
        _one_answer("instruction", "output", below="input"),
        _one_answer("question", "completion", below="input"),
        _one_answer("query", "response"),
        *_conversations_with("label"),
        _one_answer("prompt", "completion", below="input"),
    ),
}
"""By name of the format its variants, which are tried in this order; each is known by its columns."""
BESIDE_ANSWERS = ("alpaca", "question", "messages")
"""Those whose chosen and rejected may also be whole by themselves, in one of the standard layouts."""
