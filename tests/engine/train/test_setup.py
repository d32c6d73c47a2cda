"""What a run says before its first step."""

from __future__ import annotations

import shutil

from transformers import AutoModelForCausalLM

from engine.train.describe import describe_run
from engine.train.setup import prepare


def test_dropout_is_disabled_and_counted(make_config, tiny_model_dir, tmp_path):
    assert "disabled in the model (it had none)" in describe_run(prepare(make_config()))
    folder = tmp_path / "dropping"
    shutil.copytree(tiny_model_dir, folder)
    AutoModelForCausalLM.from_pretrained(folder, attention_dropout=0.1).save_pretrained(folder)
    setup = prepare(make_config(model={"model_name_or_path": str(folder)}))
    assert "disabled in the model (2 probabilities set to 0)" in describe_run(setup)
