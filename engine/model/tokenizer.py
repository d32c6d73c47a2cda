"""The tokenizer of a model: all that reading data needs of it. No part of transformers is loaded that models need."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

from .. import distributed
from ..config.schema import ModelConfig
from ..errors import UserError
from ..paths import expanded
from .adapter_forms import base_of_adapter, is_adapter
from .sources import check_folder, first_line, hub_options, needs_own_code, not_found

_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken")


def leave_torch_out() -> None:
    """Have transformers take torch for absent, in a process that does nothing but read data: most of what reading
    costs is the import of torch. Nothing changes where either of the two is imported already.
    """
    if {"torch", "transformers"} & sys.modules.keys():
        return
    advice = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    given = os.environ.get(advice)
    os.environ[advice] = "1"
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        # It asks once and keeps the answer; what needs torch by itself finds it afterwards.
        importlib.import_module("transformers.tokenization_utils_base")
    finally:
        del sys.modules["torch"]
        if given is None:
            del os.environ[advice]
        else:
            os.environ[advice] = given


def leave_activations_out() -> None:
    """Have transformers not check the names of activations in configs, in a process that loads no model.

    To know them it would import all that its layers may run on: distributed tensors, kernels, quantised matrices. That
    is half of the time that a tokenizer takes to load.
    """
    from transformers.utils import import_utils

    found = import_utils.is_torch_available
    import_utils.is_torch_available = lambda: False
    try:
        importlib.import_module("transformers.utils.type_validators")
    except ImportError:
        # Another version of transformers checks them elsewhere, or not at all.
        return
    finally:
        import_utils.is_torch_available = found


def load_tokenizer(model: ModelConfig):
    """The tokenizer of a model.

    Raises:
        UserError: there is none at the given place.
    """
    from transformers import AutoTokenizer

    source = model.tokenizer_name_or_path or model.model_name_or_path
    field = "tokenizer_name_or_path" if model.tokenizer_name_or_path else "model_name_or_path"
    check_folder(source, f"model.{field}=")
    if field == "model_name_or_path" and is_adapter(expanded(source)) and base_of_adapter(source) is not None:
        raise not_a_model(f"model.{field}={source}")
    options = hub_options(source, f"model.{field}=")
    try:
        with distributed.local_main_first(source):
            return AutoTokenizer.from_pretrained(
                source, revision=model.revision, trust_remote_code=model.trust_remote_code, **options
            )
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        if (own_code := needs_own_code(f"model.{field}={source}", error)) is not None:
            raise own_code from error
        if not Path(source).is_dir():
            raise not_found(f"model.{field}={source}", error) from error
        has_files = any(next(Path(source).glob(names), None) for names in _FILES)
        why = first_line(error) if has_files else "the folder has no file of one, such as tokenizer.json"
        raise UserError(
            f"model.{field}={source} has no tokenizer that loads: {why}; "
            "set model.tokenizer_name_or_path to a folder or Hub id that has one"
        ) from error


def not_a_model(source: str) -> UserError:
    return UserError(
        f"{source} is an adapter, not a model: give the base model here and the adapter in "
        "model.adapter_name_or_path, or merge it into its base with `dpo merge`"
    )
