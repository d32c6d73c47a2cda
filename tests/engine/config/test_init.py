"""``dpo init``: files that are there, missing, or of no trainer."""

from __future__ import annotations

import pytest

from engine.config.convert import convert_file as convert_trl
from engine.config.init import write_converted, write_template
from engine.errors import UserError

from .convert.recipes import TRL


@pytest.mark.parametrize("name", ["train_dpo.py", "train_dpo"])
def test_a_script_is_told_from_a_file_of_keys(tmp_path, name):
    path = tmp_path / name
    path.write_text("from trl import DPOConfig\n\nargs = DPOConfig(beta=0.2)\n")
    assert convert_trl(path).values["loss"]["beta"] == 0.2


def test_text_without_keys_is_refused(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("use beta 0.1\n")
    with pytest.raises(UserError, match=r"expected keys such as `learning_rate: 5\.0e-6`, got the string"):
        convert_trl(path)


def test_init_refuses_to_overwrite(tmp_path):
    path = tmp_path / "run.yaml"
    write_template(path)
    before = path.read_text()
    with pytest.raises(UserError, match="exists already"):
        write_template(path)
    (tmp_path / "trl.yaml").write_text(TRL)
    with pytest.raises(UserError, match="exists already"):
        write_converted(tmp_path / "trl.yaml", path)
    assert path.read_text() == before
    with pytest.raises(UserError, match="does not exist"):
        write_template(tmp_path / "absent" / "run.yaml")


def test_a_missing_file_is_one_of_another_trainer(tmp_path):
    with pytest.raises(UserError, match=r"no such file; give the path of the configuration, command or script"):
        convert_trl(tmp_path / "nope.yaml")
