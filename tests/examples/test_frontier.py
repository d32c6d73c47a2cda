"""The example of the reward-KL frontier: what is exact about it, and, in the long form, what the picture shows."""

from __future__ import annotations

import contextlib
import csv
import io
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

from engine.errors import UserError
from examples.frontier import exact
from examples.frontier.curves import attained, by_pairs, compare, frontier
from examples.frontier.exact import Point
from examples.frontier.language import END, PROMPTS, TOKEN, VOCABULARY, reward
from examples.frontier.methods import Evaluation, run_method
from examples.frontier.run import POINTS, RESULT, format_result, run
from examples.frontier.size import METHODS, QUICK, Size

TOKENS = QUICK.max_tokens


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """(folder, result) of the quick form."""
    folder = tmp_path_factory.mktemp("frontier") / "runs"
    with contextlib.redirect_stdout(io.StringIO()):
        return folder, run(folder, QUICK, jobs=0)


@pytest.fixture(scope="module")
def values():
    return exact.rewards(TOKENS)


@pytest.fixture(scope="module")
def ref_logps():
    """Of a random model, whose answers are spread out."""
    torch.manual_seed(3)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(VOCABULARY), initializer_range=0.5, **sizes))
    return exact.answer_logps(model.eval(), TOKENS)


def test_log_probs_are_those_of_the_model_one_answer_at_a_time():
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(VOCABULARY), initializer_range=0.5, **sizes)).double().eval()
    logps, texts = exact.answer_logps(model, TOKENS), exact.answers(TOKENS)
    assert_close(logps.exp().sum(1), torch.ones(len(PROMPTS), dtype=torch.float64))
    assert len(set(texts)) == logps.shape[1]
    assert all(text[-1] == TOKEN[END] or len(text) == TOKENS for text in texts)
    for p, y in ((0, 0), (1, 5), (2, 100), (3, len(texts) - 1)):
        ids = torch.tensor([[TOKEN[PROMPTS[p]], *texts[y]]])
        with torch.no_grad():
            token_logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        expected = token_logps.gather(1, ids[0, 1:, None]).sum()
        assert_close(logps[p, y], expected)


@pytest.mark.parametrize(
    ("prompt", "words", "expected"),
    [
        ("fox", "", 0.0),
        ("fox", "gladly red dear <end>", 1.0 + 4.0 + 3.0),
        ("frog", "red fool <end>", -2.0 - 3.0),
        ("frog", "red green brown", 4.0 - 2.0),
        ("owl", "friend friend owl", 2.0),
    ],
)
def test_rewards(prompt, words, expected):
    assert reward(prompt, set(words.split())) == expected


@pytest.mark.parametrize("beta", [5.0, 1.0, 0.3])
def test_the_closed_form_satisfies_its_identities(ref_logps, values, beta):
    """With F = beta log Z: F is reward - beta KL of the optimum, dF/dbeta = -KL, and d log Z / d(1/beta) = reward."""
    at = torch.tensor(beta, dtype=torch.float64, requires_grad=True)
    logps, log_z = exact.optimum(ref_logps, values, at)
    found = exact.point(logps.detach(), ref_logps, values)
    assert_close(logps.detach().exp().sum(1), torch.ones(len(PROMPTS), dtype=torch.float64))
    (slope,) = torch.autograd.grad((at * log_z).mean(), at, retain_graph=True)
    (by_beta,) = torch.autograd.grad(log_z.mean(), at)
    assert found.reward - beta * found.kl == pytest.approx(beta * log_z.mean().item(), rel=1e-10)
    assert -slope.item() == pytest.approx(found.kl, rel=1e-9)
    assert -(beta**2) * by_beta.item() == pytest.approx(found.reward, rel=1e-9)
    assert exact.best_reward(found.kl, ref_logps, values) == pytest.approx(found.reward, rel=1e-9)


@pytest.mark.parametrize("beta", [8.0, 1.0, 0.2])
def test_answers_of_one_reward_are_one_answer_to_the_closed_form(ref_logps, values, beta):
    classes = exact.by_reward(ref_logps, values)
    assert classes[0].shape[1] < 60
    whole, short = (exact.point(exact.optimum(*of, beta)[0], *of) for of in ((ref_logps, values), classes))
    assert short == pytest.approx(whole, rel=1e-9)
    assert exact.best_reward(0.7, *classes) == pytest.approx(exact.best_reward(0.7, ref_logps, values), rel=1e-9)


def test_a_large_beta_leaves_the_reference_and_a_small_one_takes_the_best(ref_logps, values):
    start = exact.point(ref_logps, ref_logps, values)
    assert start.kl == 0
    far, near = (exact.point(exact.optimum(ref_logps, values, b)[0], ref_logps, values) for b in (1e7, 1e-3))
    assert far.kl == pytest.approx(0, abs=1e-9)
    assert far.reward == pytest.approx(start.reward, abs=1e-6)
    assert near.reward == pytest.approx(values.max(1).values.mean().item())


def test_no_policy_is_above_the_closed_form(ref_logps, values):
    generator = torch.Generator().manual_seed(1)
    for scale in (0.1, 1.0, 5.0):
        noise = scale * torch.randn(ref_logps.shape, generator=generator, dtype=torch.float64)
        logps = (ref_logps + noise + values * torch.rand(1, generator=generator)).log_softmax(1)
        found = exact.point(logps, ref_logps, values)
        assert found.reward < exact.best_reward(found.kl, ref_logps, values)


