"""The alignment-handbook: TRL's keys in a YAML, with mixtures of data sets of its own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...errors import UserError
from .entries import Entry, hold_out, name_run, put_data, put_evaluation
from .reading import Reading, Trainer, as_list
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
    **each("wandb_entity wandb_run_group", Left("told", "wandb reads its environment variables")),
    "wandb_project": Read("`train.project`"),
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
    name_run(reading, "wandb_project")
    mixer, mixture = file.take("dataset_mixer"), file.take("dataset_mixture")
    if "dataset_name" in file.keys and (mixer is not None or mixture is not None):
        file.take("dataset_name")
        reading.stop("dataset_name", "the file has a mixture of data sets, too", "leave one of them")
    if mixer is not None:
        _mixer(reading, mixer)
    elif mixture is not None:
        _mixture(reading, mixture)
    data = reading.values.get("data", {})
    has_rows = {"eval_fraction", "eval_dataset_name"} & set(data) or any(
        "eval_split" in one for one in data.get("datasets", ())
    )
    if (mixer is not None or mixture is not None) and not has_rows:
        strategy = file.take("eval_strategy", "no")
        if strategy not in ("no", False):
            reading.changes("eval_strategy", f"{strategy}: there are no rows to evaluate")
        if file.take("eval_steps") is not None:
            reading.tell("eval_steps", "no effect without rows to evaluate")


def _mixer(reading: Reading, mixer: Any) -> None:
    """``{name: share}``: the first rows of each split whose name says train, and all of those that say test."""
    file = reading.file
    if not isinstance(mixer, dict) or not mixer:
        raise UserError(f"{file.where('dataset_mixer')}: expected a mapping of names to shares")
    splits = as_list(reading, "dataset_splits", file.take("dataset_splits") or ["train", "test"])
    configs = as_list(reading, "dataset_configs", file.take("dataset_configs") or [None] * len(mixer))
    train = [str(split) for split in splits if "train" in str(split)]
    test = [str(split) for split in splits if "test" in str(split)]
    evaluated = bool(test) and file.keys.get("eval_strategy", "no") not in ("no", False)
    entries = [
        Entry(str(name), config, split, fraction=file.as_number("dataset_mixer", share))
        for (name, share), config in zip(mixer.items(), configs, strict=False)
        for split in train
    ]
    if len(test) > 1:
        reading.stop("dataset_splits", f"{', '.join(test)}: one split is evaluated", "leave one of them")
    elif evaluated and (len(entries) > 1 or not entries[0].is_whole):
        firsts = {entry.name: entry for entry in reversed(entries)}
        entries = [replace(one, eval_split=test[0]) if firsts[one.name] is one else one for one in entries]
    elif evaluated:
        put_data(reading, "dataset_mixer", entries)
        put_evaluation(reading, "dataset_splits", [Entry(entries[0].name, configs[0], test[0])])
        return
    put_data(reading, "dataset_mixer", entries)


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
            drawn=True,
        )
        for one in listed
    ]
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
