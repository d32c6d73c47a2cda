"""Do modules that take the boundaries of sequences keep to them? Rows end to end beside padded rows, with gradients.

Boundaries are an argument that a module may ignore, hand to kernels that are not installed, or keep to in its forward
pass alone. ``checks.py`` compares log-probs; here each module computes the same inputs in both forms.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .. import distributed
from ..errors import BackendError, out_of_memory
from ..packing.layout import PackedBatch
from ..packing.rows import RowPlan, Segment, plan_rows
from .mixers import InRows, boundary_arguments, class_name
from .policy import Policy
from .side_by_side import results
from .sources import first_line

_ALLOWED = {torch.float32: 1e-2, torch.bfloat16: 0.2}
"""Largest difference of an output or gradient that is rounding, in tensor cores too, relative to its largest element.
What crosses a boundary is off by as much as it is."""


def take_boundaries(model: nn.Module, names: tuple[str, ...]) -> bool:
    """Whether all modules of the named classes take boundaries, so that they may keep to them."""
    rows = plan_rows([Segment(0, 1, 0, 0)], "joined")
    kinds = {type(module) for module in model.modules() if class_name(module) in names}
    return bool(kinds) and all({"cu_seq_lens_q", "seq_idx"} & boundary_arguments(kind, rows).keys() for kind in kinds)


def gradient_difference(policy: Policy, batch: PackedBatch) -> str | None:
    """Why rows end to end would train other numbers than padded rows, or None.

    Args:
        policy: whose layout lays rows end to end; in evaluation mode.
        batch: on the device of the policy.
    """
    padded, joined = (
        plan_rows(batch.plan.segments, blocks).map_tensors(lambda tensor: tensor.to(policy.device))
        for blocks in ("alike", "joined")
    )
    model: Any = policy.causal_lm
    wrapped = [module for module in model.modules() if isinstance(vars(module).get("forward"), InRows)]
    comparisons = [_Comparison(module.forward, padded, joined, _ALLOWED[policy.compute_dtype]) for module in wrapped]
    for module, comparison in zip(wrapped, comparisons, strict=True):
        module.forward = comparison
    policy.train()
    try:
        policy.logps(batch)
    except BackendError:
        raise
    except Exception as error:
        # kernels and compilers raise what they will
        if distributed.lost_connection(error) or out_of_memory(error) is not None:
            raise
        where = next((class_name(c.in_rows.module) for c in comparisons if c.runs), "the model")
        return f"{where} raises {type(error).__name__} with its gradients: {first_line(error)}"
    finally:
        policy.eval()
        for module, comparison in zip(wrapped, comparisons, strict=True):
            module.forward = comparison.in_rows
    different = next((c for c in comparisons if c.found), None)
    return None if different is None else f"{class_name(different.in_rows.module)} gives {different.found}"


class _Comparison:
    """Stands for the forward of a module in rows: computes both forms, compares, and gives the padded one."""

    def __init__(self, in_rows: InRows, padded: RowPlan, joined: RowPlan, allowed: float):
        self.in_rows = in_rows
        self.plans = padded, joined
        self.allowed = allowed
        self.found = ""
        self.runs = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.runs = True
        (output, padded), (_, joined) = (self._run(plan, args, kwargs) for plan in self.plans)
        for name, want in padded.items():
            got = joined.get(name)
            # written so that NaN counts as different
            if got is None or not bool((got - want).abs().max() <= self.allowed * want.abs().max()):
                self.found = self.found or f"another {name}"
        self.runs = False
        return output

    def _run(self, plan: RowPlan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, torch.Tensor]]:
        return results(self.in_rows.module, lambda *a, **k: self.in_rows.compute(plan, a, k), args, kwargs)
