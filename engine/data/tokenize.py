"""Examples to token ids, with TRL 1.x's semantics: the same rows give the same ids.

Text: the EOS text is appended to a completion that lacks it, and prompt and completion are tokenised together. Message
lists: the chat template renders the prompt with its generation prompt, and prompt plus completion without. Either way
the prompt is what ``tok(prompt)`` and all joint sequences begin with; where a token reaches over the boundary, the end
of the prompt belongs to the completions.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from datetime import datetime
from itertools import islice
from typing import Any, NamedTuple

import jinja2
import numpy as np
from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from ..config.schema import DataConfig
from ..errors import RowError, UserError
from ..paths import expanded
from .examples import Example
from .patterns import Span, check_offsets, left_out
from .turns import Message, with_text_arguments

TEMPLATE_ERRORS: tuple[type[Exception], ...] = (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError)


class Encoded(NamedTuple):
    """Token ids of one example before truncation."""

    prompt_ids: list[int]
    completion_ids: tuple[list[int], ...]
    merged: bool
    """The prompt alone is tokenised differently at its end than before a completion."""
    rendered: tuple[str, ...] = ()
    """What the chat template wrote of prompt and completion, for each completion; empty where none did."""
    left_out: tuple[np.ndarray, ...] = ()
    """bool for each completion, of its tokens: what ``data.mask_pattern`` matches; empty without one."""


class _Tokens(NamedTuple):
    """A text and what the tokenizer makes of it."""

    text: str
    ids: list[int]
    spans: Sequence[Span]
    """Where each token is in the text; empty where that is not asked for."""


class Encoder:
    """A tokenizer with the chat template that ``data.chat_template`` asks for.

    Raises:
        UserError: the template file cannot be read, or ``data.mask_pattern`` with a tokenizer that does not say where
            tokens are.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: DataConfig):
        self.tokenizer = tokenizer
        self.eos_token: str | None = tokenizer.eos_token  # type: ignore[assignment]
        self.bos_id: int | None = tokenizer.bos_token_id  # type: ignore[assignment]
        self.eos_id: int | None = tokenizer.eos_token_id  # type: ignore[assignment]
        self.vocab_size = len(tokenizer)
        self._own_chat = has_own_chat(tokenizer)
        self._pattern = None if data.mask_pattern is None else re.compile(data.mask_pattern)
        if self._pattern is not None:
            check_offsets(tokenizer, self._own_chat)
        added = _added_tokens(tokenizer)
        self.special_ids = special_ids(tokenizer)
        names = {str(token) for token in added.values() if token.special} | set(tokenizer.all_special_tokens)
        self.control_tokens = _control_pattern(sorted(names))
        self._answered = _with_answers(tokenizer)
        self.writes_date = writes_date(tokenizer, data)
        self._now = datetime.fromisoformat(data.template_date) if data.template_date else datetime.now()
        self._template = template_of(data)
        self.template_origin = "none (data.chat_template: none)"
        self.use_messages = False
        if data.chat_template == "auto":
            self.use_messages = self._own_chat or bool(tokenizer.chat_template)
            self.template_origin = "the tokenizer's" if self.use_messages else "none (the tokenizer has none)"
        elif self._template is not None:
            self.template_origin = data.chat_template
            self.use_messages = True

    def encode(self, examples: Sequence[Example]) -> list[Encoded]:
        """Token ids of each example; all texts of a kind go to the tokenizer in one call.

        Raises:
            UserError: text without an EOS token, messages without a chat template, a template that fails on a row, half
                of a character, or ids that the tokenizer does not have.
        """
        texts: dict[bool, list[str]] = {True: [], False: []}
        for example in examples:
            if example.kind == "text":
                texts[True] += self._plain_texts(example)
            elif self._takes_template(example):
                texts[False] += self._rendered_texts(example)
        try:
            ids = {special: iter(self._tokenize(batch, special)) for special, batch in texts.items()}
        except (TypeError, UnicodeEncodeError):
            self._refuse_lone_surrogates(examples)
            raise
        return [self._assemble(example, ids) for example in examples]

    def _refuse_lone_surrogates(self, examples: Sequence[Example]) -> None:
        """JSON may escape half of a character, such as ``\\ud800``, which no tokenizer takes."""
        readers = {"text": self._plain_texts, "messages": self._rendered_texts}
        for example in examples:
            texts = readers[example.kind](example) if example.kind in readers else []
            if any("\ud800" <= character <= "\udfff" for text in texts for character in text):
                raise RowError(
                    "half_character",
                    f"{example.where}: the text holds half of a surrogate pair, which is no character; "
                    "correct or remove the row",
                )

    def _takes_template(self, example: Example) -> bool:
        return example.kind == "messages" and not self._own_chat

    def _assemble(self, example: Example, ids: Mapping[bool, Iterator[_Tokens]]) -> Encoded:
        if example.kind == "ids":
            return self._checked_ids(example)
        joint: list[_Tokens] = []
        if example.kind == "messages" and self._own_chat:
            prompt_ids, *joint_ids = self._conversations(example, tokenize=True)
        else:
            prompt, *joint = islice(ids[example.kind == "text"], 1 + len(example.completions))
            prompt_ids, joint_ids = prompt.ids, [tokens.ids for tokens in joint]
        size = min(common_prefix_length(prompt_ids, joined) for joined in joint_ids)
        completion_ids = tuple(joined[size:] for joined in joint_ids)
        rendered = tuple(tokens.text for tokens in joint) if self._takes_template(example) else ()
        masks: tuple[np.ndarray, ...] = ()
        if self._pattern is not None:
            starts = [common_prefix_length(prompt.text, tokens.text) for tokens in joint]
            masks = tuple(
                left_out(self._pattern, tokens.text, start, tokens.spans[size:], example.where)
                for tokens, start in zip(joint, starts, strict=True)
            )
        return Encoded(prompt_ids[:size], completion_ids, size < len(prompt_ids), rendered, masks)

    def _plain_texts(self, example: Example) -> list[str]:
        if not self.eos_token:
            raise UserError(
                f"{example.where}: the tokenizer has no EOS token to end a text completion with; "
                "set eos_token in its tokenizer_config.json"
            )
        ended = [c if c.endswith(self.eos_token) else c + self.eos_token for c in example.completions]
        return [example.prompt, *(example.prompt + completion for completion in ended)]

    def _rendered_texts(self, example: Example) -> list[str]:
        if not self.use_messages:
            raise RowError(
                "no_chat_template",
                f"{example.where}: the row is a list of messages, but no chat template is in use: "
                f"{self.template_origin}; set data.chat_template to a Jinja file, or use a tokenizer that has one",
            )
        return self._conversations(example, tokenize=False)

    def _conversations(self, example: Example, *, tokenize: bool) -> list[Any]:
        """The prompt with its generation prompt, then prompt + completion for each completion: text, or ids."""

        def render(messages: list[Message], **kwargs: Any) -> Any:
            return self.render(messages, tokenize=tokenize, **example.template_kwargs, **kwargs)

        try:
            prompt = render(example.prompt, add_generation_prompt=True)
            return [prompt, *(render(example.prompt + completion) for completion in example.completions)]
        except TEMPLATE_ERRORS + _own_errors() as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise RowError(
                "template_refused", f"{example.where}: the chat template does not accept this row: {reason}"
            ) from error

    def render(self, messages: list[Message], *, tokenize: bool = False, **kwargs: Any) -> Any:
        """What the chat template makes of messages: text, or with ``tokenize`` ids.

        Raises:
            TEMPLATE_ERRORS: it does not accept them.
        """
        if self._template is not None:
            kwargs["chat_template"] = self._template
        try:
            return self._apply(messages, tokenize, kwargs)
        except TEMPLATE_ERRORS:
            # Some templates join the arguments of a tool call to text.
            as_text = with_text_arguments(messages)
            if as_text is None:
                raise
            return self._apply(as_text, tokenize, kwargs)

    def _apply(self, messages: list[Message], tokenize: bool, kwargs: dict[str, Any]) -> Any:
        with _clock_at(self._now) if self.writes_date else nullcontext():
            tokenizer = self.tokenizer if kwargs.get("add_generation_prompt") else self._answered
            made: Any = tokenizer.apply_chat_template(messages, tokenize=tokenize, return_dict=tokenize, **kwargs)
        return list(made["input_ids"]) if tokenize else made

    def _tokenize(self, texts: list[str], add_special_tokens: bool) -> list[_Tokens]:
        if not texts:
            return []
        places = {"return_offsets_mapping": True} if self._pattern is not None else {}
        # A template writes the special tokens itself; plain text gets what the tokenizer adds by default.
        made = self.tokenizer(
            texts, add_special_tokens=add_special_tokens, return_attention_mask=False, verbose=False, **places
        )
        spans = made["offset_mapping"] if places else [()] * len(texts)
        return [_Tokens(*parts) for parts in zip(texts, made["input_ids"], spans, strict=True)]

    def _checked_ids(self, example: Example) -> Encoded:
        if self._pattern is not None:
            raise UserError(
                f"{example.where}: data.mask_pattern is for text, and the row is a list of token ids; set "
                "data.mask_pattern to null, and give the rows a mask column"
            )
        largest = max((max(ids, default=0) for ids in (example.prompt, *example.completions)), default=0)
        if largest >= self.vocab_size:
            raise RowError(
                "unknown_token_id",
                f"{example.where}: token id {largest} is outside the tokenizer's {self.vocab_size:,} tokens; "
                "tokenise the rows again with this model's tokenizer",
            )
        return Encoded(example.prompt, example.completions, merged=False)


