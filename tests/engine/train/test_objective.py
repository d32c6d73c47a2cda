"""Every way to compute a step's loss gives the same loss and gradients as one sequence at a time."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from dpo_kernels import plackett_luce_loss, preference_loss
from dpo_kernels.chunks import sum_responses
from dpo_kernels.losses import LOSS_TYPES
from engine.config.losses import SMOOTHED_LOSSES
from engine.config.schema import LoraConfig, LossConfig, ModelConfig, PackingConfig, TrainConfig
from engine.data.groups import PreferenceDataset, PreferenceGroup
from engine.errors import UserError
from engine.model import Policy, load_policy
from engine.packing import build_batch
from engine.train.feed import TrainingFeed
from engine.train.objective import Objective
from engine.train.references import ReferenceTable
from engine.train.throughput import FlopModel

CPU = torch.device("cpu")
PAIR_LOSSES = list(LOSS_TYPES)


@pytest.fixture(scope="module")
def policy(tiny_model_dir) -> Policy:
    return load_policy(ModelConfig(model_name_or_path=str(tiny_model_dir), dtype="float32"), device=CPU)


def dataset(responses: int | None = 2, count: int = 7) -> PreferenceDataset:
    generator = np.random.default_rng(0)

    def draw(low: int, high: int) -> np.ndarray:
        return generator.integers(0, 300, generator.integers(low, high), dtype=np.int32)

    sizes = [responses or 2 + i % 3 for i in range(count)]
    return PreferenceDataset(
        [PreferenceGroup(i, draw(3, 20), tuple(draw(1, 30) for _ in range(k))) for i, k in enumerate(sizes)]
    )


def one_step(data: PreferenceDataset, tokens_per_pack: int, table: ReferenceTable | None):
    feed = TrainingFeed(
        data,
        PackingConfig(pairs_per_step=len(data), tokens_per_pack=tokens_per_pack),
        TrainConfig(),
        lookup=None if table is None else table.lookup,
        flops=FlopModel(1.0, 1.0, 1, True, 1),
        device=CPU,
    )
    return next(feed.steps(0))


def one_by_one(policy: Policy, data: PreferenceDataset) -> list[torch.Tensor]:
    """Log-prob sums of every response from the model's own forward."""
    sums = []
    for group in data:
        for response in group.response_ids:
            ids = torch.from_numpy(np.r_[group.prompt_ids, response].astype(np.int64))
            logits = policy.causal_lm(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None]).logits[0]
            start = len(group.prompt_ids)
            sums.append(logits[start - 1 : -1].log_softmax(-1).gather(1, ids[start:, None]).sum())
    return sums


@pytest.fixture
def plain_forward(policy):
    """The model with transformers' own attention."""
    implementation = policy.causal_lm.config._attn_implementation

    def forward(data: PreferenceDataset) -> list[torch.Tensor]:
        policy.causal_lm.set_attn_implementation("eager")
        try:
            return one_by_one(policy, data)
        finally:
            policy.causal_lm.set_attn_implementation(implementation)

    return forward


def gradients(policy: Policy) -> torch.Tensor:
    flat = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])
    policy.zero_grad(set_to_none=True)
    return flat


def references(data: PreferenceDataset) -> ReferenceTable:
    generator = np.random.default_rng(1)
    sums = [tuple(-5.8 * len(r) + generator.normal() for r in g.response_ids) for g in data]
    return ReferenceTable([tuple(map(float, s)) for s in sums])


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_every_loss_equals_one_sequence_at_a_time(name, policy, plain_forward):
    data = dataset()
    table = references(data)
    smoothing = 0.1 if name in SMOOTHED_LOSSES else 0.0
    config = LossConfig(loss_type=name, beta=0.3, label_smoothing=smoothing)
    sums = torch.stack(plain_forward(data))
    ref = torch.from_numpy(table.lookup(tuple(range(len(data)))))
    lengths = torch.tensor([len(r) for g in data for r in g.response_ids])
    expected = preference_loss(
        sums[0::2], sums[1::2], ref[0::2], ref[1::2], loss_type=name, beta=0.3, label_smoothing=smoothing,
        chosen_lengths=lengths[0::2], rejected_lengths=lengths[1::2],
    ).loss.mean()  # fmt: skip
    expected.backward()
    want = gradients(policy)
    for tokens_per_pack in (100_000, 70):
        step = one_step(data, tokens_per_pack, table)
        assert (len(step.packs) > 1) == (tokens_per_pack == 70)
        scored = Objective(config).backward(policy, step)
        assert not any(column.requires_grad for column in scored.tensors)
        torch.testing.assert_close(scored.losses.mean(), expected.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradients(policy), want, rtol=1e-4, atol=1e-5 * want.abs().max().item())


