"""The load-balancing loss of a step is that of an unpacked batch, however the step is packed; experts are counted."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from engine.config.schema import LoraConfig, LossConfig, ModelConfig
from engine.data.groups import PreferenceDataset, PreferenceGroup
from engine.errors import UserError
from engine.model import Policy, load_policy
from engine.model.balance import Balance
from engine.model.checks import check_packing, has_experts
from engine.model.layouts import use_layout
from engine.model.policy import Layout
from engine.packing import build_batch
from engine.train.feed import StepWork, TrainingPack, TrainingStep
from engine.train.loop import train
from engine.train.objective import Objective
from engine.train.routing import Routing, same_random_numbers
from tests.conformance.families import tiny_config, tiny_model
from tests.engine.model.test_attention import make_policy

CPU = torch.device("cpu")
COEFFICIENT = 0.7
FAMILIES = ("mixtral", "qwen3_moe", "llama4_text", "gpt_oss")


def older(than: str) -> bool:
    """Whether transformers is older than a version."""
    return Version(transformers.__version__) < Version(than)


def groups(count: int = 5, responses: int = 2) -> list[PreferenceGroup]:
    generator = np.random.default_rng(0)

    def draw(low: int, high: int) -> np.ndarray:
        return generator.integers(10, 60, generator.integers(low, high), dtype=np.int32)

    return [PreferenceGroup(i, draw(3, 9), tuple(draw(2, 9) for _ in range(responses))) for i in range(count)]


def one_step(packs: list[list[PreferenceGroup]], *, share_prompts: bool = True, idle: int = 0) -> TrainingStep:
    """Stored references of 0; ``idle`` packs at the end do not count."""
    built = []
    for n, pack in enumerate(packs):
        batch = build_batch(pack, share_prompts=share_prompts)
        built.append(TrainingPack(batch, torch.zeros(batch.num_responses), counts=n < len(packs) - idle))
    return TrainingStep(1, 1.0, tuple(built), StepWork(sum(map(len, packs[: len(packs) - idle])), 0, 0, 0, 0.0))


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory):
    """Policies by family, in float64, whose configs ask for router logits."""

    def make(family: str) -> Policy:
        if family not in made:
            config = tiny_config(family)
            config.get_text_config().output_router_logits = True
            folder = tmp_path_factory.mktemp(family)
            tiny_model(config).save_pretrained(folder)
            made[family] = load_policy(ModelConfig(model_name_or_path=str(folder), dtype="float32"), device=CPU)
            check_packing(made[family])
            made[family].double()
        return made[family].eval()

    made: dict[str, Policy] = {}
    return make


def unpacked(policy: Policy, rows: list[PreferenceGroup]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-prob sums and the load-balancing loss of all sequences, by transformers alone, one after another."""
    model, sums, routers = policy.causal_lm, [], []
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        for start, row in ((len(g.prompt_ids), np.r_[g.prompt_ids, r]) for g in rows for r in g.response_ids):
            ids = torch.from_numpy(row.astype(np.int64))
            out = model(input_ids=ids[None], output_router_logits=True, use_cache=False)
            logps = out.logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None])
            sums.append(logps[start - 1 :].sum())
            if model.config.model_type == "llama4_text" and older("5.19"):
                # There only its body returns them.
                out = model.model(input_ids=ids[None], output_router_logits=True, use_cache=False)
            routers.append([layer.reshape(len(ids), -1) for layer in out.router_logits])
    finally:
        model.set_attn_implementation(implementation)
    layers = tuple(torch.cat(layer) for layer in zip(*routers, strict=True))
    text = model.config.get_text_config()
    top_k = text.ffn_config.moe_top_k if text.model_type == "dbrx" else text.num_experts_per_tok
    return torch.stack(sums), load_balancing_loss_func(layers, layers[0].shape[-1], top_k)


def gradients(policy: Policy) -> dict[str, torch.Tensor]:
    found = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad(set_to_none=True)
    return found


