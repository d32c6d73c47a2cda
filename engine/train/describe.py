"""What will run, in words and in the run folder: model, data, packs, steps."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from dpo_kernels import describe

from .. import distributed, mesh
from ..config.schema import RunConfig
from ..data import Report
from ..data.mixture import describe_mixture
from ..data.row_numbers import NumberSummary
from ..durable import write_atomically
from ..errors import counted
from ..model.balance import Balance
from ..model.division import division_words
from ..model.head import head_words
from ..model.kernels.choice import kernels_words
from ..model.layouts import attention_words, describe_layout
from ..model.quantization import num_weights
from ..packing import mixer_padding_words
from ..plain_json import to_json
from ..run_folder import DATA_FILE
from .setup import Setup

_LENGTHS_SAVED = 50_000


def describe_run(setup: Setup) -> str:
    """The block that a run prints before its first step."""
    config, policy, plan = setup.config, setup.policy, setup.plan
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    total = sum(num_weights(p) for p in policy.parameters())
    dtype = str(policy.compute_dtype).removeprefix("torch.")
    held = f", base in {config.model.quantization}" if config.model.quantization else ""
    rows = [
        (
            "model",
            f"{type(policy.causal_lm).__name__}, {_count(trained)} of {_count(total)} parameters trained, "
            f"{dtype}{held}",
        ),
        *([("head", head_words(policy.causal_lm))] if policy.has_adapter else []),
        *([("processes", _process_words(setup))] if distributed.size() > 1 else []),
        ("attention", attention_words(policy)),
        ("kernels", kernels_words(policy)),
        ("layout", describe_layout(policy)),
        *([("mixer padding", f"{plan.mixer_padding:.1%} {mixer_padding_words(plan)}")] if plan.mixer_cells else []),
        ("loss", f"{config.loss.loss_name}, {_loss_op(setup)}"),
        *_balance_rows(setup),
        ("dropout", _dropout_words(config, policy.disabled_dropouts)),
        *((f"data ({name})", _data_words(setup, name)) for name in setup.datasets),
        *_number_rows(setup),
        (
            "packing",
            f"{counted(plan.packs, 'pack')} per {_round(config)}, {plan.fill:.1%} full; {plan.packed_tokens:,} tokens, "
            f"{plan.saved_by_sharing:.1%} saved by sharing prompts",
        ),
        (
            "steps",
            f"{setup.feed.total_steps:,} of {config.packing.pairs_per_step} {_step_unit(setup)}, "
            f"{plan.steps_per_epoch:,} per {_round(config)}",
        ),
        ("reference", setup.references.source),
        *_weights_rows(config),
        *_storage_rows(config),
        *unneeded_rows(config, setup.device.type),
        ("start-up check", _first_loss_words(setup)),
        ("matmul peak", f"{setup.peak_flops / 1e12:.3g} TFLOP/s here in {dtype}, what perf/mfu is a share of"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def _round(config: RunConfig) -> str:
    """What is planned at once."""
    return "window" if config.data.streaming else "epoch"


def _number_rows(setup: Setup) -> list[tuple[str, str]]:
    """What rows have of weights, margins and masks, which change what is learned."""
    words = {name: NumberSummary(dataset).words() for name, dataset in setup.datasets.items()}
    return [(f"rows ({name})", text) for name, text in words.items() if text]


def _process_words(setup: Setup) -> str:
    return f"{distributed.size()} on {setup.device.type}; {division_words()}"


def _loss_op(setup: Setup) -> str:
    chosen = describe(setup.device, setup.policy.compute_dtype)
    objective = setup.objective
    if objective.unpaired:
        passes = "; a pass before it for the divergence" if "kto" in setup.config.loss.loss_types else ""
        return f"linear_kto_loss: {chosen.linear_dpo_loss.impl} ({chosen.linear_dpo_loss.reason}){passes}"
    if mesh.context_size() > 1 or objective.needs_token_logps or (setup.datasets["train"].lengths.responses != 2).any():
        op, choice = "linear_logps", chosen.linear_logps
    else:
        op, choice = "linear_dpo_loss", chosen.linear_dpo_loss
    coupled = "; couples pairs: computed over whole steps, in two passes" if objective.couples_pairs else ""
    return f"{op}: {choice.impl} ({choice.reason}){coupled}"


def _balance_rows(setup: Setup) -> list[tuple[str, str]]:
    wanted = setup.config.loss.router_aux_loss_coef
    balance = Balance.of(setup.policy, wanted)
    if balance is None:
        return []
    source = "the model's own coefficient" if wanted is None else "loss.router_aux_loss_coef"
    passes = setup.plan.packs > setup.plan.steps_per_epoch or distributed.size() > 1
    extra = "; a forward pass more, since steps have several packs" if passes else ""
    return [("experts", f"load-balancing loss of whole steps x {balance.coefficient:g} ({source}){extra}")]


def rounding_words(config: RunConfig) -> str:
    """How the final model is rounded."""
    how = {"nearest": "to nearest", "stochastic": "up or down at random, without bias"}
    return f"{config.train.save_dtype}, rounded {how[config.train.save_rounding]}"


def _weights_rows(config: RunConfig) -> list[tuple[str, str]]:
    how = {"stochastic": "rounded up or down at random", "kahan": "rounded to nearest; what that leaves is kept"}.get(
        config.optim.master_weights
    )
    return [] if how is None else [("weights", f"bfloat16; updates are made in float32 and {how}")]


def _storage_rows(config: RunConfig) -> list[tuple[str, str]]:
    """Said before training, since what is rounded away then is gone."""
    if config.train.save_dtype != "bfloat16":
        return []
    nearest = config.train.save_rounding == "nearest"
    advice = "; small updates are lost, train.save_rounding stochastic keeps their sum" if nearest else ""
    return [("stored as", rounding_words(config) + advice)]


def unneeded_rows(config: RunConfig, device_type: str) -> list[tuple[str, str]]:
    """Options that keep something in host memory, where a run's memory is that already."""
    if device_type != "cpu":
        return []
    options = (
        ("optim.offload", config.optim.offload, "the optimizer's state is in host memory without it"),
        ("train.activation_offload", config.train.activation_offload, "it copies what is in host memory without it"),
    )
    return [("no effect", f"{name} saves nothing on the CPU: {why}") for name, is_on, why in options if is_on]


