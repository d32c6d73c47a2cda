"""The ops never make the host wait for a GPU, and add in a fixed order: their bodies run on a pretended one.

Triton kernels are not launched there, so that only what their launchers do on the host is seen of them.
"""

from __future__ import annotations

import pytest
import torch

from dpo_kernels import chunks, dispatch, linear_dpo_loss, linear_logps
from dpo_kernels.losses import LOSS_TYPES
from tests.pretended_cuda import CUDA, pretended_cuda
from tests.unordered_ops import unordered

T, D, V = 24, 16, 300
STATS = ("entropy", "is_top1", "mean_logits", "log_sum_sq_probs")
HEADS = {
    "bfloat16": {},
    "float32": {"dtype": torch.float32},
    "frozen head": {"frozen": True},
    "float16": {"dtype": torch.float16},
    "bias and softcap": {"bias": True, "softcap": 20.0},
    "no gradient of hidden": {"fixed_hidden": True},
}


@pytest.fixture(params=["torch", "triton"])
def cuda(request, monkeypatch):
    triton = pytest.importorskip("triton")
    if triton.knobs.runtime.interpret:
        pytest.skip("this process interprets kernels")
    monkeypatch.setattr(
        dispatch, "why_not", lambda op, impl, *unused: None if impl == request.param else "not what is tried"
    )
    found: list[str] = []
    with pretended_cuda() as device:

        def watch(func, args, kwargs):
            if unordered(func, args, kwargs):
                found.append(func._schema.name)

        device.watch = watch
        device.launch = lambda kernel, *args, **kwargs: None
        yield device
    assert not found


def head(*, dtype=torch.bfloat16, frozen=False, bias=False, softcap=None, fixed_hidden=False):
    """Hidden states, weight, labels and options."""
    hidden = torch.randn(T, D, device=CUDA, dtype=dtype).requires_grad_(not fixed_hidden)
    weight = torch.randn(V, D, device=CUDA, dtype=dtype).requires_grad_(not frozen)
    labels = torch.randint(V, (T,), device=CUDA)
    labels[3] = -100
    options = {"bias": torch.randn(V, device=CUDA, dtype=dtype) if bias else None, "softcap": softcap}
    return hidden, weight, labels, options


@pytest.mark.parametrize("case", HEADS)
@pytest.mark.parametrize(("reduction", "stats"), [("mean", None), ("none", None), ("mean", STATS)])
def test_paired_loss(cuda, case, reduction, stats):
    hidden, weight, labels, options = head(**HEADS[case])
    cu = torch.tensor([0, 5, 12, 20, T], dtype=torch.int32)
    options |= {"reduction": reduction, "stats": stats}
    out = linear_dpo_loss(hidden, weight, labels, cu, torch.zeros(4, device=CUDA), **options)
    out.loss.sum().backward()
    # The offsets, and what the sums over responses take of them.
    assert len(cuda.copies) <= 3


@pytest.mark.parametrize("loss_type", [name for name in LOSS_TYPES if name != "sigmoid"])
def test_every_loss(cuda, loss_type):
    hidden, weight, labels, options = head()
    cu, refs = torch.tensor([0, 5, 12, 20, T]), torch.zeros(4, device=CUDA)
    linear_dpo_loss(hidden, weight, labels, cu, refs, loss_type=loss_type, **options).loss.backward()


def test_a_pair_that_is_split(cuda, monkeypatch):
    for module in ("pair_chunks", "triton_pairs"):
        monkeypatch.setattr(
            f"dpo_kernels.linear_dpo.{module}.plan_chunks",
            lambda cu, *_, **__: [chunks.Chunk(i, 1, True) for i in range(len(cu) // 2)],
        )
    hidden, weight, labels, options = head()
    cu, refs = torch.tensor([0, 5, 12, 20, T]), torch.zeros(4, device=CUDA)
    linear_dpo_loss(hidden, weight, labels, cu, refs, **options).loss.backward()


@pytest.mark.parametrize("frozen", [True, False])
def test_products_are_summed_as_documented(cuda, frozen, monkeypatch):
    tuned = [True]
    monkeypatch.setattr(torch.cuda.tunable, "is_enabled", lambda: tuned[-1])
    monkeypatch.setattr(torch.cuda.tunable, "enable", tuned.append)
    settings = torch.backends.cuda.matmul
    seen = []

    def watch(func, args, kwargs):
        if "mm" in func._schema.name:
            seen.append((settings.allow_bf16_reduced_precision_reduction, tuned[-1]))

    cuda.watch = watch
    hidden, weight, labels, options = head(frozen=frozen)
    cu, refs = torch.tensor([0, 5, 12, 20, T]), torch.zeros(4, device=CUDA)
    linear_logps(hidden, weight, labels, **options).sum().backward()
    linear_dpo_loss(hidden, weight, labels, cu, refs, **options).loss.backward()
    assert set(seen) == {(False, False)}
    assert settings.allow_bf16_reduced_precision_reduction
    assert tuned[-1]


@pytest.mark.parametrize("case", HEADS)
@pytest.mark.parametrize("stats", [(), STATS], ids=["", "stats"])
def test_log_probs(cuda, case, stats):
    hidden, weight, labels, options = head(**HEADS[case])
    out = linear_logps(hidden, weight, labels, stats=stats, **options)
    if hidden.requires_grad or weight.requires_grad:
        out.logps.sum().backward()
    assert not cuda.copies


def test_a_main_gradient(cuda):
    hidden, weight, labels, options = head()
    main = torch.zeros(V, D, device=CUDA)
    linear_logps(hidden, weight, labels, weight_grad=main, **options).sum().backward()
    cu, refs = torch.tensor([0, 5, 12, 20, T]), torch.zeros(4, device=CUDA)
    linear_dpo_loss(hidden, weight, labels, cu, refs, weight_grad=main, **options).loss.backward()


@pytest.mark.parametrize("frozen", [True, False])
def test_a_filter(cuda, frozen):
    if dispatch.why_not("linear_logps", "torch", "cuda", torch.bfloat16) is None:
        pytest.skip("in torch a filter is refused on a GPU")
    hidden, weight, labels, options = head(frozen=frozen)
    names = ("dropped_mass", "kept_tiles")
    linear_logps(hidden, weight, labels, filter_mass=0.1, stats=names, **options).logps.sum().backward()
