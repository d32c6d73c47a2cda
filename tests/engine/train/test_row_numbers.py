"""Weights, margins and masks of rows in the loss, its gradients, its references and its evaluation."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from dpo_kernels import plackett_luce_loss, preference_loss
from engine.config.schema import LossConfig, ModelConfig
from engine.data.groups import PreferenceDataset
from engine.errors import UserError
from engine.evaluate import evaluate
from engine.model import Policy, load_policy
from engine.train.loop import train
from engine.train.objective import Objective
from tests.engine.conftest import preference_rows
from tests.engine.train.test_objective import CPU, dataset, gradients, one_step, references

BETA = 0.3


@pytest.fixture(scope="module")
def policy(tiny_model_dir) -> Policy:
    return load_policy(ModelConfig(model_name_or_path=str(tiny_model_dir), dtype="float32"), device=CPU)


def with_numbers(
    data: PreferenceDataset, *, weights: bool, margins: bool, tokens: tuple[float, ...], pairs=None
) -> PreferenceDataset:
    """Every other row has numbers; the first token of a response always counts."""
    generator = np.random.default_rng(3)
    groups = []
    for place, group in enumerate(data):
        drawn = tuple(generator.choice(tokens, len(r)).astype(np.float32) for r in group.response_ids)
        for values in drawn:
            values[0] = values[0] or 1
        weight, margin = generator.uniform(0, 2), generator.normal()
        own = {"weight": weight if weights else 1.0, "margin": margin if margins else 0.0, "token_weights": drawn}
        groups.append(replace(group, **(own if place % 2 else {}), pairs=pairs))
    return PreferenceDataset(groups)


def token_logps(policy: Policy, data: PreferenceDataset) -> list[list[torch.Tensor]]:
    """Of every response, from the model's own forward."""
    found: list[list[torch.Tensor]] = []
    implementation = policy.causal_lm.config._attn_implementation
    policy.causal_lm.set_attn_implementation("eager")
    try:
        for group in data:
            found.append([])
            for response in group.response_ids:
                ids = torch.from_numpy(np.r_[group.prompt_ids, response].astype(np.int64))
                logits = policy.causal_lm(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None]).logits[0]
                start = len(group.prompt_ids)
                found[-1].append(logits[start - 1 : -1].log_softmax(-1).gather(1, ids[start:, None])[:, 0])
    finally:
        policy.causal_lm.set_attn_implementation(implementation)
    return found


def sums_of(data: PreferenceDataset, logps: list[list[torch.Tensor]], ld_alpha: float = 1.0):
    """(weighted sums, unweighted ones, tokens that count), [responses] each, in plain terms."""
    weighted, unweighted, lengths = [], [], []
    for group, responses in zip(data, logps, strict=True):
        weights = [torch.from_numpy(w.copy()) for w in group.token_weights]
        kept = [(values[w != 0], w[w != 0]) for values, w in zip(responses, weights, strict=True)]
        shared = min(len(values) for values, _ in kept)
        for values, w in kept:
            tail = torch.where(torch.arange(len(values)) < shared, 1.0, ld_alpha)
            weighted.append((values * w * tail).sum())
            unweighted.append(values.sum())
            lengths.append(len(values))
    return torch.stack(weighted), torch.stack(unweighted), torch.tensor(lengths)


CASES = {
    "all of them": ({"loss_type": "sigmoid"}, {"weights": True, "margins": True, "tokens": (0, 0.5, 1, 2)}),
    "a mask": ({"loss_type": "ipo"}, {"weights": True, "margins": False, "tokens": (0, 1)}),
    "per token": ({"loss_type": "sigmoid_norm"}, {"weights": True, "margins": True, "tokens": (0, 1)}),
    "a mean over tokens": ({"loss_type": ["sigmoid", "sft"]}, {"weights": True, "margins": True, "tokens": (0, 1)}),
    "a likelihood": ({"loss_type": "orpo"}, {"weights": True, "margins": False, "tokens": (0, 0.5, 2)}),
    "and its term": ({"rpo_alpha": 0.5}, {"weights": False, "margins": True, "tokens": (0, 0.5, 2)}),
    "no reference": ({"loss_type": "simpo"}, {"weights": True, "margins": True, "tokens": (0, 1)}),
    "a tail": ({"ld_alpha": 0.3}, {"weights": True, "margins": True, "tokens": (0, 0.5, 1)}),
    "coupled": ({"loss_type": "aot"}, {"weights": False, "margins": False, "tokens": (0, 0.5, 1)}),
}


