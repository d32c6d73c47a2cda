"""The schema agrees with what it names elsewhere: the loss table, transformers' schedules, its own documentation."""

from __future__ import annotations

import dataclasses
import math
import typing

import pytest
import torch

from dpo_kernels import LOSS_TYPES, preference_loss
from dpo_kernels.kto import KTO_LOSSES
from dpo_kernels.losses import ALIASES
from engine.config import build_config
from engine.config.fields import dataclass_in, iter_keys, type_hints
from engine.config.help import config_help, field_docs
from engine.config.losses import (
    ALONE,
    COUPLED_LOSSES,
    DIVERGENCE_LOSSES,
    LIKELIHOOD_LOSSES,
    LOSS_ALIASES,
    REFERENCE_FREE_LOSSES,
    SMOOTHED_LOSSES,
    UNPAIRED_LOSSES,
    LossConfig,
    LossType,
)
from engine.config.optim import OptimConfig, SchedulerType
from engine.config.schema import RunConfig, TrainConfig
from engine.errors import UserError

PAIR_LOSSES = tuple(name for name in typing.get_args(LossType) if name not in (*ALONE, *LOSS_ALIASES))


def test_loss_names_are_those_of_the_table():
    assert set(PAIR_LOSSES) == set(LOSS_TYPES)
    assert set(KTO_LOSSES) == UNPAIRED_LOSSES < ALONE


def test_what_losses_take_is_what_the_table_says():
    assert dict(ALIASES) == LOSS_ALIASES
    assert {name for name, t in LOSS_TYPES.items() if t.takes_divergence} == DIVERGENCE_LOSSES
    assert {name for name, t in LOSS_TYPES.items() if t.likelihood} == LIKELIHOOD_LOSSES
    assert {name for name, t in LOSS_TYPES.items() if t.couples_pairs} == COUPLED_LOSSES


def test_names_of_others_are_one_loss():
    assert LossConfig(loss_type="dpo") == LossConfig()
    assert LossConfig(loss_type=("dpo", "sft")) == LossConfig(loss_type=("sigmoid", "sft"))
    assert LossConfig(loss_type="dpo_norm").loss_name == "sigmoid_norm"
    assert LossConfig(rpo_alpha=0.2).terms == {"sigmoid": 1.0, "nll": 0.2}
    mixed = LossConfig(loss_type=("sigmoid", "nll"), loss_weights=(1.0, 0.5), rpo_alpha=0.2)
    assert mixed.terms == {"sigmoid": 1.0, "nll": pytest.approx(0.7)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"f_divergence_type": "forward_kl", "loss_type": "apo_zero"}, "has no meaning for loss_type apo_zero"),
        ({"ld_alpha": 1.5}, r"loss.ld_alpha must be in \[0, 1\] or null, got 1.5"),
        ({"rpo_alpha": 0.0}, "loss.rpo_alpha must be positive or null, got 0.0"),
        ({"use_weighting": True, "loss_type": "aot"}, "loss.use_weighting has no meaning for aot"),
        ({"ld_alpha": 0.5, "loss_type": "plackett_luce"}, "loss.ld_alpha is for pairs"),
        ({"ld_alpha": 0.5, "loss_type": ("aot", "sft")}, r"loss.ld_alpha is not supported with aot \+ sft"),
        ({"shift_lambda": 1.5}, r"loss.shift_lambda must be in \(0, 1\], got 1.5"),
        ({"dpop_lambda": -1.0}, "loss.dpop_lambda must not be negative, got -1.0"),
        ({"ld_alpha": 0.0, "loss_type": "plackett_luce"}, "loss.ld_alpha is for pairs"),
        ({"f_alpha_divergence_coef": math.nan}, "loss.f_alpha_divergence_coef must be finite, got nan"),
        ({"dpop_lambda": math.inf}, "loss.dpop_lambda must be finite, got inf"),
        ({"rpo_alpha": math.inf}, "loss.rpo_alpha must be finite, got inf"),
        ({"loss_weights": (math.inf,)}, "loss.loss_weights must be finite, got inf"),
        ({"loss_type": ("nll", "nll"), "loss_weights": (0, 0)}, r"loss.loss_weights leave nothing of nll \+ nll"),
        ({"loss_weights": (0.0,)}, "loss.loss_weights leave nothing of sigmoid: give one"),
    ],
)
def test_options_that_a_loss_does_not_take(options, message):
    with pytest.raises(ValueError, match=message):
        LossConfig(**options)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"reference": {"mode": "stored"}}, "sync_ref_model moves the reference, so it cannot be stored: set"),
        ({"reference": {"mode": "none"}, "loss": {"loss_type": "simpo"}}, "cannot be none: set reference.mode to live"),
        ({"model": {"lora": {"r": 4}}}, "reference.sync_ref_model needs a second model, and with adapters the ref"),
        ({"model": {"adapter_name_or_path": "a"}}, "reference.sync_ref_model needs a second model, and with adapters"),
        ({"loss": {"loss_type": "simpo"}}, "reference.sync_ref_model has no meaning for loss.loss_type simpo, which"),
        ({"reference": {"ref_model_mixup_alpha": 0}}, r"reference.ref_model_mixup_alpha must be in \(0, 1\], got 0"),
        ({"reference": {"ref_model_sync_steps": 0}}, "reference.ref_model_sync_steps must be positive, got 0"),
    ],
)  # fmt: skip
def test_a_reference_that_cannot_move(sections, message):
    values = {"model": {"model_name_or_path": "m"}, "data": {"dataset_name": "d"}}
    for name, section in {"reference": {}, **sections}.items():
        values[name] = {**values.get(name, {}), **section}
    values["reference"]["sync_ref_model"] = True
    with pytest.raises(UserError, match=message):
        build_config(values, "test")


