"""What CUDA asks of the ops beside right numbers: no waiting for the device, graphs, streams, devices, tools.

Legend: N rows, D features, V vocabulary.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.library import opcheck

from benchmarks.gpu_checks import Inputs, make_inputs, our_logps, with_gradients
from benchmarks.gpu_table import Check, Context, SkippedError, first_line
from dpo_kernels import linear_dpo_loss, linear_logps
from dpo_kernels.linear_dpo.ops import linear_dpo_op
from dpo_kernels.linear_logps.ops import linear_logps_backward_op, linear_logps_op
from dpo_kernels.linear_logps.stats import STATS

ROOT = Path(__file__).resolve().parents[1]
SANITIZED = ("stats", "pairs", "gradients", "frozen", "filter", "weight_grad")
Case = Callable[[Inputs], list[Tensor]]


def cuda_checks(context: Context) -> Iterator[Check]:
    """Each for every op, so that a row names the op that falls short."""
    for name, case in CASES.items():
        yield Check(f"no wait for the device: {name}", partial(_no_wait, context, case))
        yield Check(f"two runs, same bits: {name}", partial(_differing_bits, context, case), 0.0)
        yield Check(f"graph capture: {name}", partial(_captured, context, case), 0.0)
        yield Check(f"side stream: {name}", partial(_on_side_stream, context, case), 0.0)
        yield Check(f"second device: {name}", partial(_on_second_device, context, case), 0.0)
    for name, check in OPCHECKS.items():
        yield Check(f"opcheck: {name}", partial(check, context))
    for name in ("log-probs", "loss"):
        yield Check(f"torch.compile(fullgraph=True), same bits: {name}", partial(_compiled, context, name), 0.0, 120)


def sanitizer_checks(context: Context) -> Iterator[Check]:
    for tool in ("memcheck",) if context.quick else ("memcheck", "racecheck"):
        for case in SANITIZED:
            yield Check(f"{tool}: {case}", partial(_sanitize, context, tool, case), 0.0, 120)


def _inputs(context: Context, device: torch.device | None = None) -> Inputs:
    shape = (24, 33, 70) if context.dry_run else (1000, 512, 32001)
    return make_inputs(device or context.device, torch.bfloat16, shape, bias=True)


def _responses(rows: int) -> Tensor:
    """Four pairs, as a training step gives them: offsets on the host."""
    return torch.linspace(0, rows, 9).to(torch.int32)


def _logps_case(inputs: Inputs) -> list[Tensor]:
    upstream = torch.linspace(-1, 1, len(inputs.labels), device=inputs.hidden.device)
    return with_gradients(our_logps, inputs, upstream, trainable=True)


def _frozen_case(inputs: Inputs) -> list[Tensor]:
    upstream = torch.linspace(-1, 1, len(inputs.labels), device=inputs.hidden.device)
    return with_gradients(our_logps, inputs, upstream, trainable=False)


def _filter_case(inputs: Inputs) -> list[Tensor]:
    upstream = torch.linspace(-1, 1, len(inputs.labels), device=inputs.hidden.device)
    return with_gradients(partial(our_logps, filter_mass=1e-2), inputs, upstream, trainable=True)


def _stats_case(inputs: Inputs) -> list[Tensor]:
    with torch.no_grad():
        out = linear_logps(*inputs[:3], bias=inputs.bias, stats=STATS, impl="triton")
    return [out.logps, *out.stats.values()]


def _main_gradient_case(inputs: Inputs) -> list[Tensor]:
    main = torch.zeros(inputs.weight.shape, device=inputs.weight.device)
    weight = inputs.weight.detach().requires_grad_()
    linear_logps(*(inputs.hidden, weight, inputs.labels), weight_grad=main, impl="triton").sum().backward()
    return [main]


def _loss_case(inputs: Inputs, **options: Any) -> list[Tensor]:
    reference = torch.zeros(8, device=inputs.hidden.device)
    cu_responses = _responses(len(inputs.labels))

    def loss(i: Inputs) -> Tensor:
        return linear_dpo_loss(*i[:3], cu_responses, reference, bias=i.bias, impl="triton", **options).loss.sum()

    return with_gradients(loss, inputs, torch.ones((), device=inputs.hidden.device), trainable=True)


CASES: dict[str, Case] = {
    "log-probs and gradients": _logps_case,
    "frozen head": _frozen_case,
    "loss": _loss_case,
    "loss by lengths": partial(_loss_case, loss_type=("ipo", "sft")),
    "loss, reduction none": partial(_loss_case, reduction="none"),
    "statistics": _stats_case,
    "filter": _filter_case,
    "weight_grad": _main_gradient_case,
}


@contextmanager
def no_wait(context: Context) -> Iterator[None]:
    """Raises where torch would wait for the device. On a CPU it does nothing."""
    if context.device.type != "cuda":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _no_wait(context: Context, case: Case) -> None:
    inputs = _inputs(context)
    case(inputs)
    with no_wait(context):
        case(inputs)


def _differing_bits(context: Context, case: Case) -> float:
    inputs = _inputs(context)
    return _difference(case(inputs), case(inputs))


def _difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """Elements that differ; NaN differs from everything."""
    return float(sum((a != b.to(a.device)).sum().item() for a, b in zip(found, expected, strict=True)))


def _need_cuda(context: Context) -> None:
    if context.device.type != "cuda":
        raise SkippedError("a matter of CUDA devices")


def _captured(context: Context, case: Case) -> float:
    """A graph of the case, replayed on other inputs in the same places."""
    _need_cuda(context)
    inputs = _inputs(context)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            case(inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = case(inputs)
    inputs.hidden.mul_(0.5)
    graph.replay()
    return _difference(found, case(inputs))


def _on_side_stream(context: Context, case: Case) -> float:
    """Behind work that the other stream has not done yet."""
    _need_cuda(context)
    inputs = _inputs(context)
    expected = case(inputs)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        late = Inputs(*(None if t is None else t.clone() for t in inputs))  # type: ignore[arg-type]
        found = case(late)
    torch.cuda.current_stream().wait_stream(stream)
    return _difference(found, expected)


def _on_second_device(context: Context, case: Case) -> float:
    """On tensors of a device that is not the current one."""
    _need_cuda(context)
    if torch.cuda.device_count() < 2:
        raise SkippedError("there is one device")
    inputs = _inputs(context)
    other = Inputs(*(None if t is None else t.to("cuda:1") for t in inputs))  # type: ignore[arg-type]
    return _difference(case(other), case(inputs))


def _compiled(context: Context, name: str) -> float:
    inputs = _inputs(context)
    if name == "log-probs":
        function: Callable[..., Tensor] = our_logps
    else:
        cu_responses, reference = _responses(len(inputs.labels)), torch.zeros(8, device=context.device)

        def function(i: Inputs) -> Tensor:
            return linear_dpo_loss(*i[:3], cu_responses, reference, bias=i.bias, impl="triton").loss

    upstream = torch.ones_like(function(inputs))
    # What inductor would generate around the op is not looked at, and in a dry run there may be no compiler for it.
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager" if context.dry_run else "inductor")
    runs = [with_gradients(f, inputs, upstream, trainable=True) for f in (function, compiled)]
    return _difference(*runs)


def _leaves(context: Context) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = make_inputs(context.device, torch.bfloat16, (11, 24, 70), bias=True)
    assert inputs.bias is not None
    return inputs.hidden.requires_grad_(), inputs.weight.requires_grad_(), inputs.labels, inputs.bias.requires_grad_()


_HEAD = (3.0, 1.5, 0.8, -100, "triton")


def _opcheck_logps(context: Context) -> None:
    hidden, weight, labels, bias = _leaves(context)
    opcheck(linear_logps_op, (hidden, weight, labels, bias, *_HEAD, False, "is_top1,entropy"))
    opcheck(linear_logps_op, (hidden, weight.detach(), labels, None, *_HEAD, True, ""))


def _opcheck_backward(context: Context) -> None:
    hidden, weight, labels, bias = _leaves(context)
    logps, lse, *_ = linear_logps_op(hidden, weight, labels, bias, *_HEAD, False, "")
    saved = [t.detach() for t in (hidden, weight, labels, lse, bias)]
    opcheck(linear_logps_backward_op, (torch.randn_like(logps), *saved, *_HEAD, True, True, True))


def _opcheck_loss(context: Context) -> None:
    hidden, weight, labels, bias = _leaves(context)
    cu_responses = torch.tensor([0, 3, 5, 5, 11], dtype=torch.int32)
    reference, weights = torch.randn(4, device=context.device), torch.rand(2, device=context.device)
    tensors = (hidden, weight, labels, cu_responses, reference, None, None, weights, bias)
    options = ("sigmoid", [1.0], [0.1, 0.0, 0.05, 0.5, 1.0], True, *_HEAD, True, True, True)
    opcheck(linear_dpo_op, (*tensors, *options))


OPCHECKS = {"linear_logps": _opcheck_logps, "its backward": _opcheck_backward, "linear_dpo_loss": _opcheck_loss}


def find_sanitizer() -> str | None:
    """compute-sanitizer from the PATH, a CUDA toolkit or NVIDIA's wheels."""
    places = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda", "/opt/cuda"]
    folders = [Path(place) / part for place in places if place for part in ("bin", "compute-sanitizer")]
    folders += Path(sysconfig.get_paths()["purelib"]).glob("nvidia/*/compute-sanitizer")
    found = shutil.which("compute-sanitizer")
    return found or shutil.which("compute-sanitizer", path=os.pathsep.join(map(str, folders)))