@pytest.mark.parametrize("name", CASES)
def test_numbers_of_pairs_are_in_loss_and_gradients(name, policy):
    options, numbers = CASES[name]
    data = with_numbers(dataset(), **numbers)
    table = references(data)
    config = LossConfig(beta=BETA, **options)
    sums, unweighted, lengths = sums_of(data, token_logps(policy, data), options.get("ld_alpha", 1.0))
    ref = torch.from_numpy(table.lookup(tuple(range(len(data)))))
    out = preference_loss(
        sums[0::2], sums[1::2], ref[0::2], ref[1::2], loss_type=tuple(config.terms), beta=BETA,
        loss_weights=tuple(config.terms.values()), chosen_lengths=lengths[0::2], rejected_lengths=lengths[1::2],
        margins=torch.tensor([g.margin for g in data]) if numbers["margins"] else None,
        unweighted_chosen_logps=unweighted[0::2],
    )  # fmt: skip
    expected = (out.loss * torch.tensor([g.weight for g in data])).mean()
    expected.backward()
    want = gradients(policy)
    for tokens_per_pack in (100_000, 70):
        objective = Objective(config, token_metrics=True)
        objective.check_dataset(data)
        scored = objective.backward(policy, one_step(data, tokens_per_pack, table))
        torch.testing.assert_close(scored.losses.mean(), expected.detach().float(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradients(policy), want, rtol=1e-4, atol=1e-5 * want.abs().max().item())
        assert scored.tokens[:, 4:].sum() == lengths.sum()


@pytest.mark.parametrize("loss", ["plackett_luce", "sigmoid"])
def test_numbers_of_groups_of_three(loss, policy):
    """Rankings have one weight each; the pairs of one prompt share weight and margin."""
    ranks = loss == "plackett_luce"
    pairs = ((0, 1), (0, 2), (1, 2))
    numbers = {"weights": True, "margins": not ranks, "tokens": (0, 0.5, 1, 2)}
    data = with_numbers(dataset(3), pairs=None if ranks else pairs, **numbers)
    table = references(data)
    sums_B3 = sums_of(data, token_logps(policy, data))[0].view(-1, 3)
    ref_B3 = torch.from_numpy(table.lookup(tuple(range(len(data))))).view(-1, 3)
    weights = torch.tensor([g.weight for g in data])
    if ranks:
        expected = (plackett_luce_loss(sums_B3, ref_B3, beta=BETA).loss * weights).mean()
    else:
        better, worse = ([pair[side] for pair in pairs] for side in (0, 1))
        sides = [values[:, places].flatten() for values in (sums_B3, ref_B3) for places in (better, worse)]
        margins = torch.tensor([g.margin for g in data]).repeat_interleave(3)
        out = preference_loss(*sides, beta=BETA, margins=margins)
        expected = (out.loss * weights.repeat_interleave(3)).mean()
    expected.backward()
    want = gradients(policy)
    for tokens_per_pack in (100_000, 120):
        scored = Objective(LossConfig(loss_type=loss, beta=BETA)).backward(
            policy, one_step(data, tokens_per_pack, table)
        )
        torch.testing.assert_close(scored.losses.mean(), expected.detach().float(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradients(policy), want, rtol=1e-4, atol=1e-5 * want.abs().max().item())


@pytest.mark.parametrize(
    ("options", "numbers", "words"),
    [
        ({"loss_type": "aot"}, {"weights": True}, "rows have a column weight, which has no meaning for loss.loss_type"),
        ({"loss_type": "apo_zero"}, {"margins": True}, "rows have a column margin, which has no meaning for loss.loss"),
        ({"loss_type": "plackett_luce"}, {"margins": True}, r"leave it out with data.columns: \{margin: null\}"),
        ({"loss_type": "sft"}, {"margins": True}, "it has no margin that could be asked to exceed one"),
        ({"loss_type": ["aot", "sft"]}, {"tokens": (0.5, 1)}, "rows have weights of tokens, which loss.loss_type aot"),
    ],
)  # fmt: skip
def test_numbers_without_a_meaning_are_refused(options, numbers, words):
    data = with_numbers(dataset(), **{"weights": False, "margins": False, "tokens": (0, 1)} | numbers)
    with pytest.raises(UserError, match=words):
        Objective(LossConfig(**options)).check_dataset(data)
    plain = {"weights": False, "margins": False, "tokens": (0, 1)}
    Objective(LossConfig(**options)).check_dataset(with_numbers(dataset(), **plain))


@pytest.fixture
def numbered(tmp_path):
    """Twelve rows; every other one has numbers."""
    rows = preference_rows(12)
    for place in range(0, 12, 2):
        rows[place] |= {"weight": 0.5 + place / 8, "margin": place / 5}
    path = tmp_path / "numbered.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path, rows


@pytest.mark.parametrize("mode", ["stored", "live"])
def test_a_run_and_its_evaluation(mode, numbered, make_config, rows_of, caplog):
    """Before the first update policy and reference are equal, so the loss is that of margins and weights alone: the
    pattern must be in the reference sums, too."""
    path, rows = numbered
    data = {"dataset_name": str(path), "mask_pattern": "[aeiou]", "eval_dataset_name": str(path)}
    data |= {"eval_dataset_split": "train"}
    reference = {"mode": "auto" if mode == "stored" else "live"}
    packing = {"pairs_per_step": 12, "tokens_per_pack": 300}
    config = make_config(data=data, packing=packing, reference=reference, train={"max_steps": 2})
    with caplog.at_level("INFO"):
        train(config)
    weights, margins = (torch.tensor([row.get(n, d) for row in rows]) for n, d in (("weight", 1.0), ("margin", 0.0)))
    first, second = rows_of(config)
    expected = (weights * -torch.nn.functional.logsigmoid(-margins)).mean().item()
    assert first["loss"] == pytest.approx(expected, abs=1e-5)
    assert abs(first["rewards/margins"]) < 1e-4
    assert second["loss"] < first["loss"]
    said = caplog.text
    assert "rows (train)" in said
    assert "weight 0.75 to 1.75" not in said
    assert "weight 0.5 to 1.75; margin 0 to 2; " in said
    assert "% of completion tokens left out" in said
    # The model before training again, from its references in the store.
    values = evaluate(config)
    assert values["eval_loss"] == pytest.approx(expected, abs=1e-5)
    assert abs(values["eval_rewards/margins"]) < 1e-4


def test_sums_in_columns_cannot_be_weighed(numbered, make_config):
    path, rows = numbered
    path.write_text("".join(json.dumps({**r, "ref_chosen_logps": -9, "ref_rejected_logps": -9}) + "\n" for r in rows))
    config = make_config(data={"dataset_name": str(path), "mask_pattern": "a"})
    with pytest.raises(
        UserError, match="rows with a mask or weights weigh single tokens, and columns of reference log-"
    ):
        train(config)


def test_lengths_of_an_evaluation_are_those_that_are_trained_on(numbered, make_config, rows_of):
    """The loss before the first update is that of the model before training, of the tokens that count."""
    path, _ = numbered
    data = {"dataset_name": str(path), "mask_pattern": "[aeiou]", "eval_dataset_name": str(path)}
    config = make_config(
        data={**data, "eval_dataset_split": "train"},
        packing={"pairs_per_step": 12, "tokens_per_pack": 300},
        loss={"loss_type": "simpo", "beta": 2.0},
        train={"max_steps": 1},
    )
    train(config)
    (row,), values = rows_of(config), evaluate(config)
    for name in ("loss", "rewards/chosen", "logps/rejected", "entropy", "mean_token_accuracy"):
        assert values[f"eval_{name}"] == pytest.approx(row[name], rel=1e-5)
