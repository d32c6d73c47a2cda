"""The record of a head, and the flat schemas that mirror it."""

from __future__ import annotations

import pytest
import torch

from dpo_kernels.head import Head, Needs
from dpo_kernels.linear_dpo import ops as dpo_ops
from dpo_kernels.linear_logps import ops, vocab_parallel
from dpo_kernels.linear_logps.reference import logits

MIRRORS = {
    ops.Inputs: ops.linear_logps_op,
    ops.BackwardInputs: ops.linear_logps_backward_op,
    ops.AccumulateInputs: ops.linear_logps_backward_accumulate_op,
    dpo_ops.Inputs: dpo_ops.linear_dpo_op,
    vocab_parallel.Inputs: vocab_parallel.vocab_parallel_op,
    vocab_parallel.BackwardInputs: vocab_parallel.vocab_parallel_backward_op,
}


@pytest.mark.parametrize("record", MIRRORS, ids=lambda record: f"{record.__module__}.{record.__name__}")
def test_records_mirror_their_schemas(record):
    arguments = MIRRORS[record]._opoverload._schema.arguments
    assert record._fields == tuple(argument.name for argument in arguments)
    defaults = {argument.name: argument.default_value for argument in arguments if argument.has_default_value()}
    assert record._field_defaults == defaults


@pytest.mark.parametrize("module", [ops, dpo_ops], ids=["linear_logps", "linear_dpo"])
def test_records_mirror_what_an_op_returns(module):
    schema = MIRRORS[module.Inputs]._opoverload._schema
    assert module.Outputs._fields == tuple(result.name for result in schema.returns)


def some_head(**options) -> Head:
    return Head(torch.randn(13, 5), torch.randn(13), **options)


def test_columns_are_a_head_of_their_own():
    head, hidden = some_head(softcap=2.0, logit_scale=0.7, temperature=1.3), torch.randn(4, 5)
    whole = logits(hidden, head)
    for columns in (slice(0, 4), slice(4, 13), slice(9, 99)):
        torch.testing.assert_close(logits(hidden, head.columns(columns)), whole[:, columns])
    assert head._replace(bias_V=None).columns(slice(3)).bias_V is None


def test_slope_is_the_derivative_without_the_cap():
    head = some_head(logit_scale=-0.5, temperature=2.0)
    moved = head._replace(bias_V=head.bias_V + 1)
    hidden = torch.randn(4, 5, dtype=torch.float64)
    expected = torch.full((4, 13), head.slope, dtype=torch.float64)
    torch.testing.assert_close(logits(hidden, moved) - logits(hidden, head), expected)


def test_options_are_the_keywords_of_the_public_functions():
    head = some_head(softcap=2.0, logit_scale=0.7, temperature=1.3)
    assert Head(head.weight_VD, *head.options.values()) == head
    assert ops.head_fields(head).keys() == {"weight", "bias", "softcap", "logit_scale", "temperature"}


@pytest.mark.parametrize("trained", [(False, False), (True, False), (False, True)])
def test_trainable(trained):
    weight, bias = (t.requires_grad_(need) for t, need in zip(some_head()[:2], trained, strict=True))
    assert Head(weight, bias).trainable == any(trained)
    assert Head(weight).trainable == trained[0]


def test_autocast_casts_as_a_product_does():
    hidden, head = torch.randn(4, 5), some_head(softcap=2.0)
    assert head.autocast(hidden) == (hidden, head)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast, cast_head = head.autocast(hidden)
        assert {t.dtype for t in (cast, *cast_head[:2])} == {torch.bfloat16}
        assert cast_head[2:] == head[2:]
        assert head._replace(bias_V=None).autocast(hidden)[1].bias_V is None
        assert head.autocast(hidden.double())[1] is head


def test_gradients_that_no_argument_needs_are_not_returned():
    found = ops.input_gradients(dpo_ops.Inputs, Needs(True, False, True), *torch.ones(3))
    named = zip(dpo_ops.Inputs._fields, found, strict=True)
    assert {name for name, value in named if value is not None} == {"hidden", "bias"}
