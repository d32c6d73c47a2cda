"""A run goes on at other paths, and for more steps; not with other data, weights or settings."""

from __future__ import annotations

import json
import os
import shutil

import pytest
from safetensors.torch import load_file, save_file

from engine.config import build_config
from engine.errors import UserError
from engine.model.balance import Balance
from engine.train.checkpoint import complete_checkpoints
from engine.train.loop import train
from engine.train.resume import Start, check_balance, check_same_run, config_values
from tests.engine.train.test_resume import interrupted_after, run_files


def test_what_has_moved_resumes_to_the_same_bits(make_config, tiny_model_dir, pairs_jsonl, tmp_path, monkeypatch):
    """Folders and files at other paths, relative or through a link, are the same weights and tokens."""
    monkeypatch.chdir(tmp_path)
    for name in ("model", "reference", "tokenizer"):
        shutil.copytree(tiny_model_dir, tmp_path / name)
    shutil.copy(pairs_jsonl, "pairs.jsonl")

    def config(place: str, run: str):
        return make_config(
            model={"model_name_or_path": f"{place}model", "tokenizer_name_or_path": f"{place}tokenizer"},
            data={"dataset_name": f"{place}pairs.jsonl", "eval_dataset_name": f"{place}pairs.jsonl"}
            | {"eval_dataset_split": "train"},
            optim={"lr_scheduler_type": "reduce_lr_on_plateau"},
            reference={"model_name_or_path": f"{place}reference"},
            train={"output_dir": run, "save_steps": 2, "eval_steps": 2},
        )

    train(config("./", "whole"))
    with interrupted_after(monkeypatch, rows=4), pytest.raises(KeyboardInterrupt):
        train(config("./", "stopped"))
    (tmp_path / "moved").mkdir()
    for name in ("model", "reference", "tokenizer", "pairs.jsonl"):
        os.rename(name, f"moved/{name}")
    os.symlink("moved", "link")
    os.rename("stopped", "moved/stopped")
    assert train(config(f"{tmp_path}/link/", "moved/stopped"), resume=True).resumed_from == 2
    assert run_files(tmp_path / "moved" / "stopped") == run_files(tmp_path / "whole")


