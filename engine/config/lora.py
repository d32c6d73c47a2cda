"""The ``model.lora`` section of the configuration."""

from __future__ import annotations

from dataclasses import dataclass

from .require import require as _require


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters, in the terms of peft. Off unless a key of model.lora is set."""

    r: int = 16
    """Rank of the update."""
    alpha: int = 32
    """The update is scaled by alpha / r."""
    dropout: float = 0.0
    """Dropout on the input of the adapters, while training."""
    target_modules: str | tuple[str, ...] | None = "all-linear"
    """Module names, lm_head among them or not, a pattern, or all-linear (every linear layer but the head); null is
    peft's choice for the model."""
    target_parameters: tuple[str, ...] = ()
    """Parameters that are adapted where they are no layer's, by the end of their names: stacked experts, such as
    mlp.experts.gate_up_proj and mlp.experts.down_proj. Without dropout and DoRA; alone where target_modules is []."""
    modules_to_save: tuple[str, ...] = ()
    """Modules that are trained whole beside the adapters and stored with them, such as lm_head and embed_tokens."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r) instead (rsLoRA)."""
    use_dora: bool = False
    """Train the magnitude of every adapted weight apart from its direction (DoRA); slower."""

    def __post_init__(self) -> None:
        _require(self.r > 0, f"model.lora.r must be positive, got {self.r}")
        _require(self.alpha > 0, f"model.lora.alpha must be positive, got {self.alpha}")
        _require(0 <= self.dropout < 1, f"model.lora.dropout must be in [0, 1), got {self.dropout}")
        _require(
            self.target_modules != () or self.target_parameters != (),
            "model.lora.target_modules must not be empty without model.lora.target_parameters",
        )
        for key, used in (("dropout", self.dropout > 0), ("use_dora", self.use_dora)):
            _require(
                not (used and self.target_parameters),
                f"model.lora.{key} does not work on model.lora.target_parameters: set it to "
                f"{'0' if key == 'dropout' else 'false'}",
            )
