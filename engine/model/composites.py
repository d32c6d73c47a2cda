"""Checkpoints of several models, of which one computes text: that one is trained, and the whole is written back.

transformers reads the text model alone out of some of them (Llama 4, Qwen3.5), and others as a whole (Gemma 3, Mistral
3). What no text reaches, such as a vision tower, keeps its bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..config.schema import ModelConfig
from .sources import hide_weight_bars, hub_options


def causal_lm_reader(config: Any) -> Any:
    """The transformers class that reads a model which writes text: whole composites where no class reads their text
    model alone, and the class that a checkpoint names where the automatic ones do not know its config.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    known = type(config) in AutoModelForCausalLM._model_mapping
    composite = config.get_text_config() is not config
    own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if known or own_code:
        return AutoModelForCausalLM
    if composite and type(config) in AutoModelForImageTextToText._model_mapping:
        return AutoModelForImageTextToText
    return _named_class(config) or AutoModelForCausalLM


def _named_class(config: Any) -> Any | None:
    """The class of transformers that wrote a checkpoint, such as a text model out of a composite (Emu 3, Mllama)."""
    import transformers

    for name in getattr(config, "architectures", None) or ():
        found = getattr(transformers, name, None)
        if name.endswith("ForCausalLM") and found is not None and found.config_class is type(config):
            return found
    return None


def empty_causal_lm(config: Any, *, trust_remote_code: bool, **options: Any) -> Any:
    """A model as ``causal_lm_reader`` would read it, with the initial weights of its architecture."""
    reader = causal_lm_reader(config)
    if not hasattr(reader, "from_config"):
        return reader._from_config(config, **options)
    return reader.from_config(config, trust_remote_code=trust_remote_code, **options)


def read_causal_lm(name: str, **options: Any) -> Any:
    """As ``AutoModelForCausalLM.from_pretrained``, also of composites that it does not know."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(name, **options)
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        hub = {key: options[key] for key in ("revision", "trust_remote_code", "local_files_only") if key in options}
        reader = causal_lm_reader(AutoConfig.from_pretrained(name, **hub))
        if reader is AutoModelForCausalLM:
            raise
        return reader.from_pretrained(name, **options)


def read_whole(model: ModelConfig, causal_lm: Any) -> Any | None:
    """The whole checkpoint, in the dtype that it is stored in, when ``causal_lm`` is the text model out of it."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    options = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    options |= hub_options(model.model_name_or_path, "model.model_name_or_path=")
    config = AutoConfig.from_pretrained(model.model_name_or_path, **options)
    if config.model_type == causal_lm.config.model_type or config.get_text_config() is config:
        return None
    if type(config) not in AutoModelForImageTextToText._model_mapping:
        return None
    hide_weight_bars()
    with torch.device("cpu"):
        return AutoModelForImageTextToText.from_pretrained(model.model_name_or_path, dtype="auto", **options)


def put_in_whole(whole: Any, causal_lm: Any, weights: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """The state of ``whole`` with the weights of its text model replaced; its configs follow.

    Args:
        weights: the state of ``causal_lm``; None where it holds its own.
    """
    state = whole.state_dict()
    prefixes = {_prefix(causal_lm, causal_lm.get_decoder()): _prefix(whole, whole.get_decoder())}
    head = causal_lm.get_output_embeddings()
    prefixes[_prefix(causal_lm, head)] = _prefix(whole, whole.get_output_embeddings())
    for name, tensor in (causal_lm.state_dict() if weights is None else weights).items():
        ours, theirs = next((a, b) for a, b in prefixes.items() if name.startswith(a))
        assert state[theirs + name.removeprefix(ours)].shape == tensor.shape
        state[theirs + name.removeprefix(ours)] = tensor.detach()
    text, own = whole.config.get_text_config(), causal_lm.config
    for key in ("eos_token_id", "bos_token_id", "pad_token_id"):
        setattr(text, key, getattr(own, key, None))
    if not own.tie_word_embeddings:
        whole.config.tie_word_embeddings = text.tie_word_embeddings = False
    if getattr(causal_lm, "generation_config", None) is not None:
        whole.generation_config = causal_lm.generation_config
    return state


def _prefix(model: nn.Module, part: nn.Module) -> str:
    name = next(name for name, module in model.named_modules() if module is part)
    return f"{name}." if name else ""