def _added_tokens(tokenizer: PreTrainedTokenizerBase) -> Mapping[int, Any]:
    # A method that raises in mistral-common's, whose special tokens are all known by name.
    decoder = tokenizer.added_tokens_decoder
    return decoder if isinstance(decoder, Mapping) else {}


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids of every token that is no text."""
    return frozenset(tokenizer.all_special_ids) | {i for i, t in _added_tokens(tokenizer).items() if t.special}


def _with_answers(tokenizer: Any) -> Any:
    """The tokenizer for conversations that end with an answer: mistral-common's takes them in another mode only."""
    file = getattr(tokenizer, "_tokenizer_path", None)
    if file is None or not hasattr(tokenizer, "mode"):
        return tokenizer
    return type(tokenizer)(tokenizer_path=file, mode="finetuning")


def _own_errors() -> tuple[type[Exception], ...]:
    """What mistral-common raises for conversations that it does not take; nothing where it is not in use."""
    module = sys.modules.get("mistral_common.exceptions")
    return () if module is None else (module.MistralCommonException,)


def has_own_chat(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether it builds conversations out of ids, as mistral-common's does, and not from the text of a template."""
    return type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template


@contextmanager
def _clock_at(now: datetime) -> Iterator[None]:
    """Let the ``strftime_now`` of chat templates see this time: they take no function as an argument."""

    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return now

    before = chat_template_utils.datetime
    chat_template_utils.datetime = Clock  # type: ignore[misc]
    try:
        yield
    finally:
        chat_template_utils.datetime = before  # type: ignore[misc]


def writes_date(tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> bool:
    """Whether the chat template that is in use writes the date of the day on which it is rendered."""
    if data.chat_template == "none":
        return False
    template: Any = template_of(data) or getattr(tokenizer, "chat_template", None) or ""
    texts = template.values() if isinstance(template, dict) else [template]
    return any("strftime_now" in text for text in texts)


def template_of(data: DataConfig) -> str | None:
    """The chat template that ``data.chat_template`` names; None where the tokenizer's is used, or none.

    Raises:
        UserError: the file cannot be read.
    """
    path = data.chat_template
    if path in ("auto", "none"):
        return None
    try:
        return expanded(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"data.chat_template={path} cannot be read: {reason}; give 'auto', 'none' or the path of a Jinja file"
        ) from None


def common_prefix_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How many leading tokens, or characters, two sequences share."""
    if second[: len(first)] == first:
        return len(first)
    return next(i for i in range(len(first)) if i >= len(second) or first[i] != second[i])


def _control_pattern(tokens: Sequence[str]) -> re.Pattern[str] | None:
    """Matches any of a tokenizer's special tokens in a text."""
    found = sorted((token for token in tokens if token), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, found))) if found else None
