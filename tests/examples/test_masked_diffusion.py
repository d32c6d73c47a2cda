"""The example of a masked-diffusion model: a small form of all of it, and the whole with what its page claims."""

from __future__ import annotations

import importlib
import json
import math

import pytest
import torch

from engine.demo.base_model import END
from examples.masked_diffusion.__main__ import main, one_thread, run
from examples.masked_diffusion.language import PROMPT, WINDOW, batches, make_language
from examples.masked_diffusion.model import Shape
from examples.masked_diffusion.train import Size
from examples.masked_diffusion.variance import BEST, NAIVE, SAMPLERS

SMALL = Size(
    shape=Shape(features=32, layers=1),
    texts=600,
    pairs=48,
    held_out=12,
    pretraining_steps=40,
    pretraining_batch=16,
    steps=6,
    pairs_per_step=8,
    learning_rate=2e-3,
    eval_steps=3,
    samples=4,
    measured_pairs=4,
    draws=4,
)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("masked")
    with one_thread():
        return run(folder / "new" / "folder", SMALL, 7), folder / "new" / "folder"


def test_the_small_form_learns(small):
    result, _ = small
    assert result.pretraining_losses[-1] < 0.75 * result.pretraining_losses[0]
    first, *_, last = result.evaluations
    assert [found.step for found in result.evaluations] == [0, 3, 6]
    assert (first.reward_accuracy, first.margin) == (0.5, 0.0)
    assert first.loss == pytest.approx(math.log(2), abs=1e-6)
    assert result.losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert last.reward_accuracy > 0.8
    assert last.margin > 0.5
    assert last.loss < first.loss


def test_the_small_form_writes_what_it_found(small):
    result, folder = small
    written = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert written["evaluations"][-1]["margin"] == result.evaluations[-1].margin
    assert written["variances"].keys() == SAMPLERS.keys()
    assert {name: sum(found.values()) for name, found in written["styles"].items()} == {"before": 4, "after": 4}
    for name in ("training.png", "variance.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_shared_masks_vary_less(small):
    result, _ = small
    assert all(0 < found.shared < found.own for found in result.variances.values())


def test_the_language_fits_its_windows():
    language = make_language(200, 8, 4, seed=3)
    tokenizer = language.tokenizer
    end = tokenizer.convert_tokens_to_ids(END)
    for prompts, *responses in (language.text, language.pairs, language.held_out):
        assert prompts.shape[1] == PROMPT
        assert (prompts[:, -1] == tokenizer.convert_tokens_to_ids("<|assistant|>")).all()
        for ids_BR in responses:
            assert ids_BR.shape == (len(prompts), WINDOW)
            ends = ids_BR == end
            assert ends[:, -1].all()
            # Once the answer has ended, all is end.
            assert (ends.int().diff(dim=1) >= 0).all()
    assert language.styles(language.pairs.chosen_BR) == {"kind": 8}
    assert language.styles(language.held_out.rejected_BR) == {"curt": 4}
    asked = {language.words(ids) for ids in language.pairs.prompts_BP}
    assert asked.isdisjoint(language.words(ids) for ids in language.held_out.prompts_BP)


def test_batches_are_of_all_rows_in_turn():
    drawn = torch.cat(list(batches(5, 4, 5, torch.Generator().manual_seed(0)))).view(4, 5)
    assert all(sorted(epoch) == list(range(5)) for epoch in drawn.tolist())


def test_a_folder_that_cannot_be_written_is_said_in_one_line(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr("sys.argv", ["masked_diffusion", "--output", str(tmp_path / "file" / "folder")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last.endswith("choose another folder with --output")


@pytest.mark.parametrize("module", ["masked_diffusion", "frontier"])
def test_a_seed_that_no_generator_takes_is_said_in_one_line(module, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", [module, "--seed", "99999999999999999999"])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"examples.{module}.__main__").main()
    assert ended.value.code == 2
    assert "--seed takes a number from 0 to 4294967295" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("seed", [7, 8, 9])
def test_the_whole_form_does_what_its_page_says(seed, tmp_path):
    with one_thread():
        result = run(tmp_path, Size(), seed)
    first, last = result.evaluations[0], result.evaluations[-1]
    assert 0.3 < first.ranking_accuracy < 0.65
    assert last.ranking_accuracy > max(0.85, first.ranking_accuracy + 0.3)
    assert last.reward_accuracy > 0.95
    assert last.margin > 4
    naive, best = result.variances[NAIVE], result.variances[BEST]
    assert naive.own > 20 * best.shared
    before, after = result.styles["before"], result.styles["after"]
    assert after["kind"] > before["kind"] + 10
    assert after.get("curt", 0) < before["curt"] / 4
