from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, set_seed

from dpo_kernels import preference_loss
from engine.config import build_config, to_yaml
from engine.config.schema import LoraConfig
from engine.data import load_dataset_groups
from engine.errors import UserError
from engine.evaluate import evaluate
from engine.model import load_tokenizer
from engine.model.adapters import quiet_loading
from engine.model.sources import named_by
from engine.train.evaluation import format_evaluation
from engine.train.loop import train
from tests.engine.distributed.launch import launch

peft = pytest.importorskip("peft")


@pytest.fixture
def config(tmp_path, tiny_model_dir, pairs_jsonl):
    return build_config(
        {
            "model": {"model_name_or_path": str(tiny_model_dir), "dtype": "float32"},
            "data": {"dataset_name": str(pairs_jsonl), "eval_dataset_name": str(pairs_jsonl), "max_length": 160},
            "packing": {"pairs_per_step": 6, "tokens_per_pack": 400},
            "optim": {"learning_rate": 2e-3},
            "reference": {"store": str(tmp_path / "store")},
            "train": {"output_dir": str(tmp_path / "run"), "report_to": []},
        },
        "test",
    )


def one_by_one(path, dataset, adapter=None) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
    if adapter is not None:
        with quiet_loading():
            model = peft.PeftModel.from_pretrained(model, adapter)
    sums = []
    with torch.no_grad():
        for group in dataset:
            for response in group.response_ids:
                ids = torch.tensor([*group.prompt_ids.tolist(), *response.tolist()])
                logps = model(input_ids=ids[None]).logits[0].log_softmax(-1)
                start = len(group.prompt_ids)
                sums.append(logps[start - 1 : -1].gather(1, ids[start:, None]).sum())
    return torch.stack(sums)


def token_metrics(path, dataset) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
    sides: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    for group in dataset:
        for side, response in zip(sides, group.response_ids, strict=True):
            ids, start = torch.tensor([*group.prompt_ids.tolist(), *response.tolist()]), len(group.prompt_ids)
            with torch.no_grad():
                z = model(input_ids=ids[None]).logits[0, start - 1 : -1].double()
            hits = (z.argmax(-1) == ids[start:]).double()
            side.append(torch.stack([z.mean(-1), torch.distributions.Categorical(logits=z).entropy(), hits], 1))
    chosen, rejected = (torch.cat(side).unbind(1) for side in sides)
    return {
        "eval_logits/chosen": chosen[0].mean(),
        "eval_logits/rejected": rejected[0].mean(),
        "eval_entropy": torch.cat([chosen[1], rejected[1]]).mean(),
        "eval_mean_token_accuracy": chosen[2].mean(),
    }


