"""The layout that ``dpo plan`` counts is the one that a run takes, and a line says how it was found."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from engine.forecast import layout as module
from engine.forecast import shallow
from engine.forecast.layout import find_layout
from engine.model import check_packing, load_policy
from tests.engine.train.conftest import save_family

CPU = torch.device("cpu")
RANDOM = "with random weights"


@pytest.mark.parametrize(
    ("family", "name", "words"),
    [
        ("llama", "packs", f"by the start-up check, on 1 of 4 layers {RANDOM}"),
        ("lfm2", "mixers in rows", f"Lfm2ShortConv x 2, by the start-up check, on 2 of 4 layers {RANDOM}"),
        ("mamba2", "mixers in rows", f"Mamba2Mixer x 4, by the start-up check, on 1 of 4 layers {RANDOM}"),
        ("bloom", "rows", f"by the start-up check, on 1 of 4 layers {RANDOM}"),
    ],
)
def test_it_is_the_layout_of_the_run(family, name, words, config, tmp_path, tiny_tokenizer):
    folder = save_family(family, tmp_path / family, tiny_tokenizer)
    config = replace(config, model=replace(config.model, model_name_or_path=str(folder)))
    found = find_layout(config, CPU)
    assert (found.name, found.source) == (name, words)
    policy = load_policy(config.model, device=CPU)
    check_packing(policy)
    assert found.layout._replace(reason="") == policy.layout._replace(reason="")
    assert (found.packing.layout == "rows") == (name == "rows")
    assert found.packing.share_prompts == (name != "rows")


def test_what_is_not_found_is_assumed_and_said(config, monkeypatch):
    later = "; `dpo train` takes the first layout that its start-up check finds exact"
    monkeypatch.setattr(shallow, "free_bytes", lambda device: 2**10)
    found = find_layout(config, CPU)
    assert found.layout.kind == "shared"
    assert found.source.startswith("assumed: layers of every kind would take 0.0 of 0.0 GiB")
    assert found.source.endswith(later)
    rows = replace(config, packing=replace(config.packing, layout="rows"))
    assert find_layout(rows, CPU).layout.kind == "rows"
    assert not find_layout(rows, CPU).packing.share_prompts
    monkeypatch.undo()

    def refuse(*args, **kwargs):
        raise module.UserError("it is not causal")

    monkeypatch.setattr(module, "check_packing", refuse)
    assert find_layout(config, CPU).source == f"assumed: {RANDOM} it is not causal{later}"
