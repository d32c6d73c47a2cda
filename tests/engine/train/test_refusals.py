"""What cannot run is refused in one line, before anything is computed or written."""

from __future__ import annotations

import pytest

from engine.errors import UserError
from engine.train.loop import train


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": {"loss_type": "simpo"}, "reference": {"mode": "stored"}}, r"simpo has no reference"),
        ({"loss": {"loss_type": "cpo"}, "reference": {"mode": "live"}}, r"cpo has no reference"),
        ({"optim": {"lr_scheduler_type": "greedy"}}, r"greedy needs train\.eval_steps"),
        ({"optim": {"lr_scheduler_type": "cosine_with_min_lr"}}, r"min_lr.*lr_scheduler_kwargs"),
        ({"packing": {"tokens_per_pack": 20}}, r"tokens_per_pack is 20, but row \d+ needs \d+"),
        ({"data": {"eval_dataset_name": "/nowhere/e.jsonl"}}, r"/nowhere/e\.jsonl"),
    ],
)
def test_what_cannot_run_is_refused_before_a_run_folder_exists(changes, message, make_config, tmp_path):
    with pytest.raises(UserError, match=message):
        train(make_config(**changes))
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_made_is_refused_before_anything_is_computed(make_config, monkeypatch, tmp_path):
    monkeypatch.setattr("engine.train.loop.prepare", lambda config: pytest.fail("prepared"))
    with pytest.raises(UserError, match=r"cannot create train\.output_dir=/proc/nothing"):
        train(make_config(train={"output_dir": "/proc/nothing"}))
    (tmp_path / "kept").mkdir()
    monkeypatch.setattr("engine.run_folder.os.access", lambda path, mode: False)
    with pytest.raises(UserError, match="kept: permission denied"):
        train(make_config(train={"output_dir": str(tmp_path / "kept")}))
    assert (tmp_path / "kept").is_dir()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim": {"lr_scheduler_type": "greedy"}}, r"greedy needs train\.eval_steps"),
        ({"loss": {"loss_type": "simpo"}, "reference": {"mode": "stored"}}, r"simpo has no reference"),
        ({"data": {"dataset_name": "/nowhere/d.jsonl"}}, r"/nowhere/d\.jsonl does not exist"),
        ({"data": {"dataset_name": "typo.jsonl"}}, r"is choosen meant to be chosen"),
        ({"model": {"model_name_or_path": "/nowhere/model"}}, r"/nowhere/model is not a folder"),
        ({}, "already holds a run"),
    ],
)
def test_a_folder_in_use_hides_no_other_fault(changes, message, make_config, monkeypatch, tmp_path):
    """In the order in which they have to be put right."""
    monkeypatch.setattr("engine.train.loop.prepare", lambda config: pytest.fail("prepared"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    (tmp_path / "typo.jsonl").write_text('{"prompt": "a", "choosen": "b", "rejected": "c"}\n')
    with pytest.raises(UserError, match=message):
        train(make_config(**changes))


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(make_config, make_tokenizer, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["Question"])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    config = make_config(model={"tokenizer_name_or_path": str(tmp_path / "tokenizer")})
    with pytest.raises(UserError, match=r"row 0: token \d+ is outside the \d+ embeddings of LlamaForCausalLM"):
        train(config)


def test_several_processes_without_a_launcher_are_refused(make_config, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"WORLD_SIZE is 2 but RANK, LOCAL_RANK, .* not set: .* torchrun, or unset"):
        train(make_config())
