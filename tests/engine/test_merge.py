"""A merged adapter gives the log-probs that it gave on its base, whatever it adapts and however it is scaled."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, set_seed

from engine import cli
from engine.durable import is_complete
from engine.errors import UserError
from engine.merge import merge
from engine.model.adapters import quiet_loading

FORMS = {
    "plain": {"r": 4, "target_modules": ["q_proj", "down_proj"]},
    "rslora": {"r": 8, "target_modules": "all-linear", "use_rslora": True},
    "dora": {"r": 4, "target_modules": ["v_proj", "lm_head"], "use_dora": True},
    "head": {"r": 4, "target_modules": ["lm_head"]},
    "embedding": {"r": 4, "target_modules": ["embed_tokens", "q_proj"]},
    "copies": {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory, tiny_model_dir, tiny_tokenizer):
    """The same small model with input and output layers of its own, tied, and stored in bfloat16."""
    folder = tmp_path_factory.mktemp("bases")
    for name, changes in {"tied": {"tie_word_embeddings": True}, "bfloat16": {"dtype": "bfloat16"}}.items():
        set_seed(0)
        config = LlamaConfig.from_pretrained(tiny_model_dir, **changes)
        model = LlamaForCausalLM(config)
        model.to(torch.bfloat16 if name == "bfloat16" else torch.float32).save_pretrained(folder / name)
        tiny_tokenizer.save_pretrained(folder / name)
    return {"untied": Path(tiny_model_dir), "tied": folder / "tied", "bfloat16": folder / "bfloat16"}


def write_adapter(base: Path, folder: Path, form: dict) -> Path:
    """An adapter whose every weight is moved, as if it were trained."""
    set_seed(1)
    with quiet_loading():
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **form))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return folder


def logps(model, ids) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits.float().log_softmax(-1)


def on_its_base(base: Path, adapter: Path, ids) -> torch.Tensor:
    """With peft, on a base whose layers are told apart, as training has them."""
    with quiet_loading():
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        model.config.tie_word_embeddings = False
        return logps(peft.PeftModel.from_pretrained(model, adapter), ids)


@pytest.fixture
def ids():
    return torch.randint(0, 200, (2, 17), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("base", ["untied", "tied"])
def test_log_probs_are_those_of_the_adapter(base, form, bases, ids, tmp_path):
    adapter = write_adapter(bases[base], tmp_path / "adapter", FORMS[form])
    expected = on_its_base(bases[base], adapter, ids)
    assert (expected - logps(AutoModelForCausalLM.from_pretrained(bases[base]), ids)).abs().max() > 0.01
    merged = merge(str(adapter))
    assert merged.folder == tmp_path / "adapter-merged"
    model = AutoModelForCausalLM.from_pretrained(merged.folder)
    torch.testing.assert_close(logps(model, ids), expected, rtol=1e-4, atol=1e-4)
    assert merged.moved < 1e-4
    # What the adapter has not told apart stays one tensor.
    stays_tied = base == "tied" and form in ("plain", "rslora")
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == stays_tied
    assert ("lm_head.weight" in load_file(merged.folder / "model.safetensors")) != stays_tied
    assert AutoTokenizer.from_pretrained(merged.folder).chat_template
    assert is_complete(merged.folder)


def test_what_older_versions_of_peft_leave_on_the_model_is_removed(bases, ids, tmp_path, monkeypatch):
    adapter = write_adapter(bases["untied"], tmp_path / "adapter", FORMS["plain"])
    unload = peft.tuners.lora.LoraModel.merge_and_unload

    def leaving(model, *args, **options):
        config, merged = model.peft_config, unload(model, *args, **options)
        merged.peft_config = config
        return merged

    monkeypatch.setattr(peft.tuners.lora.LoraModel, "merge_and_unload", leaving)
    found = logps(AutoModelForCausalLM.from_pretrained(merge(str(adapter)).folder), ids)
    torch.testing.assert_close(found, on_its_base(bases["untied"], adapter, ids), rtol=1e-4, atol=1e-4)


def test_a_configuration_beside_the_folder_does_not_name_its_base(bases, ids, tmp_path):
    adapter = write_adapter(bases["untied"], tmp_path / "adapter", FORMS["plain"])
    beside = f"model: {{model_name_or_path: {bases['tied']}}}\ndata: {{dataset_name: d}}\n"
    (tmp_path / "config.yaml").write_text(beside)
    found = logps(AutoModelForCausalLM.from_pretrained(merge(str(adapter)).folder), ids)
    torch.testing.assert_close(found, on_its_base(bases["untied"], adapter, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("asked", "stored"), [("auto", "bfloat16"), ("float32", "float32"), ("float16", "float16")])
def test_the_dtype_of_the_base_is_kept_or_another_asked_for(asked, stored, bases, ids, tmp_path):
    adapter = write_adapter(bases["bfloat16"], tmp_path / "adapter", FORMS["dora"])
    merged = merge(str(adapter), dtype=asked)
    assert {str(t.dtype) for t in load_file(merged.folder / "model.safetensors").values()} == {f"torch.{stored}"}
    assert json.loads((merged.folder / "config.json").read_text())["dtype"] == stored
    exact = on_its_base(bases["bfloat16"], adapter, ids)
    found = logps(AutoModelForCausalLM.from_pretrained(merged.folder, dtype=torch.float32), ids)
    # Rounded once: every weight is the nearest of the exact sum.
    bounds = {"bfloat16": 0.05, "float16": 0.01, "float32": 1e-4}
    assert (found - exact).abs().max() < bounds[stored]
    whole = load_file(merge(str(adapter), tmp_path / "whole", dtype="float32").folder / "model.safetensors")
    for name, tensor in load_file(merged.folder / "model.safetensors").items():
        assert torch.equal(tensor, whole[name].to(tensor.dtype)), name


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model_dir, pairs_jsonl):
    """A finished run that trained an adapter."""
    folder = tmp_path_factory.mktemp("merged")
    (folder / "run.yaml").write_text(
        f"model: {{model_name_or_path: {tiny_model_dir}, dtype: float32, "
        "lora: {r: 4, target_modules: [q_proj, lm_head]}}\n"
        f"data: {{dataset_name: {pairs_jsonl}}}\npacking: {{pairs_per_step: 12}}\noptim: {{learning_rate: 0.01}}\n"
        f"reference: {{store: {folder / 'store'}}}\n"
        f"train: {{output_dir: {folder / 'run'}, max_steps: 2, report_to: none}}\n"
    )
    assert cli.main(["train", str(folder / "run.yaml")]) == 0
    return folder / "run"


def test_a_run_is_merged_with_its_card(run, bases, ids, tmp_path, capsys):
    for source in (run, run / "checkpoint-2"):
        output = tmp_path / source.name
        assert cli.main(["merge", str(source), "--output", str(output)]) == 0
        assert f"the merged model, in float32, is {output}" in capsys.readouterr().out
        found = logps(AutoModelForCausalLM.from_pretrained(output), ids)
        torch.testing.assert_close(found, on_its_base(bases["untied"], run, ids), rtol=1e-4, atol=1e-4)
        card = (output / "README.md").read_text()
        assert "library_name: transformers" in card
        assert f"# {source.name}\n" in card
    card = (tmp_path / "run" / "README.md").read_text()
    assert "- **Merged:** the adapter of `run` is part of the weights, which are stored in float32" in card
    assert "learning_rate: 0.01" in card
    assert "lora\n" not in card.split("---")[1]


@pytest.mark.parametrize("kind", ["nf4"])
def test_a_base_that_was_held_in_four_bits_is_that_base(kind, run, ids, tmp_path):
    pytest.importorskip("bitsandbytes")
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((run / name).read_bytes())
    config = (run / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("quantization: null", f"quantization: {kind}"))
    merged = merge(str(folder))
    model = AutoModelForCausalLM.from_pretrained(merged.folder)
    assert "quantization_config" not in json.loads((merged.folder / "config.json").read_text())
    base = load_file(
        Path(json.loads((run / "adapter_config.json").read_text())["base_model_name_or_path"]) / "model.safetensors"
    )
    name = "model.layers.0.mlp.up_proj.weight"
    found = dict(model.named_parameters())[name]
    # No adapter there: what is left is the rounding, to sixteen values a block of 64.
    assert 0 < (found - base[name]).abs().max() < base[name].abs().max()
    assert all(len(block.unique()) <= 16 for block in found.detach().reshape(-1, 64))


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda run, place: place / "none", {}, r"none is not a folder: give a model folder"),
        (
            lambda run, place: place,
            {},
            r"holds no adapter \(adapter_config\.json and its weights\): give the output fol",
        ),
        (lambda run, place: whole(place), {}, r"holds a whole model: there is no adapter to merge"),
        (lambda run, place: run, {"output": "run"}, r"run is there already: name another folder with --output"),
        (
            lambda run, place: run,
            {"base": "QUANTISED"},
            r"is stored quantised \(gptq, 4 bits\).*give the checkpoint in b",
        ),
        (
            lambda run, place: moved(run, place),
            {},
            r"the base /gone/base of .* is no folder here: say where it is with",
        ),
        (lambda run, place: run, {"base": "OTHER"}, r"does not fit"),
    ],
)
def test_what_cannot_be_merged_is_one_line(change, options, message, run, tmp_path):
    source = change(run, tmp_path)
    if options.get("base"):
        config = LlamaConfig.from_pretrained(
            json.loads((run / "adapter_config.json").read_text())["base_model_name_or_path"]
        )
        config.hidden_size, config.intermediate_size = 16, 8
        if options["base"] == "QUANTISED":
            config.quantization_config = {"quant_method": "gptq", "bits": 4}
            config.save_pretrained(tmp_path / "base")
        else:
            LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
        options = {"base": str(tmp_path / "base")}
    output = run if options.pop("output", None) else tmp_path / "merged"
    with pytest.raises(UserError, match=message):
        merge(str(source), output, **options)
    assert not (tmp_path / "merged").exists()


def whole(place: Path) -> Path:
    (place / "config.json").write_text("{}")
    return place


def moved(run: Path, place: Path) -> Path:
    """The adapter alone, which names a base that is not here."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (place / name).write_bytes((run / name).read_bytes())
    config = json.loads((place / "adapter_config.json").read_text())
    (place / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/gone/base"}))
    return place