def assert_same(found: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    largest = max(grad.abs().max() for grad in want.values())
    for name, grad in want.items():
        # The sums of transformers are float32, whatever the model is.
        torch.testing.assert_close(found.get(name, torch.zeros_like(grad)), grad, rtol=1e-5, atol=1e-6 * largest.item())


DIVISIONS = {
    "one pack": lambda rows: one_step([rows]),
    "several packs": lambda rows: one_step([rows[:1], rows[1:4], rows[4:]]),
    "prompts not shared": lambda rows: one_step([rows[:2], rows[2:]], share_prompts=False),
    "a pack that does not count": lambda rows: one_step([rows[:3], rows[3:], rows[:1]], idle=1),
}


@pytest.mark.parametrize(
    ("family", "division"),
    [("mixtral", "prompts not shared"), *((f, d) for f in FAMILIES for d in DIVISIONS if d != "prompts not shared")],
)
def test_a_step_has_the_balance_of_an_unpacked_batch(family, division, mixtures):
    policy, rows = mixtures(family), groups()
    sums, aux = unpacked(policy, rows)
    preference = -torch.nn.functional.logsigmoid(0.1 * (sums[0::2] - sums[1::2])).mean()
    (preference + COEFFICIENT * aux).backward()
    want = gradients(policy)
    objective = Objective(LossConfig(router_aux_loss_coef=COEFFICIENT))
    scored = objective.backward(policy, DIVISIONS[division](rows))
    assert_same(gradients(policy), want)
    routing = objective.routing
    assert routing.aux_loss().item() == pytest.approx(aux.item(), rel=1e-6)
    means = routing.add_to(scored.step_means(len(rows)), routing.aux_loss())
    assert means[0].item() == pytest.approx((preference + COEFFICIENT * aux).item(), rel=1e-6)
    # Every layer gives each token top_k experts.
    tokens = sum(len(g.prompt_ids) + len(r) for g in rows for r in g.response_ids)
    layers = routing.expert_tokens
    assert [layer.sum().item() for layer in layers] == [tokens * routing.balance.top_k] * len(layers)
    assert len(layers) > 0


@pytest.mark.parametrize(("loss", "responses"), [("aot", 2), ("plackett_luce", 3)])
def test_every_way_to_a_loss_takes_the_balance_along(loss, responses, mixtures):
    policy, rows = mixtures("qwen3_moe"), groups(responses=responses)
    plain, balanced = (
        Objective(LossConfig(loss_type=loss, router_aux_loss_coef=weight)) for weight in (0, COEFFICIENT)
    )
    _, aux = unpacked(policy, rows)
    (COEFFICIENT * aux).backward()
    balance = gradients(policy)
    for step in (one_step([rows]), one_step([rows[:2], rows[2:]])):
        plain.backward(policy, step)
        want = gradients(policy)
        want |= {name: want.get(name, 0) + grad for name, grad in balance.items()}
        balanced.backward(policy, step)
        assert_same(gradients(policy), want)


def test_recomputed_layers_count_once(mixtures):
    policy, rows = mixtures("mixtral"), groups()
    objective, step = Objective(LossConfig(router_aux_loss_coef=COEFFICIENT)), one_step([groups()])
    objective.backward(policy, step)
    want, counts = gradients(policy), objective.routing.expert_tokens
    policy.causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        objective.backward(policy.train(), step)
    finally:
        policy.causal_lm.gradient_checkpointing_disable()
    assert_same(gradients(policy), want)
    assert all(map(torch.equal, objective.routing.expert_tokens, counts))
    assert len(rows) == step.num_terms


def test_dropout_of_adapters_draws_the_same_masks_in_both_passes(mixtures, tmp_path):
    """The first pass must say what the second one chooses."""
    policy = mixtures("mixtral")
    policy.causal_lm.float().save_pretrained(tmp_path)
    policy.double()
    lora = LoraConfig(r=4, dropout=0.5, target_modules=("q_proj", "v_proj"))
    adapted = load_policy(ModelConfig(model_name_or_path=str(tmp_path), dtype="float32", lora=lora), device=CPU)
    torch.nn.init.normal_(next(p for n, p in adapted.named_parameters() if "lora_B" in n), std=3)
    objective, rows = Objective(LossConfig(router_aux_loss_coef=COEFFICIENT)), groups()
    seen = []
    run = type(adapted).forward

    def forward(self, *args, **kwargs):
        result = run(self, *args, **kwargs)
        seen.append(result[1].chosen_LE)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(adapted), "forward", forward)
        objective.backward(adapted.train(), one_step([rows[:2], rows[2:]]))
    assert len(seen) == 4
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])
    assert torch.equal(seen[1], seen[3])


