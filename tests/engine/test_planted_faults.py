"""One file of each layout with every fault that it can have: each is reported at its row, and nothing else is."""

from __future__ import annotations

import json

import pytest

from engine.check import check
from engine.config.schema import DataConfig, LossConfig, ModelConfig, PackingConfig, RunConfig
from engine.data.columns import layouts
from engine.data.held_out import TRAINED
from engine.data.problems import PROBLEMS

MAX_LENGTH, TOKENS_PER_PACK = 64, 90
REFUSING_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'function' %}{{ raise_exception('no functions') }}{% endif %}"
    "{% if m['role'] != 'tool' %}{{ '<|' + m['role'] + '|>' + m['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def turn(role, content):
    return {"role": role, "content": content}


def said(speaker, value):
    return {"from": speaker, "value": value}


def prompt_of(i):
    return f"Where does the river {i} go?"


def text(i, **changes):
    return {"prompt": prompt_of(i), "chosen": f" It goes to the sea {i}.", "rejected": f" No {i}."} | changes


def implicit(i, **changes):
    row = text(i)
    return {name: row["prompt"] + row[name] for name in ("chosen", "rejected")} | changes


def chat(i, **changes):
    row = text(i)
    sides = {name: [turn("assistant", row[name].strip())] for name in ("chosen", "rejected")}
    return {"prompt": [turn("user", row["prompt"])]} | sides | changes


def hh(i, question=None, chosen=None, rejected=None):
    start = f"\n\nHuman: {question or prompt_of(i)}\n\nAssistant:"
    sides = {"chosen": chosen, "rejected": rejected}
    return {name: start + (text(i)[name] if side is None else side) for name, side in sides.items()}


def sharegpt(i, **changes):
    row = text(i)
    sides = {name: said("gpt", row[name].strip()) for name in ("chosen", "rejected")}
    return {"conversations": [said("human", row["prompt"])]} | sides | changes


def kwise(i, **changes):
    return {"prompt": prompt_of(i), "responses": [f" No {i}.", f" Sea {i}."], "ranking": [2, 1]} | changes


def scored(i, **changes):
    return {
        "prompt": prompt_of(i),
        "responses": [f" No {i}.", f" Sea {i}.", f" To {i}."],
        "scores": [1, 9, 3],
    } | changes


def unpaired(i, **changes):
    return {"prompt": prompt_of(i), "completion": f" It goes to the sea {i}.", "label": i % 2 == 0} | changes


def ids(i, **changes):
    return {"prompt_ids": [40, 50 + i], "chosen_ids": [60, 61, 2], "rejected_ids": [70, 2]} | changes


