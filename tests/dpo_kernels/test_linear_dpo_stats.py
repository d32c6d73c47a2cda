"""Statistics of tokens from the product of the paired loss: their definitions, and the same loss as without."""

from __future__ import annotations

import pytest
import torch

from benchmarks.shapes import RESPONSE_LENGTHS
from dpo_kernels import chunks, linear_dpo_loss
from dpo_kernels.linear_dpo import pair_chunks
from dpo_kernels.linear_logps.stats import STATS
from tests.dpo_kernels.linear_dpo_setup import IMPLS, Case, results
from tests.dpo_kernels.test_token_stats import definition

HEADS = {"plain": {}, "scaled": {"logit_scale": 0.3, "temperature": 0.7}, "softcap": {"softcap": 3.0}}


def run(case: Case, trained=(1, 1, 1), stats=None, **options):
    """The output, and loss, values and gradients in one list."""
    leaves = case.leaves(trained=trained)
    options |= {"bias": leaves[2], "stats": stats}
    out = linear_dpo_loss(*leaves[:2], case.labels, case.cu, case.ref, **options)
    upstream = torch.full_like(out.loss, 1.5)
    return out, results(out[:5], leaves, upstream)


def check(case: Case, **options) -> None:
    """Against float64 definitions, and to the bit against the loss without statistics."""
    plain, expected = run(case, **options)
    assert len(plain) == 5
    out, found = run(case, stats=STATS, **options)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert list(out.stats) == list(STATS)
    head = {name: value for name, value in options.items() if name in ("softcap", "logit_scale", "temperature")}
    wide = [t.double() for t in (case.hidden, case.weight)]
    tolerance = 1e-9 if case.ref.dtype == torch.float64 else 1e-5
    for name, want in definition(*wide, case.labels, bias=case.bias, **head).items():
        got = out.stats[name]
        assert not got.requires_grad
        assert got.dtype == (torch.bool if name == "is_top1" else case.ref.dtype)
        torch.testing.assert_close(got.double(), want.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("impl", IMPLS)
def test_definitions(impl: str, head: str, dtype: torch.dtype) -> None:
    check(Case((6, 7, 3, 9), dtype=dtype), impl=impl, **HEADS[head])


@pytest.mark.parametrize("lengths", RESPONSE_LENGTHS.values(), ids=RESPONSE_LENGTHS)
def test_small_buffers(lengths, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks, pairs held whole and pairs that are split."""
    monkeypatch.setattr(pair_chunks, "BUFFER_BYTES", 6 * 23 * 8)
    monkeypatch.setattr(chunks, "CACHE_BYTES", 2 * 23 * 8)
    check(Case(lengths))


@pytest.mark.parametrize(
    ("trained", "options"),
    [((1, 0, 0), {}), ((1, 1, 1), {"reduction": "none"}), ((1, 1, 1), {"loss_type": "aot"})],
    ids=["frozen head", "a loss a pair", "coupled pairs"],
)
def test_losses_whose_gradient_is_formed_in_backward(trained, options) -> None:
    check(Case((6, 7, 3, 9)), trained=trained, **options)


def test_a_row_without_a_softmax_has_no_top() -> None:
    case = Case((2, 2), ignored=False)
    case.hidden[1] = float("nan")
    # Where a search that finds nothing would stay.
    case.labels[1] = 0
    out, _ = run(case, stats=STATS, impl="torch")
    assert not out.stats["is_top1"][1]
    assert all(out.stats[name][1].isnan() for name in ("entropy", "mean_logits", "log_sum_sq_probs"))
    assert all(values[[0, 2, 3]].isfinite().all() for values in out.stats.values())


@pytest.mark.parametrize("names", [("logits",), ("dropped_mass",), ("entropy", "entropy")])
def test_names_that_are_not_known(names) -> None:
    with pytest.raises(ValueError, match="stats must"):
        run(Case((2, 3)), stats=names)