def test_without_a_coefficient_nothing_is_added_and_no_pass_is_made(mixtures):
    policy, rows = mixtures("qwen3_moe"), groups()
    passes = []
    handle = policy.register_forward_pre_hook(lambda *_: passes.append(1))
    objective = Objective(LossConfig(router_aux_loss_coef=0))
    objective.backward(policy, one_step([rows[:2], rows[2:]]))
    handle.remove()
    policy.zero_grad(set_to_none=True)
    assert len(passes) == 2
    assert objective.routing.aux_loss() is None
    assert objective.routing.expert_tokens


def test_the_coefficient_of_a_model(mixtures, tiny_model_dir):
    policy = mixtures("mixtral")
    own = Balance.of(policy, None)
    assert own == Balance(policy.config.router_aux_loss_coef, policy.config.num_experts_per_tok)
    assert Balance.of(policy, 0.5) == replace(own, coefficient=0.5)
    assert Balance.of(policy, 0) is None
    dense = load_policy(ModelConfig(model_name_or_path=str(tiny_model_dir)), device=CPU)
    assert Balance.of(dense, None) is Balance.of(dense, 0.0) is None
    with pytest.raises(UserError, match=r"router_aux_loss_coef 0.5: llama is no mixture of experts .* set it to 0"):
        Balance.of(dense, 0.5)


DENSE = {
    "granitemoehybrid": {"num_local_experts": 0},
    "doge": {"is_moe": False},
    "jamba": {"num_experts": 1, "num_experts_per_tok": 1},
    "qwen2_moe": {"mlp_only_layers": [0, 1, 2, 3]},
}
"""Configs of families of mixtures whose models are dense."""


@pytest.mark.parametrize("family", DENSE)
def test_a_dense_model_of_a_family_of_mixtures_trains_without_balance(family):
    config = tiny_config(family)
    for name, value in DENSE[family].items():
        setattr(config, name, value)
    policy = make_policy(tiny_model(config))
    assert config.router_aux_loss_coef
    check_packing(policy)
    objective = Objective(LossConfig())
    objective.backward(policy.train(), one_step([groups()]))
    assert objective.routing.balance is None
    assert policy.training
    with pytest.raises(UserError, match=rf"router_aux_loss_coef 0.5: {family} is no mixture of experts .* set it to 0"):
        Balance.of(policy, 0.5)


def test_a_model_that_returns_no_loss_of_its_routers_has_one_only_when_asked_for(mixtures):
    policy = mixtures("llama4_text")
    assert policy.config.get_text_config().router_aux_loss_coef
    assert Balance.of(policy, None) is None
    assert Balance.of(policy, 0.5) == Balance(0.5, 2)


def test_routers_of_another_form_are_refused():
    config = tiny_config("doge")
    config.is_moe = True
    config.num_experts, config.num_experts_per_tok = 16, 2
    policy = make_policy(tiny_model(config))
    if older("5.18"):
        # There it cannot run at all, which the start-up check says first.
        with pytest.raises(UserError, match="DogeForCausalLM cannot run one row at a time: TypeError in Doge"):
            check_packing(policy)
        return
    with pytest.raises(UserError, match=r"loss of doge is not that of one router over all experts.*set it to 0"):
        Balance.of(policy, None)