def test_a_frontier_is_concave_and_holds_what_mixtures_reach():
    start = Point(0.0, 0.0)
    points = [Point(1.0, 1.0), Point(0.5, 0.8), Point(0.8, 0.7), Point(2.0, 0.5), Point(0.9, 0.1)]
    assert frontier(points, start).tolist() == [[0.0, 0.0], [0.5, 0.8], [1.0, 1.0]]
    assert frontier([Point(0.5, -1.0)], start).tolist() == [[0.0, 0.0]]


def test_a_mixture_of_two_policies_is_on_or_left_of_the_line_between_them(ref_logps, values):
    ends = [exact.optimum(ref_logps, values, beta)[0] for beta in (3.0, 0.4)]
    points = [exact.point(logps, ref_logps, values) for logps in ends]
    mixed = exact.point(torch.stack(ends).exp().mean(0).log(), ref_logps, values)
    assert mixed.reward == pytest.approx((points[0].reward + points[1].reward) / 2)
    assert mixed.kl < (points[0].kl + points[1].kl) / 2


def test_points_of_the_closed_form_attain_all(ref_logps, values):
    start = exact.point(ref_logps, ref_logps, values)
    betas = np.geomspace(0.2, 50, 60)
    points = [exact.point(exact.optimum(ref_logps, values, beta)[0], ref_logps, values) for beta in betas]
    shares = attained(points, start, np.array([0.2, 0.5, 1.0]), ref_logps, values)
    assert np.all((shares > 0.995) & (shares <= 1))


def test_methods_are_compared_at_equal_divergence(ref_logps, values):
    """DPO on the closed form; another method with less reward at the same divergence; DPO from fewer pairs alike."""
    start = exact.point(ref_logps, ref_logps, values)
    points = [
        exact.point(exact.optimum(ref_logps, values, beta)[0], ref_logps, values) for beta in (8.0, 4.0, 2.0, 1.0)
    ]
    worse = [Point(kl, start.reward + 0.8 * (reward - start.reward)) for kl, reward in points[:3]]
    evaluations = [
        *(Evaluation("dpo", "", 100, 1, point) for point in points),
        *(Evaluation("dpo", "", 10, 1, point) for point in worse),
        *(Evaluation("ipo", "", 100, 1, point) for point in worse),
    ]
    found = compare(evaluations, start, ref_logps, values)
    assert found.keys() == {"ipo"}
    assert found["ipo"]["to_kl"] == worse[-1].kl
    assert found["ipo"]["other"] == pytest.approx(0.8 * found["ipo"]["dpo"], rel=1e-9)
    assert found["ipo"]["above"] == 1
    shares = by_pairs(evaluations, start, ref_logps, values)
    assert list(shares) == [10, 100]
    assert shares[10] == pytest.approx(0.8 * shares[100], rel=1e-9)


def test_the_whole_of_it_runs_and_stays_below_the_closed_form(ran, values):
    folder, result = ran
    runs = {(one.method, one.run, one.pairs) for one in result.evaluations}
    assert {method for method, _, _ in runs} == set(METHODS)
    assert len(result.evaluations) == QUICK.evaluations * len(runs) == QUICK.evaluations * len(METHODS)
    for one in result.evaluations:
        assert one.point.kl > 0
        assert one.point.reward <= exact.best_reward(one.point.kl, result.ref_logps, values) + 1e-9
    assert_close(result.ref_logps.exp().sum(1), torch.ones(len(PROMPTS), dtype=torch.float64))
    rows = list(csv.DictReader((folder / POINTS).open(encoding="utf-8")))
    assert [float(row["kl"]) for row in rows] == pytest.approx([one.point.kl for one in result.evaluations], abs=1e-6)
    for picture in ("frontier.png", "by-pairs.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")
    assert (folder / RESULT).exists()
    assert (folder / "dpo" / "comparison.html").exists()
    assert all(math.isfinite(share) for share in result.shares.values())
    assert format_result(result).splitlines()[2].startswith("IPO ")


def test_again_trains_nothing_and_another_size_is_refused(ran):
    folder, result = ran
    (model,) = folder.glob("preferred-ft/*/model.safetensors")
    time = model.stat().st_mtime_ns
    with contextlib.redirect_stdout(io.StringIO()):
        again = run_method("preferred-ft", folder, QUICK, result.ref_logps)
    assert model.stat().st_mtime_ns == time
    assert again == [one for one in result.evaluations if one.method == "preferred-ft"]
    with pytest.raises(
        UserError, match="holds other files than this run's: remove it, or choose another with --output"
    ):
        run(folder, replace(QUICK, steps=6), jobs=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_dpo_is_above_the_others_and_nears_the_closed_form(tmp_path, seed):
    """Means over divergences that both reach: far above SimPO and unlikelihood, a little above IPO. Likelihood alone
    ends close to the reference, and is not better up to there."""
    result = run(tmp_path / "runs", Size(seed=seed), jobs=2)
    near = ("ipo", "preferred-ft")
    for method, row in result.against.items():
        assert row["dpo"] - row["other"] > (0 if method in near else 0.05), method
    best = {
        method: max(one.point.reward for one in result.evaluations if one.method == method)
        for method in ("dpo", "preferred-ft")
    }
    assert best["dpo"] - result.start.reward > 2 * (best["preferred-ft"] - result.start.reward)
    shares = list(result.shares.values())
    assert shares == sorted(shares)
    assert shares[-1] - shares[0] > 0.05
    assert shares[-1] > 0.85
