"""What every launcher shares: checks of layout, tensor descriptors, meta-parameters, and the device to launch on."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from dpo_kernels.head import Head
from dpo_kernels.kernels import hopper
from dpo_kernels.kernels.tile_config import MAX_BLOCK, TileConfig, device_arch, tile_config

INTERPRETING = bool(triton.knobs.runtime.interpret)
COMPILATION = {"enable_fp_fusion": True}
"""Said by every launch, because the default differs between versions of Triton: a product and a sum round once."""


LEAST_CAPABILITY = 8, 0
"""Older chips have no tensor cores for bfloat16: products are emulated, and accumulators spill by the kilobyte."""


def obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels, as imported in this process, cannot run on tensors of a device and dtype; None when they can."""
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"the Triton kernels take bfloat16, float16 or float32, not {str(dtype).removeprefix('torch.')}"
    if device.type == "cpu" and not INTERPRETING:
        return "Triton kernels need a GPU, unless TRITON_INTERPRET=1 is set before triton is imported"
    if device.type != "cpu" and INTERPRETING:
        return "TRITON_INTERPRET=1 was set when triton was imported, and the interpreter takes CPU tensors only"
    return None if device.type == "cpu" else _chip_obstacle(device)


def _chip_obstacle(device: torch.device) -> str | None:
    """Kernels are compiled and checked for NVIDIA chips from Ampere on; on others they may be slow or wrong."""
    if device.type != "cuda":
        return f"the Triton kernels run on NVIDIA GPUs, not on {device.type}"
    if torch.version.hip is not None:
        return "the Triton kernels run on NVIDIA GPUs, and this torch is built for ROCm"
    # Where there is no GPU, tensors of one are fake, and stand for a chip that is not known.
    if not torch.cuda.is_available():
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        found, least = (".".join(map(str, version)) for version in (capability, LEAST_CAPABILITY))
        name = torch.cuda.get_device_name(device)
        return f"the Triton kernels need compute capability {least}, and {name} has {found}"
    return None


def final_scalars(head: Head) -> dict[str, Any]:
    """What a kernel needs that meets final logits."""
    return {
        "logit_scale": head.logit_scale,
        "softcap": 1.0 if head.softcap is None else head.softcap,
        "temperature": head.temperature,
        "HAS_SOFTCAP": head.softcap is not None,
    }


def epilogue_arguments(head: Head) -> dict[str, Any]:
    """What a kernel needs that forms logits from products."""
    has_scale = head.logit_scale != 1.0 or head.temperature != 1.0
    return {**final_scalars(head), "HAS_SCALE": has_scale, "HAS_BIAS": head.bias_V is not None}


class TileLaunch:
    """Arguments that the tile kernels share: operands as pointers or descriptors, strides and meta-parameters.

    hidden_TD and weight_VD have the same dtype and a contiguous last dimension. `config` overrides the shipped table.
    """

    def __init__(
        self,
        kernel: str,
        hidden_TD: torch.Tensor,
        weight_VD: torch.Tensor,
        *,
        heavy: bool,
        config: TileConfig | None = None,
    ) -> None:
        T, D = hidden_TD.shape
        V = weight_VD.shape[0]
        assert weight_VD.shape[1] == D
        assert hidden_TD.dtype == weight_VD.dtype
        assert D == 1 or hidden_TD.stride(1) == weight_VD.stride(1) == 1, "the kernels read rows of contiguous elements"
        aligned = tma_ready(hidden_TD) and tma_ready(weight_VD)
        self.config = config or table_config(kernel, hidden_TD, D=D, V=V, heavy=heavy, aligned=aligned)
        self.num_programs = triton.cdiv(T, self.config.block_n) * triton.cdiv(V, self.config.block_v)
        self.strides = (hidden_TD.stride(0), weight_VD.stride(0))
        use_tma = self.config.tma and aligned
        self.by_hopper = self.config.hopper and aligned and hopper.takes(hidden_TD)
        """Whether ``kernels.hopper`` does what this launch would do."""
        self.hidden: Any = hidden_TD
        self.weight: Any = weight_VD
        if use_tma:
            self.hidden = TensorDescriptor.from_tensor(hidden_TD, [self.config.block_n, self.config.block_d])
            self.weight = TensorDescriptor.from_tensor(weight_VD, [self.config.block_v, self.config.block_d])
        self.meta: dict[str, Any] = {
            "BLOCK_N": self.config.block_n,
            "BLOCK_V": self.config.block_v,
            "BLOCK_D": self.config.block_d,
            "GROUP_N": self.config.group_n,
            "EVEN_D": D % self.config.block_d == 0,
            "USE_TMA": use_tma,
            "PRECISION": precision(hidden_TD.dtype),
            # Half a tile at a time leaves registers for what stands beside it.
            "SPLIT": self.config.block_v == MAX_BLOCK or (heavy and self.config.block_v == MAX_BLOCK // 2),
            "num_warps": self.config.num_warps,
            "num_stages": self.config.num_stages,
            **COMPILATION,
        }


def table_config(kernel: str, operand: torch.Tensor, *, D: int, V: int, heavy: bool, aligned: bool) -> TileConfig:
    """What the tables have for a launch over such operands."""
    arch = device_arch(operand.device)
    find = functools.partial(tile_config, kernel, arch=arch, dtype=operand.dtype, D=D, V=V, heavy=heavy)
    config = find(aligned=aligned)
    if not config.tma and D % 16:
        # The mask of the last features makes pointers load elements one by one, as from rows that are not aligned.
        return find(aligned=False)
    return config


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current CUDA device, which need not be the tensors' own."""
    if device.type == "cuda":
        return torch.cuda.device(device)
    return contextlib.nullcontext()


def multiprocessors(device: torch.device) -> int | None:
    """How many a GPU has; None where there is none to ask, as for tensors without memory."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(device).multi_processor_count


def precision(dtype: torch.dtype) -> str:
    """Three tf32 products keep fp32 accuracy on NVIDIA's tensor cores; half dtypes need nothing."""
    if INTERPRETING:
        return "widen"
    return "tf32x3" if dtype == torch.float32 and torch.version.hip is None else "ieee"


def tma_ready(matrix: torch.Tensor) -> bool:
    """Tensor descriptors need rows of contiguous elements that begin at multiples of 16 bytes and do not overlap."""
    aligned = matrix.data_ptr() % 16 == 0 and matrix.stride(0) * matrix.element_size() % 16 == 0
    return aligned and matrix.stride(1) == 1 and matrix.stride(0) >= matrix.shape[1]
