"""``dpo merge``: an adapter put into the weights of its base, which gives a model that stands alone.

The sum is made in float32 and rounded once, to the dtype that the base is stored in. A base that the run held in 4 bits
is rounded to these first, since that is what the adapter was trained beside.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from .config import load_config
from .config.schema import ModelConfig
from .durable import disk_errors
from .errors import UserError
from .model import Policy, load_adapter, load_tokenizer
from .model.adapter_forms import base_of_adapter, is_adapter
from .model.companions import describe_trained
from .model.layouts import eager_attention
from .model.load import DTYPES, load_policy
from .model.quantization import check_quantization, stored_quantization
from .model.sources import ADAPTER_CONFIG, MODEL_CONFIG, check_folder, hub_options, named_by
from .paths import expanded, names_a_path
from .run_folder import CARD_FILE, CONFIG_FILE
from .train.checkpoint import complete_checkpoints
from .train.export import merged_card, write_model
from .train.storage import dtypes_of

MergedDtype = Literal["auto", "float32", "bfloat16", "float16"]
_DTYPES = {**DTYPES, "float16": torch.float16}
_PROBE = (2, 24)
"""Rows and tokens that the model is asked for before and after."""
_SEED = 0

log = logging.getLogger(__name__)


class Merged(NamedTuple):
    """What ``merge`` has written."""

    folder: Path
    dtype: torch.dtype
    """That most weights are stored in."""
    moved: float
    """The largest difference of a log-prob, in nats, that rounding to it causes on some random tokens."""


def merge(
    source: str,
    output: Path | None = None,
    *,
    base: str | None = None,
    dtype: MergedDtype = "auto",
) -> Merged:
    """Merge the adapter of a run, a checkpoint or a folder that peft wrote into its base, and write the model.

    Args:
        source: the folder of the adapter.
        output: must not exist, or be empty; by default ``source`` with ``-merged`` behind its name.
        base: the model to put it into; by default the one that the run, or the adapter, names.
        dtype: what weights are stored in; ``auto`` is what the base is stored in.

    Raises:
        UserError: no adapter there, a base that is stored quantised or does not load, or a folder that is in use.
    """
    folder = expanded(source)
    _check_source(folder, source)
    output = folder.resolve().with_name(f"{folder.resolve().name}-merged") if output is None else output
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(f"{output} is there already: name another folder with --output")
    model = _base_model(folder, base)
    with named_by("--base ", base):
        kind = stored_quantization(model)
    if kind is not None:
        raise UserError(
            f"the base {model.model_name_or_path} is stored quantised ({kind}), and an adapter cannot be put into such "
            "weights: give the checkpoint in bfloat16 or float32 that it was made of with --base"
        )
    check_quantization(model)
    has_tokenizer = (folder / "tokenizer_config.json").exists()
    named = replace(model, tokenizer_name_or_path=str(folder)) if has_tokenizer else model
    tokenizer = load_tokenizer(named)
    with named_by("--base ", base):
        policy = _load_base(model)
    stored = _stored_dtype(model) if dtype == "auto" else _DTYPES[dtype]
    before = _put_in(policy, folder)
    describe_trained(policy.causal_lm, tokenizer)
    wanted = dtypes_of(policy.causal_lm, stored)
    moved = (_round(policy, wanted) - before).abs().max().item()
    card = _card(folder, output.name, model, stored)
    existed = output.exists()
    with disk_errors(output, elsewhere="choose another --output"):
        output.mkdir(parents=True, exist_ok=True)
        try:
            write_model(output, policy, None, tokenizer, replace(model, quantization=None), stored, card)
        except BaseException:
            if not existed and not any(output.iterdir()):
                output.rmdir()
            raise
    return Merged(output, stored, moved)


def _check_source(folder: Path, source: str) -> None:
    check_folder(source, "")
    if not folder.is_dir():
        raise UserError(f"{source} is no folder: give a run, a checkpoint of one, or the folder of an adapter")
    if is_adapter(folder):
        return
    if (folder / MODEL_CONFIG).exists():
        raise UserError(f"{source} holds a whole model: there is no adapter to merge")
    if checkpoints := complete_checkpoints(folder):
        raise UserError(
            f"{source} is not finished, so it holds no adapter yet: merge {checkpoints[-1][1]}, or --resume"
        )
    raise UserError(f"{source} holds no adapter ({ADAPTER_CONFIG} and its weights): give the output folder of a run")


def _base_model(folder: Path, base: str | None) -> ModelConfig:
    """The base, as the run that made the adapter held it; else as the adapter names it."""
    folder = folder.resolve()
    # What lies beside another folder than a checkpoint may be of any run.
    of_checkpoint = folder in (path for _, path in complete_checkpoints(folder.parent))
    run = folder.parent if of_checkpoint else folder
    if (run / CONFIG_FILE).exists():
        model = replace(load_config(run / CONFIG_FILE).model, lora=None, adapter_name_or_path=None, attention="auto")
    else:
        found = base_of_adapter(str(folder)) if base is None else (base, None)
        assert found is not None
        model = ModelConfig(model_name_or_path=found[0], revision=found[1])
    if base is not None:
        return replace(model, model_name_or_path=base, revision=None)
    name = model.model_name_or_path
    if names_a_path(name) and not expanded(name).is_dir():
        raise UserError(f"the base {name} of {folder} is no folder here: say where it is with --base")
    return model


def _load_base(model: ModelConfig) -> Policy:
    """In float32, on the CPU, with an output layer of its own."""
    cpu = torch.device("cpu")
    policy = load_policy(model if model.quantization else replace(model, dtype="float32"), device=cpu)
    if model.quantization:
        log.info("the base is rounded to %s, as while it was trained, and then written whole", model.quantization)
        causal_lm: Any = policy.causal_lm
        causal_lm.dequantize()
        causal_lm.float()
        policy.compute_dtype = torch.float32
    return policy


def _put_in(policy: Policy, folder: Path) -> Tensor:
    """Merge the adapter in ``folder``; log-probs of some random tokens before it was."""
    causal_lm: Any = policy.causal_lm
    embedding, head = causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()
    configs = {id(c): c for c in (causal_lm.config, causal_lm.config.get_text_config())}.values()
    tied = head.weight is embedding.weight
    ties = [(config, config.tie_word_embeddings) for config in configs if hasattr(config, "tie_word_embeddings")]
    if tied:
        # An adapter on the output layer must not reach the embeddings.
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        for config, _ in ties:
            config.tie_word_embeddings = False
    load_adapter(policy, folder)
    before = _probe(policy)
    policy.model = causal_lm = policy.model.merge_and_unload()  # type: ignore[operator]
    if hasattr(causal_lm, "peft_config"):
        # peft 0.18 leaves it there, and a model that has it counts as an adapted one.
        del causal_lm.peft_config
    embedding, head = causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()
    if tied and torch.equal(embedding.weight, head.weight):
        head.weight = embedding.weight
        for config, was in ties:
            config.tie_word_embeddings = was
    return before


def _round(policy: Policy, wanted: dict[str, torch.dtype]) -> Tensor:
    """Give the weights their dtypes; log-probs of the random tokens with these values, computed in float32."""
    state = policy.causal_lm.state_dict(keep_vars=True)
    floating = {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}
    for name, tensor in floating.items():
        tensor.data = tensor.data.to(wanted.get(name, tensor.dtype)).float()
    after = _probe(policy)
    for name, tensor in floating.items():
        tensor.data = tensor.data.to(wanted.get(name, tensor.dtype))
    return after


def _probe(policy: Policy) -> Tensor:
    """fp32 [rows, tokens, vocabulary]: log-probs after random tokens."""
    generator = torch.Generator().manual_seed(_SEED)
    causal_lm: Any = policy.causal_lm
    ids = torch.randint(len(causal_lm.get_input_embeddings().weight), _PROBE, generator=generator)
    policy.eval()
    with torch.no_grad(), eager_attention(policy):
        return policy.plain_logits(ids).float().log_softmax(-1)


def _stored_dtype(model: ModelConfig) -> torch.dtype:
    """That most weights of the base have, by its config; float32 where that does not say."""
    from transformers import AutoConfig

    options = hub_options(model.model_name_or_path, "model.model_name_or_path=")
    config = AutoConfig.from_pretrained(
        model.model_name_or_path, revision=model.revision, trust_remote_code=model.trust_remote_code, **options
    )
    found = config.dtype or config.get_text_config().dtype
    return found if isinstance(found, torch.dtype) else torch.float32


def _card(folder: Path, name: str, model: ModelConfig, dtype: torch.dtype) -> str:
    """That of the run, for the merged model."""
    stored = str(dtype).removeprefix("torch.")
    merged = f"- **Merged:** the adapter of `{folder.name}` is part of the weights, which are stored in {stored}\n"
    path = folder / CARD_FILE
    return merged_card(path.read_text(encoding="utf-8") if path.is_file() else None, name, model, merged)
