"""``dpo doctor``: what is installed, what will run here and why, and whether it computes the right numbers."""

from __future__ import annotations

import math
import os
import platform
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

PACKAGES = (
    "dpo-kernels", "torch", "triton", "transformers", "datasets", "peft", "bitsandbytes", "accelerate", "trl",
    "flash-attn", "flash-attn-3", "liger-kernel", "flash-linear-attention", "causal-conv1d", "mamba-ssm", "numpy",
    "pyarrow", "safetensors", "tyro",
)  # fmt: skip
ENVIRONMENT = (
    "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "TRITON_INTERPRET", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF",
    "HF_HOME", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "DPO_CACHE", "DPO_TILE_CONFIGS",
    "WORLD_SIZE",
)  # fmt: skip

MIXER_KERNELS = ("fla", "causal_conv1d", "mamba_ssm")
"""Packages whose kernels transformers takes for state space models, gated delta nets and their convolutions."""
LOGP_TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-3}
"""Largest error of one token's log-prob, in nats, against float64 on the same inputs."""
GRADIENT_TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
"""Largest error of a gradient against float64, as a share of its norm."""

ATTENTION_TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}
"""Largest error of attention's output against float64, as a share of its norm."""
LOSS_TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}
"""Largest distance of the first loss from ln 2, where policy and reference are the same."""
STEP_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
"""Largest error of a model's gradient against its own forward in float32, as a share of its norm."""

Rows = Iterator[tuple[str, str]]


class SelfTestError(Exception):
    """A number is wrong, or could not be computed. The message says which."""


def diagnose() -> tuple[str, bool]:
    """The report, as plain text to paste into a bug report, and whether everything that must work does."""
    lines, healthy = ["dpo doctor"], True
    for title, section in _SECTIONS.items():
        lines += ["", title]
        rows: list[tuple[str, str]] = []
        try:
            for row in section():
                rows.append(row)
        except Exception as error:
            # a broken installation is what this command is for, so it is reported and the rest goes on
            healthy = False
            rows.append(("FAILED", f"{type(error).__name__}: {' '.join(str(error).split())}"))
        width = max(len(name) for name, _ in rows)
        lines += [f"  {name:<{width}}  {value}" for name, value in rows]
    lines += ["", "healthy" if healthy else "not healthy: see FAILED above"]
    return "\n".join(lines), healthy


def _versions() -> Rows:
    yield "python", f"{platform.python_version()} ({sys.executable})"
    yield "platform", platform.platform()
    for name in PACKAGES:
        try:
            yield name, metadata.version(name)
        except metadata.PackageNotFoundError:
            yield name, "not installed"


def _machine() -> Rows:
    import psutil
    import torch

    yield "cpu", f"{os.cpu_count()} logical cores, torch uses {torch.get_num_threads()} threads"
    memory = psutil.virtual_memory()
    yield "memory", f"{memory.total / 2**30:.1f} GiB, {memory.available / 2**30:.1f} GiB available"
    if not torch.cuda.is_available():
        yield (
            "gpu",
            f"none found (torch is built for {built})" if (built := _toolkit()) else "none (torch is a CPU build)",
        )
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield (
            f"gpu {index}",
            f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.total_memory / 2**30:.1f} GiB",
        )
    yield "toolkit", f"{_toolkit()}, cudnn {torch.backends.cudnn.version()}"


def _toolkit() -> str | None:
    """What this torch is built for, such as ``CUDA 13.0``; None for the CPU alone."""
    import torch

    names = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip, "XPU": torch.version.xpu}
    return next((f"{name} {version}" for name, version in names.items() if version), None)


def _choices() -> Rows:
    import torch

    import dpo_kernels
    from dpo_kernels import native

    from .model import choose_backend, resolve_device

    device = resolve_device()
    yield "device", str(device)
    yield "native library", native.why_not() or f"runs {native.isa()}, of {', '.join(native.isas())}"
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        chosen = dpo_kernels.describe(device, dtype)
        for op in ("linear_logps", "linear_logps_filtered", "linear_dpo_loss"):
            choice = getattr(chosen, op)
            yield f"{op} {name}", f"{choice.impl} ({choice.reason})"
        backend = choose_backend("auto", device, dtype)
        yield f"attention {name}", f"{backend.name} ({backend.reason})"
    yield from _blocks(device.type)


def _blocks(device_type: str) -> Rows:
    """What computes decoder blocks, and mixers of tokens that are no attention."""
    from importlib.util import find_spec

    from .model.kernels.choice import auto_words
    from .model.kernels.compiled import compile_lack
    from .model.kernels.liger import DEVICES, liger_lack

    yield "model.kernels auto", auto_words(device_type)
    lack = liger_lack() or ("" if device_type in DEVICES else f"runs on {', '.join(DEVICES)} alone")
    yield "model.kernels liger", lack or f"liger-kernel {metadata.version('liger-kernel')}"
    yield "model.kernels compile", compile_lack(device_type) or "torch.compile can generate code"
    found = [name for name in MIXER_KERNELS if find_spec(name) is not None]
    reason = "" if device_type == "cuda" else f", on {device_type} by torch alone"
    words = f"{', '.join(found)}{reason}" if found else "no kernels are installed: transformers computes it by torch"
    yield "linear attention", words


