"""Layers whose scores are capped, have sinks or stay in chunks: FlexAttention, flash kernels, and scores in the open.

Each is one layer of a model at a pack of shared prompts, forward and backward. Only shapes and options are the model's.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu_table import Check, Context, SkippedError
from benchmarks.measure import milliseconds, peak_extra_bytes

_REPEATS = 5
_COMPILES = 120.0


class Layer(NamedTuple):
    """One kind of layer."""

    heads: int
    key_heads: int
    width: int
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    chunk: int | None = None


LAYERS = {
    "Gemma 2 9B, global": Layer(16, 8, 256, softcap=50.0),
    "gpt-oss-20b, global": Layer(64, 8, 64, sinks=True),
    "Llama 4 Scout, chunks": Layer(40, 8, 128, chunk=2048),
    "Gemma 2 9B, window": Layer(16, 8, 256, softcap=50.0, window=4096),
    "gpt-oss-20b, window": Layer(64, 8, 64, sinks=True, window=128),
    "Llama 3 8B, plain": Layer(32, 8, 128),
}
"""Each option once, and then with what has been compiled for it."""
BACKENDS = ("sdpa", "flex", "varlen", "flash")


def flex_checks(context: Context) -> Iterator[Check]:
    # a quick run tries caps, sinks and chunks once
    for name, layer in list(LAYERS.items())[: 3 if context.quick else None]:
        for backend in BACKENDS[: 2 if context.quick else None]:
            yield Check(f"{name}: {backend}", partial(_measure, context, layer, backend), seconds=_COMPILES)


def _measure(context: Context, layer: Layer, backend: str) -> dict[str, Any]:
    """Time and memory of a layer, the share of its norm by which it differs from scores in the open, and graphs
    that a second pack of another length compiles."""
    from engine.model.attention import flex, interface
    from engine.model.attention.scores import Scores

    if context.dry_run:
        layer = Layer(4, 2, 16, layer.window and 5, layer.softcap, layer.sinks, layer.chunk and 8)
        # what is compiled runs as it is traced
        flex.BACKEND = "eager"
    packs = [_pack(context, layer, prompt) for prompt in ((40, 53) if context.dry_run else (2048, 3000))]
    (query, *_), _, sinks = packs[0]
    scores = Scores(layer.width**-0.5, layer.window, layer.softcap, sinks, layer.chunk)
    if not context.dry_run or backend != "flex":
        _check_able(context, interface, backend, query, scores)

    def run(pack: Any, name: str = backend) -> list[Tensor]:
        inputs, plan, sink = pack
        output = interface._attend((name,), torch.nn.Module(), *inputs, plan, scores._replace(sinks=sink))
        wanted = [x for x in (*inputs, sink) if x is not None and x.requires_grad]
        return [output.detach(), *torch.autograd.grad(output, wanted, torch.ones_like(output))] if wanted else [output]

    graphs = torch._dynamo.utils.counters["stats"]
    found, want = run(packs[0]), run(packs[0], "sdpa")
    before = graphs["unique_graphs"]
    run(packs[1])
    again = graphs["unique_graphs"] - before
    _, held = peak_extra_bytes(lambda: run(packs[0]), context.device)  # type: ignore[arg-type, return-value]
    times = sorted(
        milliseconds(lambda: run(packs[0]), context.device) for _ in range(1 if context.dry_run else _REPEATS)
    )
    error = max(((a - b).double().norm() / b.double().norm()).item() for a, b in zip(found, want, strict=True))
    return {
        # both round to half precision, on different ways
        "ok": error < 0.03 and again == 0,
        "ms": times[len(times) // 2],
        "MiB": held / 2**20,
        "from scores in the open": error,
        "graphs of a second pack": again,
        "tokens": query.shape[2],
    }


def _check_able(context: Context, interface: Any, backend: str, query: Tensor, scores: Any) -> None:
    from engine.errors import UserError
    from engine.model import choose_backend

    try:
        choose_backend(backend, context.device, query.dtype)
    except UserError as reason:
        raise SkippedError(str(reason)) from reason
    if reason := interface.lack(backend, query, query, scores):
        raise SkippedError(f"{backend} {reason}")


def _pack(context: Context, layer: Layer, prompt: int) -> tuple[list[Tensor], Any, Tensor | None]:
    """Inputs of two groups of a prompt and two responses, their plan, and sinks."""
    from engine.packing.layout import Segment, plan_attention

    answer = prompt // 2
    segments: list[Segment] = []
    for start in (0, prompt + 2 * answer):
        stop = start + prompt + answer
        segments += [Segment(start, stop, start, start), Segment(stop, stop + answer, start, start + prompt)]
    tokens = segments[-1].stop
    generator = torch.Generator().manual_seed(prompt)
    # on the CPU the library has no gradients
    needs = not context.dry_run
    heads = (layer.heads, layer.key_heads, layer.key_heads)
    inputs = [
        torch.randn(tokens, n, layer.width, generator=generator)
        .to(context.device, torch.bfloat16)
        .transpose(0, 1)[None]
        for n in heads
    ]
    sinks = torch.zeros(layer.heads, device=context.device) if layer.sinks else None
    for x in (*inputs, *([] if sinks is None else [sinks])):
        x.requires_grad_(needs)
    plan = plan_attention(segments).map_tensors(lambda x: x.to(context.device))
    return inputs, plan, sinks
