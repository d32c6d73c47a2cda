"""``dpo check``: what the data looks like to the model, before anything is trained."""

from __future__ import annotations

from array import array

import numpy as np

from engine.config.schema import DataConfig, RunConfig
from engine.data import Split, stream_groups
from engine.data.groups import PreferenceGroup
from engine.data.lint import LintReport
from engine.data.tokenize import Encoder
from engine.errors import UserError

PERCENTILES = (0, 50, 90, 99, 100)
PROMPT_TOKENS_SHOWN = 48
RESPONSE_TOKENS_SHOWN = 32


def check(config: RunConfig) -> str:
    """Read the training data and, where it is set, the evaluation data, a row at a time, and describe them.

    Returns:
        Text with what lint found, token lengths, and the first example decoded with its boundary.

    Raises:
        UserError: the data or the tokenizer cannot be read, or no row can be used.
    """
    from engine.model.load import load_tokenizer

    tokenizer = load_tokenizer(config.model)
    parts = [f"chat template: {Encoder(tokenizer, config.data).template_origin}"]
    splits: tuple[Split, ...] = ("train", "eval") if config.data.eval_dataset_name else ("train",)
    for split in splits:
        parts.append(f"{split} data\n{_check_split(config.data, tokenizer, split)}")
    return "\n\n".join(parts)


def _check_split(data: DataConfig, tokenizer, split: Split) -> str:
    groups, report = stream_groups(data, tokenizer, split=split)
    first: PreferenceGroup | None = None
    lengths: dict[str, array[int]] = {}
    for group in groups:
        first = first or group
        names = _response_names(len(group.response_ids))
        for name, ids in zip(("prompt", *names), (group.prompt_ids, *group.response_ids), strict=True):
            lengths.setdefault(name, array("q")).append(len(ids))
    report.raise_if_empty()
    assert first is not None
    parts = [report.format(), _format_lengths(lengths, data.max_length), _format_example(first, tokenizer)]
    verdict = _strict_verdict(report, data.strict)
    return "\n\n".join(parts + ([verdict] if verdict else []))


def _response_names(count: int) -> tuple[str, ...]:
    if count == 2:
        return ("chosen", "rejected")
    return tuple(f"response {rank}" for rank in range(1, count + 1))


def _format_lengths(lengths: dict[str, array[int]], max_length: int | None) -> str:
    """A table of percentiles of token counts."""
    names = {0: "min", 50: "median", 100: "max"}
    heads = [names.get(p, f"{p}%") for p in PERCENTILES] + ["mean", "total"]
    limit = "no limit" if max_length is None else f"prompt + response at most {max_length:,}"
    lines = [f"tokens ({limit})", "  " + " " * 12 + "".join(f"{head:>12}" for head in heads)]
    for name, sizes in lengths.items():
        cells = [f"{value:,.0f}" for value in np.percentile(sizes, PERCENTILES, method="nearest")]
        cells += [f"{np.mean(sizes):,.1f}", f"{sum(sizes):,}"]
        lines.append(f"  {name:<12}" + "".join(f"{cell:>12}" for cell in cells))
    return "\n".join(lines)


def _format_example(group: PreferenceGroup, tokenizer) -> str:
    """The end of the prompt and the start and end of each response, as the model reads them."""
    lines = [f"row {group.row} as the model reads it"]
    names = _response_names(len(group.response_ids))
    width = max(len(name) for name in ("prompt", *names))
    tail = group.prompt_ids[-PROMPT_TOKENS_SHOWN:]
    skipped = "... " if len(tail) < len(group.prompt_ids) else ""
    lines.append(f"  {'prompt':<{width}}  {skipped}{tokenizer.decode(tail)!r}")
    for name, ids in zip(names, group.response_ids, strict=True):
        if len(ids) <= RESPONSE_TOKENS_SHOWN:
            shown = repr(tokenizer.decode(ids))
        else:
            half = RESPONSE_TOKENS_SHOWN // 2
            shown = f"{tokenizer.decode(ids[:half])!r} ... {tokenizer.decode(ids[-half:])!r}"
        lines.append(f"  {name:<{width}}  {shown}")
    return "\n".join(lines)


def _strict_verdict(report: LintReport, strict: bool) -> str | None:
    try:
        report.raise_if_strict(strict)
    except UserError as error:
        return f"data.strict is set, so training would stop: {error}"
    return None