def _dropout_words(config: RunConfig, disabled: int) -> str:
    adapter = config.model.lora.dropout if config.model.lora else 0.0
    found = f"{disabled:,} probabilities set to 0" if disabled else "it had none"
    return f"disabled in the model ({found})" + (f"; {adapter:g} in the adapters, as configured" if adapter else "")


def _step_unit(setup: Setup) -> str:
    terms_G = setup.datasets["train"].terms
    if setup.objective.unpaired:
        return f"rows ({setup.datasets['train'].desirable_G.mean():.0%} desirable)"
    if (terms_G > 1).any():
        return f"prompts ({terms_G.mean():.1f} pairs each)"
    if _ranks(setup):
        return f"rankings ({setup.datasets['train'].lengths.responses.mean():.1f} responses each)"
    return "pairs"


def _ranks(setup: Setup) -> bool:
    """Whether rows are rankings of more than two responses."""
    dataset = setup.datasets["train"]
    return not dataset.has_pairs.any() and bool((dataset.lengths.responses > 2).any())


def _data_words(setup: Setup, name: str) -> str:
    lint, dataset = setup.lint[name], setup.datasets[name]
    tokens = int(dataset.trained.sizes_P.sum())
    dropped = f", {lint.dropped:,} dropped (`dpo check` says why)" if lint.dropped else ""
    made = f"{len(dataset):,} rows out of pairs: " if len(dataset) > lint.total and dataset.mixture is None else ""
    kept = lint.kept if made else len(dataset)
    words = f"{made}{kept:,} of {lint.total:,} rows{dropped}; {tokens:,} tokens"
    if name == "train" and setup.config.data.streaming:
        words = f"a stream, whose first window has {words}"
    if (fraction := setup.config.data.eval_fraction) is not None:
        part = "without the share" if name == "train" else "the share"
        words += f"; {part} of {fraction:g} of the prompts that is held out (data.eval_fraction)"
    if dataset.mixture is None:
        return words
    sets = "".join(f"\n  {line}" for line in describe_mixture(dataset.mixture, dataset.source_names))
    return f"{words} in {len(dataset.source_names)} sets, {dataset.per_epoch:,} rows an epoch{sets}"


def _first_loss_words(setup: Setup) -> str:
    if setup.first_loss is None:
        return "none: the policy does not start as a stored reference"
    of = " of the two best responses" if _ranks(setup) else " of responses alone" if setup.objective.unpaired else ""
    return f"stored references match; sigmoid loss{of} {setup.first_loss:.6f} (ln 2 = {math.log(2):.6f})"


def write_data_file(setup: Setup, output_dir: Path) -> None:
    """``data.json``: token counts of the training rows (evenly spaced ones when there are many), lint, plan."""
    dataset = setup.datasets["train"]
    lengths = dataset.trained
    stride = math.ceil(len(lengths) / _LENGTHS_SAVED)
    sample = lengths[::stride]
    # The response of an undesirable row is none that was chosen.
    first = dataset.desirable_G[::stride] | ~dataset.labelled_G[::stride]
    record = {
        "lengths": {
            "prompt": [int(n[0]) for n in sample],
            "chosen": [int(n[1]) for n, chosen in zip(sample, first, strict=True) if chosen],
            "rejected": [
                int(x) for n, chosen in zip(sample, first, strict=True) for x in np.asarray(n[2 if chosen else 1 :])
            ],
        },
        "rows_per_length": stride,
        "lint": _lint(setup.lint),
        "plan": asdict(setup.plan),
        "layout": {**setup.policy.layout._asdict(), "words": describe_layout(setup.policy)},
    }
    write_atomically(output_dir / DATA_FILE, to_json(record) + "\n")


def _lint(reports: dict[str, Report]) -> dict[str, Any]:
    """The report of the training data; those of other splits are in it by the names of theirs."""
    found: dict[str, Any] = {name: report.to_dict() for name, report in reports.items()}
    return {**found.pop("train"), **found}


def _count(number: int) -> str:
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.1f}{unit}"
    return str(number)