@pytest.mark.parametrize("steps", [500, 0.5, 0.07, 1])
def test_shares_of_all_steps_are_those_of_transformers(steps, tmp_path):
    from transformers import TrainerState, TrainingArguments

    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, save_steps=steps, logging_steps=steps)
    for total in (7, 1000):
        state = TrainerState()
        state.compute_steps(arguments, total)
        train = TrainConfig(save_steps=steps, logging_steps=steps)
        assert train.every("save_steps", total) == state.save_steps
        assert train.every("logging_steps", total) == state.logging_steps
    assert TrainConfig().every("eval_steps", 10) is None
    with pytest.raises(
        ValueError, match=r"train\.save_steps must be a positive whole number of steps or a share below"
    ):
        TrainConfig(save_steps=1.5)


def test_schedules_are_those_of_transformers():
    from transformers.trainer_utils import SchedulerType as Names

    assert set(typing.get_args(SchedulerType)) == {name.value for name in Names}


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_reference_free_losses(name):
    logps, lengths = torch.tensor([-3.0]), torch.tensor([2])
    try:
        preference_loss(logps, logps - 1, loss_type=name, chosen_lengths=lengths, rejected_lengths=lengths)
        needs_reference = False
    except ValueError:
        needs_reference = True
    assert needs_reference == (name not in REFERENCE_FREE_LOSSES)


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_losses_that_read_label_smoothing(name):
    logps = torch.tensor([[-20.0, -30.0, -11.0], [-25.0, -22.0, -40.0]], dtype=torch.float64)
    lengths = torch.tensor([5, 9, 3])

    def value(smoothing: float) -> torch.Tensor:
        return preference_loss(
            *logps, *(logps + 1.5 * logps.cos()), loss_type=name, label_smoothing=smoothing, chosen_lengths=lengths,
            rejected_lengths=lengths + 2,
        ).loss  # fmt: skip

    assert (name in SMOOTHED_LOSSES) == (not torch.equal(value(0.05), value(0.2)))


def test_every_key_is_documented():
    def sections(cls: type) -> list[type]:
        nested = [dataclass_in(hint) for hint in type_hints(cls).values()]
        return [cls, *(s for n in nested if n is not None for s in sections(n))]

    for section in sections(RunConfig):
        plain = [name for name, hint in type_hints(section).items() if dataclass_in(hint) is None]
        assert not [name for name in plain if not field_docs(section).get(name)], section


def test_help_lists_every_key_with_its_default():
    text = config_help(width=100)
    for key, _ in iter_keys():
        assert f"  --{key} " in text
    assert "--loss.beta NUMBER  (default: 0.1)" in text
    assert "--model.model_name_or_path TEXT  (required)" in text
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize(
    ("warmup", "total", "expected"), [(0, 100, 0), (10, 100, 10), (0.1, 100, 10), (0.101, 100, 11), (1, 5, 1)]
)
def test_warmup_is_steps_or_a_share(warmup, total, expected):
    assert OptimConfig(warmup_steps=warmup).num_warmup_steps(total) == expected


def test_one_loss_in_a_list_is_that_loss():
    assert LossConfig(loss_type=("ipo",)) == LossConfig(loss_type="ipo")
    assert LossConfig(loss_type=("sigmoid", "sft")).loss_name == "sigmoid + sft"


@pytest.mark.parametrize(
    ("section", "values", "key"),
    [
        (LossConfig, {"beta": 0.0}, "loss.beta"),
        (LossConfig, {"label_smoothing": 0.5}, "loss.label_smoothing"),
        (LossConfig, {"loss_type": "hinge", "label_smoothing": 0.1}, "loss.label_smoothing"),
        (LossConfig, {"loss_type": ()}, "loss.loss_type"),
        (LossConfig, {"loss_type": ("sft", "plackett_luce")}, "plackett_luce"),
        (LossConfig, {"loss_type": ("sft", "sigmoid"), "loss_weights": (1.0,)}, "loss.loss_weights"),
        (OptimConfig, {"learning_rate": 0.0}, "optim.learning_rate"),
        (OptimConfig, {"warmup_steps": -1}, "optim.warmup_steps"),
        (OptimConfig, {"warmup_steps": 2.5}, "optim.warmup_steps"),
        (OptimConfig, {"adam_beta2": 1.0}, "optim.adam_beta2"),
        (TrainConfig, {"max_steps": 0}, "train.max_steps"),
        (TrainConfig, {"seed": -1}, "train.seed"),
        (TrainConfig, {"eval_steps": 0}, "train.eval_steps"),
        (TrainConfig, {"output_dir": ""}, "train.output_dir"),
    ],
)
def test_values_out_of_range_are_refused_by_name(section, values, key):
    with pytest.raises(ValueError, match=key.replace(".", r"\.")):
        section(**values)


def test_sections_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        LossConfig().beta = 0.2  # type: ignore[misc]