@pytest.mark.parametrize("responses", [3, None])
def test_rankings_equal_one_sequence_at_a_time(responses, policy, plain_forward):
    data = dataset(responses)
    table = references(data)
    objective = Objective(LossConfig(loss_type="plackett_luce", beta=0.3))
    objective.check_dataset(data)
    sums = iter(plain_forward(data))
    losses = []
    for i, group in enumerate(data):
        logps = torch.stack([next(sums) for _ in group.response_ids])
        losses.append(plackett_luce_loss(logps[None], torch.from_numpy(table.lookup((i,)))[None], beta=0.3).loss[0])
    torch.stack(losses).mean().backward()
    want = gradients(policy)
    for tokens_per_pack in (100_000, 90):
        step = one_step(data, tokens_per_pack, table)
        scored = objective.backward(policy, step)
        expected = torch.stack([losses[row] for row in step.rows]).detach()
        torch.testing.assert_close(scored.losses, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradients(policy), want, rtol=1e-4, atol=1e-5 * want.abs().max().item())


@pytest.mark.parametrize("tokens_per_pack", [100_000, 100])
def test_rankings_of_two_are_pairs_to_the_bit(tokens_per_pack, policy):
    data = dataset()
    step = one_step(data, tokens_per_pack, references(data))
    ranked = Objective(LossConfig(loss_type="plackett_luce", beta=0.3)).backward(policy, step)
    ranked_gradient = gradients(policy)
    paired = Objective(LossConfig(beta=0.3)).backward(policy, step)
    assert all(torch.equal(a, b) for a, b in zip(ranked.tensors, paired.tensors, strict=True))
    assert torch.equal(ranked_gradient, gradients(policy))


def test_scores_of_two_are_those_of_pairs_to_the_bit():
    generator = torch.Generator().manual_seed(0)
    logps, refs = torch.randn(2, 12, generator=generator) * 40 - 200
    lengths = torch.arange(1, 13)
    ranked, paired = (Objective(LossConfig(loss_type=name, beta=0.3)) for name in ("plackett_luce", "sigmoid"))
    for a, b in zip(*(o.score(logps, refs, lengths, (2,) * 6).tensors for o in (ranked, paired)), strict=True):
        assert torch.equal(a, b)


PAIRS_OF_FOUR = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3))


def scored_groups(count: int = 6) -> PreferenceDataset:
    """Groups of four responses and five pairs, of three and two, and plain pairs."""
    groups = []
    for group in dataset(4, count):
        kind = group.row % 3
        size, pairs = ((4, PAIRS_OF_FOUR), (3, ((0, 2), (1, 2))), (2, None))[kind]
        groups.append(replace(group, response_ids=group.response_ids[:size], pairs=pairs))
    return PreferenceDataset(groups)


def expanded(data: PreferenceDataset, table: ReferenceTable) -> tuple[PreferenceDataset, ReferenceTable]:
    """A row for each pair, with its own copy of the prompt."""
    rows, sums = [], []
    for i, group in enumerate(data):
        refs = table.lookup((i,)).tolist()
        for a, b in group.pairs or ((0, 1),):
            rows.append(replace(group, response_ids=(group.response_ids[a], group.response_ids[b]), pairs=None))
            sums.append((refs[a], refs[b]))
    return PreferenceDataset(rows), ReferenceTable(sums)


def token_rows(policy: Policy, data: PreferenceDataset) -> list[list[torch.Tensor]]:
    """[tokens, 3] of every response of every group, from the whole logits matrix, with transformers' own attention."""
    implementation = policy.causal_lm.config._attn_implementation
    policy.causal_lm.set_attn_implementation("eager")
    found: list[list[torch.Tensor]] = []
    for group in data:
        found.append([])
        for response in group.response_ids:
            ids = torch.from_numpy(np.r_[group.prompt_ids, response].astype(np.int64))
            z = policy.plain_logits(ids[None])[0, len(group.prompt_ids) - 1 : -1].detach().double()
            entropy = torch.special.entr(z.softmax(-1)).sum(-1)
            hits = z.argmax(-1) == ids[len(group.prompt_ids) :]
            found[-1].append(torch.stack([z.mean(-1), entropy, hits.double()], 1))
    policy.causal_lm.set_attn_implementation(implementation)
    return found


def token_means(chosen: list[torch.Tensor], rejected: list[torch.Tensor]) -> torch.Tensor:
    best, rest = torch.cat(chosen), torch.cat(rejected)
    return torch.stack([best[:, 0].mean(), rest[:, 0].mean(), torch.cat([best, rest])[:, 1].mean(), best[:, 2].mean()])


