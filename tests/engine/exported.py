"""What is measured is what is written: the model folder of a run, loaded by transformers and peft alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from engine.config import load_config
from engine.config.schema import ModelConfig
from engine.data import load_dataset_groups
from engine.model import load_tokenizer
from engine.model.load import DTYPES
from engine.model.quantization import use_one_product

RELATIVE = {"float32": 2e-6, "bfloat16": 2e-3}
"""Of a sum of log-probs, by what is computed in: packs and plain sequences round at other places."""


def plain_model(run: Path, model: ModelConfig) -> Any:
    """What ``run`` describes, held as it was trained: a whole model in float32, an adapter on its base."""
    if not (run / "adapter_config.json").exists():
        return AutoModelForCausalLM.from_pretrained(run, dtype=torch.float32, attn_implementation="eager").eval()
    import peft

    options: dict[str, Any] = {"dtype": DTYPES[model.dtype], "attn_implementation": "eager"}
    if model.quantization:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=model.quantization,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=DTYPES[model.dtype],
        )
    base = AutoModelForCausalLM.from_pretrained(model.model_name_or_path, **options)
    if model.quantization:
        # bitsandbytes repacks weights on some CPUs, to compute with them in bfloat16.
        use_one_product(base)
    return peft.PeftModel.from_pretrained(base, run).eval()


def plain_logps(model: Any, dataset, dtype: torch.dtype) -> torch.Tensor:
    """float64 [S]: log-prob sums of all responses, one plain sequence at a time."""
    sums = []
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        for group in dataset:
            start = len(group.prompt_ids)
            for response in group.response_ids:
                ids = torch.tensor([*group.prompt_ids.tolist(), *response.tolist()])
                logps = model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
                sums.append(logps[start - 1 : -1].gather(1, ids[start:, None]).sum())
    return torch.stack(sums)


def assert_written_is_measured(run: Path) -> None:
    """The mean log-probs in ``evaluation.json`` of a finished run are those of the model in its folder."""
    config = load_config(run / "config.yaml")
    dataset, _ = load_dataset_groups(config.data, load_tokenizer(config.model), split="eval")
    logps_S = plain_logps(plain_model(run, config.model), dataset, DTYPES[config.model.dtype])
    measured = json.loads((run / "evaluation.json").read_text())
    found = {"eval_logps/chosen": logps_S[0::2].mean(), "eval_logps/rejected": logps_S[1::2].mean()}
    for name, value in found.items():
        assert measured[name] == pytest.approx(value.item(), rel=RELATIVE[config.model.dtype]), name
