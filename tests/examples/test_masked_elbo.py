"""ELBO estimates against what they estimate: sums over all masks and all orders, and a known joint distribution."""

from __future__ import annotations

import copy
import math
from itertools import permutations, product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.testing import assert_close

from examples.masked_diffusion.elbo import Masks, Sampler, bernoulli_masks, count_masks, elbo, elbo_values
from examples.masked_diffusion.language import Pairs
from examples.masked_diffusion.model import MaskedModel, Shape
from examples.masked_diffusion.train import preference_step
from examples.masked_diffusion.variance import SAMPLERS

V, R, PAD = 5, 4, 0
PROMPT = torch.tensor([[PAD, 3, 2]])
RESPONSE = torch.tensor([[1, 4, 2, 1]])


def make_model(seed=0, vocabulary=V, window=R) -> MaskedModel:
    """In float64; what is masked changes the log-probs of the others by several tenths of a nat."""
    torch.manual_seed(seed)
    model = MaskedModel(vocabulary, PROMPT.shape[1] + window, PAD, Shape(features=8, layers=2, heads=2)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    return model


class Joint(nn.Module):
    """In the place of a model: the true conditionals of a joint distribution of R tokens."""

    def __init__(self):
        super().__init__()
        logits = torch.randn(V**R, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        self.table, self.mask = (2 * logits).softmax(0).view([V] * R), V
        self.head = torch.eye(V, dtype=torch.float64)

    def forward(self, ids_BT):
        """Log-probs [B, T, V] as hidden states, which the identity for a head leaves as they are."""
        found = torch.zeros(*ids_BT.shape, V, dtype=torch.float64)
        for row, ids_R in enumerate(ids_BT[:, -R:].tolist()):
            seen = self.table[tuple(slice(None) if i == V else slice(i, i + 1) for i in ids_R)]
            for place in (place for place, token in enumerate(ids_R) if token == V):
                found[row, place - R] = seen.sum([axis for axis in range(R) if axis != place]).log() - seen.sum().log()
        return found


def all_masks(window=R) -> torch.Tensor:
    """Every mask that hides something, bool [2^R - 1, R]."""
    return torch.tensor([mask for mask in product((False, True), repeat=window) if any(mask)])


def exactly(window=R) -> Masks:
    """All masks, with weights that make ``elbo`` exact: t^(l - 1) (1 - t)^(R - l) integrates to 1 / (l C(R, l))."""
    masked = all_masks(window)
    weights = [len(masked) / (count * math.comb(window, count)) for count in masked.sum(1).tolist()]
    return Masks(masked[None], torch.tensor([weights], dtype=torch.float64))


def token_logps(model, response_R) -> dict[tuple[bool, ...], torch.Tensor]:
    """Log-probs [R] of a response's tokens under each mask, by plain torch; of no use where nothing is masked."""
    masked = all_masks(len(response_R))
    ids = response_R.expand(len(masked), -1).masked_fill(masked, model.mask)
    hidden = model(torch.cat([PROMPT.expand(len(masked), -1), ids], 1))[:, -len(response_R) :]
    logps = (hidden @ model.head.T).log_softmax(-1)[..., response_R].diagonal(dim1=1, dim2=2)
    return dict(zip(map(tuple, masked.tolist()), logps.detach(), strict=True))


def orders(model, response_R) -> torch.Tensor:
    """Log-prob of a response for each order [R!] in which its tokens can be filled in, one at a time."""
    logps, window = token_logps(model, response_R), len(response_R)
    found = []
    for order in permutations(range(window)):
        rest = [[place in order[step:] for place in range(window)] for step in range(window)]
        found.append(sum(logps[tuple(mask)][place] for mask, place in zip(rest, order, strict=True)))
    return torch.stack(found)


def test_the_elbo_is_the_mean_over_orders_and_below_the_log_prob():
    """Ou et al. 2024: a masked-diffusion model is one that is autoregressive in a random order."""
    model = make_model()
    by_order = orders(model, RESPONSE[0])
    exact = elbo(model, PROMPT, RESPONSE, exactly())
    assert_close(exact[0], by_order.mean(), rtol=1e-12, atol=0)
    assert exact < by_order.logsumexp(0) - math.log(len(by_order)) - 0.01


def test_the_elbo_of_true_conditionals_is_the_log_prob():
    joint = Joint()
    for response_R in torch.tensor([[1, 4, 2, 1], [0, 0, 3, 2]]):
        want = joint.table[tuple(response_R)].log()
        assert_close(elbo(joint, PROMPT, response_R[None], exactly())[0], want, rtol=1e-10, atol=0)


def test_responses_are_drawn_from_the_likelihood_that_the_elbo_bounds():
    window, draws = 2, 8_000
    model = make_model(window=window)
    every = torch.tensor(list(product(range(V), repeat=window)))
    chances = torch.stack([orders(model, response).exp().mean() for response in every])
    assert_close(chances.sum(), torch.tensor(1.0, dtype=torch.float64))
    drawn = model.answer(PROMPT.expand(draws, -1), window, torch.Generator().manual_seed(0))
    counts = torch.bincount(drawn[:, 0] * V + drawn[:, 1], minlength=V**window)
    deviations = (counts - draws * chances) / (draws * chances * (1 - chances)).sqrt()
    assert deviations.abs().max() < 4


@pytest.mark.parametrize("paired", [False, True])
def test_masks_of_a_count_have_the_elbo_as_their_mean(paired):
    """Over every count and every order."""
    model = make_model()
    noise = torch.tensor(list(permutations(range(R)))).double().repeat(R, 1)
    times = ((torch.arange(R) + 0.5) / R).repeat_interleave(len(noise) // R)
    masks = count_masks(times[:, None], noise[:, None], paired=paired)
    found = elbo(model, PROMPT.expand(len(noise), -1), RESPONSE.expand(len(noise), -1), masks)
    assert_close(found.mean(), elbo(model, PROMPT, RESPONSE, exactly())[0], rtol=1e-6, atol=0)
    assert found.std() > 0.1
    if paired:
        assert torch.equal(masks.masked_BnR.sum((1, 2)), torch.full((len(noise),), R + 1))


@pytest.mark.parametrize("paired", [False, True])
def test_masks_of_a_time_have_the_elbo_as_their_mean(paired):
    """Over every mask, and over times by a quadrature that is exact for polynomials of their degree."""
    model = make_model()
    nodes, weights = (torch.from_numpy(values) for values in np.polynomial.legendre.leggauss(R))
    masked = torch.tensor(list(product((False, True), repeat=R)))
    times = ((nodes + 1) / 2).repeat_interleave(len(masked))
    masked, weights = masked.repeat(R, 1), (weights / 2).repeat_interleave(len(masked))
    noise = torch.where(masked, times[:, None] / 2, (1 + times[:, None]) / 2)
    chances = weights * torch.where(masked, times[:, None], 1 - times[:, None]).prod(1)
    masks = bernoulli_masks(times[:, None], noise[:, None], paired=paired, shortest=0.0)
    assert torch.equal(masks.masked_BnR[:, 0], masked)
    found = elbo(model, PROMPT.expand(len(noise), -1), RESPONSE.expand(len(noise), -1), masks)
    assert_close(chances.sum(), torch.tensor(1.0, dtype=torch.float64))
    assert_close((chances * found).sum(), elbo(model, PROMPT, RESPONSE, exactly())[0], rtol=1e-12, atol=0)


def test_stratified_times_cover_the_interval():
    spread = Sampler(times=3, stratified=True).spread((torch.arange(4)[:, None] + 0.5) / 4)
    assert_close(spread.flatten().sort().values, (torch.arange(12) + 0.5) / 12)
    assert torch.equal((3 * spread).long(), torch.arange(3).expand(4, -1))


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_draws_masks_whose_mean_is_the_elbo(name):
    """4,000 draws; the seed is fixed, so the bound of four standard errors is met always or never."""
    model = make_model()
    masks = SAMPLERS[name].draw(4000, R, torch.Generator().manual_seed(1))
    assert masks.weights_Bn.shape == (4000, SAMPLERS[name].passes) == (4000, 8)
    logps = token_logps(model, RESPONSE[0]) | {(False,) * R: torch.zeros(R, dtype=torch.float64)}
    table = torch.stack([logps[mask][list(mask)].sum() for mask in sorted(logps)])
    codes = (masks.masked_BnR * torch.tensor([8, 4, 2, 1])).sum(-1)
    found = (masks.weights_Bn * table[codes]).mean(1)
    exact = elbo(model, PROMPT, RESPONSE, exactly())[0]
    assert abs(found.mean() - exact) < 4 * found.std() / 4000**0.5
    alike = elbo_values(model, PROMPT.expand(600, -1), RESPONSE.expand(600, -1), Masks(*(m[:600] for m in masks)))
    assert_close(alike, found[:600], rtol=1e-6, atol=1e-9)


def pair_of_models(vocabulary=V):
    policy, reference = make_model(1, vocabulary), make_model(2, vocabulary)
    draw = torch.Generator().manual_seed(3)
    chosen, rejected = torch.randint(1, vocabulary, (2, 3, R), generator=draw)
    pairs = Pairs(torch.tensor([[0, 3, 2], [1, 1, 4], [0, 0, 1]]), chosen, rejected)
    masks = Sampler(times=2, paired=True).draw(6, R, draw)
    return policy, reference, pairs, Masks(masks.masked_BnR, masks.weights_Bn.double())


def plain_loss(policy, reference, pairs, masks, beta):
    """The DPO loss on ELBOs with all logits held."""

    def values(model):
        found = []
        for row, response in enumerate(torch.cat([pairs.chosen_BR, pairs.rejected_BR])):
            total = 0.0
            for masked, weight in zip(masks.masked_BnR[row], masks.weights_Bn[row], strict=True):
                ids = torch.cat([pairs.prompts_BP[row % 3], response.masked_fill(masked, model.mask)])
                logits = model(ids[None])[0, -R:] @ model.tokens.weight[:-1].T
                total = total - weight * F.cross_entropy(logits[masked], response[masked], reduction="sum")
            found.append(total / len(masks.weights_Bn[row]))
        return torch.stack(found)

    with torch.no_grad():
        ref = values(reference)
    gained = values(policy) - ref
    return -F.logsigmoid(beta * (gained[:3] - gained[3:])).mean()


def test_loss_and_gradients_are_those_of_plain_torch():
    policy, *rest = pair_of_models()
    twin = copy.deepcopy(policy)
    found, want = preference_step(policy, *rest, 0.3), plain_loss(twin, *rest, 0.3)
    assert_close(found, want, rtol=1e-12, atol=0)
    found.backward()
    want.backward()
    for (name, parameter), other in zip(policy.named_parameters(), twin.parameters(), strict=True):
        assert_close(parameter.grad, other.grad, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
        assert other.grad.any(), name


@pytest.mark.parametrize("loss", [preference_step, plain_loss], ids=["op", "plain"])
def test_no_logits_are_kept_for_backward(loss):
    """Of the op's loss; plain torch keeps them, a part for each mask."""
    vocabulary = 1009
    policy, reference, pairs, masks = pair_of_models(vocabulary)
    widest = 0

    def note(tensor):
        nonlocal widest
        if vocabulary in tensor.shape[1:]:
            widest = max(widest, tensor.numel())
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        loss(policy, reference, pairs, masks, 0.3)
    assert (widest == 0) == (loss is preference_step)


def test_equal_models_have_a_loss_of_ln_2_under_any_masks():
    policy, _, pairs, masks = pair_of_models()
    assert preference_step(policy, copy.deepcopy(policy), pairs, masks, 0.3).item() == pytest.approx(math.log(2))


def test_every_token_sees_those_on_both_sides_and_no_padding():
    model = make_model()
    ids = torch.cat([PROMPT, RESPONSE], 1)
    hidden = model(ids)
    for place in range(ids.shape[1]):
        other = ids.clone()
        other[0, place] = 4 if ids[0, place] != 4 else 3
        assert (model(other) != hidden).any(-1).all(), place
    with torch.no_grad():
        model.tokens.weight[PAD] += 1
    assert_close(model(ids)[:, 1:], hidden[:, 1:], rtol=0, atol=0)