def _sanitize(context: Context, tool: str, case: str) -> dict[str, Any]:
    """Errors that compute-sanitizer counts in our kernels, in a process that runs one case once on small inputs."""
    binary = find_sanitizer()
    if context.dry_run:
        run_sanitized(case, context.device)
        return {"value": 0.0, "note": f"the case ran; a sanitizer would be {binary}"}
    if binary is None:
        raise SkippedError("compute-sanitizer is neither on the PATH nor in CUDA_HOME nor in NVIDIA's wheels")
    # Kernels of torch and the vendor's libraries are not ours to check, and there are thousands.
    options = ["--tool", tool, "--kernel-name", "kns=_kernel", "--kernel-name-exclude", "kns=at6native"]
    options += ["--print-limit", "5", "--target-processes", "application-only"]
    command = [binary, *options, sys.executable, "-m", "benchmarks.gpu_cuda", case]
    # Without torch's own pools every tensor is an allocation, whose ends are guarded.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    limit = max(5.0, min(110.0, context.seconds_left() - 3))
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, timeout=limit, stdin=subprocess.DEVNULL, check=False
    )
    text = (done.stdout + done.stderr).decode(errors="replace")
    print(text)
    return read_sanitizer(text, done.returncode)


def read_sanitizer(text: str, code: int) -> dict[str, Any]:
    """The verdict of compute-sanitizer's output; a run without its summary, or that did not reach its end, failed."""
    if "the case is done" not in text:
        said = [line for line in text.splitlines() if line.strip()]
        return {"ok": False, "error": f"exit code {code}: {said[-1][:300] if said else 'no output'}"}
    summaries = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", text)
    if not summaries:
        return {"ok": False, "error": "no summary of the sanitizer"}
    count = sum(map(int, summaries))
    first = next((line.strip("= ") for line in text.splitlines() if re.search(r"^=+ .*(Invalid|azard|rror)", line)), "")
    return {"ok": count == 0, "value": float(count), "note": first[:200] if count else ""}


def run_sanitized(case: str, device: torch.device) -> None:
    """One small configuration of the kernels of a case."""
    inputs = make_inputs(device, torch.bfloat16, (19, 40, 300), bias=True)
    run = {
        "stats": _stats_case,
        "pairs": _loss_case,
        "gradients": _logps_case,
        "frozen": _frozen_case,
        "filter": _filter_case,
        "weight_grad": _main_gradient_case,
    }[case]
    for values in run(inputs):
        assert values.isfinite().all(), f"{case}: not finite"
    print("the case is done")


if __name__ == "__main__":
    try:
        run_sanitized(sys.argv[1], torch.device("cuda"))
    except Exception as error:
        print(f"{type(error).__name__}: {first_line(error)}")
        raise
