"""Python scripts with ``DPOTrainer``: read by their syntax tree, never run; what cannot be resolved is said by line."""

from __future__ import annotations

import pytest

from engine.errors import UserError

from .recipes import assert_stops, notes

HEAD = """
import torch
from datasets import load_dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import DPOConfig, DPOTrainer

raise SystemExit("never run")
"""
FILE = "train.py"
MINIMAL = HEAD + 'rows = load_dataset("d", split="train")\n'


def script(config: str = "", trainer: str = "", before: str = "", rows: str = "rows", model: str = '"m"') -> str:
    """A script with the given arguments; ``before`` stands ahead of them."""
    return (
        f"{MINIMAL}{before}\nargs = DPOConfig({config})\n"
        f"trainer = DPOTrainer(model={model}, args=args, train_dataset={rows}, {trainer})\ntrainer.train()\n"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (script("beta=0.3"), {"loss.beta": 0.3}),
        (script("learning_rate=RATE * 2", before="RATE = 1e-6"), {"optim.learning_rate": 2e-6}),
        (script("output_dir=f'runs/{NAME}'", before="NAME = 'x'"), {"train.output_dir": "runs/x"}),
        (script("**common, beta=0.2", before="common = dict(max_length=2048, seed=7)"),
         {"data.max_length": 2048, "train.seed": 7, "loss.beta": 0.2}),
        (script("loss_type=['sigmoid', 'sft'], loss_weights=[1, 0.5]"), {"loss.loss_type": ("sigmoid", "sft")}),
        (script("router_aux_loss_coef=0.01"), {"loss.router_aux_loss_coef": 0.01}),
        (script(trainer="beta=0.5, max_length=64"), {"loss.beta": 0.5, "data.max_length": 64}),
        (script(before="LIMIT = 100", rows="rows.shuffle(seed=1).select(range(LIMIT))"),
         {"data.dataset_train_split": "train[:100]"}),
        (script(before="rows = rows.rename_column('question', 'prompt')"), {"data.columns": {"prompt": "question"}}),
        (script(before="rows = load_dataset('json', data_files='x.jsonl', split='train')"),
         {"data.dataset_name": "x.jsonl"}),
        (script("eval_strategy='epoch'", before="sets = load_dataset('d')", rows="sets['train_prefs']",
                trainer="eval_dataset=sets['test_prefs']"),
         {"data.dataset_train_split": "train_prefs", "data.eval_dataset_split": "test_prefs"}),
        (script("eval_strategy='epoch'", before="parts = rows.train_test_split(test_size=0.1)", rows="parts['train']",
                trainer="eval_dataset=parts['test']"), {"data.eval_fraction": 0.1}),
        (script(before="parts = rows.train_test_split(test_size=0.1)", rows="parts['train']"),
         {"data.eval_fraction": 0.1}),
        (script(before="parts = rows.train_test_split(test_size=0.1)", trainer="eval_dataset=parts['test']"),
         {"data.eval_fraction": None}),
        (script(trainer="peft_config=lora", before="lora = LoraConfig(r=4, target_modules=['q_proj'])"),
         {"model.lora.r": 4, "model.lora.alpha": 8, "model.lora.target_modules": ("q_proj",)}),
        (script("eval_strategy='steps', eval_steps=5", before="sets = load_dataset('d')\n"
                "more = load_dataset('e', split='test')", rows="sets['train']",
                trainer="eval_dataset={'a': sets['test'], **dict(b=more)}"),
         {"data.eval_dataset_name": {"a": "d", "b": "e"}, "data.eval_dataset_split": {"a": "test", "b": "test"}}),
        (script("eval_strategy='steps', eval_steps=5, save_steps=10, load_best_model_at_end=True",
                trainer="eval_dataset=load_dataset('d', split='test'), callbacks=[Early(early_stopping_patience=N)]",
                before="N = 3\nEarly = transformers.EarlyStoppingCallback").replace("Early(", "EarlyStoppingCallback("),
         {"train.early_stopping_patience": 3, "train.load_best_model_at_end": True}),
        (script("eval_strategy='steps', eval_steps=5", trainer="eval_dataset=load_dataset('d', split='test')")
         + "trainer.add_callback(EarlyStoppingCallback(2, 0.01))\n",
         {"train.early_stopping_patience": 2, "train.early_stopping_threshold": 0.01}),
        (script(before="more = 7") + "setattr(args, 'max_length', 4096)\ntrainer.args.seed = more\nargs.beta = 0.4\n",
         {"data.max_length": 4096, "train.seed": 7, "loss.beta": 0.4}),
        (script(model="moe", before="moe = AutoModelForCausalLM.from_pretrained('m', output_router_logits=True)\n"
                "moe.config.router_aux_loss_coef = 0.02"), {"loss.router_aux_loss_coef": 0.02}),
        (script(model="moe", before="moe = AutoModelForCausalLM.from_pretrained('m', router_aux_loss_coef=0.03)"),
         {"loss.router_aux_loss_coef": 0.03}),
        (script(trainer="ref_model='m0'"), {"reference.model_name_or_path": "m0"}),
        (script(model="model", before="model = AutoModelForCausalLM.from_pretrained('m', dtype=torch.float32)\n"
                "model = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules='all-linear'))"),
         {"model.model_name_or_path": "m", "model.lora.r": 2, "model.lora.alpha": 4}),
        (script(model="model", before="base = AutoModelForCausalLM.from_pretrained('m')\n"
                "model = PeftModel.from_pretrained(base, 'out', is_trainable=True)"),
         {"model.model_name_or_path": "m", "model.adapter_name_or_path": "out"}),
        (script(model="model", trainer="peft_config=LoraConfig(r=4)", before="four = BitsAndBytesConfig(load_in_4bit="
                "True, bnb_4bit_quant_type='fp4', bnb_4bit_use_double_quant=True)\n"
                "model = AutoModelForCausalLM.from_pretrained('m', quantization_config=four)"),
         {"model.quantization": "fp4"}),
    ],
)  # fmt: skip
def test_arguments_are_followed_to_their_constants(run, text, expected):
    found = run(text)
    assert {key: found.get(key) for key in expected} == expected


