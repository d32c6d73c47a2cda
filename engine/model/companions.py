"""What stands beside the weights of a model, and must fit what was trained: special tokens, chat template, processors.

The tokens are aligned as TRL 1.16 and the Trainer of transformers do it, so that generation stops where training did.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from ..config.schema import DataConfig, ModelConfig
from ..data.tokenize import has_own_chat, template_of
from ..errors import UserError
from ..paths import expanded
from .sources import MODEL_CONFIG, first_line, hub_options

_PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "audio_tokenizer_config.json",
    "chat_template.json",
)
_HUB_TROUBLES = ("missing_entries", "connection_errors", "gated_repo")
_TEMPLATE_FILE = "chat_template.jinja"

log = logging.getLogger(__name__)


def take_template(tokenizer: Any, data: DataConfig) -> None:
    """Give the tokenizer the chat template that rows are rendered with, so that it is saved with it.

    Raises:
        UserError: the file cannot be read.
    """
    template = template_of(data)
    if template is not None and not has_own_chat(tokenizer):
        tokenizer.chat_template = template


def describe_trained(causal_lm: Any, tokenizer: Any) -> None:
    """Make the configs of a model fit its tokenizer and its weights. Nothing that it computes changes.

    A tokenizer without a padding token gets its EOS for it, as in TRL.
    """
    changed = align_special_tokens(causal_lm, tokenizer)
    if changed:
        named = ", ".join(f"{name} {value}" for name, value in changed.items())
        log.info("config and generation config follow the tokenizer: %s", named)
    untie_config(causal_lm)
    keep_generation_config(causal_lm)


def align_special_tokens(causal_lm: Any, tokenizer: Any) -> dict[str, int]:
    """Bring EOS, BOS and PAD of config and generation config to the tokenizer's; what it does not define stays.

    Any of several EOS ends a generation, so there its EOS comes first and the others stay.

    Returns:
        The names that changed, with the tokenizer's ids.
    """
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    config, generation = causal_lm.config.get_text_config(), getattr(causal_lm, "generation_config", None)
    targets = [config] if generation is None else [config, generation]
    changed = {}
    for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
        own = getattr(tokenizer, name)
        if own is None or all(own in _as_list(getattr(target, name, None)) for target in targets):
            continue
        changed[name] = own
        for target in targets:
            before = getattr(target, name, None)
            if name == "eos_token_id" and (target is generation or isinstance(before, list)):
                setattr(target, name, [own, *(t for t in _as_list(before) if t not in (own, None))])
            else:
                setattr(target, name, own)
    return changed


def _as_list(value: Any) -> list:
    return value if isinstance(value, list) else [value]


def untie_config(causal_lm: Any) -> None:
    """Say in the config that input and output embeddings are not tied, where they are not.

    A checkpoint that stores both with other values than each other is loaded untied, whatever its config says.
    """
    embedding, head = causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()
    if head is None or embedding.weight is head.weight:
        return
    for config in {id(c): c for c in (causal_lm.config, causal_lm.config.get_text_config())}.values():
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False


class _AsItCame(GenerationConfig):
    """One that may be saved with settings that have no effect, such as a temperature without ``do_sample``.

    Many published ones have such, and load; transformers refuses to save them once a token was aligned.
    """

    def validate(self, strict: bool = False, **options: Any) -> None:  # type: ignore[override]
        super().validate(strict=False, **options)


def keep_generation_config(causal_lm: Any) -> None:
    """Let the generation config of a model be saved with everything that it came with."""
    generation = getattr(causal_lm, "generation_config", None)
    if type(generation) is GenerationConfig:
        causal_lm.generation_config = _AsItCame.from_dict(generation.to_dict())


def set_dtype(config: Any, dtype: torch.dtype) -> None:
    """Name the dtype of the weights in a config and in its parts."""
    config.dtype = dtype
    for name in config.sub_configs:
        if getattr(config, name, None) is not None:
            getattr(config, name).dtype = dtype


def copy_companions(model: ModelConfig, folder: Path) -> None:
    """Copy what the base has beside model and tokenizer: processors of images and sound, and code that comes with it.

    Args:
        folder: holds model and tokenizer; what is there stays.
    """
    # An older form of the template, which the one of the tokenizer replaces.
    old = {"chat_template.json"} if (folder / _TEMPLATE_FILE).exists() else set()
    names = [name for name in _PROCESSOR_FILES if name not in old]
    source = expanded(model.model_name_or_path)
    # The config, which the model has written, says where on this machine the others are.
    wanted = [MODEL_CONFIG, *names]
    found = [source / name for name in wanted] if source.is_dir() else _from_hub(model, wanted)
    if model.trust_remote_code:
        found += [path for parent in {path.parent for path in found} for path in parent.glob("*.py")]
    for path in found:
        if path.name != MODEL_CONFIG and path.is_file() and not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)


def _from_hub(model: ModelConfig, names: list[str]) -> list[Path]:
    """Those of the files that the Hub, or without a connection its cache, has."""
    from transformers.utils import cached_file

    name = model.model_name_or_path
    # A run is not lost for what is missing here and can be copied by hand.
    quiet = dict.fromkeys((f"_raise_exceptions_for_{kind}" for kind in _HUB_TROUBLES), False)
    try:
        options = hub_options(name, "model.model_name_or_path=")
        found = [cached_file(name, file, revision=model.revision, **quiet, **options) for file in names]
    except (OSError, ValueError, UserError) as error:
        log.warning("processors of %s, if it has any, are not written: %s", name, first_line(error))
        return []
    return [Path(path) for path in found if path is not None]
