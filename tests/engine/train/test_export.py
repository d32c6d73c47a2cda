"""The final model of a run: its folder describes what is in it, and loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from engine.config.schema import DataConfig, ModelConfig, RunConfig, TrainConfig
from engine.model import load_policy, load_tokenizer
from engine.model.companions import copy_companions, describe_trained
from engine.train.export import export_model, model_card
from engine.train.loop import train
from tests.conformance.families import tiny_config, tiny_model
from tests.engine.exported import plain_model


def export(model: ModelConfig, folder: Path, *, sharded: bool = False, **train: str):
    """Write the untrained model as a run does, and return what was loaded."""
    config = RunConfig(
        model=model, data=DataConfig(dataset_name="rows.jsonl"), train=TrainConfig(output_dir=str(folder), **train)
    )
    policy = load_policy(model, device=torch.device("cpu"))
    # Of one process, whose shards are the whole.
    policy.sharded = sharded
    tokenizer = load_tokenizer(model)
    describe_trained(policy.causal_lm, tokenizer)
    folder.mkdir(exist_ok=True)
    export_model(folder, policy, tokenizer, config, {})
    return policy


@pytest.fixture
def base(tiny_model_dir, tmp_path) -> Path:
    """A copy of the tiny model, to be changed."""
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "base"))


def edit(path: Path, **values) -> None:
    found = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(found | values))


@pytest.mark.parametrize("save_dtype", ["auto", "float32", "bfloat16"])
@pytest.mark.parametrize("sharded", [False, True])
def test_the_config_names_the_dtype_of_the_weights(sharded, save_dtype, tiny_model_dir, tmp_path):
    model = ModelConfig(model_name_or_path=str(tiny_model_dir), dtype="bfloat16")
    policy = export(model, tmp_path / "run", sharded=sharded, save_dtype=save_dtype)
    dtype = torch.bfloat16 if save_dtype == "bfloat16" else torch.float32
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run", dtype="auto")
    assert loaded.config.dtype == loaded.dtype == dtype
    trained = policy.causal_lm.state_dict()
    assert all(torch.equal(tensor, trained[name].to(dtype)) for name, tensor in loaded.state_dict().items())


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("family", ["deepseek_v3", "ernie4_5_moe"])
def test_what_a_model_keeps_in_float32_is_not_rounded(family, sharded, tiny_tokenizer, tmp_path):
    model = tiny_model(tiny_config(family))
    for name, tensor in model.state_dict().items():
        if "bias" in name or "gate.weight" in name:
            tensor += 5 + 1e-3 * torch.rand(tensor.shape)
    model.save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    config = ModelConfig(model_name_or_path=str(tmp_path / "base"))
    export(config, tmp_path / "run", sharded=sharded, save_dtype="bfloat16")
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16).state_dict()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "run").state_dict()
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16, torch.float32}
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert tensor.dtype == wanted[name].dtype, name
        assert torch.equal(tensor, wanted[name]), name


def test_embeddings_that_the_config_alone_ties_are_not_tied(tiny_model_dir, tiny_tokenizer, tmp_path):
    LlamaForCausalLM(LlamaConfig.from_pretrained(tiny_model_dir, tie_word_embeddings=True)).save_pretrained(
        tmp_path / "base"
    )
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    for name, tied in (("tied", True), ("untied", False)):
        if not tied:
            file = tmp_path / "base" / "model.safetensors"
            weights = load_file(file)
            weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1
            save_file(weights, file, {"format": "pt"})
        policy = export(ModelConfig(model_name_or_path=str(tmp_path / "base")), tmp_path / name)
        assert json.loads((tmp_path / name / "config.json").read_text())["tie_word_embeddings"] is tied
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert torch.equal(loaded.lm_head.weight, policy.causal_lm.lm_head.weight)
        assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied


def test_generation_settings_without_effect_are_no_obstacle(base, tmp_path):
    """A temperature without do_sample, which transformers does not save, and settings in config.json."""
    edit(base / "generation_config.json", temperature=0.6, top_p=0.9, eos_token_id=7)
    edit(base / "config.json", repetition_penalty=1.2)
    export(ModelConfig(model_name_or_path=str(base)), tmp_path / "run")
    found = GenerationConfig.from_pretrained(tmp_path / "run")
    assert (found.temperature, found.top_p, found.eos_token_id) == (0.6, 0.9, [2, 7])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert model.generate(torch.tensor([[5, 6]]), max_new_tokens=2).shape[1] > 2


def test_the_files_of_a_processor_come_along(base, tmp_path):
    files = {
        "preprocessor_config.json": {"image_seq_length": 16},
        "processor_config.json": {"processor_class": "Gemma3Processor"},
        "video_preprocessor_config.json": {"size": 3},
        "chat_template.json": {"chat_template": "an older form of what the tokenizer has"},
    }
    for name, content in files.items():
        edit(base / name, **content)
    export(ModelConfig(model_name_or_path=str(base)), tmp_path / "run")
    older = files.pop("chat_template.json")
    assert older
    for name in files:
        assert (tmp_path / "run" / name).read_bytes() == (base / name).read_bytes()
    assert not (tmp_path / "run" / "chat_template.json").exists()
    assert (tmp_path / "run" / "chat_template.jinja").exists()


def test_the_files_of_a_processor_on_the_hub_come_from_its_cache(tiny_model_dir, tmp_path, monkeypatch):
    snapshot = tmp_path / "hub" / "models--org--seeing" / "snapshots" / ("0" * 40)
    shutil.copytree(tiny_model_dir, snapshot)
    edit(snapshot / "preprocessor_config.json", image_seq_length=16)
    (snapshot / "modeling_mine.py").write_text("ONE = 1\n")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for trusted, names in (
        (False, {"preprocessor_config.json"}),
        (True, {"preprocessor_config.json", "modeling_mine.py"}),
    ):
        folder = tmp_path / str(trusted)
        folder.mkdir()
        copy_companions(ModelConfig(model_name_or_path="org/seeing", trust_remote_code=trusted), folder)
        assert {path.name for path in folder.iterdir()} == names


def test_a_composite_model_names_one_dtype_in_all_its_configs(tiny_tokenizer, tmp_path):
    config = tiny_config("gemma3")
    tiny_model(config).bfloat16().save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    model = ModelConfig(model_name_or_path=str(tmp_path / "base"))
    for save_dtype in ("float32", "bfloat16"):
        export(model, tmp_path / save_dtype, save_dtype=save_dtype)
        found = json.loads((tmp_path / save_dtype / "config.json").read_text())
        assert [found[k]["dtype"] if k else found["dtype"] for k in ("", "text_config", "vision_config")] == [
            save_dtype
        ] * 3
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / save_dtype)
        assert str(loaded.dtype) == f"torch.{save_dtype}"


def test_code_that_comes_with_a_model_comes_along(base, tmp_path):
    (base / "modeling_mine.py").write_text(
        "from transformers import LlamaForCausalLM\n"
        "from .configuration_mine import MineConfig\n\n\n"
        "class MineForCausalLM(LlamaForCausalLM):\n    config_class = MineConfig\n"
    )
    (base / "configuration_mine.py").write_text(
        "from transformers import LlamaConfig\n\n\nclass MineConfig(LlamaConfig):\n    model_type = 'mine'\n"
    )
    (base / "helpers_of_mine.py").write_text("ONE = 1\n")
    classes = {"AutoConfig": "configuration_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}
    edit(base / "config.json", model_type="mine", architectures=["MineForCausalLM"], auto_map=classes)
    policy = export(ModelConfig(model_name_or_path=str(base), trust_remote_code=True), tmp_path / "run")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run", trust_remote_code=True)
    assert type(loaded).__name__ == "MineForCausalLM"
    assert torch.equal(loaded.lm_head.weight, policy.causal_lm.lm_head.weight)
    assert {p.name for p in base.glob("*.py")} == {p.name for p in (tmp_path / "run").glob("*.py")}


def test_a_run_writes_the_template_and_the_tokens_that_it_trained_with(make_config, base, tmp_path):
    template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{{ eos_token }}{% endfor %}[assistant] "
    (tmp_path / "own.jinja").write_text(template)
    edit(base / "tokenizer_config.json", eos_token="<|user|>", pad_token=None)
    train(
        make_config(
            model={"model_name_or_path": str(base)},
            data={"chat_template": str(tmp_path / "own.jinja"), "max_rows": 12},
            train={"save_steps": 1, "max_steps": 2},
        )
    )
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoint-1"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.chat_template == template
        assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (4, 4)
        config = json.loads((folder / "config.json").read_text())
        assert (config["eos_token_id"], config["bos_token_id"], config["pad_token_id"]) == (4, 1, 4)
        generation = GenerationConfig.from_pretrained(folder)
        assert (generation.eos_token_id, generation.bos_token_id, generation.pad_token_id) == ([4, 2], 1, 4)


def test_the_folder_loads_as_a_pipeline(tiny_model_dir, tmp_path):
    from transformers import pipeline

    export(ModelConfig(model_name_or_path=str(tiny_model_dir)), tmp_path / "run")
    assert plain_model(tmp_path / "run", ModelConfig(model_name_or_path=str(tiny_model_dir))).dtype == torch.float32
    assert AutoTokenizer.from_pretrained(tmp_path / "run").chat_template
    said = pipeline("text-generation", model=str(tmp_path / "run"))([{"role": "user", "content": "Hi"}])
    assert said[0]["generated_text"][-1]["role"] == "assistant"


def test_no_part_of_an_earlier_model_stays(tiny_model_dir, tmp_path):
    model = ModelConfig(model_name_or_path=str(tiny_model_dir), dtype="float32")
    export(model, tmp_path / "run")
    written = {path.name for path in (tmp_path / "run").iterdir()}
    stale = {
        "model-00001-of-00002.safetensors",
        "pytorch_model.bin",
        "adapter_config.json",
        "added_tokens.json",
    } - written
    for name in (*stale, "notes.txt"):
        (tmp_path / "run" / name).write_text("{}")
    assert not stale & written
    export(model, tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").iterdir()} == written | {"notes.txt"}


@pytest.mark.parametrize(
    ("loss", "reference", "words"),
    [
        ("sigmoid", {}, "beta 0.1, the base model as reference\n"),
        ("simpo", {}, "beta 0.1, no reference model\n"),
        (
            "sigmoid",
            {"sync_ref_model": True},
            "the base model as reference, moved towards the trained model by 0.6 every 512 steps\n",
        ),
    ],
)
def test_the_card_says_what_the_reference_was(loss, reference, words, make_config):
    config = make_config(loss={"loss_type": loss}, reference=reference)
    assert words in model_card(SimpleNamespace(has_adapter=False), config, {})