SIDES = ("chosen", "rejected")
LONG = " the sea" * 90
HALF = " sea green" * 20
REPEATED = text(0)
TEXT_FAULTS = [
    (["missing_column"], {"prompt": "p", "chosen": "c", "reject": "r"}),
    (["null_value"], text(1, chosen=None)),
    (["wrong_type"], text(2, chosen=3)),
    (["has_images"], text(3, images=["a.png"])),
    (["bad_reference"], text(4, ref_chosen_logps=-1.0)),
    (["bad_weight"], text(4, weight=-1)),
    (["half_character"], text(5, chosen="x\ud83d")),
    (["empty_prompt"], text(6, prompt="  ")),
    (["prompt_too_long"], text(7, prompt=LONG)),
    (["empty_completion"], text(8, rejected=" ")),
    (["prompt_repeated"], text(9, chosen=prompt_of(9) + " To the sea.")),
    (["odd_roles"], text(18, chosen="\n\nHuman: Go on.\n\nAssistant: It is blue.")),
    (["control_token"], text(10, chosen=" It is <|user|> blue.")),
    (["damaged_text"], text(11, rejected=" caf\ufffd")),
    (["damaged_text"], text(12, prompt="Is it \x00 blue?")),
    (["whitespace_difference"], text(13, chosen=" It is  blue.", rejected=" It is blue.\n")),
    (["identical_completions"], text(14, chosen=" blue", rejected=" blue")),
    (["boundary_merge"], text(15, prompt="What is the se", chosen="a? blue", rejected="a? green")),
    (["truncated", "eos_lost"], text(16, chosen=LONG)),
    (["over_budget"], text(17, chosen=HALF, rejected=" No," + HALF)),
    (["duplicate"], text(0)),
    (["contradiction"], text(0, chosen=REPEATED["rejected"], rejected=REPEATED["chosen"])),
    (["broken_row"], b'{"prompt": "p", "chosen": '),
    (["broken_row"], b'{"prompt": "\xff"}'),
    (["broken_row"], b"[1]"),
]
FAULTS = {
    "text": (text, TEXT_FAULTS),
    "implicit text": (
        implicit,
        [
            (["missing_column"], {"chosen": "c"}),
            (["no_prompt_tokens"], {"chosen": "yes", "rejected": "no"}),
            (["whitespace_difference"], {"chosen": "What is it? It is a", "rejected": "What is it? Itis a"}),
            (["duplicate"], implicit(0)),
            (["contradiction"], {"chosen": implicit(0)["rejected"], "rejected": implicit(0)["chosen"]}),
        ],
    ),
    "messages": (
        chat,
        [
            (["missing_column"], {"prompt": [turn("user", "hi")], "chosen": [turn("assistant", "a")]}),
            (["null_value"], chat(1, rejected=None)),
            (["wrong_type"], chat(2, chosen=[])),
            (["wrong_type"], chat(2, tools="[{")),
            (["bad_turn"], chat(3, chosen=[{"text": "x"}])),
            (["bad_turn"], chat(4, chosen=[turn("assistant", None)])),
            (["bad_turn"], chat(4, prompt=[turn("user", 7)])),
            (["bad_turn"], chat(5, chosen=[said("narrator", "x")])),
            (["differing_prompts"], {s: [turn("user", s), turn("assistant", "a")] for s in ("chosen", "rejected")}),
            (["unread_column"], chat(40, instruction="Sing.")),
            (["unread_column"], {"prompt": "Sing.", **{s: [*chat(48)["prompt"], *chat(48)[s]] for s in SIDES}}),
            (["lost_reasoning"], chat(41, chosen=[turn("assistant", "sea") | {"reasoning_content": "to the"}])),
            (["lost_tool_calls"], chat(42, rejected=[turn("assistant", "sea") | {"tool_calls": [{"name": "go"}]}])),
            (["lost_tools"], chat(43, tools=[{"name": "clock"}])),
            (["lost_turn"], chat(44, prompt=[turn("user", "ab"), turn("assistant", "c"), turn("tool", "b")])),
            (["lost_field"], chat(45, chosen=[turn("assistant", "sea") | {"refusal": "I would rather not."}])),
            (["scores_reversed"], chat(60, chosen=[turn("assistant", "sea sea")], score_chosen="1", score_rejected=2)),
            (["template_refused"], chat(6, prompt=[turn("user", "a"), turn("function", "b")])),
            (["empty_prompt"], chat(7, prompt=[turn("user", " ")])),
            (["empty_completion"], chat(8, chosen=[turn("assistant", "")])),
            (["prompt_repeated", "boundary_merge"], chat(9, chosen=[*chat(9)["prompt"], turn("assistant", "sea")])),
            (["odd_roles"], chat(10, prompt=[turn("user", "Why?"), turn("user", "Tell me.")])),
            (["odd_roles"], chat(11, prompt=[turn("user", "Why?"), turn("assistant", "Because.")])),
            (["odd_roles"], chat(12, rejected=[turn("assistant", "yes"), turn("user", "no")])),
            (["odd_roles"], chat(13, prompt=[turn("user", "Why?"), turn("system", "Be kind.")])),
            (["odd_roles"], chat(14, prompt=[turn("narrator", "It rained.")])),
            (["control_token"], chat(15, prompt=[turn("user", "Go <|assistant|>on")])),
            (["damaged_text"], chat(16, chosen=[turn("assistant", "caf\ufffd")])),
            (["whitespace_difference"], chat(17, chosen=[turn("assistant", "No 17 .")])),
            (["identical_completions"], chat(18, chosen=chat(18)["rejected"])),
            (["truncated", "eos_lost"], chat(19, chosen=[turn("assistant", LONG)])),
            (["prompt_too_long"], chat(20, prompt=[turn("user", LONG)])),
            (["duplicate"], chat(0)),
            (["contradiction"], chat(0, chosen=chat(0)["rejected"], rejected=chat(0)["chosen"])),
        ],
    ),
    "hh": (
        hh,
        [
            (["missing_column"], {"chosen": hh(1)["chosen"]}),
            (["null_value"], hh(2) | {"chosen": None}),
            (["no_dialogue"], hh(3) | {"rejected": "No."}),
            (["bad_turn"], {"chosen": "\n\nAssistant: a", "rejected": "\n\nAssistant: b"}),
            (["differing_prompts"], hh(4) | {"rejected": hh(5)["rejected"]}),
            (["empty_completion"], hh(6, rejected=" ")),
            (["control_token"], hh(7, question="Go </s> on")),
            (["damaged_text"], hh(8, chosen=" caf\ufffd")),
            (["identical_completions"], hh(9, chosen=" yes", rejected=" yes")),
            (["whitespace_difference"], hh(10, chosen=" It is.", rejected=" It  is.")),
            (["truncated", "eos_lost"], hh(11, chosen=LONG)),
            (["prompt_too_long"], hh(12, question=LONG)),
            (["duplicate"], hh(0)),
            (["contradiction"], hh(0, chosen=text(0)["rejected"], rejected=text(0)["chosen"])),
        ],
    ),
    "sharegpt": (
        sharegpt,
        [
            (["missing_column"], {"conversations": [], "chosen": said("gpt", "a")}),
            (["null_value"], sharegpt(1, conversations=None)),
            (["wrong_type"], sharegpt(2, conversations="hi")),
            (["bad_turn"], sharegpt(3, conversations=[])),
            (["bad_turn"], sharegpt(4, chosen=said("narrator", "x"))),
            (["bad_turn"], sharegpt(5, rejected=said("gpt", None))),
            (["bad_turn"], sharegpt(6, rejected=[])),
            (["odd_roles"], sharegpt(7, conversations=[said("human", "a"), said("gpt", "b")])),
            (["odd_roles", "boundary_merge"], sharegpt(8, chosen=said("human", "a"))),
            (["control_token"], sharegpt(9, chosen=said("gpt", "Go </s> on"))),
            (["empty_completion"], sharegpt(10, chosen="")),
            (["duplicate"], sharegpt(0)),
            (["contradiction"], sharegpt(0, chosen=sharegpt(0)["rejected"], rejected=sharegpt(0)["chosen"])),
        ],
    ),
    "kwise": (
        kwise,
        [
            (["missing_column"], {"prompt": "p", "responses": ["a", "b"]}),
            (["null_value"], kwise(1, ranking=None)),
            (["wrong_type"], kwise(2, responses=["a", [turn("assistant", "b")]])),
            (["bad_turn"], kwise(3, prompt=[])),
            (["bad_ranking"], kwise(4, ranking=[1, 1])),
            (["bad_ranking"], kwise(5, ranking=[1, 2, 3])),
            (["bad_ranking"], kwise(6, responses=["a"], ranking=[1])),
            (["bad_ranking"], kwise(7, ranking=[1, "x"])),
            (["bad_reference"], kwise(8, ref_logps=[-1.0])),
            (["not_a_pair"], kwise(9, responses=[" a", " b", " c"], ranking=[1, 2, 3])),
            (["identical_completions"], kwise(10, responses=[" a", " a"])),
            (["duplicate"], kwise(0)),
            (["contradiction"], kwise(0, ranking=[1, 2])),
        ],
    ),
    "scored": (
        scored,
        [
            (["missing_column"], {"prompt": "p", "scores": [1, 2]}),
            (["missing_column"], scored(1, prompt=None)),
            (["bad_score"], scored(2, scores=[1, 2])),
            (["bad_score"], scored(3, scores=[1, 2, None])),
            (["bad_score"], scored(4, responses=[" a"], scores=[1])),
            (["bad_score"], scored(5, scores=None)),
            (["bad_turn"], scored(6, responses=[{"words": "a"}, " b", " c"])),
            (["no_scored_pair"], scored(7, scores=[2, 2, 2])),
            (["tied_scores"], scored(8, scores=[2, 1, 2])),
            (["has_images"], scored(9, images=["a.png"])),
            (["identical_completions"], scored(10, responses=[" a", " a", " b"])),
            (["duplicate"], scored(0)),
        ],
    ),
    "unpaired": (
        unpaired,
        [
            (["missing_column"], {"prompt": "p", "completion": " c"}),
            (["null_value"], unpaired(1, label=None)),
            (["bad_label"], unpaired(2, label="good")),
            (["bad_label"], unpaired(3, label=2)),
            (["bad_label"], unpaired(4, label=[True])),
            (["wrong_type"], unpaired(5, completion=3)),
            (["has_images"], unpaired(6, images=["a.png"])),
            (["bad_reference"], unpaired(7, ref_logps=[-1.0, -2.0])),
            (["empty_completion"], unpaired(8, completion=" ")),
            (["empty_prompt"], unpaired(9, prompt=" ")),
            (["prompt_repeated"], unpaired(10, completion=prompt_of(10) + " To the sea.")),
            (["truncated", "eos_lost"], unpaired(11, completion=LONG)),
            (["prompt_too_long"], unpaired(12, prompt=LONG)),
            (["labels_reversed"], unpaired(14, score=1.0)),
            (["labels_reversed"], unpaired(15, score=2)),
            (["duplicate"], unpaired(0)),
            (["contradiction"], unpaired(0, label=False)),
        ],
    ),
    "tokenized": (
        ids,
        [
            (["nothing_counts"], ids(45, mask=[[1, 1, 1], [0, 0]])),
            (["bad_weight"], ids(46, mask=[[1, 1, 1], [0]])),
            (["missing_column"], {"prompt_ids": [5], "chosen_ids": [6]}),
            (["null_value"], ids(1, chosen_ids=None)),
            (["wrong_type"], ids(2, chosen_ids="text")),
            (["wrong_type"], ids(3, chosen_ids=[1.5])),
            (["unknown_token_id"], ids(4, chosen_ids=[9999, 2])),
            (["no_prompt_tokens"], ids(5, prompt_ids=[])),
            (["no_completion_tokens"], ids(6, rejected_ids=[])),
            (["double_eos"], ids(40, chosen_ids=[60, 2, 2])),
            (["eos_inside"], ids(41, rejected_ids=[60, 2, 61, 2])),
            (["empty_completion"], ids(7, rejected_ids=[2])),
            (["double_bos"], ids(8, prompt_ids=[1, 1, 40])),
            (["missing_eos"], ids(9, chosen_ids=[60, 61])),
            (["other_end"], ids(47, chosen_ids=[60, 3])),
            (["identical_completions"], ids(10, chosen_ids=[70, 2])),
            (["truncated", "eos_lost"], ids(11, chosen_ids=[60] * 70 + [2])),
            (["prompt_too_long"], ids(12, prompt_ids=[60] * 70)),
            (["over_budget"], ids(13, chosen_ids=[60] * 58 + [2], rejected_ids=[61] * 58 + [2])),
            (["duplicate"], ids(0)),
            (["contradiction"], ids(0, chosen_ids=[70, 2], rejected_ids=[60, 61, 2])),
        ],
    ),
}


