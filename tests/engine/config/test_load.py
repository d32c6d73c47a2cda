"""Reading a configuration: what is accepted, what is refused and how the refusal reads, and the way back to YAML."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import build_config, diff_from_defaults, format_diff, load_config, to_dict, to_yaml
from engine.config.fields import iter_keys
from engine.config.init import template_text
from engine.config.schema import LoraConfig
from engine.errors import SeveralErrors, UserError

BASE = "model: {model_name_or_path: m}\ndata: {dataset_name: d}\n"


@pytest.fixture
def load(tmp_path):
    def run(text: str, *overrides: str):
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return load_config(path, overrides)

    return run


@pytest.fixture
def refusal(load):
    """The message with which a file is refused; always one line."""

    def run(text: str, *overrides: str) -> str:
        with pytest.raises(UserError) as caught:
            load(text, *overrides)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return run


def test_a_minimal_file_has_every_default(load):
    config = load(BASE)
    assert (config.loss.beta, config.data.max_length, config.optim.learning_rate) == (0.1, 1024, 1e-6)
    assert config.model.lora is None
    assert config.train.report_to == ("tensorboard",)


def test_yaml_spellings_that_are_meant_as_numbers(load):
    config = load(BASE + "optim: {learning_rate: 1e-6, weight_decay: 1, adam_epsilon: '1e-7'}\n")
    assert config.optim.learning_rate == 1e-6
    assert config.optim.weight_decay == 1.0
    assert isinstance(config.optim.weight_decay, float)
    assert config.optim.adam_epsilon == 1e-7


def test_empty_sections_and_null_are_defaults_and_none(load):
    config = load(BASE + "loss:\ntrain:\ndata2:\n".replace("data2:\n", "optim: {}\n"))
    assert config == load(BASE)
    config = load("model: {model_name_or_path: m, lora: null}\ndata: {dataset_name: d, max_length: null}\n")
    assert config.model.lora is None
    assert config.data.max_length is None


def test_an_empty_lora_section_is_lora_with_its_defaults(load):
    assert load("model: {model_name_or_path: m, lora: {}}\ndata: {dataset_name: d}\n").model.lora == LoraConfig()


def test_a_lone_item_is_a_list(load):
    assert load(BASE + "train: {report_to: tensorboard}\n").train.report_to == ("tensorboard",)
    assert load(BASE + "train: {report_to: []}\n").train.report_to == ()


@pytest.mark.parametrize("spelling", ["none", "[none]", "[]", "null"])
def test_no_tracker_is_spelt_as_the_trainer_spells_it(load, spelling):
    assert load(BASE + f"train: {{report_to: {spelling}}}\n").train.report_to == ()


def test_paths_are_left_as_they_are(load):
    config = load("model: {model_name_or_path: ./m}\ndata: {dataset_name: ../d.jsonl}\n")
    assert (config.model.model_name_or_path, config.data.dataset_name) == ("./m", "../d.jsonl")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (BASE + "loss: {bta: 1}\n", ["line 3", "loss.bta", "did you mean loss.beta?"]),
        (BASE + "los: {beta: 1}\n", ["line 3", "los:", "did you mean loss?"]),
        (BASE + "train:\n  seed: 1\n  beta: 1\n", ["line 5", "train.beta", "did you mean loss.beta?"]),
        (BASE + "learning_rate: 1\n", ["optim.learning_rate", "dpo init --from FILE"]),
        (BASE + "loss: {zzzzzz: 1}\n", ["loss.zzzzzz", "known here: loss_type, "]),
        (BASE + "loss: {beta: high}\n", ["line 3: loss.beta", "expected a number", "the string 'high'"]),
        (BASE + "loss: {beta: true}\n", ["loss.beta", "expected a number", "got true"]),
        (BASE + "loss: {beta: .nan}\n", ["loss.beta", "finite"]),
        (BASE + "loss: {beta: null}\n", ["loss.beta", "expected a number", "got null"]),
        (BASE + "packing: {pairs_per_step: 1.5}\n", ["packing.pairs_per_step", "an integer", "the number 1.5"]),
        (BASE + "packing: {pairs_per_step: '8'}\n", ["packing.pairs_per_step", "an integer", "the string '8'"]),
        (BASE + "packing: {shuffle: 1}\n", ["packing.shuffle", "true or false", "the integer 1"]),
        (BASE + "loss: {loss_type: sigmod}\n", ["loss.loss_type", "one of sigmoid", "did you mean sigmoid?"]),
        (BASE + "loss: {loss_type: sigmoyd}\n", ["loss.loss_type", "did you mean sigmoid?"]),
        (
            BASE + "train: {report_to: [wandbb]}\n",
            ["train.report_to", "a list (one of tensorboard, wandb, mlflow, trackio, swanlab, none)"],
        ),
        (BASE + "train: {report_to: [none, wandb]}\n", ["train.report_to none stands alone"]),
        (BASE + "loss: 3\n", ["line 3: loss", "expected a mapping", "the integer 3"]),
        ("model: {model_name_or_path: 12}\ndata: {dataset_name: d}\n", ["expected a string", "put it in quotes"]),
        ("model: {model_name_or_path: m}\n", ["data.dataset_name is missing", "--data.dataset_name VALUE"]),
        (BASE + "loss: {beta: -1}\n", ["line 3", "loss.beta must be positive, got -1"]),
        (BASE + "reference: {mode: none}\n", ["reference.mode none", "sigmoid"]),
        (BASE + "train: {eval_steps: 5}\n", ["train.eval_steps needs data.eval_dataset_name"]),
        (BASE + "loss: {beta: 1}\nloss: {beta: 2}\n", ["line 4", "loss is already set in line 3"]),
        (BASE + "optim: {lr_scheduler_kwargs: {a: [1]}}\n", ["optim.lr_scheduler_kwargs", "a mapping of names"]),
        ("", ["empty", "dpo init"]),
        ("- a\n", ["expected sections", "the list ['a']"]),
        ("model: [1\n", ["line 2", "not valid YAML"]),
        ("model: {a: !!python/object:os.system x}\n", ["line 1", "not valid YAML"]),
        ("a: &a [*a]\n", ["unknown key"]),
        ("loss: {beta: 2026-13-45}\n", ["not valid YAML"]),
    ],
)
def test_refusals_name_file_line_key_and_remedy(refusal, text, parts):
    message = refusal(text)
    assert "run.yaml" in message
    for part in parts:
        assert part in message


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="no such file; write one with `dpo init"):
        load_config(tmp_path / "absent.yaml")
    with pytest.raises(UserError, match=r"is a folder, where the YAML file of a run belongs; `dpo init` writes one"):
        load_config(tmp_path)
    for name, kind in (("run.py", "a Python script"), ("rows.jsonl", "data"), ("run.ipynb", "a notebook")):
        with pytest.raises(UserError, match=f"{name} is {kind}, where the YAML file of a run belongs"):
            load_config(tmp_path / name)
    (tmp_path / "latin.yaml").write_bytes("model: {model_name_or_path: \xe9}".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.yaml: not UTF-8"):
        load_config(tmp_path / "latin.yaml")


def test_every_key_that_is_missing_is_named_at_once(load):
    with pytest.raises(SeveralErrors) as caught:
        load("loss: {beta: 0.2}\n")
    starts = [str(error).split(": ", 1)[1].split(";")[0] for error in caught.value.errors]
    assert starts == ["model.model_name_or_path is missing", "data.dataset_name is missing"]


def test_overrides_go_before_the_file(load):
    config = load(
        BASE + "loss: {beta: 0.5}\ntrain: {seed: 1}\n",
        "--loss.beta", "0.2", "--model.lora.r=8", "--train.report_to", "tensorboard", "--packing.shuffle", "false",
        "--train.max_steps", "-1", "--data.max-length", "null", "--optim.learning_rate=5e-7",
        "--model.lora.target_modules", "q_proj", "v_proj", "--loss.loss_type", "sigmoid", "sft",
        "--optim.lr_scheduler_kwargs", "min_lr_rate", "0.1", "--data.columns.prompt", "ask",
        "--data.columns.system=null", "--data.roles", "{customer: user}", "--train.gradient_checkpointing",
        "--model.revision=-x",
    )  # fmt: skip
    assert config.loss.beta == 0.2
    assert config.train.seed == 1
    assert config.model.lora == LoraConfig(r=8, target_modules=("q_proj", "v_proj"))
    assert not config.packing.shuffle
    assert config.train.max_steps == -1
    assert config.data.max_length is None
    assert config.optim.learning_rate == 5e-7
    assert config.loss.loss_type == ("sigmoid", "sft")
    assert config.optim.lr_scheduler_kwargs == {"min_lr_rate": 0.1}
    assert config.data.columns == {"prompt": "ask", "system": None}
    assert config.data.roles == {"customer": "user"}
    assert config.train.gradient_checkpointing
    assert config.model.revision == "-x"


@pytest.mark.parametrize(
    ("overrides", "sets"),
    [
        (["--data.eval_dataset_name", "1.jsonl"], "1.jsonl"),
        (["--data.eval_dataset_name", "a: b.jsonl"], "a: b.jsonl"),
        (["--data.eval_dataset_name", "{a: x, b: y}"], {"a": "x", "b": "y"}),
        (["--data.eval_dataset_name.a", "x", "--data.eval_dataset_name.b=y"], {"a": "x", "b": "y"}),
        (["--data.eval_dataset_name", "null"], None),
    ],
)
def test_evaluation_sets_are_one_or_have_names(overrides, sets, load):
    data = load(BASE.replace("dataset_name: d", "dataset_name: d, eval_dataset_name: e"), *overrides).data
    assert data.eval_dataset_name == sets


def test_entries_of_a_set_are_beside_those_of_the_file(load, refusal):
    sets = "datasets: [{name: a, rows: 1}, {name: b, rows: 2, columns: {prompt: ask}}]"
    text = BASE.replace("dataset_name: d", sets)
    changed = ["--data.datasets.1.columns.weight", "trust", "--data.datasets.1.columns.system=null"]
    data = load(text, *changed, "--data.datasets.0.roles.customer=user", "--data.datasets.0.rows", "3").data
    assert data.datasets[1].columns == {"prompt": "ask", "weight": "trust", "system": None}
    assert data.datasets[0].roles == {"customer": "user"}
    assert data.datasets[0].rows == 3
    assert "unknown option --data.datasets.1.colums.weight" in refusal(text, "--data.datasets.1.colums.weight", "x")
    assert "data.datasets has 2 items" in refusal(text, "--data.datasets.2.columns.weight", "x")


def test_overrides_supply_required_keys_and_switch_sections_off(load):
    text = "model: {lora: {r: 4}}\n"
    config = load(text, "--model.model_name_or_path", "m", "--data.dataset_name", "d", "--model.lora", "null")
    assert config.model.lora is None
    later = load(text, "--model.model_name_or_path=m", "--data.dataset_name=d", "--model.lora=null", "--model.lora.r=2")
    assert later.model.lora == LoraConfig(r=2)


def test_the_last_of_several_overrides_counts(load):
    assert load(BASE, "--loss.beta", "0.2", "--loss.beta", "0.3").loss.beta == 0.3


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["--loss.bta", "1"], ["unknown option --loss.bta", "did you mean --loss.beta?"]),
        (["--beta", "1"], ["unknown option --beta", "did you mean --loss.beta?"]),
        (["--zzzzzz.q"], ["unknown option --zzzzzz.q"]),
        (["--loss.beta", "x"], ["--loss.beta", "expected a number", "got x"]),
        (["--loss.beta"], ["--loss.beta", "got no value"]),
        (["--loss.beta", "1", "2"], ["--loss.beta", "got 1 2"]),
        (["--loss.beta", "-1"], ["--loss.beta must be positive, got -1.0"]),
        (["--loss.beta", "nan"], ["--loss.beta", "finite"]),
        (["--packing.pairs_per_step", "1.5"], ["--packing.pairs_per_step", "an integer"]),
        (["--packing.shuffle", "maybe"], ["--packing.shuffle", "true or false"]),
        (["--loss.loss_type", "sigmod"], ["--loss.loss_type", "did you mean sigmoid?"]),
        (["--train.report_to"], ["--train.report_to", "got no value"]),
        (["--model.lora", "yes"], ["--model.lora", "expected null", "--model.lora.r 16"]),
        (["--model"], ["unknown option --model"]),
        (["stray"], ["unexpected argument 'stray'"]),
    ],
)
def test_refused_overrides_name_the_flag(refusal, overrides, parts):
    message = refusal(BASE, *overrides)
    for part in parts:
        assert part in message
    assert "run.yaml" not in message


def test_diff_names_what_is_not_the_default(load):
    config = load(BASE + "loss: {beta: 0.5}\n", "--model.lora.r", "8")
    diff = diff_from_defaults(config)
    assert diff["loss.beta"] == (0.5, 0.1)
    assert diff["model.model_name_or_path"] == ("m", None)
    assert diff["model.lora.r"] == (8, None)
    assert "train.seed" not in diff
    lines = format_diff(config).splitlines()
    assert len(lines) == len(diff)
    assert any(line.startswith("loss.beta") and line.endswith("0.5  (default 0.1)") for line in lines)


def test_the_template_sets_every_key_to_its_default(load):
    config = load(template_text())
    assert set(diff_from_defaults(config)) == {"model.model_name_or_path", "data.dataset_name"}
    values = to_dict(config)
    for key, _ in iter_keys():
        section, _, name = key.partition(".")
        if name.startswith("lora."):
            continue
        assert f"  {name}:" in template_text(), key
        assert name in values[section]


def test_the_templates_commented_lora_block_is_valid(load):
    text = template_text().replace("  lora: null ", "  # ")
    text = re.sub(r"(?m)^  # (lora:$|  \w+: )", r"  \1", text)
    assert load(text).model.lora == LoraConfig()


def _plausible(key: str, hint: object) -> st.SearchStrategy:
    ranges: dict[str, st.SearchStrategy] = {
        "model.adapter_name_or_path": st.none(),
        "model.quantization": st.none(),
        "model.lora.dropout": st.floats(0, 0.99),
        "model.lora.target_modules": st.none() | st.text(min_size=1) | st.lists(st.text(), min_size=1),
        # They go with neither dropout nor DoRA.
        "model.lora.target_parameters": st.just([]),
        "model.lora.modules_to_save": st.lists(st.text(min_size=1)),
        "data.max_length": st.none() | st.integers(2, 10**9),
        "loss.loss_type": st.sampled_from(["sigmoid", "simpo", "cpo", ["sigmoid", "sft"]]),
        "loss.loss_weights": st.none(),
        "loss.f_divergence_type": st.just("reverse_kl"),
        "loss.ld_alpha": st.none() | st.floats(0, 1),
        "loss.shift_lambda": st.floats(0, 1, exclude_min=True),
        # Of losses that take pairs.
        "loss.desirable_weight": st.just(1.0),
        "loss.undesirable_weight": st.just(1.0),
        "loss.label_smoothing": st.floats(0, 0.49),
        # The other one goes with a dtype of the model.
        "optim.master_weights": st.just("float32"),
        # Not beside paged optimizers.
        "optim.offload": st.just(False),
        "optim.warmup_steps": st.floats(0, 0.999) | st.integers(0, 10**6),
        "optim.lr_scheduler_kwargs": st.none()
        | st.dictionaries(st.text(), st.integers() | st.text() | st.floats(allow_nan=False, allow_infinity=False)),
        "data.eval_fraction": st.none(),
        "data.dataset_name": st.text(min_size=1) | st.lists(st.text(min_size=1), min_size=2),
        "data.datasets": st.just([]),
        "data.eval_dataset_name": st.none()
        | st.text(min_size=1)
        | st.dictionaries(st.sampled_from(["safety", "style-2"]), st.text(min_size=1), min_size=1),
        "data.eval_dataset_split": st.text(min_size=1),
        "data.template_date": st.none() | st.dates().map(str),
        "data.columns": st.none() | st.dictionaries(st.sampled_from(["prompt", "system"]), st.none(), max_size=2),
        "data.turn_fields": st.none() | st.dictionaries(st.sampled_from(["role", "content"]), st.text(min_size=1)),
        "data.mask_pattern": st.none() | st.sampled_from(["a+", r"\*"]),
        "data.roles": st.none() | st.dictionaries(st.text(), st.text()),
        "reference.mode": st.sampled_from(["auto", "stored", "live"]),
        "reference.sync_ref_model": st.just(False),
        "reference.ref_model_mixup_alpha": st.floats(0.1, 1),
        "train.param_dtype": st.just("float32"),
        "train.context_parallel": st.just(1),
        "train.max_steps": st.just(-1) | st.integers(1, 10**9),
        "train.eval_steps": st.none(),
        "train.early_stopping_patience": st.none(),
        "train.load_best_model_at_end": st.just(False),
        "train.seed": st.integers(0, 2**32 - 1),
        "train.report_to": st.lists(st.sampled_from(["tensorboard", "wandb"]), max_size=2),
    }
    by_type: dict[object, st.SearchStrategy] = {
        str: st.text(min_size=1),
        int: st.integers(1, 10**12),
        float: st.floats(1e-300, 0.999),
        bool: st.booleans(),
        type(None): st.none(),
    }
    if key in ranges:
        return ranges[key]
    if get_origin(hint) is Literal:
        return st.sampled_from(get_args(hint))
    if members := get_args(hint):
        return st.one_of(*(_plausible("", member) for member in members))
    return by_type[hint]


@st.composite
def _nested_values(draw) -> dict:
    values: dict = {}
    for key, hint in iter_keys():
        required = key in ("model.model_name_or_path", "data.dataset_name")
        if not required and not draw(st.booleans()):
            continue
        *parents, leaf = key.split(".")
        section = values
        for name in parents:
            section = section.setdefault(name, {})
        section[leaf] = draw(_plausible(key, hint))
    return values


@settings(max_examples=60)
@given(_nested_values())
def test_yaml_round_trip(values):
    config = build_config(values, "drawn")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.yaml"
        path.write_text(to_yaml(config), encoding="utf-8", newline="")
        assert load_config(path) == config
    assert build_config(to_dict(config), "again") == config
