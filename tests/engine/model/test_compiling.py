"""How functions are compiled: in every thread alike, and with torch's settings left as they were."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental import _config as shapes

from engine.model.compiling import compile_for_all_lengths


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_a_thread_may_compile_what_another_one_began():
    """As many variants as models need, of which torch itself allows 8."""

    def add(x: torch.Tensor, name: str) -> torch.Tensor:
        return x + len(name)

    before = torch._dynamo.config.recompile_limit, shapes.use_duck_shape
    run = compile_for_all_lengths(add, "eager", fullgraph=True)
    x = torch.zeros(5)
    # torch 2.11 without a GPU falls over where it is another thread that first enters this mode
    with FakeTensorMode():
        pass
    with ThreadPoolExecutor(1) as thread:
        thread.submit(run, x, "").result()
    for size in range(1, 12):
        assert torch.equal(run(x, "n" * size), x + size)
    assert graphs() == 12
    assert (torch._dynamo.config.recompile_limit, shapes.use_duck_shape) == before


def test_equal_sizes_are_not_one_size():
    """A first pack of as many tokens as features."""
    run = compile_for_all_lengths(lambda x, weight, places: (x @ weight) * places[:, None], "eager", fullgraph=True)
    weight = torch.nn.Parameter(torch.randn(6, 6))
    for tokens in (6, 9, 4):
        x, places = torch.randn(tokens, 6), torch.arange(tokens)
        torch.testing.assert_close(run(x, weight, places), (x @ weight) * places[:, None])
    assert graphs() == 1