def plant(good, faults):
    """Rows with a good one before each fault and two at the end; the rows of each problem."""
    rows, expected = [good(0)], {}
    for number, (problems, row) in enumerate(faults):
        rows += [row, good(30 + number)]
        for problem in problems:
            expected.setdefault(problem, []).append(len(rows) - 2)
    return rows, expected


def encode(row):
    return row if isinstance(row, bytes) else json.dumps(row).encode()


def run_check(folder, tokenizer, path, **loss):
    tokenizer.save_pretrained(folder)
    return check(
        RunConfig(
            model=ModelConfig(model_name_or_path=str(folder)),
            data=DataConfig(dataset_name=str(path), max_length=MAX_LENGTH),
            packing=PackingConfig(tokens_per_pack=TOKENS_PER_PACK),
            loss=LossConfig(**loss),
        )
    )


def found(checked):
    report = checked.reports["train"]
    return {name: report.rows(name) for name in report.counts}


@pytest.mark.parametrize("layout", FAULTS)
def test_every_fault_is_reported_at_its_row_and_nothing_else_is(layout, make_tokenizer, tmp_path):
    rows, expected = plant(*FAULTS[layout])
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(map(encode, rows)))
    template = REFUSING_TEMPLATE if layout in ("messages", "hh", "sharegpt") else None
    loss = {"loss_type": "kto"} if layout == "unpaired" else {}
    checked = run_check(tmp_path, make_tokenizer(chat_template=template), path, **loss)
    assert found(checked) == expected
    report = checked.reports["train"]
    stopping = {row for name, at in expected.items() for row in at if PROBLEMS[name].stops}
    dropped = {row for name, at in expected.items() for row in at if PROBLEMS[name].drops}
    assert (report.total, report.stopping, report.dropped) == (len(rows), len(stopping), len(dropped))
    assert report.kept == len(rows) - len(stopping) - len(dropped)
    assert f"{len(stopping)} of {len(rows)} rows cannot be used" in checked.obstacles[0]
    assert len(checked.text.splitlines()) < 20 + 3 * len(expected)


