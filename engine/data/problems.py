"""What lint looks for in the data, what becomes of the rows that have it, and what to do about it.

Three kinds of problem. Rows that cannot be read as what they should be **stop** training; ``dpo check`` reads on and
lists them all. Those that leave nothing to learn from **drop** the row; the others only **count**, because the row
is still a defined, if perhaps unintended, training example. ``data.strict`` stops at any.
"""

from __future__ import annotations

from dataclasses import dataclass


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
    "bad_label": (
        "the label of a completion is neither true nor false",
        "correct the rows: true is a desirable completion, 1 and 0 are read, too",
    ),
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
    "unpaired": (
        "one completion with a label, and the loss compares completions of one prompt",
        "set loss.loss_type to kto, or give the rows a second completion",
    ),
    "over_budget": (
        "prompt and responses together are longer than packing.tokens_per_pack",
        "raise packing.tokens_per_pack or train.context_parallel, or lower data.max_length",
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
            "one_label",
            False,
            "no completion of the set has the other label, so nothing is said to be better than anything",
            "add rows with the other label",
        ),
        Problem(
            "labels_reversed",
            False,
            "a column of scores is lower where completions are labelled desirable, on average of the set",
            "see whether the labels mean the opposite",
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
            "turns out of order, of unknown roles, or a completion that is not the assistant's alone",
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
            "an earlier row ranks, or labels, the same completions of the same prompt the other way round",
            "keep one of the two",
        ),
    )
}
