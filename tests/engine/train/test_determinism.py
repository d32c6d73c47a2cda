"""No operation of a training step adds or writes in an order that changes from run to run on a GPU."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import nullcontext

import pytest
import torch

from engine.model.attention.determinism import deterministic_algorithms
from engine.packing import PackedBatch
from engine.packing.layout import AttentionPlan
from engine.train.setup import prepare
from tests.engine.train.test_host_waits import CASES, LORA, inline_feed, take_steps  # noqa: F401
from tests.pretended_cuda import CUDA, pretended_cuda
from tests.unordered_ops import unordered

NAMES = (
    "sigmoid 1",
    "aot_unpaired 1",
    "orpo 1",
    "kto 1",
    "bf16",
    "lora ipo bf16",
    "checkpointing",
    "live adapters",
    "experts",
)


def rankings(folder, responses: int = 4) -> str:
    words = ("red", "green", "blue", "grey")
    rows = [
        {"prompt": f"Question {i}:", "responses": [f" {w} {i}" for w in words[:responses]], "ranking": [3, 1, 2, 4]}
        for i in range(6)
    ]
    path = folder / "rankings.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def unordered_of(config, folder) -> Counter:
    """The operations of two steps that a GPU may do in another order, with how often."""
    found: Counter[str] = Counter()
    setup = prepare(config)
    with pretended_cuda() as cuda:

        def watch(func, args, kwargs):
            found[func._schema.name] += unordered(func, args, kwargs)

        cuda.watch = watch
        take_steps(setup, folder, [], cuda)
    assert len(found) > 20
    return +found


@pytest.mark.parametrize("case", NAMES)
def test_every_operation_of_a_step_has_a_fixed_order(case, make_config, tmp_path, tiny_mixture_dir):
    sections = CASES[case](tiny_mixture_dir) if callable(CASES[case]) else CASES[case]
    train = {"logging_steps": 2, "max_steps": 2, "save_steps": None, **sections.get("train", {})}
    config = make_config(**{**sections, "train": train})
    assert not unordered_of(config, tmp_path)


@pytest.mark.parametrize("model", [{}, LORA["model"]], ids=["full", "lora"])
@pytest.mark.parametrize("share_prompts", [True, False])
def test_four_responses_of_one_prompt(model, share_prompts, make_config, tmp_path):
    config = make_config(
        model=model,
        data={"dataset_name": rankings(tmp_path)},
        loss={"loss_type": "plackett_luce"},
        packing={"share_prompts": share_prompts, "pairs_per_step": 3},
        train={"logging_steps": 2, "max_steps": 2, "save_steps": None},
    )
    assert not unordered_of(config, tmp_path)


def test_a_gather_without_an_order_is_found(make_config, tmp_path, monkeypatch):
    monkeypatch.setattr(PackedBatch, "gather_predicting", lambda self, hidden: hidden.index_select(0, self.rows_N))
    monkeypatch.setattr(AttentionPlan, "gather_keys", lambda self, x: x.index_select(0, self.key_rows))
    config = make_config(
        data={"dataset_name": rankings(tmp_path)},
        loss={"loss_type": "plackett_luce"},
        train={"logging_steps": 2, "max_steps": 2, "save_steps": None},
    )
    assert set(unordered_of(config, tmp_path)) == {"aten::index_add"}


def attention_backward(x, context=None):
    query = x[None, None].requires_grad_()
    with context or nullcontext():
        torch.nn.functional.scaled_dot_product_attention(query, query, query).sum().backward()


JUDGED = {
    "twice": (lambda x, i: x.index_add(0, i * 0, x), True),
    "once": (lambda x, i: x.index_add(0, i, x), False),
    "sums of floats": (lambda x, i: x.cumsum(0), True),
    "sums of integers": (lambda x, i: i.cumsum(0), False),
    "written twice": (lambda x, i: x.index_put((i * 0,), x), True),
    "written once": (lambda x, i: x.index_put((i,), x), False),
    "added after sorting": (lambda x, i: x.index_put((i * 0,), x, accumulate=True), False),
    "scattered twice": (lambda x, i: x.scatter(0, (i * 0)[:, None], x), True),
    "sorted": (lambda x, i: x.sort(dim=0), False),
    "fused attention": (lambda x, i: attention_backward(x), True),
    "deterministic fused attention": (lambda x, i: attention_backward(x, deterministic_algorithms()), False),
}


@pytest.mark.parametrize("case", JUDGED)
def test_what_is_unordered(case):
    function, expected = JUDGED[case]
    with pretended_cuda() as cuda:
        seen = []
        cuda.watch = lambda func, args, kwargs: seen.append(unordered(func, args, kwargs))
        function(torch.ones(3, 2, device=CUDA), torch.arange(3, device=CUDA))
    assert any(seen) == expected