def test_every_problem_is_planted_somewhere():
    planted = {problem for _, faults in FAULTS.values() for problems, _ in faults for problem in problems}
    # Labels that are all alike are in test_unpaired, rankings of scored completions in test_scored, embeddings and
    # rows for another loss in test_check, what is trained on in test_held_out.
    assert planted | {"no_chat_template", "one_label", "unpaired", "tied_ranking", "beyond_embedding", *TRAINED} == set(
        PROBLEMS
    )


def test_elements_of_an_array(make_tokenizer, tmp_path):
    faults = [(p, [1] if row == b"[1]" else row) for p, row in TEXT_FAULTS if row == b"[1]" or isinstance(row, dict)]
    rows, expected = plant(text, faults)
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows, indent=1))
    assert found(run_check(tmp_path, make_tokenizer(), path)) == expected


def test_rows_before_damage_are_reported_and_the_damage_is_named(make_tokenizer, tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([text(0), text(0), text(1)])[:-20])
    checked = run_check(tmp_path, make_tokenizer(), path)
    assert found(checked) == {"duplicate": [1]}
    assert checked.obstacles[0].startswith(f"reading ended after 2 rows: {path}, line 1: broken JSON: Unterminated")


def test_first_row_without_columns_does_not_hide_the_layout(make_tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(map(encode, [{"question": "q"}, text(1), b"{", text(2)])))
    checked = run_check(tmp_path, make_tokenizer(), path)
    assert found(checked) == {"broken_row": [2], "missing_column": [0]}
    assert "the first: " + f"{path}, row 0 (line 1): no known layout has the columns question" in checked.text
    assert layouts() in checked.text