def test_experts_of_a_config_inside_are_balanced_only_when_asked_for():
    """TRL, too, reads the coefficient of the text config, and dbrx has its own in another."""
    policy = make_policy(tiny_model(tiny_config("dbrx")))
    check_packing(policy)
    assert has_experts(policy.config)
    assert Balance.of(policy, None) is None
    if older("5.23"):
        # There the family returns no logits of its routers.
        with pytest.raises(UserError, match=r"router_aux_loss_coef 0.5: dbrx is no mixture .* set it to 0"):
            Balance.of(policy, 0.5)
        return
    policy.double()
    rows = groups()
    _, aux = unpacked(policy, rows)
    objective = Objective(LossConfig(router_aux_loss_coef=COEFFICIENT))
    objective.backward(policy, one_step([rows[:2], rows[2:]]))
    assert objective.routing.aux_loss().item() == pytest.approx(aux.item(), rel=1e-6)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_a_model_in_rows_has_the_balance_of_an_unpacked_batch(family, mixtures):
    policy, rows = mixtures(family), groups()
    _, aux = unpacked(policy, rows)
    (COEFFICIENT * aux).backward()
    balance = gradients(policy)
    before = policy.layout
    use_layout(policy, Layout("rows"))
    try:
        plain, balanced = (Objective(LossConfig(router_aux_loss_coef=weight)) for weight in (0, COEFFICIENT))
        step = one_step([rows[:2], rows[2:]], share_prompts=False)
        plain.backward(policy, step)
        want = gradients(policy)
        want |= {name: want.get(name, 0) + grad for name, grad in balance.items()}
        balanced.backward(policy, step)
        assert_same(gradients(policy), want)
        assert balanced.routing.aux_loss().item() == pytest.approx(aux.item(), rel=1e-6)
    finally:
        use_layout(policy, before)


def test_a_step_takes_its_balance_once(make_config, tiny_mixture_dir, monkeypatch):
    calls = []
    taken = Routing.aux_loss
    monkeypatch.setattr(Routing, "aux_loss", lambda routing: calls.append(1) or taken(routing))
    train(make_config(model={"model_name_or_path": str(tiny_mixture_dir)}, train={"max_steps": 3, "save_steps": None}))
    assert len(calls) == 3


def test_random_numbers_are_put_back_after_an_error():
    torch.manual_seed(3)
    want = torch.get_rng_state()
    with contextlib.suppress(ValueError), same_random_numbers(CPU):
        raise ValueError(torch.rand(1))
    assert torch.equal(torch.get_rng_state(), want)


def test_an_evaluation_has_the_balance_of_all_its_rows(mixtures):
    from engine.config import build_config
    from engine.train.evaluation import evaluate_policy

    policy, rows = mixtures("mixtral"), groups()
    _, aux = unpacked(policy, rows)
    sections = {"model": {"model_name_or_path": "m"}, "data": {"dataset_name": "d"}, "packing": {"tokens_per_pack": 40}}
    config = build_config({**sections, "loss": {"router_aux_loss_coef": COEFFICIENT}}, "test")
    plain = build_config({**sections, "loss": {"router_aux_loss_coef": 0}}, "test")
    dataset = PreferenceDataset(rows)

    def zeros(pack):
        return np.zeros(sum(len(rows[i].response_ids) for i in pack), dtype=np.float32)

    found, without = (evaluate_policy(policy, dataset, Objective(c.loss), c, lookup=zeros) for c in (config, plain))
    assert found["eval_aux_loss"] == pytest.approx(aux.item(), rel=1e-6)
    assert found["eval_loss"] == pytest.approx(without["eval_loss"] + COEFFICIENT * aux.item(), rel=1e-6)
    assert "eval_aux_loss" not in without
