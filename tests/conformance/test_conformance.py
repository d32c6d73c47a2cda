"""A dozen families on trial, and the shape of the committed table of all of them (`make conformance`)."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from tests.conformance.arguments import chosen_types
from tests.conformance.table import PATH, read_rows
from tests.conformance.trial import EQUAL, GRAD_BOUND, LOGPS_BOUND, NOT_BUILT, REFUSED, try_family


@pytest.mark.parametrize(
    ("model_type", "local"),
    [
        ("llama4_text", True),  # chunks, a body that is not where its prefix says
        ("gemma2", True),  # windows, capped scores and logits
        ("qwen2_moe", True),  # a window that only the mask knows, experts
        ("deepseek_v3", False),  # latent attention: values narrower than keys
        ("afmoe", True),  # wants contiguous output
        ("hyperclovax", False),  # multiplies by what Granite divides by
        ("opt", False),  # learned positions, dropout everywhere
    ],
)
def test_equal(model_type, local):
    result = try_family(model_type)
    assert result.verdict == EQUAL, result
    assert result.logps_error <= LOGPS_BOUND
    assert result.grad_error <= GRAD_BOUND
    assert result.isolated
    assert result.local == local
    if model_type == "opt":
        assert result.dropouts > 0


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("mamba", r"MambaForCausalLM leaks tokens between responses of a pack, first in \S+mixer \(MambaMixer\)"),
        ("qwen3_next", r"leaks tokens.*\(Qwen3NextGatedDeltaNet\), which depends on the rest of a pack"),
        ("lfm2", r"leaks tokens.*\(Lfm2ShortConv\)"),
        ("bloom", r"leaks tokens.*\(BloomAttention\)"),
        ("stablelm", r"cannot run on packs: StableLmAttention does not pass keyword arguments"),
        ("bert", r"different log-probs.*first in the output layers"),
        ("bart", r"different log-probs.*embed_positions \(BartLearnedPositionalEmbedding\)"),
        ("minimax_m3_vl_text", r"MiniMaxM3VLAttention gives its attention `block_indices`"),
        ("gpt_neo", r"cannot run on packs: its model does not use transformers' AttentionInterface"),
    ],
)
def test_refused_with_a_reason(model_type, reason):
    result = try_family(model_type)
    assert result.verdict == REFUSED, result
    assert "\n" not in result.reason
    assert result.reason.endswith("choose a family that docs/conformance.md lists as equal")
    assert re.search(reason, result.reason), result.reason


def test_committed_table_holds_what_the_readme_promises():
    rows = read_rows()
    counts = Counter(row["verdict"] for row in rows)
    assert set(counts) <= {EQUAL, REFUSED, NOT_BUILT}
    assert counts[EQUAL] + counts[REFUSED] >= 40
    assert f"**{counts[EQUAL]} equal, {counts[REFUSED]} refused" in PATH.read_text(encoding="ascii")
    for row in rows:
        if row["verdict"] == EQUAL:
            assert float(row["log-probs"]) <= LOGPS_BOUND, row
            assert float(row["gradients"]) <= GRAD_BOUND, row
            assert row["isolated"] == "yes"
            assert not row["what the user is told"]
        else:
            assert row["what the user is told"], row


def test_the_command_line(capsys):
    assert chosen_types([]) == []
    assert chosen_types(["llama", "qwen3"]) == ["llama", "qwen3"]
    for arguments, text in ((["--help"], "docs/conformance.md"), (["lama"], "did you mean llama?")):
        with pytest.raises(SystemExit):
            chosen_types(arguments)
        captured = capsys.readouterr()
        assert text in captured.out + captured.err
