from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from engine.config.schema import DataConfig, ModelConfig
from engine.data import load_dataset_groups
from engine.data.groups import PreferenceDataset
from engine.errors import UserError
from engine.model import load_policy, load_tokenizer
from engine.packing import build_batch
from engine.reference import ReferenceStore, load_ref_sums, model_digest, precompute, verify_rows


@pytest.fixture
def stored(policy, dataset) -> list[tuple[np.ndarray, ...]]:
    return [tuple(policy.expected(group)) for group in dataset]


def test_the_right_values_pass_and_only_a_few_rows_are_computed(policy, dataset, stored):
    verify_rows(policy, dataset, stored)
    assert len(policy.scored) == 4
    sizes = [int(n.sum()) for n in dataset.lengths]
    rows = [row for pack in policy.scored for row in pack]
    assert {sizes[rows[0]], sizes[rows[-1]]} == {min(sizes), max(sizes)}
    assert set(policy.modes) == {(True, False, False)}


def test_sums_are_checked_too(policy, dataset, stored):
    sums = [tuple(float(v.sum()) for v in group) for group in stored]
    verify_rows(policy, dataset, sums)
    wrong = [tuple(v * 1.02 for v in group) for group in sums]
    with pytest.raises(UserError, match="differ from the model's by up to"):
        verify_rows(policy, dataset, wrong)


def test_other_weights_are_noticed_and_rows_named(make_policy, dataset, stored):
    other = make_policy(seed=1)
    with pytest.raises(UserError, match=r"of rows \d+, \d+.*nats per token \(checked 4 rows, allowed 0.001\)"):
        verify_rows(other, dataset, stored)


@pytest.mark.parametrize("change", ["one token", "small bias", "length", "nan"])
def test_one_wrong_response_is_noticed(policy, dataset, stored, change):
    longest = max(range(len(dataset)), key=lambda i: dataset.lengths[i].sum())
    values = stored[longest][1].copy()
    if change == "one token":
        values[0] += 0.01
    elif change == "small bias":
        values += 6e-4
    elif change == "nan":
        values[0] = np.nan
    else:
        values = values[1:]
    stored[longest] = (stored[longest][0], values)
    with pytest.raises(UserError, match=f"of row {dataset[longest].row} differ"):
        verify_rows(policy, dataset, stored)


def test_the_tolerance_follows_the_dtype(make_policy, dataset, stored):
    near = [tuple(v + 0.02 * (-1) ** np.arange(len(v)).astype(np.float32) for v in g) for g in stored]
    verify_rows(make_policy(dtype=torch.bfloat16), dataset, near)
    with pytest.raises(UserError):
        verify_rows(make_policy(), dataset, near)
    verify_rows(make_policy(), dataset, near, atol=0.5)


def test_fewer_rows_than_asked_for(policy, make_groups):
    groups = [replace(make_groups(1)[0], row=7)]
    verify_rows(policy, PreferenceDataset(groups), [tuple(policy.expected(groups[0]))])
    with pytest.raises(UserError, match="of row 7 differ"):
        verify_rows(policy, PreferenceDataset(groups), [(0.0, 0.0)])


@pytest.mark.parametrize(("beta", "refused"), [(0.1, True), (0.01, False)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_response_may_differ_by_a_hundredth_of_reward(dtype, beta, refused, make_policy, dataset, stored):
    """The difference is spread over the tokens, each of which passes in bfloat16."""
    shifted = [tuple(v + np.float32(0.2 / len(v)) for v in group) for group in stored]
    sums = [tuple(float(v.sum()) for v in group) for group in shifted]
    for values in (shifted, sums):
        options = {"beta": beta, "atol": 0.5}
        if refused:
            with pytest.raises(UserError, match=r"0\.02 of reward at beta 0\.1 \(allowed 0\.01\)"):
                verify_rows(make_policy(dtype=dtype), dataset, values, **options)
        else:
            verify_rows(make_policy(dtype=dtype), dataset, values, **options)


def test_what_a_model_itself_rounds_between_layouts_is_allowed(make_policy, dataset, stored):
    """As kernels that are chosen by shape do in bfloat16: sums differ with what else is in a pack."""
    policy = make_policy(dtype=torch.bfloat16)
    exact = policy.logps

    def rounded(batch):
        counts = (batch.cu_responses_S1[1:] - batch.cu_responses_S1[:-1]).repeat_interleave(
            batch.cu_responses_S1[1:] - batch.cu_responses_S1[:-1]
        )
        return exact(batch) + (0.15 / counts if len(batch.rows) > 1 else 0.0)

    policy.logps = rounded
    packed = [tuple(v + np.float32(0.15 / len(v)) for v in group) for group in stored]
    verify_rows(policy, dataset, packed)
    other = [tuple(v + np.float32(0.4 / len(v)) for v in group) for group in stored]
    with pytest.raises(UserError, match=r"0\.04 of reward at beta 0\.1 \(allowed 0\.03\)"):
        verify_rows(policy, dataset, other)


@pytest.fixture(scope="module")
def chat_model(shared_dir):
    path = shared_dir / "models" / "tiny-chat-llama"
    if not path.is_dir():
        pytest.skip("needs the trained tiny model")
    return path


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_model_after_twenty_steps_is_another_and_packs_are_not(dtype, chat_model, shared_dir, tmp_path):
    """Twenty steps of Adam at the default rate move each weight by about twenty times the rate, along its gradient."""
    data = DataConfig(dataset_name=str(shared_dir / "data" / "dpo-en-demo.json"), max_length=256, max_rows=12)
    model = ModelConfig(model_name_or_path=str(chat_model), dtype=dtype)
    groups, _ = load_dataset_groups(data, load_tokenizer(model), split="train")
    policy = load_policy(model, device=torch.device("cpu"))
    store = ReferenceStore(tmp_path)
    precompute(policy, groups, store, tokens_per_pack=1500, progress=False)
    sums = load_ref_sums(groups, store, model_digest(policy))
    verify_rows(policy, groups, sums)
    verify_rows(policy, groups, sums, share_prompts=False)
    batch = build_batch([groups[i] for i in range(4)])
    parts = policy.logps(batch).tensor_split(batch.cu_responses_S1[1:-1].tolist())
    sum(part.sum() * (-1) ** (1 + i) for i, part in enumerate(parts)).backward()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter -= 20 * 1e-6 * parameter.grad.sign()
    with pytest.raises(UserError, match=r"of reward at beta 0\.1 \(allowed 0\.01\)"):
        verify_rows(policy, groups, sums)