def test_the_first_rows_of_a_random_order_are_other_rows(converted):
    for shuffle in ("", ".shuffle(seed=1)"):
        changed = notes(converted(script(rows=f"rows{shuffle}.select(range(9))")), "new")
        assert ("takes 9 rows of a random order there" in changed.get("train_dataset", "")) == bool(shuffle)


def test_a_script_of_unsloth(run):
    text = """
from unsloth import FastLanguageModel, PatchDPOTrainer, is_bfloat16_supported
from trl import DPOConfig, DPOTrainer
from datasets import load_dataset
PatchDPOTrainer()
max_seq_length = 2048
model, tokenizer = FastLanguageModel.from_pretrained(
    model_name="unsloth/zephyr-sft", max_seq_length=max_seq_length, dtype=None, load_in_4bit=True,
)
model = FastLanguageModel.get_peft_model(
    model, r=64, target_modules=["q_proj", "v_proj"], lora_alpha=64, lora_dropout=0, bias="none",
    use_gradient_checkpointing="unsloth", random_state=3407,
)
trainer = DPOTrainer(
    model=model,
    ref_model=None,
    args=DPOConfig(
        per_device_train_batch_size=2, gradient_accumulation_steps=4, warmup_ratio=0.1, num_train_epochs=3,
        learning_rate=5e-6, fp16=not is_bfloat16_supported(), bf16=is_bfloat16_supported(), optim="adamw_8bit",
        lr_scheduler_type="linear", seed=42, output_dir="outputs",
    ),
    beta=0.1,
    train_dataset=load_dataset("d")["train"],
    tokenizer=tokenizer,
    max_length=1024,
    max_prompt_length=512,
)
"""
    found = run(text)
    expected = {
        "model.model_name_or_path": "unsloth/zephyr-sft", "model.quantization": "nf4", "model.lora.r": 64,
        "model.lora.alpha": 64, "model.lora.target_modules": ("q_proj", "v_proj"), "optim.optimizer": "adamw_8bit",
        "packing.pairs_per_step": 8, "optim.learning_rate": 5e-6, "model.dtype": None, "data.dataset_name": "d",
    }  # fmt: skip
    assert {key: found.get(key) for key in expected} == expected


@pytest.mark.parametrize("guard", ["def main():\n{}\nmain()", "if __name__ == '__main__':\n{}", "with open('x'):\n{}"])
def test_names_inside_functions_and_blocks(run, guard):
    body = "\n".join("    " + line for line in script("beta=BETA", before="BETA = 0.7").splitlines())
    assert run(guard.format(body))["loss.beta"] == 0.7