def _places() -> Rows:
    from dpo_kernels.kernels.tile_config import tile_table

    from .data.row_cache import default_row_folder
    from .errors import UserError
    from .reference import default_store_path

    for name in ENVIRONMENT:
        if name in os.environ:
            yield name, os.environ[name]
    switches = [os.environ.get(name, "").lower() for name in ENVIRONMENT if "OFFLINE" in name]
    offline = any(value in ("1", "true", "yes", "on") for value in switches)
    yield "offline", "yes: only local folders and cached Hub files are read" if offline else "no"
    for name, folder in (("reference store", default_store_path), ("tokenised rows", default_row_folder)):
        try:
            yield name, _describe_folder(folder())
        except UserError as error:
            yield name, str(error)
    yield "tile shapes", tile_table()


def _describe_folder(path: Path) -> str:
    import shutil

    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    access = "" if os.access(existing, os.W_OK) else ", NOT WRITABLE"
    free = shutil.disk_usage(existing).free / 2**30
    if not path.exists():
        return f"{path} (not there yet, {free:.1f} GiB free{access})"
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return f"{path} ({size / 2**20:.1f} MiB, {free:.1f} GiB free{access})"


def _self_test() -> Rows:
    import torch

    from .model import resolve_device

    device = resolve_device()
    for dtype in (torch.float32, torch.bfloat16):
        yield from _self_test_dtype(device, dtype)


def _attention_test() -> Rows:
    """Every backend that would compute a layer here, against scores in the open in float64."""
    import torch

    from .model import choose_backend, resolve_device
    from .model.selftest import attention_errors, cannot_compile

    device = resolve_device()
    for dtype in (torch.float32, torch.bfloat16):
        name, backend = str(dtype).removeprefix("torch."), choose_backend("auto", device, dtype)
        for kernel in (backend.name, *backend.others):
            row = f"{kernel} {name}"
            if reason := cannot_compile(kernel, device, dtype):
                yield row, f"passed over: it {reason}"
                continue
            errors = attention_errors(kernel, device, dtype)
            yield _verdict(row, errors.output, ATTENTION_TOLERANCE[name], "of its norm")
            yield _verdict(f"{row}, gradients", errors.gradient, GRADIENT_TOLERANCE[name], "of their norm")


def _step_test() -> Rows:
    """A step of a tiny model as a run would take it: float32 weights that compute in each dtype."""
    import torch

    from .model import choose_backend, resolve_device
    from .model.selftest import training_step

    device = resolve_device()
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        step = training_step(choose_backend("auto", device, dtype), device, dtype)
        yield _verdict(f"first loss {name}", abs(step.loss - math.log(2)), LOSS_TOLERANCE[name], "from ln 2")
        yield _verdict(f"gradient {name}", step.gradient_error, STEP_TOLERANCE[name], "of its norm")
        if not step.loss_after < step.loss:
            raise SelfTestError(f"loss {name}: {step.loss_after:.4f} after a step, {step.loss:.4f} before; must fall")
        yield f"loss after a step {name}", f"ok: {step.loss_after:.4f}, from {step.loss:.4f}"


def _self_test_dtype(device, dtype) -> Rows:
    """Log-probs and gradients of the ops that a run would use, against plain torch in float64 on the same inputs."""
    import torch
    import torch.nn.functional as F

    from dpo_kernels import linear_dpo_loss, linear_logps

    name = str(dtype).removeprefix("torch.")
    generator = torch.Generator().manual_seed(0)
    hidden_TD = torch.randn(96, 64, generator=generator).to(device, dtype).requires_grad_()
    weight_VD = (torch.randn(1000, 64, generator=generator) / 4).to(device, dtype).requires_grad_()
    labels_T = torch.randint(1000, (96,), generator=generator).to(device)
    cu_responses = torch.tensor([0, 17, 40, 41, 96], dtype=torch.int32)
    ref_S = torch.tensor([-80.0, -120.0, -5.0, -260.0], device=device)

    exact_hidden, exact_weight = (x.detach().double().requires_grad_() for x in (hidden_TD, weight_VD))
    exact_T = F.log_softmax(exact_hidden @ exact_weight.T, dim=-1).gather(1, labels_T[:, None])[:, 0]
    sums_S = torch.stack([part.sum() for part in exact_T.split(cu_responses.diff().tolist())])
    margins = 0.1 * (sums_S - ref_S.double()).view(-1, 2)
    exact_loss = -F.logsigmoid(margins[:, 0] - margins[:, 1]).mean()
    exact_loss.backward()

    error = (linear_logps(hidden_TD, weight_VD, labels_T).double() - exact_T).abs().max().item()
    yield _verdict(f"log-probs {name}", error, LOGP_TOLERANCE[name], "nats, largest error of a token")
    linear_dpo_loss(hidden_TD, weight_VD, labels_T, cu_responses, ref_S, beta=0.1).loss.backward()
    for label, ours, exact in (("hidden", hidden_TD, exact_hidden), ("weight", weight_VD, exact_weight)):
        assert ours.grad is not None
        assert exact.grad is not None
        error = ((ours.grad.double() - exact.grad).norm() / exact.grad.norm()).item()
        yield _verdict(f"{label} gradient {name}", error, GRADIENT_TOLERANCE[name], "of its norm")


def _verdict(name: str, error: float, allowed: float, unit: str) -> tuple[str, str]:
    # written so that NaN fails
    if not error <= allowed:
        raise SelfTestError(f"{name}: error {error:.2e} {unit}, allowed {allowed:.0e}")
    return name, f"ok: {error:.1e} {unit} (allowed {allowed:.0e})"


_SECTIONS: dict[str, Callable[[], Rows]] = {
    "versions": _versions,
    "machine": _machine,
    "what runs here": _choices,
    "self-test of the head": _self_test,
    "self-test of attention": _attention_test,
    "self-test of a training step": _step_test,
    "places": _places,
}
