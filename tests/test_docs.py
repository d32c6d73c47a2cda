"""What README.md and docs/ promise: their snippets run, their commands parse, their links lead somewhere."""

from __future__ import annotations

import dataclasses
import io
import re
import shlex
from contextlib import redirect_stdout
from pathlib import Path
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
import yaml

from engine import cli, commands
from engine.config import load_config
from engine.config.losses import LossConfig, LossType

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *ROOT.glob("examples/**/README.md")])
DATED = {"CHANGELOG.md", "experiments.md"}
"""They tell what was, too."""


def blocks(page: str, language: str = "") -> list[str]:
    """The fenced blocks of a page in one language; without a language those that name none."""
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / page).read_text(encoding="utf-8"), re.M | re.S)


def shell_lines(page: Path) -> list[str]:
    """The commands in a page's blocks, without prompts, comments and what starts them."""
    found = []
    for language in ("", "bash", "sh"):
        for block in blocks(str(page.relative_to(ROOT)), language):
            lines = re.sub(r"\\\n\s*", " ", block).splitlines()
            found += [re.sub(r"^.*--no-python ", "", line.partition("#")[0]).strip() for line in lines]
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_to_files(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_every_example_is_on_their_page():
    folder = ROOT / "examples"
    links = re.findall(r"\]\(([\w.]+)", (folder / "README.md").read_text(encoding="utf-8"))
    found = {p.name for p in folder.iterdir() if p.name[0] not in "._"}
    assert found - {"README.md"} == set(links) - {".."}


def test_every_recipe_says_how_to_run_it():
    recipes = sorted((ROOT / "examples").rglob("*.yaml"))
    assert recipes
    for path in recipes:
        name = path.relative_to(ROOT).as_posix()
        assert path.read_text(encoding="utf-8").splitlines()[0] == f"# dpo train {name}", name


@pytest.mark.parametrize("page", [p for p in PAGES if p.name not in DATED], ids=lambda p: p.name)
def test_commands_are_understood(page, tmp_path, monkeypatch):
    """Every ``dpo`` line of the page is one that the command line takes, keys and values included."""
    run = tmp_path / "run.yaml"
    run.write_text("model: {model_name_or_path: m}\ndata: {dataset_name: d}\ntrain: {output_dir: runs/x}\n")

    def understand(options, overrides):
        if hasattr(options, "config"):
            assert options.config == "run.yaml"
            load_config(run, overrides)
        return 0

    for name in cli._COMMANDS:
        monkeypatch.setattr(commands, name, understand)
    for line in shell_lines(page):
        if line.startswith("dpo ") and "COMMAND" not in line:
            assert cli.run(shlex.split(line)[1:]) == 0, line


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_make_targets_exist(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"`make ([a-z-]+)[ `]", text)) | set(re.findall(r"^make ([a-z-]+)", text, re.M))
    assert named <= targets


def test_the_op_is_what_it_replaces():
    (snippet,) = blocks("README.md", "python")
    generator = torch.Generator().manual_seed(0)
    lengths = [3, 2, 4, 3]
    values = {
        "torch": torch,
        "F": F,
        "hidden": torch.randn(12, 16, generator=generator, requires_grad=True),
        "weight": torch.randn(50, 16, generator=generator, requires_grad=True),
        "labels": torch.randint(0, 50, (12,), generator=generator),
        "lengths": lengths,
        "cu_responses": torch.tensor([0, 3, 5, 9, 12]),
        "ref_logps": torch.tensor([-21.0, -14.0, -27.0, -20.0]),
    }
    results = []
    for part in snippet.split("# after"):
        exec(part, values)
        results.append((values["loss"], *torch.autograd.grad(values["loss"], (values["hidden"], values["weight"]))))
    for before, after in zip(*results, strict=True):
        torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)


def test_the_own_loop_prints_what_the_guide_says():
    page = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
    snippet = next(block for block in blocks("docs/guide.md", "python") if "describe" in block)
    printed = re.search(r"^prints\n\n```\n(.*?)^```$", page, re.M | re.S)[1]
    output = io.StringIO()
    with redirect_stdout(output):
        exec(snippet, {})
    first, *rest = output.getvalue().splitlines()
    expected, *described = printed.splitlines()
    numbers = [[float(n) for n in re.findall(r"-?\d+\.\d+", line)] for line in (first, expected)]
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-4)
    # Which implementation it is depends on the machine.
    assert [line.partition(":")[0] for line in rest[1:]] == [line.partition(":")[0] for line in described[1:]]


def test_the_run_file_of_the_pages_is_one(tmp_path):
    texts = [blocks(page, "yaml")[0] for page in ("README.md", "docs/guide.md")]
    assert texts[0] == texts[1]
    path = tmp_path / "run.yaml"
    path.write_text(texts[0])
    assert load_config(path).loss.beta == 0.1


def test_a_converted_file_is_explained_as_the_guide_says(tmp_path, capsys, monkeypatch):
    page = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
    source, printed = re.search(
        r"For\n\n```yaml\n(.*?)^```\n\nit prints\n\n```\n(.*?)^```$", page, re.M | re.S
    ).groups()
    assert yaml.safe_load(source)["bf16"] is True
    (tmp_path / "trl.yaml").write_text(source)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["init", "--from", "trl.yaml"]) == 0
    assert capsys.readouterr().out == printed


def held_rows(heading: str) -> list[tuple[str, str]]:
    """What the rows of the table "held by" below a heading of the guide are about, and the text of the test that holds
    each, which there is."""
    page = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
    table = page.partition(f"\n## {heading}\n")[2].partition("\n## ")[0].partition(" | held by |\n|---|---|---|\n")[2]
    rows = []
    for line in table.partition("\n\n")[0].splitlines():
        what, _, held = line.strip("|").split(" | ")
        file, _, function = held.strip().partition(": ")
        text = (ROOT / file).read_text(encoding="utf-8")
        assert f"\ndef {function}(" in text, held
        rows.append((what, text))
    return rows


def test_every_option_of_the_loss_is_held_by_a_test_that_names_it():
    rows = [(re.findall(r"`(?:\w+[.:] ?)?(\w+)`", what), text) for what, text in held_rows("Options of the loss")]
    named = {name for names, _ in rows for name in names}
    assert {f.name for f in dataclasses.fields(LossConfig)} <= named
    assert {"sync_ref_model", "mask_pattern", "weight", "margin", "save_steps"} <= named
    assert [name for names, text in rows for name in names if not re.search(rf"\b{name}\b", text)] == []


def test_every_loss_is_held_by_a_test_that_names_it():
    """To TRL where it has the loss, else to its formula."""
    folder = ROOT / "tests"
    files = (
        "parity/test_trl_variants.py",
        "parity/test_trl_kto.py",
        "dpo_kernels/test_losses.py",
        "dpo_kernels/test_preference.py",
    )
    text = "".join((folder / file).read_text(encoding="utf-8") for file in files)
    assert [name for name in get_args(LossType) if not re.search(rf"\b{name}\b", text)] == []


def test_every_wrapper_of_a_loop_is_held_by_a_test_that_names_it():
    (modes,) = re.findall(r"^MODES = \((.*)\)$", (ROOT / "examples" / "own_loop.py").read_text(encoding="utf-8"), re.M)
    rows = [(what.lower().replace("none", "plain"), text) for what, text in held_rows("The loss op in your own loop")]
    held = {name.strip() for what, _ in rows for name in what.split(",")}
    assert held == set(re.findall(r"\w+", modes))
    for what, text in rows:
        assert all(name.strip() in text.lower() for name in what.split(",")), what