@pytest.mark.parametrize("tokens_per_pack", [100_000, 150])
@pytest.mark.parametrize("name", ["sigmoid", "aot", "plackett_luce", "several pairs"])
def test_token_metrics_are_means_over_the_tokens_of_the_step(name, tokens_per_pack, policy):
    data = {"plackett_luce": dataset(None), "several pairs": scored_groups()}.get(name) or dataset()
    table = references(data)
    config = LossConfig(loss_type="sigmoid" if name == "several pairs" else name)
    step = one_step(data, tokens_per_pack, table)
    plain = Objective(config).backward(policy, step)
    want = gradients(policy)
    scored = Objective(config, token_metrics=True).backward(policy, step)
    assert torch.equal(gradients(policy), want)
    assert all(torch.equal(a, b) for a, b in zip(scored[:6], plain[:6], strict=True))
    rows = token_rows(policy, data)
    if name == "several pairs":
        pairs = [(g[a], g[b]) for i, g in enumerate(rows) for a, b in data[i].pairs or ((0, 1),)]
    else:
        pairs = [(group[0], torch.cat(group[1:])) for group in rows]
    expected = token_means(*(list(side) for side in zip(*pairs, strict=True)))
    assert plain.step_means(step.num_terms).shape == (7,)
    torch.testing.assert_close(scored.step_means(step.num_terms)[7:], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("names", ["sigmoid", "ipo", "simpo", ("sigmoid", "sft")])
def test_pairs_of_one_prompt_train_as_rows_of_their_own(names, policy):
    """Every pair counts once with equal weight, and every response is computed once."""
    data = scored_groups()
    table = references(data)
    rows, sums = expanded(data, table)
    assert len(rows) == data.terms.sum() == 16
    objective = Objective(LossConfig(loss_type=names, beta=0.3))
    objective.check_dataset(data)
    plain = objective.backward(policy, one_step(rows, 100_000, sums))
    want = gradients(policy)
    for tokens_per_pack in (100_000, 150):
        step = one_step(data, tokens_per_pack, table)
        assert step.num_terms == len(step.rows) == 16
        assert (len(step.packs) > 1) == (tokens_per_pack == 150)
        assert sum(p.batch.num_responses for p in step.packs) == 18
        scored = objective.backward(policy, step)
        torch.testing.assert_close(scored.means(), plain.means(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradients(policy), want, rtol=1e-4, atol=1e-5 * want.abs().max().item())
        if tokens_per_pack == 100_000:
            for got, one in zip(scored.tensors, plain.tensors, strict=True):
                torch.testing.assert_close(got.sort().values, one.sort().values, rtol=1e-5, atol=1e-5)


def test_several_pairs_of_one_prompt_are_refused_where_they_have_no_meaning():
    data = scored_groups()
    with pytest.raises(UserError, match=r"plackett_luce does not take several pairs.*data\.scored_pairs to ranking"):
        Objective(LossConfig(loss_type="plackett_luce")).check_dataset(data)
    with pytest.raises(UserError, match=r"aot does not take several pairs.*data\.scored_pairs to best_worst"):
        Objective(LossConfig(loss_type="aot")).check_dataset(data)


def test_more_than_two_responses_need_a_ranking_loss():
    with pytest.raises(UserError, match=r"row 0 has 3 responses.*takes pairs.*plackett_luce"):
        Objective(LossConfig()).check_dataset(dataset(3))


def test_reward_metrics(policy):
    data = dataset()
    table = references(data)
    step = one_step(data, 100_000, table)
    with torch.no_grad():
        batch = step.packs[0].batch
        logps = sum_responses(policy.logps(batch), batch.lengths_S)
    ratios = logps - step.packs[0].ref_logps_S
    scored = Objective(LossConfig(beta=0.5)).backward(policy, step)
    policy.zero_grad()
    torch.testing.assert_close(scored.chosen_rewards, 0.5 * ratios[0::2], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scored.rejected_rewards, 0.5 * ratios[1::2], rtol=1e-4, atol=1e-4)
    means = scored.means()
    assert means[3].item() == (scored.chosen_rewards > scored.rejected_rewards).double().mean().item()
    assert means[4].item() == pytest.approx((scored.chosen_rewards - scored.rejected_rewards).mean().item(), abs=1e-6)
    torch.testing.assert_close(means[5:], torch.stack([logps[0::2].mean(), logps[1::2].mean()]).double())


def test_coupled_losses_draw_the_same_adapter_dropout_in_both_passes(tiny_model_dir):
    lora = LoraConfig(r=4, dropout=0.5)
    policy = load_policy(ModelConfig(model_name_or_path=str(tiny_model_dir), dtype="float32", lora=lora), device=CPU)
    policy.train()
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    data = dataset()
    table = references(data)
    step = one_step(data, 70, table)
    objective = Objective(LossConfig(loss_type="aot"))
    seen: list[torch.Tensor] = []
    forward = policy.forward

    def record(batch, function):
        result = forward(batch, function)
        seen.append(getattr(result, "logps", result).detach())
        return result

    policy.forward = record
    torch.manual_seed(0)
    objective.backward(policy, step)
    half = len(seen) // 2
    assert half == len(step.packs) > 1
    assert all(torch.equal(a, b) for a, b in zip(seen[:half], seen[half:], strict=True))
    assert not torch.equal(seen[0], policy.eval().logps(step.packs[0].batch))


def test_sums_are_exact_for_long_responses():
    generator = torch.Generator().manual_seed(0)
    logps = -torch.rand(60_000, generator=generator) * 10
    lengths = torch.tensor([1, 49_999, 10_000])
    expected = torch.stack([part.double().sum() for part in logps.split(lengths.tolist())])
    torch.testing.assert_close(sum_responses(logps, lengths).double(), expected, rtol=1e-7, atol=0)


def test_a_batch_without_padding_is_what_the_feed_builds():
    data = dataset(count=2)
    batch = build_batch([data[0], data[1]])
    assert one_step(data, 100_000, None).packs[0].batch.num_tokens == batch.num_tokens
