"""The keys of TRL that say which model is trained: precision, adapters, quantisation; and how keys are taken at all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import UserError
from .trl_conversion import Conversion, Note
from .trl_file import TrlFile
from .trl_keys import COMPARED

_OWN = ("model_revision", "dtype", "attn_implementation", "trust_remote_code", "router_aux_loss_coef")
"""Arguments of ``from_pretrained`` that are keys of TRL's, too."""
_LOADING = (
    *("device_map", "use_cache", "low_cpu_mem_usage", "token", "cache_dir", "max_memory", "local_files_only"),
    *("output_router_logits", "use_safetensors", "tp_plan", "force_download", "offload_folder", "use_kernels"),
    *("bnb_4bit_compute_dtype", "bnb_4bit_quant_storage", "quant_method"),
)
_ATTENTION = {"flash_attention_2": "flash", "sdpa": "sdpa"}


class Keys:
    """Keys of TRL on their way into the sections of ``result``.

    ``given`` are sections that are known already; ``stops`` are reasons not to convert.
    """

    def __init__(self, trl: TrlFile, trainer: str, values: Mapping[str, Mapping[str, Any]]) -> None:
        self.trl, self.name = trl, trainer
        self.given = {section: dict(given) for section, given in values.items()}
        self.result = Conversion(trl.source, trainer=trainer)
        self.stops: list[UserError] = []

    def _put(self, section: str, key: str, value: Any, old: str) -> None:
        self.result.values[section][key] = value
        self._same(old, f"-> {section}.{key} {value}")

    def _copy(self, section: str, *keys: str) -> None:
        for key in keys:
            if key in self.trl.keys:
                self.result.values[section][key] = self.trl.take(key)

    def _same(self, key: str, text: str) -> None:
        compared = self.name == "TRL" and key in COMPARED
        self.result.notes.append(Note(key, "same" if compared else "told", text))

    def _new(self, key: str, text: str) -> None:
        self.result.notes.append(Note(key, "new", text))

    def _stop(self, key: str, text: str) -> None:
        self.stops.append(UserError(f"{self.trl.where(key)}: {text}; remove the key to convert without it"))

    def _steps(self, key: str, value: Any) -> int | float:
        """Steps, or a share of all steps below 1, as here."""
        number = self.trl.as_number(key, value)
        return number if number < 1 else int(number)