def test_an_adapter_that_has_moved_goes_on(make_config, tmp_path):
    first = str(tmp_path / "first")
    train(make_config(model={"lora": {"r": 2}}, train={"output_dir": first}))
    train(make_config(model={"adapter_name_or_path": first}, train={"save_steps": 2}))
    for path in (tmp_path / "run" / "manifest.json", tmp_path / "run" / "checkpoint-4"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    weights = run_files(tmp_path / "run")
    moved = os.path.relpath(shutil.move(first, tmp_path / "moved"))
    config = make_config(model={"adapter_name_or_path": moved}, train={"save_steps": 2})
    assert train(config, resume=True).resumed_from == 2
    assert run_files(tmp_path / "run") == weights


@pytest.mark.parametrize("mode", ["auto", "live"])
def test_a_changed_reference_model_is_refused(mode, make_config, tiny_model_dir, tmp_path):
    shutil.copytree(tiny_model_dir, tmp_path / "reference")
    reference = {"mode": mode, "model_name_or_path": str(tmp_path / "reference")}
    config = make_config(reference=reference, train={"save_steps": 2})
    train(config)
    (tmp_path / "run" / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"reference model holds other weights .*\(reference\.model_name_or_path was "):
        train(make_config(reference={"mode": mode}, train={"save_steps": 2}), resume=True)
    weights = load_file(tmp_path / "reference" / "model.safetensors")
    weights = {name: weight + 0.01 for name, weight in weights.items()}
    save_file(weights, tmp_path / "reference" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"the reference model holds other weights than when the run began; restore"):
        train(config, resume=True)


@pytest.mark.parametrize("finished", [True, False], ids=["finished", "interrupted"])
@pytest.mark.parametrize("more", [{"num_train_epochs": 2}, {"max_steps": 8}], ids=["epochs", "steps"])
def test_more_steps_extend_a_run_to_the_bits_of_one_that_had_them(finished, more, make_config, tmp_path, monkeypatch):
    """With a schedule that does not depend on their number; killed once on the way."""
    settings = {"optim": {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 3}}
    train(make_config(**settings, train={"save_steps": 2, **more, "output_dir": str(tmp_path / "whole")}))
    once = make_config(**settings, train={"save_steps": 2})
    if finished:
        train(once)
    else:
        with interrupted_after(monkeypatch, rows=3), pytest.raises(KeyboardInterrupt):
            train(once)
    extended = make_config(**settings, train={"save_steps": 2, **more})
    with interrupted_after(monkeypatch, rows=3), pytest.raises(KeyboardInterrupt):
        train(extended, resume=True)
    result = train(extended, resume=True)
    assert (result.steps, result.resumed_from) == (8, 6 if finished else 4)
    assert run_files(tmp_path / "run") == run_files(tmp_path / "whole")
    assert train(extended, resume=True).resumed_from is None
    with pytest.raises(UserError, match=r"8 steps are done, and train\.num_train_epochs=1 asks for 4; ask for as many"):
        train(once, resume=True)


def test_an_extended_run_follows_the_schedule_of_all_its_steps(make_config, tmp_path, caplog):
    """From the checkpoint on, and says so: training would otherwise go on from a rate of 0."""
    run = tmp_path / "run"
    train(make_config(train={"save_steps": 2}))
    config = make_config(train={"save_steps": 2, "max_steps": 6}, optim={"learning_rate": 2e-3})
    with caplog.at_level("INFO"):
        assert train(config, resume=True).resumed_from == 4
    rates = [json.loads(line)["learning_rate"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rates[:4] == [2e-3 * (4 - step) / 4 for step in range(4)]
    assert rates[4:] == pytest.approx([2e-3 * (6 - step) / 6 for step in (4, 5)], rel=1e-12)
    said = (
        "linear is the schedule of 6 steps: the learning rate of step 5 is 0.0006667 (0 in 4 steps), of the last one 0."
    )
    assert f"the run goes on to step 6 instead of 4, and from here on {said}" in caplog.text


@pytest.mark.parametrize("every", [500, 3])
def test_a_finished_run_goes_on_from_its_last_step(every, make_config, tmp_path):
    """However short it was."""
    train(make_config(train={"save_steps": every}))
    steps = [step for step, _ in complete_checkpoints(tmp_path / "run")]
    assert steps == ([4] if every == 500 else [3, 4])
    result = train(make_config(train={"save_steps": every, "max_steps": 5}), resume=True)
    assert (result.steps, result.resumed_from) == (5, 4)


def test_a_finished_run_without_a_checkpoint_cannot_go_on(make_config, tmp_path):
    train(make_config(train={"save_steps": None}))
    assert not complete_checkpoints(tmp_path / "run")
    assert train(make_config(train={"save_steps": None, "max_steps": 4}), resume=True).steps == 4
    with pytest.raises(UserError, match=r"finished after 4 steps and holds no checkpoint, .*model.model_name_or_path="):
        train(make_config(train={"max_steps": 5}), resume=True)


def test_a_checkpoint_alone_becomes_a_model(make_config, tmp_path):
    train(make_config(train={"save_steps": 2}))
    shutil.copytree(tmp_path / "run" / "checkpoint-2", tmp_path / "new" / "checkpoint-2")
    result = train(make_config(train={"max_steps": 2, "output_dir": str(tmp_path / "new")}), resume=True)
    assert (result.steps, result.resumed_from) == (2, 2)
    weights, expected = (load_file(tmp_path / p / "model.safetensors") for p in ("new", "run/checkpoint-2"))
    assert weights.keys() == expected.keys()
    assert all(weights[name].equal(tensor) for name, tensor in expected.items())


def test_a_key_that_an_older_checkpoint_lacks_was_what_its_default_is(make_config, tmp_path):
    config = make_config()
    saved = config_values(config)
    del saved["loss.dpop_lambda"], saved["loss.ld_alpha"]
    check_same_run(saved, config, tmp_path)
    with pytest.raises(UserError, match=r"loss\.ld_alpha was None and is now 0\.5"):
        check_same_run(saved, make_config(loss={"ld_alpha": 0.5}), tmp_path)


def test_kernels_of_blocks_may_change(make_config, tmp_path):
    """They change no number by more than another packing."""
    check_same_run(config_values(make_config()), make_config(model={"kernels": "compile"}), tmp_path)


OLD_SETTINGS = {
    "model.model_name_or_path": "m",
    "model.tokenizer_name_or_path": None,
    "model.revision": None,
    "model.trust_remote_code": False,
    "model.dtype": "bfloat16",
    "model.attention": "auto",
    "model.lora.r": 16,
    "model.lora.alpha": 32,
    "model.lora.dropout": 0.0,
    "model.lora.target_modules": "all-linear",
    "model.adapter_name_or_path": None,
    "model.quantization": None,
    "data.dataset_name": "d",
    "data.dataset_config": None,
    "data.dataset_train_split": "train",
    "data.eval_dataset_name": None,
    "data.eval_dataset_split": "test",
    "data.max_length": 1024,
    "data.truncation_mode": "keep_start",
    "data.format": "auto",
    "data.chat_template": "auto",
    "data.max_rows": None,
    "data.strict": False,
    "packing.pairs_per_step": 64,
    "packing.tokens_per_pack": 16384,
    "packing.share_prompts": True,
    "packing.shuffle": True,
    "loss.loss_type": "sigmoid",
    "loss.loss_weights": None,
    "loss.beta": 0.1,
    "loss.label_smoothing": 0.0,
    "loss.discopop_tau": 0.05,
    "loss.simpo_gamma": 0.5,
    "loss.cpo_alpha": 1.0,
    "optim.optimizer": "adamw",
    "optim.learning_rate": 1e-06,
    "optim.lr_scheduler_type": "linear",
    "optim.lr_scheduler_kwargs": None,
    "optim.warmup_steps": 0,
    "optim.max_grad_norm": 1.0,
    "optim.weight_decay": 0.0,
    "optim.adam_beta1": 0.9,
    "optim.adam_beta2": 0.999,
    "optim.adam_epsilon": 1e-08,
    "optim.rmsprop_alpha": 0.99,
    "reference.store": None,
    "reference.mode": "auto",
    "reference.model_name_or_path": None,
    "train.output_dir": "runs/default",
    "train.num_train_epochs": 1,
    "train.max_steps": -1,
    "train.seed": 42,
    "train.save_steps": 500,
    "train.save_total_limit": None,
    "train.logging_steps": 10,
    "train.eval_steps": None,
    "train.gradient_checkpointing": False,
    "train.activation_offload": False,
    "train.report_to": ["tensorboard"],
}
"""Of a checkpoint from before most keys of losses, adapters and data were there."""


def test_a_checkpoint_of_an_older_version_goes_on(tmp_path):
    def config(loss=None, lora=None):
        model = {"model_name_or_path": "m", "lora": {"r": 16} | (lora or {})}
        return build_config({"model": model, "data": {"dataset_name": "d"}, "loss": loss or {}}, "test")

    check_same_run(OLD_SETTINGS, config(), tmp_path)
    check_same_run(OLD_SETTINGS, config({"router_aux_loss_coef": 0.0}), tmp_path)
    for key, after in (("dpop_lambda", 3.0), ("use_weighting", True), ("f_divergence_type", "forward_kl")):
        with pytest.raises(UserError, match=rf"loss\.{key} was .* and is now {after!r}"):
            check_same_run(OLD_SETTINGS, config({key: after}), tmp_path)
    with pytest.raises(UserError, match=r"model\.lora\.use_dora was False and is now True"):
        check_same_run(OLD_SETTINGS, config(lora={"use_dora": True}), tmp_path)
    whole = {key: value for key, value in OLD_SETTINGS.items() if not key.startswith("model.lora.")}
    with pytest.raises(UserError, match=r"model\.lora\.alpha was None and is now 32"):
        check_same_run(whole | {"model.lora": None}, config(), tmp_path)


def test_an_older_run_of_experts_does_not_go_on_with_a_loss_that_it_did_not_have(make_config, tmp_path):
    config, balance = make_config(), Balance(0.02, 2)
    old, new = (Start(tmp_path, {"config": values}) for values in (OLD_SETTINGS, config_values(config)))
    with pytest.raises(UserError, match=r"coefficient of 0\.02; set loss\.router_aux_loss_coef to 0, or start a new"):
        check_balance(old, balance)
    check_balance(old, None)
    check_balance(new, balance)
