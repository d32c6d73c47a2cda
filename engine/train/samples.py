"""Answers to held-out prompts before, during and after training: ``samples.jsonl`` in the folder of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config.schema import RunConfig
from ..data.groups import PreferenceDataset, PreferenceGroup
from ..durable import write_atomically
from ..errors import shortened
from ..model import Policy
from ..model.generation import generate
from ..model.stops import stop_ids
from ..plain_json import to_json
from ..run_folder import SAMPLES_FILE, read_samples

Sample = Mapping[str, Any]
"""``step``, ``row`` and the texts ``prompt``, ``greedy`` and ``sampled``."""
_SHOWN = 2


def distinct_prompts(dataset: PreferenceDataset, count: int) -> list[PreferenceGroup]:
    """The first groups of a dataset whose prompts differ."""
    found: dict[bytes, PreferenceGroup] = {}
    for group in dataset:
        if len(found) == count:
            break
        found.setdefault(group.prompt_ids.tobytes(), group)
    return list(found.values())


def draw_samples(
    policy: Policy, tokenizer: Any, config: RunConfig, dataset: PreferenceDataset, *, step: int
) -> list[dict[str, Any]]:
    """A record for each of ``train.sample_prompts`` prompts: the step, the row, and the texts of the prompt, of the
    most likely answer (``greedy``) and of one drawn at ``train.sample_temperature`` (``sampled``)."""
    groups = distinct_prompts(dataset, config.train.sample_prompts)
    texts = [tokenizer.decode(group.prompt_ids) for group in groups]
    columns = {}
    for name, temperature in (("greedy", 0.0), ("sampled", config.train.sample_temperature)):
        answers = generate(
            policy,
            [group.prompt_ids for group in groups],
            stops=stop_ids(config.model, tokenizer),
            max_new_tokens=config.train.sample_max_new_tokens,
            temperature=temperature,
            seed=config.train.seed,
            tokens_per_batch=config.packing.tokens_per_pack,
        )
        columns[name] = [tokenizer.decode(ids, skip_special_tokens=True) for ids in answers]
    return [
        {"step": step, "row": group.label, "prompt": text, "greedy": greedy, "sampled": sampled}
        for group, text, greedy, sampled in zip(groups, texts, columns["greedy"], columns["sampled"], strict=True)
    ]


def format_samples(samples: Sequence[dict[str, Any]]) -> str:
    """The first of them, a line each, for a terminal."""
    lines = [f"answers after step {samples[0]['step']} (all are in {SAMPLES_FILE}):"]
    for sample in samples[:_SHOWN]:
        lines += [f"  row {sample['row']}, {name}: {shortened(sample[name])}" for name in ("greedy", "sampled")]
    return "\n".join(lines)


def by_prompt(samples: Sequence[Sample]) -> list[Sample]:
    """Those of one prompt beside each other, by step."""
    places: dict[tuple[Any, str], int] = {}
    for sample in samples:
        places.setdefault((sample["row"], sample["prompt"]), len(places))
    return sorted(samples, key=lambda sample: (places[sample["row"], sample["prompt"]], sample["step"]))


def as_markdown(samples: Sequence[Sample]) -> str:
    """Each prompt once, with its answers by step, in blocks that no text ends early."""
    parts: list[str] = []
    before = None
    for sample in by_prompt(samples):
        if (sample["row"], sample["prompt"]) != before:
            before = sample["row"], sample["prompt"]
            parts += [f"## Row {sample['row']}", _block(sample["prompt"])]
        parts += [f"### Step {sample['step']}", "most likely", _block(sample["greedy"])]
        parts += ["drawn", _block(sample["sampled"])]
    return "\n\n".join(parts) + "\n"


def _block(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines() or [""])


def add_samples(output_dir: Path, samples: Sequence[dict[str, Any]]) -> None:
    """Write samples of a step behind those of earlier ones; those of the same step are replaced."""
    step = samples[0]["step"]
    _write(output_dir, [*(old for old in read_samples(output_dir) if old["step"] != step), *samples])


def keep_samples_until(output_dir: Path, step: int) -> None:
    """Drop the samples of steps after ``step``."""
    samples = read_samples(output_dir)
    if any(sample["step"] > step for sample in samples):
        _write(output_dir, [sample for sample in samples if sample["step"] <= step])


def _write(output_dir: Path, samples: Sequence[dict[str, Any]]) -> None:
    write_atomically(output_dir / SAMPLES_FILE, "".join(to_json(sample) + "\n" for sample in samples))
