"""Shell scripts that start a trainer: options, variables and processes are read, nothing is run."""

from __future__ import annotations

from functools import partial

import pytest

from engine.config.convert import convert_file
from engine.config.convert.shell import read_shell

from .recipes import assert_stops

TRL = "trl dpo --model_name_or_path m --dataset_name d"


@pytest.mark.parametrize(
    ("text", "trainer", "processes"),
    [
        (TRL, "TRL", None),
        ("accelerate launch --num_processes 8 trl/scripts/dpo.py --model_name_or_path m", "TRL", 8),
        ("torchrun --nproc_per_node=4 --nnodes 2 examples/scripts/dpo.py --beta 1", "TRL", 8),
        ("NPROC_PER_NODE=4 \\\nswift rlhf --model m", "ms-swift", 4),
        ("export NPROC_PER_NODE=2\nswift rlhf --model m", "ms-swift", 2),
        ("llamafactory-cli train stage=dpo", "LLaMA-Factory", None),
        ("CUDA_VISIBLE_DEVICES=0,1 llamafactory-cli train stage=dpo", "LLaMA-Factory", 2),
        ("accelerate launch -m axolotl.cli.train --rl dpo", "Axolotl", None),
        ("accelerate launch --num_processes 8 open_instruct/dpo_tune_cache.py --beta 5", "open-instruct", 8),
        ("accelerate launch scripts/dpo.py --beta 5", "alignment-handbook", None),
    ],
)
def test_trainer_and_processes(text, trainer, processes):
    command = read_shell("x.sh", f"#!/bin/bash\nset -e\n{text}\n")
    assert (command.trainer, command.processes) == (trainer, processes)


def test_options_and_their_lines():
    text = """LR=5e-6
NAME=run-${LR}  # don't
# trl dpo --beta 9
trl dpo --learning-rate $LR \\
  --output_dir ${NAME} --use_peft \\
  --lora_target_modules q v --beta=0.2 --seed ${SEED:-7} --run_name 'a #b'
"""
    command = read_shell("x.sh", text)
    assert command.keys == {
        "learning_rate": "5e-6", "output_dir": "run-5e-6", "use_peft": True, "lora_target_modules": ["q", "v"],
        "beta": 0.2, "seed": 7, "run_name": "a #b",
    }  # fmt: skip
    assert (command.lines["learning_rate"], command.lines["use_peft"], command.lines["beta"]) == (4, 5, 6)


@pytest.mark.parametrize("how", ["accelerate launch scripts/dpo.py", "accelerate launch -m trl.scripts.dpo", "trl dpo"])
def test_a_configuration_beside_the_command(tmp_path, how):
    (tmp_path / "recipe.yaml").write_text("beta: 0.1\nseed: 3\n")
    script = tmp_path / "x.sh"
    command = read_shell(str(script), f"{how} --config recipe.yaml --beta 0.5\n")
    assert command.keys == {"beta": 0.5, "seed": 3}


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("python train.py --x 1\n", "no command starts one of ms-swift, LLaMA-Factory"),
        (f"{TRL}\n{TRL}\n", "commands in lines 1, 2 start trainers; leave one"),
        (f"{TRL} \\\n --beta $BETA\n", "x.sh, line 2: --beta: $BETA is not set in the script"),
        (f"{TRL} --beta $(cat beta)\n", "x.sh, line 1: --beta: $(cat"),
        ("trl dpo --config absent.yaml\n", "absent.yaml: no such file"),
    ],
)
def test_what_depends_on_a_run_stops(text, part):
    assert_stops(partial(read_shell, "x.sh"), text, part)


def test_processes_of_a_configuration_of_accelerate(tmp_path):
    (tmp_path / "zero3.yaml").write_text("distributed_type: DEEPSPEED\nnum_processes: 16\n")
    text = "accelerate launch --config_file {} scripts/dpo.py --beta 1\n"
    assert read_shell(str(tmp_path / "x.sh"), text.format("zero3.yaml")).processes == 16
    assert read_shell(str(tmp_path / "x.sh"), text.format("absent.yaml")).processes is None


def test_a_command_of_trl_is_converted(tmp_path):
    path = tmp_path / "dpo.sh"
    path.write_text(f"{TRL} --no_gradient_checkpointing --no_remove_unused_columns --learning_rate 5e-7\n")
    conversion = convert_file(path)
    assert not conversion.values["train"]["gradient_checkpointing"]
    assert conversion.values["optim"]["learning_rate"] == 5e-7
    assert not [note for note in conversion.notes if note.effect == "new"]
