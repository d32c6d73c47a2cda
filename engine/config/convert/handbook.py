"""The alignment-handbook: TRL's keys in a YAML, with mixtures of data sets of its own."""

from __future__ import annotations

from typing import Any

from ...errors import UserError
from .entries import Entry, hold_out, put_data, put_evaluation
from .reading import Reading, Trainer
from .rules import Left, Read, Rule, each, words
from .transformers_keys import TRL_KEYS

RULES: dict[str, Rule] = {
    **each("dataset_mixer dataset_splits dataset_configs dataset_mixture", Read("`data`; weights are shares of a set")),
    **each("chat_template", Read("stops, unless it names a Jinja file for `data.chat_template`")),
    **each("label_smoothing", Read("`loss.label_smoothing`, for sigmoid, too")),
    **each("auto_insert_empty_system_msg system_prompt", Left("new", "not supported; dropped", (False,))),
    **each(
        "preprocessing_num_workers callbacks benchmarks hub_model_revision num_completions",
        Left("told", "no part in what is learned"),
    ),
    **each("wandb_entity wandb_project wandb_run_group", Left("told", "wandb reads its environment variables")),
}  # fmt: skip


def read(reading: Reading) -> None:
    """The keys that mean something together."""
    file = reading.file
    if (text := file.take("chat_template")) is not None:
        if "\n" in str(text) or "{" in str(text):
            reading.stop("chat_template", "a template is read from a file", "write it to one and name that")
        else:
            reading.put("data.chat_template", str(text), "chat_template")
    if smoothing := file.number("label_smoothing", 0.0):
        reading.put("loss.label_smoothing", smoothing, "label_smoothing")
    mixer, mixture = file.take("dataset_mixer"), file.take("dataset_mixture")
    if mixer is not None:
        _mixer(reading, mixer)
    elif mixture is not None:
        _mixture(reading, mixture)
    has_data = {"eval_fraction", "eval_dataset_name", "datasets"} & set(reading.values.get("data", {}))
    if (mixer is not None or mixture is not None) and not has_data & {"eval_fraction", "eval_dataset_name"}:
        strategy = file.take("eval_strategy", "no")
        if strategy not in ("no", False):
            reading.changes("eval_strategy", f"{strategy}: there are no rows to evaluate")
        file.take("eval_steps")


def _mixer(reading: Reading, mixer: Any) -> None:
    """``{name: share}``: the first rows of each split whose name says train, and all of those that say test."""
    file = reading.file
    if not isinstance(mixer, dict):
        raise UserError(f"{file.where('dataset_mixer')}: expected a mapping of names to shares")
    splits = file.take("dataset_splits") or ["train", "test"]
    configs = file.take("dataset_configs") or [None] * len(mixer)
    train = [str(split) for split in splits if "train" in str(split)]
    test = [str(split) for split in splits if "test" in str(split)]
    named = zip(mixer.items(), configs, strict=False)
    entries = [
        Entry(str(name), config, split, fraction=file.as_number("dataset_mixer", share))
        for (name, share), config in named
        for split in train
    ]
    put_data(reading, "dataset_mixer", entries)
    if test and file.keys.get("eval_strategy", "no") not in ("no", False):
        if len(mixer) > 1 or len(test) > 1:
            reading.changes("dataset_splits", f"{', '.join(test)} of {len(mixer)} sets are not evaluated together; set "
                            "data.eval_dataset_name")  # fmt: skip
        else:
            put_evaluation(reading, "dataset_splits", Entry(str(next(iter(mixer))), configs[0], test[0]))


def _mixture(reading: Reading, mixture: Any) -> None:
    """``{datasets: [{id, config, split, columns, weight}], test_split_size}``, as the newer handbook has it."""
    file = reading.file
    listed = mixture.get("datasets") if isinstance(mixture, dict) else None
    if not isinstance(listed, list) or not all(isinstance(one, dict) and one.get("id") for one in listed):
        raise UserError(f"{file.where('dataset_mixture')}: expected a list of datasets, each with an id")
    entries = [
        Entry(
            str(one["id"]),
            None if one.get("config") is None else str(one["config"]),
            str(one.get("split", "train")),
            fraction=file.as_number("dataset_mixture", one.get("weight", 1.0)),
        )
        for one in listed
    ]
    if any(entry.fraction != 1 for entry in entries):
        reading.changes("dataset_mixture", "the handbook draws its share of a set at random; here it is other rows")
    put_data(reading, "dataset_mixture", entries)
    if (size := mixture.get("test_split_size")) is not None:
        hold_out(reading, "dataset_mixture", file.as_number("dataset_mixture.test_split_size", size))


HANDBOOK = Trainer(
    name="alignment-handbook",
    marks=words("dataset_mixture dataset_splits dataset_configs auto_insert_empty_system_msg"),
    rules=RULES,
    defaults={"router_aux_loss_coef": 0.0},
    read=read,
    same_names=TRL_KEYS - set(RULES),
)