def test_messages_among_texts_without_a_template(make_tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(map(encode, [text(0), chat(1), text(2)])))
    assert found(run_check(tmp_path, make_tokenizer(), path)) == {"no_chat_template": [1]}


def test_beginning_of_sequence_that_the_tokenizer_and_the_text_both_write(bos_tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [text(0), text(1, prompt="<s>" + prompt_of(1)), text(2, prompt="")]
    path.write_bytes(b"\n".join(map(encode, rows)))
    assert found(run_check(tmp_path, bos_tokenizer, path)) == {"empty_prompt": [2], "double_bos": [1]}


def test_rankings_are_copies_and_contradictions_by_their_pairs(make_tokenizer, tmp_path):
    three = [" a", " b", " c"]
    rows = [
        kwise(0, responses=three, ranking=[1, 2, 3]),
        kwise(0, responses=three[::-1], ranking=[3, 2, 1]),
        kwise(0, responses=[" c", " a"], ranking=[1, 2]),
        kwise(0, responses=[" a", " c"], ranking=[1, 2]),
    ]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(map(encode, rows)))
    checked = run_check(tmp_path, make_tokenizer(), path, loss_type="plackett_luce")
    assert found(checked) == {"duplicate": [1], "contradiction": [2, 3]}


def test_shared_data_has_no_faults_but_its_own(shared_dir):
    expected = {
        # Its answers that begin with " Human:" are real.
        "hh-harmless-test.jsonl.gz": {
            "differing_prompts": 1,
            "empty_completion": 4,
            "odd_roles": 19,
            "truncated": 2,
            "eos_lost": 2,
        },
        "dpo-en-demo.json": {
            "prompt_too_long": 48,
            "identical_completions": 1,
            "truncated": 68,
            "eos_lost": 68,
            "duplicate": 3,
        },
    }
    for name, counts in expected.items():
        model = ModelConfig(model_name_or_path=str(shared_dir / "models" / "tiny-chat-llama"))
        data = DataConfig(dataset_name=str(shared_dir / "data" / name), max_rows=1400)
        checked = check(RunConfig(model=model, data=data))
        assert checked.reports["train"].counts == counts
        assert not checked.obstacles
