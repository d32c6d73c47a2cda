"""What can be known early is said early: each fault is found before the work that it does not need."""

from __future__ import annotations

import shutil
import sys
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file, save_file

from engine.errors import UserError
from engine.train.loop import train

WORK = {
    "tokens": "engine.train.training_data.load_dataset_groups",
    "model": "engine.model.ready.load_policy",
    "references": "engine.train.setup.prepare_references",
    "steps": "engine.train.loop.Run",
}
"""From cheap to dear."""
DECAY = {"lr_scheduler_type": "warmup_stable_decay"}


def schedule(**options) -> dict:
    return {"optim": options}


def without(name: str):
    """The package is not installed."""
    return lambda patch: patch.setattr("importlib.util.find_spec", lambda found: None if found == name else found)


def no_bitsandbytes(patch) -> None:
    patch.setitem(sys.modules, "bitsandbytes", None)


def no_login(patch) -> None:
    def refuse(**options):
        raise RuntimeError("api_key not configured (no-tty)")

    patch.delenv("WANDB_MODE", raising=False)
    patch.setitem(sys.modules, "wandb", SimpleNamespace(login=refuse, Error=RuntimeError, __spec__=object()))


def full_disk(patch) -> None:
    patch.setattr("engine.train.storage.shutil.disk_usage", lambda path: SimpleNamespace(free=100_000))


def nothing(patch) -> None:
    pass


FAULTS = [
    ("tokens", schedule(lr_scheduler_type="greedy"), nothing, r"greedy needs train\.eval_steps"),
    ("tokens", schedule(lr_scheduler_type="cosine_with_min_lr"), nothing, r"min_lr.*lr_scheduler_kwargs"),
    ("tokens", schedule(**DECAY), nothing, r"num_decay_steps"),
    (
        "tokens",
        schedule(lr_scheduler_type="cosine", lr_scheduler_kwargs={"num_cycle": 2}),
        nothing,
        r"kwargs: cosine has no option 'num_cycle'; did you mean num_cycles\? \(its options are num_cycles\)",
    ),
    (
        "tokens",
        schedule(lr_scheduler_type="constant", lr_scheduler_kwargs={"min_lr": 0.1}),
        nothing,
        r"constant has no option 'min_lr' \(it has none\)",
    ),
    (
        "tokens",
        schedule(lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr_rate": "a tenth"}),
        nothing,
        r"'cosine_with_min_lr' cannot be built",
    ),
    (
        "tokens",
        schedule(lr_scheduler_type="polynomial", lr_scheduler_kwargs={"lr_end": 0.5}),
        nothing,
        r"'polynomial' cannot be built: lr_end",
    ),
    (
        "tokens",
        schedule(lr_scheduler_type="polynomial", lr_scheduler_kwargs={"lr_end": -0.5}),
        nothing,
        r"'polynomial' cannot be built: the learning rate of step \d+ of 1,000 would be -0\.",
    ),
    (
        "tokens",
        schedule(lr_scheduler_type="inverse_sqrt", lr_scheduler_kwargs={"timescale": 0}),
        nothing,
        r"'inverse_sqrt' cannot be built",
    ),
    ("tokens", schedule(optimizer="adamw_8bit"), no_bitsandbytes, r"optimizer=adamw_8bit needs bitsandbytes"),
    ("tokens", {"model": {"quantization": "nf4", "lora": {}}}, without("accelerate"), r"nf4 needs accelerate: pip"),
    ("tokens", {"train": {"report_to": ["wandb"]}}, without("wandb"), r"report_to wandb needs wandb"),
    ("tokens", {"train": {"report_to": ["tensorboard"]}}, without("tensorboard"), r"report_to tensorboard needs"),
    ("tokens", {"train": {"report_to": ["wandb"]}}, no_login, r"api_key not configured .*WANDB_MODE=offline"),
    (
        "tokens",
        {"reference": {"mode": "none"}, "loss": {"loss_type": ["sigmoid", "sft"]}},
        nothing,
        r"mode none does not",
    ),
    ("tokens", {"reference": {"mode": "stored"}, "loss": {"loss_type": "simpo"}}, nothing, r"simpo has no reference"),
    ("model", {"packing": {"tokens_per_pack": 20}}, nothing, r"tokens_per_pack is 20, but row \d+ needs \d+"),
    ("model", {"data": {"eval_dataset_name": "/nowhere/e.jsonl"}}, nothing, r"/nowhere/e\.jsonl"),
    (
        "references",
        {"train": {"save_steps": 2}},
        full_disk,
        r"this run writes at least .*, 2 checkpoints of .* are free",
    ),
]


@pytest.mark.parametrize(("before", "changes", "break_it", "message"), FAULTS)
def test_a_fault_is_named_before_dearer_work(before, changes, break_it, message, make_config, monkeypatch, tmp_path):
    dearer = list(WORK.values())[list(WORK).index(before) :]
    for work in dearer:
        monkeypatch.setattr(work, lambda *a, work=work, **k: pytest.fail(f"{work} was reached"))
    with monkeypatch.context() as patch:
        break_it(patch)
        with pytest.raises(UserError, match=message):
            train(make_config(**changes))
    assert not (tmp_path / "run").exists()


def test_a_resume_with_other_data_or_weights_is_named_before_dearer_work(
    make_config, monkeypatch, tiny_model_dir, tmp_path
):
    base = tmp_path / "base"
    shutil.copytree(tiny_model_dir, base)

    def config(steps: int = 4, length: int = 160):
        return make_config(
            model={"model_name_or_path": str(base)},
            data={"max_length": length},
            train={"save_steps": 2, "max_steps": steps},
        )

    train(config())
    monkeypatch.setattr(WORK["references"], lambda *a, **k: pytest.fail("references"))
    (tmp_path / "run" / "manifest.json").unlink()
    weights = load_file(base / "model.safetensors")
    save_file({n: w + 0.01 for n, w in weights.items()}, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"holds other weights than when the run began; restore"):
        train(config(), resume=True)
    monkeypatch.setattr(WORK["model"], lambda *a, **k: pytest.fail("model"))
    with pytest.raises(UserError, match=r"not what it was \(data\.max_length was 160 and is now 40\)"):
        train(config(length=40), resume=True)
    with pytest.raises(UserError, match=r"4 steps are done, and train\.max_steps=3 asks for 3"):
        train(config(3), resume=True)


def test_a_warmup_that_outlasts_the_run_is_said(make_config, monkeypatch, caplog):
    monkeypatch.setattr(WORK["model"], lambda *a, **k: (_ for _ in ()).throw(UserError("enough")))
    with pytest.raises(UserError, match="enough"):
        train(make_config(optim={"warmup_steps": 100}))
    assert "optim.warmup_steps is 100 and the run has 4 steps" in caplog.text
