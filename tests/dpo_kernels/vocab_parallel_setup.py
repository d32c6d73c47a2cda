"""Cases of a head that is spread over processes, and what each process runs."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from dpo_kernels import linear_logps_vocab_parallel

T, D, V = 41, 13, 101
BOUNDS = {2: (0, 37, V), 3: (0, 50, 51, V)}
"""First classes of the slices: uneven, one of a single class."""

EVERYTHING = {"softcap": 2.5, "logit_scale": -0.6, "temperature": 0.7}
CASES = {
    "plain float64": (torch.float64, False, {}),
    "everything float64": (torch.float64, True, EVERYTHING),
    "softcap float64": (torch.float64, False, {"softcap": 3.0}),
    "token 0 ignored": (torch.float64, False, {"ignore_index": 0}),
    "plain float32": (torch.float32, False, {}),
    "everything float32": (torch.float32, True, EVERYTHING),
    "plain bfloat16": (torch.bfloat16, False, {}),
    "everything bfloat16": (torch.bfloat16, True, EVERYTHING),
    "everything float16": (torch.float16, True, EVERYTHING),
}


def make_case(dtype: torch.dtype, with_bias: bool, ignore_index: int = -100, **options):
    """hidden, weight, labels, bias, upstream: the same on every process."""
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, weight, bias = normal(T, D).to(dtype), normal(V, D).to(dtype), normal(V).to(dtype)
    labels = torch.randint(0, V, (T,), generator=generator)
    labels[:4] = torch.tensor([0, V - 1, 36, 50])
    labels[5::6] = ignore_index
    return hidden, weight, labels, bias if with_bias else None, normal(T)


def _run(rank: int, world_size: int, inputs, frozen: bool = False, **options):
    """[logps, dX, dW of the slice, db of the slice]"""
    hidden, weight, labels, bias, upstream = inputs
    bounds = BOUNDS[world_size]
    columns = slice(bounds[rank], bounds[rank + 1])
    leaves = [t.clone().requires_grad_() for t in (hidden, weight[columns]) if t is not None]
    if frozen:
        leaves[1].requires_grad_(False)
    if bias is not None:
        leaves.append(bias[columns].clone().requires_grad_())
        options["bias_shard"] = leaves[2]
    logps = linear_logps_vocab_parallel(
        *leaves[:2], labels, group=dist.group.WORLD, vocab_start=columns.start, **options
    )
    logps.backward(upstream.to(logps.dtype))
    return [logps.detach(), *(t.grad for t in leaves)]


def worker(rank: int, world_size: int, folder: str) -> None:
    store = f"file://{Path(folder) / f'store{world_size}'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    found: dict = {}
    for name, (dtype, with_bias, options) in CASES.items():
        found[name] = _run(rank, world_size, make_case(dtype, with_bias, **options), **options)
    inputs = make_case(torch.float64, False)
    found["frozen"] = _run(rank, world_size, inputs, frozen=True)
    found["no rows"] = _run(rank, world_size, (inputs[0][:0], inputs[1], inputs[2][:0], None, inputs[4][:0]))
    found["all ignored"] = _run(rank, world_size, (*inputs[:2], torch.full((T,), -100), None, inputs[4]))
    mask = torch.zeros(V, dtype=torch.float64)
    mask[: BOUNDS[world_size][1]] = -torch.inf
    found["masked slice"] = _run(rank, world_size, (*inputs[:3], mask, inputs[4]))
    # Outside of every slice, and a class that two slices claim.
    for name, label, start in (("outside", V, BOUNDS[world_size][rank]), ("shared", 0, 0)):
        try:
            labels = inputs[2].clone()
            labels[3] = label
            linear_logps_vocab_parallel(
                inputs[0], inputs[1][: 1 + rank], labels[3:4].expand(T), group=dist.group.WORLD, vocab_start=start
            )
        except ValueError as error:
            found[name] = str(error)
    torch.save(found, Path(folder) / f"{world_size}-{rank}.pt")
    dist.destroy_process_group()