def test_a_trained_model_against_one_sequence_at_a_time(config, tiny_model_dir, tmp_path):
    train(config)
    values = evaluate(config, str(tmp_path / "run"))
    dataset, _ = load_dataset_groups(config.data, load_tokenizer(config.model), split="eval")
    logps, ref = one_by_one(tmp_path / "run", dataset), one_by_one(tiny_model_dir, dataset)
    lengths = torch.tensor([len(r) for g in dataset for r in g.response_ids])
    out = preference_loss(logps[0::2], logps[1::2], ref[0::2], ref[1::2])
    expected = {
        "eval_loss": out.loss.mean(),
        "eval_rewards/chosen": out.chosen_rewards.mean(),
        "eval_rewards/rejected": out.rejected_rewards.mean(),
        "eval_rewards/accuracies": (out.chosen_rewards > out.rejected_rewards).float().mean(),
        "eval_rewards/margins": (out.chosen_rewards - out.rejected_rewards).mean(),
        "eval_logps/chosen": logps[0::2].mean(),
        "eval_logps/rejected": logps[1::2].mean(),
        "eval_ranking_accuracy": (logps[0::2] > logps[1::2]).float().mean(),
        "eval_ranking_accuracy_per_token": ((logps / lengths)[0::2] > (logps / lengths)[1::2]).float().mean(),
        "eval_num_pairs": torch.tensor(24.0),
        **token_metrics(tmp_path / "run", dataset),
    }
    for name, value in expected.items():
        assert values[name] == pytest.approx(value.item(), rel=1e-4, abs=1e-4), name
    by_length = {k: v for k, v in values.items() if k.startswith("eval_num_pairs/")}
    assert sum(by_length.values()) == 24
    longest = [max(len(r) for r in g.response_ids) for g in dataset]
    assert by_length["eval_num_pairs/33-64"] == sum(33 <= n <= 64 for n in longest)
    written = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert written == values
    change = logps - ref
    assert values["eval_logps_change/chosen"] == pytest.approx(change[0::2].mean().item(), abs=1e-4)
    assert values["eval_reference_ranking_accuracy"] == (ref[0::2] > ref[1::2]).float().mean().item()
    (details,) = json.loads((tmp_path / "run" / "evaluation_details.json").read_text()).values()
    assert sum(b["pairs"] for b in details["by_reference_margin"]) == 24
    assert sum(b["pairs"] for b in details["calibration"]) == 24
    fell = sorted((value, place) for place, value in enumerate(change[0::2].tolist()) if value < 0)[:10]
    assert [record["chosen"] for record in details["most_displaced"]] == pytest.approx([v for v, _ in fell], abs=1e-4)
    for record, (_, place) in zip(details["most_displaced"], fell, strict=True):
        assert record["row"] == dataset[place].row
        assert record["chosen_response"] == load_tokenizer(config.model).decode(dataset[place].response_ids[0])
    table = format_evaluation(values)
    assert "ranking_accuracy_per_token" in table
    figures = table.split("\n\n")[0].splitlines()
    assert len({len(line.partition(" ±")[0]) for line in figures}) == 1
    rewards = 0.1 * change.double()
    margins = (rewards[0::2] - rewards[1::2]).numpy()
    for name, of_pairs in (("rewards/margins", margins), ("loss", out.loss.double().numpy())):
        assert values[f"eval_{name}_se"] == pytest.approx(of_pairs.std(ddof=1) / math.sqrt(24), rel=1e-3), name
    assert "33-64" in table


def test_the_base_model_has_no_margin_and_does_rank(config, tmp_path, caplog):
    with caplog.at_level("INFO"):
        values = evaluate(config)
    assert f"evaluating {config.model.model_name_or_path}, the model before training" in caplog.text
    assert values["eval_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert values["eval_rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert 0 < values["eval_ranking_accuracy"] < 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("lora", [True, False])
def test_evaluation_after_training_is_the_evaluation_of_the_folder(lora, config, tmp_path):
    if lora:
        model = build_config(
            {"model": {"model_name_or_path": "x", "lora": {"r": 4}}, "data": {"dataset_name": "x"}}, ""
        )
        config = replace(config, model=replace(config.model, lora=model.model.lora))
    result = train(config)
    values = evaluate(config, str(tmp_path / "run"))
    for name in ("eval_loss", "eval_rewards/margins", "eval_logps/chosen"):
        assert values[name] == pytest.approx(result.metrics[name], rel=1e-5, abs=1e-5)
    if lora:
        # The adapter's own rank and scale count, whatever the configuration says.
        for other in (None, replace(config.model.lora, r=7, alpha=1)):
            changed = replace(config, model=replace(config.model, lora=other))
            again = evaluate(changed, str(tmp_path / "run"))
            assert again["eval_loss"] == pytest.approx(values["eval_loss"], rel=1e-5)


def save_adapter(base, start, folder) -> str:
    """A trained adapter that started in one of peft's ways."""
    with quiet_loading():
        adapted = peft.get_peft_model(
            AutoModelForCausalLM.from_pretrained(base),
            peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=start),
        )
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("start", ["pissa", "olora", True])
def test_an_adapter_is_compared_with_its_base_whatever_it_starts_from(start, config, tiny_model_dir, tmp_path):
    set_seed(0)
    adapter = save_adapter(tiny_model_dir, start, tmp_path / "adapter")
    dataset, _ = load_dataset_groups(config.data, load_tokenizer(config.model), split="eval")
    base, logps = one_by_one(tiny_model_dir, dataset), one_by_one(tiny_model_dir, dataset, adapter)
    rewards = 0.1 * (logps - base)
    assert rewards.abs().max() > 0.1
    values = evaluate(config, adapter)
    assert values["eval_rewards/chosen"] == pytest.approx(rewards[0::2].mean().item(), rel=1e-4, abs=1e-4)
    assert values["eval_rewards/rejected"] == pytest.approx(rewards[1::2].mean().item(), rel=1e-4, abs=1e-4)
    # Of a run that goes on from it the adapter is the reference, of others too.
    config = replace(config, model=replace(config.model, adapter_name_or_path=adapter))
    values = evaluate(config, adapter)
    assert values["eval_logps/chosen"] == pytest.approx(logps[0::2].mean().item(), rel=1e-4, abs=1e-4)
    assert values["eval_rewards/margins"] == pytest.approx(0, abs=1e-4)
    other = save_adapter(tiny_model_dir, True, tmp_path / "other")
    values = evaluate(config, other)
    rewards = 0.1 * (one_by_one(tiny_model_dir, dataset, other) - logps)
    assert values["eval_rewards/chosen"] == pytest.approx(rewards[0::2].mean().item(), rel=1e-4, abs=1e-4)