class ModelKeys(Keys):
    """Those of the section ``model``."""

    def _model(self) -> None:
        kwargs = self.trl.mapping("model_init_kwargs")
        for old, new in (("revision", "model_revision"), ("torch_dtype", "dtype")):
            if old in kwargs:
                kwargs[new] = kwargs.pop(old)
        kwargs |= kwargs.pop("quantization_config", None) or {}
        if "bnb_4bit_use_double_quant" in kwargs:
            kwargs["use_bnb_nested_quant"] = kwargs.pop("bnb_4bit_use_double_quant")
        for key in (*_OWN, *(f"load_in_{bits}bit" for bits in (4, 8)), "bnb_4bit_quant_type", "use_bnb_nested_quant"):
            if key in kwargs and key not in self.trl.keys:
                self.trl.keys[key] = kwargs.pop(key)
                self.trl.names[key] = f"model_init_kwargs.{key}"
        for key, value in kwargs.items():
            if key in _LOADING:
                self._same(f"model_init_kwargs.{key}", "how the model is loaded is decided here")
            elif value is not None:
                text = f"{key} changes the model, which is trained as it is"
                self.stops.append(
                    UserError(f"{self.trl.where('model_init_kwargs')}: {text}; remove it to convert without")
                )
        self._copy("model", "model_name_or_path", "tokenizer_name_or_path", "trust_remote_code")
        revision = self.trl.take("model_revision", "main")
        if revision != "main":
            self._put("model", "revision", str(revision), "model_revision")
        self._precision()
        attention = self.trl.take("attn_implementation")
        if isinstance(attention, str) and attention in _ATTENTION:
            self._put("model", "attention", _ATTENTION[attention], "attn_implementation")
        elif attention is not None:
            self._same("attn_implementation", f"{attention} is not one of ours; model.attention auto takes the fastest")
        self._lora()

    def _precision(self) -> None:
        fp16, bf16 = self.trl.flag("fp16"), self.trl.take("bf16")
        given = self.trl.take("dtype", self.trl.take("torch_dtype"))
        held = given or "float32"
        if fp16:
            self._new("fp16", "float16 is not supported; model.dtype bfloat16 has its speed without loss scaling")
        computed = "bfloat16" if fp16 or bf16 in (None, True) or held in ("bfloat16", "float16") else "float32"
        if bf16 is not None:
            self._same("bf16", f"-> model.dtype {computed}")
        self.result.values["model"]["dtype"] = computed
        if held in ("bfloat16", "float16", "auto") and not self.trl.keys.get("use_peft"):
            self._new(
                "dtype",
                f"{self.name} trains the weights in {held}, which rounds small updates away; here trained weights are "
                f"float32, which takes more memory, and compute in model.dtype {computed}; they are stored as float32, "
                "too, unless train.save_dtype is bfloat16; optim.master_weights stochastic holds them in bfloat16 and "
                "rounds updates at random, so that they add up",
            )
        elif held == "float16":
            self._new("dtype", f"float16 -> model.dtype {computed}, which the frozen base is held in, too")
        elif given == "float32":
            self._same("dtype", f"weights are float32, and compute in model.dtype {computed}")
        elif held != "float32":
            self._same("dtype", f"{held} -> model.dtype {computed}, which the frozen base is held in, too")

    def _lora(self) -> None:
        defaults = {"r": 16, "alpha": 32, "dropout": 0.05, "target_modules": None}
        variants = {name: self.trl.flag(name) for name in ("use_rslora", "use_dora")}
        given = [name for name in defaults if f"lora_{name}" in self.trl.keys]
        values = {name: self.trl.take(f"lora_{name}", default) for name, default in defaults.items()}
        if copies := self.trl.take("lora_modules_to_save"):
            given.append("modules_to_save")
            values["modules_to_save"] = [copies] if isinstance(copies, str) else copies
        if parameters := self.trl.take("lora_target_parameters"):
            given.append("target_parameters")
            values["target_parameters"] = [parameters] if isinstance(parameters, str) else parameters
        if not self.trl.flag("use_peft"):
            for key in (*(f"lora_{name}" for name in given), *(name for name, used in variants.items() if used)):
                self._same(key, "no effect without use_peft")
            self._quantization(trains_adapter=False)
            return
        if values["target_modules"] == ["all-linear"]:
            values["target_modules"] = "all-linear"
        values |= {name: True for name, used in variants.items() if used}
        self.result.values["model"]["lora"] = values
        self._same("use_peft", f"-> model.lora; the adapter switched off is the reference, as in {self.name}")
        for name in given:
            self._same(f"lora_{name}", f"-> model.lora.{name}")
        if "target_modules" not in given:
            self._same("lora_target_modules", f"not given: null, which is peft's own choice, as in {self.name}")
        if "dropout" not in given:
            self._same("lora_dropout", f"not given: {self.name}'s default, 0.05")
        self._quantization(trains_adapter=True)

    def _quantization(self, *, trains_adapter: bool) -> None:
        four = self.trl.flag("load_in_4bit")
        kind, nested = self.trl.take("bnb_4bit_quant_type", "nf4"), self.trl.flag("use_bnb_nested_quant")
        if self.trl.take("bnb_4bit_quant_storage") is not None:
            self._same("bnb_4bit_quant_storage", "how 4-bit weights lie in memory is decided here")
        if not four:
            if kind != "nf4":
                self._same("bnb_4bit_quant_type", "no effect without load_in_4bit")
            return
        if not trains_adapter:
            self._new(
                "load_in_4bit", "a quantised model can only be trained with adapters; all weights are trained in full"
            )
            return
        self._put("model", "quantization", str(kind), "load_in_4bit")
        if not nested:
            self._new("use_bnb_nested_quant", "false: here the scales of 4-bit weights are always quantised, too")
