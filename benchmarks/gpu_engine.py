"""The engine on a CUDA machine: its attention backends, and one training step in each of its ways.

Every model is built here, of random weights: nothing is read from disk but a config.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple, get_args, get_type_hints

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu_cuda import no_wait
from benchmarks.gpu_table import Check, Context, SkippedError

SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    # Weights large enough that attention is no plain average.
    "initializer_range": 0.08,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
GROUPED = {**SIZES, "num_attention_heads": 8, "num_key_value_heads": 1}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **SIZES},
    "qwen3, head dim 128, heads 8:1": {"model_type": "qwen3", **GROUPED, "head_dim": 128},
    "mistral, window": {"model_type": "mistral", **SIZES, "sliding_window": 5},
    "gemma2, softcap, head dim 256": {"model_type": "gemma2", **SIZES, "head_dim": 256, "sliding_window": 5},
    "gpt-oss, sinks": {
        "model_type": "gpt_oss",
        **SIZES,
        "head_dim": 64,
        # All of the experts, always: which ones a token takes must not hang on rounding.
        "num_local_experts": 2,
        "num_experts_per_tok": 2,
        "sliding_window": 5,
    },
}
EXPERTS = {
    "model_type": "qwen3_moe",
    **SIZES,
    "head_dim": 64,
    # Every token goes to every expert: rounding that changes a route would change everything after it.
    "num_experts": 4,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 128,
}

HYBRID = {
    "model_type": "qwen3_5_text",
    **SIZES,
    "num_hidden_layers": 4,
    "head_dim": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
}
"""Three layers of linear attention, then one of attention."""


@dataclass(frozen=True)
class Way:
    """How a step is trained, where it is not the default."""

    model: dict[str, Any] = field(default_factory=dict)
    loss: dict[str, Any] = field(default_factory=dict)
    responses: int = 2
    pairs: tuple[tuple[int, int], ...] | None = None
    optim: dict[str, Any] = field(default_factory=dict)
    checkpointing: bool | Literal["selective"] = False
    offload: bool = False
    kernels: str = "none"
    family: str = "qwen3, head dim 128, heads 8:1"
    dtype: str = "bfloat16"


WAYS = {
    "full": Way(),
    "full, float32": Way(dtype="float32"),
    "LoRA": Way(model={"lora": {"r": 4}}),
    "gradient checkpointing": Way(checkpointing=True),
    "activation offload": Way(offload=True),
    "mixture of experts": Way(family="qwen3_moe"),
    "K = 3, plackett_luce": Way(loss={"loss_type": "plackett_luce"}, responses=3),
    "scored, pairs of one prompt": Way(responses=3, pairs=((0, 1), (0, 2), (1, 2))),
    "loss by lengths": Way(loss={"loss_type": ("ipo", "sft")}),
    "pairs coupled": Way(loss={"loss_type": "aot"}),
    "no reference": Way(loss={"loss_type": "simpo"}),
    "LoRA, loss by lengths": Way(model={"lora": {"r": 4}}, loss={"loss_type": "simpo"}),
    "linear attention": Way(family="qwen3_5_text"),
    "selective checkpointing": Way(checkpointing="selective"),
    "kernels liger": Way(kernels="liger"),
    "master_weights stochastic": Way(optim={"master_weights": "stochastic"}),
    "master_weights kahan, optim.offload": Way(optim={"master_weights": "kahan", "offload": True}),
    "stochastic, adamw_8bit": Way(optim={"master_weights": "stochastic", "optimizer": "adamw_8bit"}),
    "paged_adamw": Way(optim={"optimizer": "paged_adamw"}),
    "paged_adamw_8bit": Way(optim={"optimizer": "paged_adamw_8bit"}),
    # what is compiled takes longest
    "LoRA, kernels compile, checkpointing": Way(model={"lora": {"r": 4}}, kernels="compile", checkpointing=True),
}


def backends() -> list[str]:
    """Every attention backend that a configuration may name."""
    from engine.config.schema import ModelConfig

    return [name for name in get_args(get_type_hints(ModelConfig)["attention"]) if name != "auto"]


def attention_checks(context: Context) -> Iterator[Check]:
    for family, config in FAMILIES.items():
        for backend in backends():
            yield Check(f"{backend}: {family}", partial(_attention, context, config, backend))


def step_checks(context: Context) -> Iterator[Check]:
    for name, way in WAYS.items():
        yield Check(name, partial(_train_steps, context, way))


def build_policy(
    context: Context,
    config: dict[str, Any],
    dtype: str,
    *,
    checkpointing: Any = False,
    weights_dtype: Any = "float32",
    **model: Any,
):
    """A policy of random weights on the device, the same for the same config.

    Args:
        weights_dtype: of weights that are trained.

    Raises:
        SkippedError: it cannot run here, with the engine's own reason.
    """
    from transformers import AutoConfig

    from engine.config.load import build_config
    from engine.errors import UserError
    from engine.model import load_policy

    with tempfile.TemporaryDirectory() as folder:
        values = dict(config)
        AutoConfig.for_model(values.pop("model_type"), **values).save_pretrained(folder)
        section = {"model_name_or_path": folder, "dtype": dtype, **model}
        settings = build_config({"model": section, "data": {"dataset_name": "unused"}}, "benchmark").model
        torch.manual_seed(0)
        try:
            with context.device:
                policy = load_policy(
                    settings,
                    device=context.device,
                    gradient_checkpointing=checkpointing,
                    empty=True,
                    weights_dtype=weights_dtype,
                )
        except UserError as reason:
            raise SkippedError(str(reason)) from reason
    return policy.train()


def random_groups(
    count: int, *, prompt: tuple[int, int], response: tuple[int, int], responses: int, vocab: int, pairs: Any = None
):
    """Groups with prompts and responses of uneven lengths, drawn from ranges; ``responses`` of 0 is one to three."""
    from engine.data.groups import PreferenceGroup

    generator = np.random.default_rng(0)

    def draw(bounds: tuple[int, int]) -> np.ndarray:
        return generator.integers(2, vocab, int(generator.integers(*bounds)), dtype=np.int32)

    return [
        PreferenceGroup(i, draw(prompt), tuple(draw(response) for _ in range(responses or 1 + i % 3)), pairs=pairs)
        for i in range(count)
    ]


class Scores(NamedTuple):
    """Of one backend: log-probs [N], and the gradient of their mean with respect to all weights, flat."""

    logps: Tensor
    gradient: Tensor


def _attention(context: Context, config: dict[str, Any], backend: str) -> dict[str, Any]:
    """A backend is right when its error against segments one by one in float32 is at most twice that of these in the
    compute dtype."""
    from engine.errors import BackendError
    from engine.packing import build_batch

    scale = 1 if context.dry_run else 40
    config = {**config, **({"sliding_window": 5 * scale} if "sliding_window" in config else {})}
    groups = random_groups(6, prompt=(2 * scale, 9 * scale), response=(scale, 7 * scale), responses=0, vocab=512)
    batch = build_batch(groups).to(context.device)
    policy = build_policy(context, config, "bfloat16", attention=backend)
    try:
        found = _score(policy, batch)
    except BackendError as reason:
        raise SkippedError(str(reason)) from reason
    again = _score(policy, batch)
    exact = _score(build_policy(context, config, "float32", attention="sdpa"), batch)
    plain = _score(build_policy(context, config, "bfloat16", attention="sdpa"), batch)
    errors, allowed = _distance(found, exact), _distance(plain, exact)
    same = all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    close = all(e <= 2 * p + 1e-5 for e, p in zip(errors, allowed, strict=True))
    columns = {"logp error, nats": errors[0], "gradient error": errors[1], "of sdpa": list(allowed)}
    return {"ok": close and same, **columns, "same bits twice": same, "note": policy.backend.reason}


def _score(policy: Any, batch: Any) -> Scores:
    policy.zero_grad(set_to_none=True)
    logps = policy.logps(batch)
    logps.mean().backward()
    return Scores(logps.detach(), _gradient(policy))


def _gradient(policy: Any) -> Tensor:
    return torch.cat([p.grad.flatten().float() for p in policy.parameters() if p.grad is not None])


def _distance(scores: Scores, exact: Scores) -> tuple[float, float]:
    """Largest difference of a log-prob; |difference| / |gradient|."""
    logps = (scores.logps - exact.logps).abs().max().item()
    return logps, ((scores.gradient - exact.gradient).norm() / exact.gradient.norm()).item()


def step_of_groups(groups: Any, objective: Any, device: torch.device) -> Any:
    """A step of one pack whose references are 0."""
    from engine.forecast.counting import step_of
    from engine.train.feed import build_pack

    responses = sum(len(group.response_ids) for group in groups)
    references = torch.zeros(responses) if objective.needs_reference else None
    return step_of(build_pack(groups, references, share_prompts=True).to(device))


def _train_steps(context: Context, way: Way) -> dict[str, Any]:
    """Loss and gradient against float32 with segments one by one, bits of two passes, and steps that never wait."""
    from engine.config.schema import LossConfig, OptimConfig
    from engine.errors import UserError
    from engine.model import check_packing
    from engine.model.layouts import describe_layout
    from engine.train.objective import Objective
    from engine.train.optimizer import GuardedUpdate, build_optimizer, build_schedule

    scale = 1 if context.dry_run else 20
    family = {"qwen3_moe": EXPERTS, "qwen3_5_text": HYBRID}.get(way.family) or FAMILIES[way.family]
    optim = OptimConfig(learning_rate=1e-4, **way.optim)
    sizes: dict[str, Any] = {"prompt": (3 * scale, 9 * scale), "response": (2 * scale, 7 * scale), "vocab": 512}
    groups = random_groups(4, **sizes, responses=way.responses, pairs=way.pairs)
    options = {"checkpointing": way.checkpointing, "weights_dtype": optim.weights_dtype, **way.model}
    policy = build_policy(context, family, way.dtype, **options)
    if family is HYBRID:
        # which modules want rows is found out by trying
        check_packing(policy)
        policy.train()
    fuse(context, policy, way.kernels)
    plain_attention = {**way.model, "attention": "sdpa"}
    policy.activation_offload = way.offload
    objective = Objective(LossConfig(**way.loss))
    step = step_of_groups(groups, objective, context.device)

    def run(model: Any) -> tuple[float, Tensor]:
        model.zero_grad(set_to_none=True)
        loss = objective.backward(model, step).losses.double().mean().item()
        return loss, _gradient(model)

    (loss, gradient), (_, again) = run(policy), run(policy)
    exact_loss, exact = run(_like(policy, build_policy(context, family, "float32", **plain_attention)))
    plain_loss, plain = run(_like(policy, build_policy(context, family, way.dtype, **plain_attention)))
    error, allowed = (((g - exact).norm() / exact.norm()).item() for g in (gradient, plain))
    same = torch.equal(gradient, again)

    try:
        optimizer, _ = build_optimizer(policy.model, optim)
    except UserError as reason:
        raise SkippedError(str(reason)) from reason
    update = GuardedUpdate(optimizer, build_schedule(optimizer, optim, total_steps=10), max_grad_norm=1.0)
    policy.zero_grad(set_to_none=True)
    losses = []

    def train() -> None:
        scored = objective.backward(policy, step)
        losses.append(scored.losses.mean())
        update.step(losses[-1])

    train()
    # some optimizers take no verdict on the device, so the host asks for it in every step
    with no_wait(context) if update.deferred else nullcontext():
        for _ in range(3):
            train()
    ok = same and update.ok() and losses[-1].item() < losses[0].item() and error <= 2 * allowed + 1e-4
    # A loss is right by chance in places: rounding alone may move it by this share.
    ok = ok and abs(loss - exact_loss) <= 2 * abs(plain_loss - exact_loss) + 0.01 * abs(exact_loss)
    columns = {"loss": loss, "loss in float32": exact_loss, "gradient error": error, "of sdpa": allowed}
    columns |= {"same bits twice": same, "loss after 3 steps": losses[-1].item()}
    words = describe_layout(policy) if policy.layout.kind == "mixers" else ""
    return {"ok": ok, **columns, "note": ", ".join(filter(None, [policy.backend.name, words]))}


def fuse(context: Context, policy: Any, kernels: Any) -> None:
    """Kernels for the blocks of a policy.

    Raises:
        SkippedError: they cannot be used here, with the engine's own reason.
    """
    from engine.errors import UserError
    from engine.model.kernels import compiled
    from engine.model.kernels.choice import fuse_blocks

    if context.dry_run:
        # the same calls without generated code, which takes a minute to compile
        compiled.BACKEND = "eager"
    try:
        fuse_blocks(policy, kernels)
    except UserError as reason:
        raise SkippedError(str(reason)) from reason


def _like(policy: Any, other: Any) -> Any:
    """``other`` with the weights of ``policy``, as those drawn in another dtype are others, and padded rows."""
    from engine.model.layouts import use_layout

    other.load_state_dict(policy.state_dict())
    use_layout(other, policy.layout._replace(joined=False))
    return other