def test_an_adapter_without_its_config_is_an_error(config, tmp_path):
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"^the adapter .* cannot be read: "):
        evaluate(config, str(tmp_path))


@pytest.mark.parametrize("loss", ["simpo", "aot"])
def test_losses_without_a_reference_and_of_whole_batches(loss, config):
    values = evaluate(replace(config, loss=replace(config.loss, loss_type=loss)))
    assert math.isfinite(values["eval_loss"])
    one_pack = replace(config.packing, tokens_per_pack=100_000, share_prompts=False)
    other = evaluate(replace(config, packing=one_pack, loss=replace(config.loss, loss_type=loss)))
    assert values["eval_loss"] == pytest.approx(other["eval_loss"], abs=1e-5)


def test_no_evaluation_data_is_an_error(config):
    with pytest.raises(UserError, match=r"set data\.eval_dataset_name"):
        evaluate(replace(config, data=replace(config.data, eval_dataset_name=None)))


def test_a_missing_model_is_an_error(config, tmp_path):
    with pytest.raises(UserError, match=r"^--model .*nowhere is not a folder"):
        evaluate(config, str(tmp_path / "nowhere"))


def test_a_model_that_does_not_load_is_named_once_by_the_option_that_gave_it(config, tmp_path):
    with pytest.raises(UserError, match=rf"^--model {tmp_path} does not load") as found:
        evaluate(config, str(tmp_path))
    assert str(found.value).count("model.model_name_or_path") == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("model.model_name_or_path=a/b: gone", "--model a/b: gone"),
        ("model.adapter_name_or_path=a/b is of another base", "--model a/b is of another base"),
        ("the adapter a/b does not fit Llama", "--model a/b does not fit Llama"),
        ("model.model_name_or_path=a/b/c is gone", "--model a/b: model.model_name_or_path=a/b/c is gone"),
        ("Llama leaks", "--model a/b: Llama leaks"),
    ],
)
def test_errors_of_a_model_are_under_its_option(words, said):
    with pytest.raises(UserError) as found, named_by("--model ", "a/b"):
        raise UserError(words)
    assert str(found.value) == said


