"""8-bit moments in blocks that no row crosses, and moments in paged memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine.config.schema import OptimConfig
from engine.train import row_blocks
from engine.train.optimizer import build_optimizer
from engine.train.optimizer_state import slots_of, state_tensors
from engine.train.row_blocks import BLOCK, MOMENTS, SCALES
from tests.pretended_cuda import OnDevice, on_host

bitsandbytes = pytest.importorskip("bitsandbytes")
from tests.engine.train.paged_memory import is_paged, paged_memory  # noqa: E402

EIGHT, PAGED = "adamw_8bit", ("paged_adamw", "paged_adamw_8bit")


def updated(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range = range(3)) -> nn.Module:
    """The model after updates by gradients that depend on the step alone."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in model.parameters():
            grad = torch.randn(p.shape, generator=generator).to(p.dtype)
            p.grad = OnDevice(grad) if isinstance(p, OnDevice) or p.is_cuda else grad
        optimizer.step()
    return model


def layer(width: int, rows: int) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(width, rows)


def reference(width: int, rows: int, steps: int = 3) -> nn.Linear:
    """By bitsandbytes itself, whose layers have a row each where rows are not whole blocks."""
    whole = layer(width, rows)
    parts = [nn.Parameter(row.clone()) for row in whole.weight.detach().split(rows if width % BLOCK == 0 else 1)]
    optimizer = bitsandbytes.optim.AdamW8bit(
        [{"params": parts, "weight_decay": 0.1}, {"params": [whole.bias], "weight_decay": 0.0}],
        **{"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "min_8bit_size": 1},
    )
    optimizer.args.min_8bit_size = 1
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        grad = torch.randn(whole.weight.shape, generator=generator)
        for part, rows_of_grad in zip(parts, grad.split(len(parts[0])), strict=True):
            part.grad = rows_of_grad.clone()
        whole.bias.grad = torch.randn(whole.bias.shape, generator=generator)
        optimizer.step()
    whole.weight.data = torch.cat([part.detach() for part in parts])
    return whole


@pytest.mark.parametrize(("width", "rows"), [(512, 40), (300, 17), (16, 300)])
def test_each_row_is_updated_as_bitsandbytes_does_it_alone(width, rows, monkeypatch):
    """To the bit, some rows at a time; and where rows are whole blocks, the whole tensor."""
    monkeypatch.setattr(row_blocks, "PIECE", 7 * 512)
    ours = layer(width, rows)
    optimizer, _ = build_optimizer(ours, OptimConfig(optimizer=EIGHT, learning_rate=1e-3, weight_decay=0.1))
    updated(ours, optimizer)
    assert torch.equal(ours.weight, reference(width, rows).weight)
    slots = optimizer.state[ours.weight]
    assert [tuple(slots[name].shape) for name in SCALES] == [(rows, -(-width // BLOCK))] * 2
    assert {slots[name].dtype for name in MOMENTS} == {torch.uint8}
    # A scale is the largest moment of its block.
    assert (slots[SCALES[0]] > 0).all()


@pytest.mark.parametrize("shape", [(5000,), (63, 64)])
def test_vectors_and_small_matrices_keep_32_bits(shape):
    model = nn.ParameterList([nn.Parameter(torch.ones(shape))])
    optimizer, names = build_optimizer(model, OptimConfig(optimizer=EIGHT))
    updated(model, optimizer, range(1))
    state = state_tensors(optimizer.state_dict()["state"], names)
    assert {name.split("/")[0]: t.dtype for name, t in state.items()} == {
        "step": torch.int64, **dict.fromkeys(MOMENTS, torch.float32)
    }  # fmt: skip


def test_the_padding_is_what_the_library_reads_as_zero():
    optimizer, _ = build_optimizer(layer(300, 17), OptimConfig(optimizer=EIGHT))
    tables = optimizer._tables(torch.device("cpu"))
    assert [float(table[code]) for table, code in zip(tables, optimizer._zeros, strict=True)] == [0.0, 0.0]


def test_weights_that_are_not_contiguous_are_updated():
    ours, plain = layer(512, 40), layer(512, 40)
    ours.weight = nn.Parameter(ours.weight.detach().t().contiguous().t())
    for model in (ours, plain):
        config = OptimConfig(optimizer=EIGHT, learning_rate=1e-3)
        updated(model, build_optimizer(model, config)[0])
    assert torch.equal(ours.weight, plain.weight)


def large() -> nn.Module:
    """Rows of whole blocks and of others, large enough to be paged, and small ones."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(512, 200), nn.Linear(320, 320), nn.Linear(64, 8))


@pytest.mark.parametrize("held", ["float32", "kahan"])
@pytest.mark.parametrize("name", PAGED)
def test_paged_state_gives_the_same_bits_and_is_paged_again_when_it_is_loaded(name, held):
    config = OptimConfig(optimizer=name, learning_rate=1e-3, weight_decay=0.1, master_weights=held)

    def build() -> tuple[nn.Module, Any, list[str]]:
        model = large().to(torch.float32 if held == "float32" else torch.bfloat16)
        return model, *build_optimizer(model, config)

    want, optimizer, _ = build()
    with pytest.warns(UserWarning, match="not supported on CPU"):
        updated(want, optimizer)
    with paged_memory() as (cuda, memory):
        model = cuda.take(large().to(next(want.parameters()).dtype))
        optimizer, names = build_optimizer(model, config)
        updated(model, optimizer, range(2))
        check_places(model, optimizer)
        assert len(memory.buffers) == 4
        assert set(memory.prefetched) == set(memory.buffers)
        stored = {
            name: on_host(tensor).clone()
            for name, tensor in state_tensors(optimizer.state_dict()["state"], names).items()
        }
        groups = optimizer.state_dict()["param_groups"]
        optimizer, names = build_optimizer(model, config)
        before = cuda.waits
        optimizer.load_state_dict({"state": slots_of(stored, names), "param_groups": groups})
        large_ones = sum(t.numel() >= 1e5 and key.split("/")[0] in MOMENTS for key, t in stored.items())
        # All but what is paged goes to the device, each in a copy that is waited for.
        others = sum(t.ndim > 0 for t in stored.values()) - large_ones
        assert (large_ones, cuda.waits - before) == (4, others)
        check_places(model, optimizer)
        updated(model, optimizer, range(2, 3))
    for ours, theirs in zip(model.parameters(), want.parameters(), strict=True):
        assert torch.equal(on_host(ours), theirs)


def check_places(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Moments of large weights are in paged memory, others on the device."""
    for p in model.parameters():
        for name in MOMENTS:
            moment: Tensor = optimizer.state[p][name]
            assert is_paged(moment) == (p.numel() >= 1e5)
            assert isinstance(moment, OnDevice) != is_paged(moment)


def test_state_in_blocks_of_the_flat_tensor_is_read(tmp_path):
    """Whole blocks keep their bits; other rows are off by one more rounding; vectors are widened."""
    params = {"whole": (40, 512), "other": (40, 300), "vector": (5000,)}
    model = nn.ParameterDict({name: nn.Parameter(torch.ones(shape)) for name, shape in params.items()})
    theirs = bitsandbytes.optim.AdamW8bit(model.parameters(), lr=1e-3)
    updated(model, theirs)
    flat = [slots["__bnb_optimizer_quant_state__"] | slots for slots in theirs.state_dict()["state"].values()]
    stored = {
        f"{slot}/{name}": value
        for name, slots in zip(model, flat, strict=True)
        for slot, value in slots.items()
        if isinstance(value, Tensor)
    }
    found = row_blocks.from_flat_blocks(stored, dict(model.items()))
    assert torch.equal(found["state1/whole"], stored["state1/whole"])
    assert torch.equal(found["absmax2/whole"].view(-1), stored["absmax2/whole"])
    assert {key.split("/")[0] for key in found} == {*MOMENTS, *SCALES}
    dequantise, table = bitsandbytes.functional.dequantize_blockwise, stored["qmap1/other"]
    was = {
        name: dequantise(stored[f"state1/{name}"], absmax=stored[f"absmax1/{name}"], code=table, blocksize=BLOCK)
        for name in ("other", "vector")
    }
    assert torch.equal(found["state1/vector"], was["vector"])
    assert "absmax1/vector" not in found
    scales = found["absmax1/other"].repeat_interleave(BLOCK, 1)[:, :300]
    now = table[found["state1/other"].int()] * scales
    # Numbers of the table lie at most this far apart.
    assert ((now - was["other"]).abs() <= table.diff().max() / 2 * scales + 1e-7).all()
    again = row_blocks.from_flat_blocks(found, dict(model.items()))
    assert again.keys() == found.keys()