def test_plain_training_arguments_have_other_defaults(run):
    text = script().replace("DPOConfig(", "TrainingArguments(output_dir='o'")
    found = run(text)
    assert found["optim.learning_rate"] == 5e-5
    assert found["model.dtype"] == "float32"
    assert "train.gradient_checkpointing" not in found
    # the same script with DPOConfig
    assert "optim.learning_rate" not in run(script())


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (script("beta=find_beta()"), ", line 11: beta: find_beta() is not a constant"),
        (script("learning_rate=opts.lr", before="import argparse\nparser = argparse.ArgumentParser()\n"
                "parser.add_argument('--lr', default=1e-6)\nopts = parser.parse_args()"),
         "learning_rate: opts.lr comes from the command line (its default in line 12 is 1e-06)"),
        (script("max_length=N", before="N = 512\nif torch:\n    N = 1024"),
         "line 13: max_length: N is set in line 12, under the condition of line 11"),
        (script("max_length=N", before="for N in (1, 2):\n    pass"), "max_length: N is not a constant"),
        (script(rows="load(3)"), "train_dataset: load(3) is not a constant"),
        (script(rows="concatenate_datasets([rows, rows])"), "train_dataset: concatenate_datasets joins several"),
        (script(trainer="peft_config=LoraConfig(r=4, target_modules=['q'], layers_to_transform=[0])"),
         "LoraConfig: layers_to_transform=[0] is not supported"),
        (script("eval_strategy='epoch'", trainer="eval_dataset=load_dataset('d')"),
         "all splits of d are meant; name one"),
        (script("eval_strategy='epoch'", trainer="eval_dataset=load_dataset('d', 'c', split='test')"),
         "d has the configuration c, and training data has another"),
        (script("eval_strategy='epoch'", before="parts = rows.train_test_split(test_size=0.1)", rows="parts['train']",
                trainer="eval_dataset={'a': parts['test'], 'b': rows}"), "one of several sets is split off"),
        (script("**given", before="given = {'beta': 0.2}\ngiven['max_length'] = 64"),
         "given is changed in line 11"),
        (script("**given", before="given = dict(seed=2)\ngiven.update(seed=6)"), "given is changed in line 11"),
        (script(trainer="peft_config=LoraConfig(r=4, target_modules=names)", before="names = ['q']\nnames.append('v')"),
         "lora_target_modules: names is changed in line 11"),
        (script() + "if torch:\n    args.beta = 0.4\n", "args.beta is set under the condition of line 14"),
        (script(before="rows = load_dataset('d', data_dir='x', split='train')"),
         "data_dir is not read; name the folder"),
        (script(trainer="peft_config=lora_of(x)"), "peft_config: lora_of(x) is not a constant"),
        (script(model="load()"), "model: load() is not a constant"),
        (script() + "DPOTrainer(model='m2')\n", "DPOTrainer is called in lines 12, 14; leave one of them"),
        (HEAD + "SFTTrainer(model='m')\n", "SFTTrainer in line 9 is not converted"),
        (HEAD + "parser = TrlParser((ScriptArguments, DPOConfig))\ns, args = parser.parse_args_and_config()\n"
         "DPOTrainer('m', args=args)\n", "where options come from a command line or a file, convert that"),
        ("def broken(:\n", ", line 1: no Python that can be read"),
    ],
)  # fmt: skip
def test_what_cannot_be_resolved_is_said_by_name_and_line(converted, text, part):
    assert_stops(converted, text, part, FILE)


def test_all_that_cannot_be_resolved_is_said_at_once(converted):
    with pytest.raises(UserError) as caught:
        converted(script("beta=a(), learning_rate=b(), run_name=c()", rows="d()"))
    assert [error.args[0].split(": ")[1] for error in caught.value.errors] == ["beta", "learning_rate", "train_dataset"]


def test_several_evaluation_sets_need_the_metric_of_one(converted):
    text = script(
        "eval_strategy='steps', eval_steps=5, load_best_model_at_end=True, run_name=stamp(), "
        "model_init_kwargs={'dtype': torch.bfloat16}",
        trainer="eval_dataset={'a': rows, 'b': rows}",
    )
    found = converted(text)
    assert found.values["train"]["metric_for_best_model"] == "a_loss"
    for given, chosen in (("eval_rewards/margins", "a_rewards/margins"), ("eval_b_loss", "eval_b_loss")):
        other = converted(text.replace("run_name=stamp()", f"metric_for_best_model='{given}'"))
        assert other.values["train"]["metric_for_best_model"] == chosen
    changed = notes(found, "new")
    assert "a_loss decides here" in changed["metric_for_best_model"]
    assert "model_init_kwargs.dtype" in changed
    assert notes(found, "told")["run_name"] == "line 11: stamp() is not a constant; set train.run_name"


def test_what_a_script_does_to_its_model_is_loud(converted):
    before = (
        "model = AutoModelForCausalLM.from_pretrained('m')\nmodel.resize_token_embeddings(9)\n"
        "model.config.use_cache = False\nmodel.config.rope_theta = 9\nfor p in model.layers:\n    p.requires_grad = 0\n"
    )
    changed = notes(converted(script(before=before, model="model")), "new")
    assert changed.keys() >= {"resize_token_embeddings", "model.config.rope_theta", "requires_grad"}
    assert "model.config.use_cache" not in changed


def test_what_is_not_run_is_loud(converted):
    changed = notes(
        converted(script(trainer="callbacks=[c]", before="rows = rows.map(f)\nrows = rows.filter(g)")), "new"
    )
    assert changed["callbacks"] == "line 13: c is not read"
    texts = [
        n.text for n in converted(script(before="rows = rows.map(f)\nrows = rows.filter(g)")).notes if n.effect == "new"
    ]
    assert [text.split(" is not run")[0] for text in texts] == ["line 10: .map(f)", "line 11: .filter(g)"]
