"""A dozen families on trial, and the shape of the committed table of all of them (`make conformance`)."""

from __future__ import annotations

import re
from collections import Counter

import pytest
import transformers
from packaging.version import Version

from tests.conformance.arguments import chosen
from tests.conformance.table import path_of, read_rows, tables
from tests.conformance.trial import EQUAL, GRAD_BOUND, LOGPS_BOUND, NOT_BUILT, NOT_CAUSAL, try_family


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
        ("gemma4_text", True),  # head dimensions of 256 and 512, attributes that differ between layers, shared keys
        ("gemma4", True),  # the same inside a composite
        ("emu3", False),  # a text model that the automatic classes do not read back
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
    ("model_type", "layout", "mixers", "reason"),
    [
        ("mamba", "mixers in rows", "MambaMixer x 4", r"leaks tokens .* first in \S+mixer \(MambaMixer\)"),
        ("qwen3_5_text", "mixers in rows", "Qwen3_5GatedDeltaNet x 2", r"\(Qwen3_5GatedDeltaNet\), which depends"),
        ("lfm2", "mixers in rows", "Lfm2ShortConv x 2", r"leaks tokens.*\(Lfm2ShortConv\)"),
        ("recurrent_gemma", "mixers in rows", "RecurrentGemmaRecurrentBlock x 3", r"leaks tokens"),
        ("rwkv", "mixers in rows", "ZeroPad2d x 8, RwkvSelfAttention x 4", r"\(ZeroPad2d\)"),
        ("bart", "mixers in rows", "BartLearnedPositionalEmbedding x 1", r"different log-probs.*embed_positions"),
        ("bloom", "rows", "", r"leaks tokens.*\(BloomAttention\)"),
        ("stablelm", "rows", "", r"cannot run on packs: StableLmAttention does not pass keyword arguments"),
        ("bert", "rows", "", r"different log-probs.*first in the output layers"),
        ("minimax_m3_vl_text", "rows", "", r"MiniMaxM3VLAttention gives its attention `block_indices`"),
        ("falcon", "rows", "", r"cannot run on packs: its model does not use transformers' AttentionInterface"),
        ("phimoe", "rows", "", r"\(PhimoeAttention\), whose attention does more than packs support"),
        ("deepseek_v32", "one row", "", r"DeepseekV32ForCausalLM gives different log-probs in rows"),
        pytest.param(
            *("dots3_note_text", "one row", "", r"Dots3NoteForCausalLM gives different log-probs in rows"),
            marks=pytest.mark.skipif(
                Version(transformers.__version__) < Version("5.23"), reason="transformers has it since 5.23"
            ),
        ),
        ("prophetnet", "one row", "", r"is not causal in padded rows"),  # its logits are of the first of two streams
        ("blt", "rows", "", r"BltSelfAttention does not pass keyword arguments"),  # reads dropout from its config
        ("xlm", "rows", "", r"leaks tokens.*\(MultiHeadAttention\)"),
    ],
)
def test_what_packs_change_gets_rows(model_type, layout, mixers, reason):
    result = try_family(model_type)
    assert result.verdict == EQUAL, result
    assert (result.layout, result.mixers) == (layout, mixers)
    assert re.search(reason, result.reason), result.reason


def test_what_is_not_causal_is_refused_with_a_reason():
    result = try_family("cpmant")
    assert result.verdict == NOT_CAUSAL, result
    assert "\n" not in result.reason
    assert re.match(r"in its own eager forward the log-prob of a token changes by up to \S+ nats", result.reason)
    assert "CpmAntForCausalLM is not causal one row at a time: what it says of a token depends" in result.reason
    assert result.reason.endswith("choose a family that docs/conformance.md lists as equal")


@pytest.mark.parametrize("path", tables(), ids=lambda path: path.stem)
def test_committed_tables_hold_what_the_readme_promises(path):
    rows = read_rows(path)
    counts = Counter(row["verdict"] for row in rows)
    assert set(counts) <= {EQUAL, NOT_CAUSAL, NOT_BUILT}
    assert sum(row["layout"].startswith(("shared", "mixers in rows")) for row in rows) >= 120
    words = f"**{counts[EQUAL]} equal, 0 refused, {counts[NOT_CAUSAL]} not causal, {counts[NOT_BUILT]} not built"
    assert words in path.read_text(encoding="ascii")
    for row in rows:
        if row["verdict"] == EQUAL:
            assert float(row["log-probs"]) <= LOGPS_BOUND, row
            assert float(row["gradients"]) <= GRAD_BOUND, row
            assert row["isolated"] == "yes"
            assert (row["layout"] == "shared") == (not row["what the user is told"])
        else:
            assert row["what the user is told"], row


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["qwen2", "llama", "gemma2", "mixtral", "phi3"])
def test_equal_with_compiled_blocks(model_type):
    """Code that inductor generates; Liger's layers are tried in ``tests/engine/model/kernels/interpreted``."""
    result = try_family(model_type, "compile")
    assert result.verdict == EQUAL, result


def test_the_command_line(capsys):
    assert chosen([]) == ([], "none")
    assert chosen(["llama", "qwen3", "--kernels", "compile"]) == (["llama", "qwen3"], "compile")
    for arguments, text in ((["--help"], path_of(transformers.__version__).name), (["lama"], "did you mean llama?")):
        with pytest.raises(SystemExit):
            chosen(arguments)
        captured = capsys.readouterr()
        assert text in captured.out + captured.err