def test_what_was_measured_before_rounding_goes_with_other_rows(config, tmp_path):
    config = replace(config, train=replace(config.train, save_dtype="bfloat16"))
    train(config)
    path = tmp_path / "run" / "evaluation.json"
    kept = {k: v for k, v in json.loads(path.read_text()).items() if k.startswith("eval_as_trained/")}
    assert kept
    evaluate(config, str(tmp_path / "run"))
    assert kept.items() <= json.loads(path.read_text()).items()
    evaluate(replace(config, data=replace(config.data, max_rows=5)), str(tmp_path / "run"))
    assert not any(name.startswith("eval_as_trained/") for name in json.loads(path.read_text()))
    path.write_text("{")
    values = evaluate(config, str(tmp_path / "run"))
    assert json.loads(path.read_text()) == values


def test_a_checkpoint_in_shards_says_how_it_becomes_a_model(config, tmp_path):
    folder = tmp_path / "checkpoint-7"
    (folder / "shards").mkdir(parents=True)
    (folder / "trainer_state.json").write_text('{"step": 7}')
    message = (
        r"^--model .*checkpoint-7 is a checkpoint in the shards .* --resume --train\.max_steps 7 --train\.output_dir"
    )
    with pytest.raises(UserError, match=message):
        evaluate(config, str(folder))
    with pytest.raises(UserError, match=r"^model\.model_name_or_path=.*checkpoint-7 is a checkpoint in the shards"):
        evaluate(replace(config, model=replace(config.model, model_name_or_path=str(folder))))


def test_a_run_is_evaluated_by_its_own_loss_and_rows_it_was_trained_on_are_named(config, tmp_path, caplog):
    train(replace(config, loss=replace(config.loss, beta=0.5)))
    capped = replace(config, data=replace(config.data, max_rows=5))
    with caplog.at_level("INFO"):
        own, other = evaluate(capped, str(tmp_path / "run")), evaluate(capped, str(tmp_path / "run"), own_loss=True)
    assert own["eval_rewards/margins"] == pytest.approx(5 * other["eval_rewards/margins"], rel=1e-5)
    assert caplog.text.count("the loss is that of the run: sigmoid, beta 0.5") == 1
    assert "5 of 5 evaluation rows are not held out" in caplog.text
    written = tmp_path / "run" / "config.yaml"
    written.write_text(written.read_text().replace(str(config.data.dataset_name), "/gone/pairs.jsonl", 1))
    caplog.clear()
    assert evaluate(capped, str(tmp_path / "run")) == own
    assert "whether the evaluation rows were trained on is not known: data.dataset_name=/gone/pairs" in caplog.text


def test_samples_of_an_adapter_are_compared_with_the_model_without_it(config, tmp_path):
    lora = {"model": replace(config.model, lora=LoraConfig(r=4, alpha=64))}
    config = replace(config, **lora, train=replace(config.train, sample_prompts=3, sample_max_new_tokens=8))
    train(config)
    values = evaluate(config, str(tmp_path / "run"), samples=4)
    assert values["eval_sampled/num_samples"] == 12
    assert values["eval_sampled/kl_k3"] > 0
    assert values["eval_sampled/kl_k3_se"] > 0
    assert evaluate(config, samples=2)["eval_sampled/kl"] == 0
    written = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert written["eval_sampled/kl"] == values["eval_sampled/kl"]


def test_processes_that_share_a_model_measure_the_divergence_of_one(config, tmp_path):
    """From answers that all of them draw."""
    config = replace(config, train=replace(config.train, max_steps=2, sample_prompts=3, sample_max_new_tokens=6))
    train(config)
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    command = [
        "-m",
        "engine",
        "evaluate",
        str(tmp_path / "run.yaml"),
        "--model",
        config.train.output_dir,
        "--samples",
        "2",
    ]
    ended = launch([command] * 2)
    assert [end.code for end in ended] == [0, 0], ended[0].err + ended[1].err
    together = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    alone = evaluate(config, config.train.output_dir, samples=2)
    assert together["eval_sampled/num_samples"] == 6
    assert together == pytest.approx(alone, rel=1e-4, abs=1e-5)
