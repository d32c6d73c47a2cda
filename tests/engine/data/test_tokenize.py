"""Token ids: equal to TRL's on the same rows, and what lint finds in them."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config.schema import DataConfig
from engine.data.columns import detect_format
from engine.data.examples import Example
from engine.data.formats import reader_for
from engine.data.groups import PreferenceDataset
from engine.data.lint import LintReport
from engine.data.make_groups import make_groups
from engine.data.sources import Row
from engine.data.tokenize import Encoder, common_prefix_length
from engine.errors import UserError


def groups_of(rows, tokenizer, *, max_length=None, **data):
    """All groups and the report for rows given as dicts."""
    encoder = Encoder(tokenizer, DataConfig(dataset_name="unused", **data))
    sources = [Row(index, row, "f.jsonl") for index, row in enumerate(rows)]
    read = reader_for(detect_format(sources[0]), use_messages=encoder.use_messages)
    report = LintReport("f.jsonl")
    for _ in sources:
        report.add_row()
    return list(make_groups(map(read, sources), encoder, max_length=max_length, report=report)), report


def turn(role, content):
    return {"role": role, "content": content}


def trl_ids(rows, tokenizer, max_length):
    """(prompt ids, chosen ids, rejected ids) of TRL's preparation and truncation, for the rows that it keeps."""
    datasets = pytest.importorskip("datasets")
    dpo = pytest.importorskip("trl.trainer.dpo_trainer")
    arguments = SimpleNamespace(dataset_num_proc=None, max_length=max_length, truncation_mode="keep_start")
    prepared = dpo.DPOTrainer._prepare_dataset(
        SimpleNamespace(_tokenizer=tokenizer), datasets.Dataset.from_list(rows), tokenizer, arguments, "train"
    )
    collate = dpo.DataCollatorForPreference(pad_token_id=0, max_length=max_length)
    result = []
    for row in prepared:
        batch = collate([row])
        sides = []
        for ids, attended, completion in zip(
            batch["input_ids"], batch["attention_mask"].bool(), batch["completion_mask"].bool(), strict=True
        ):
            sides.append(ids[completion & attended].tolist())
            prompt = ids[attended & ~completion].tolist()
        result.append((prompt, *sides))
    return result


def our_ids(rows, tokenizer, max_length):
    groups, _ = groups_of(rows, tokenizer, max_length=max_length)
    return [(g.prompt_ids.tolist(), *(ids.tolist() for ids in g.response_ids)) for g in groups]


STRINGS = [
    {"prompt": "What colour is the sky?", "chosen": " It is blue.", "rejected": " It is green, and the sea is red."},
    {"prompt": "The lamp is on the tab", "chosen": "le.</s>", "rejected": "le and under it."},
    {"prompt": "Where does the river go? " * 9, "chosen": "To the sea.", "rejected": "It does not."},
    {"prompt": "Where does the river go?" * 12, "chosen": "To the sea. " * 9, "rejected": "No."},
    {"prompt": "", "chosen": "yes", "rejected": "no"},
    {"prompt": "\u4e16\u754c ", "chosen": "\u00e9t\u00e9", "rejected": ""},
]
CHATS = [
    {
        "prompt": [turn("system", "Be kind."), turn("user", "Where does the river go?")],
        "chosen": [turn("assistant", "It goes to the sea.")],
        "rejected": [turn("assistant", "I cannot help with that." * 5)],
    },
    {
        "prompt": [turn("user", "hi"), turn("assistant", "hello"), turn("user", "Tell me about the house. " * 6)],
        "chosen": [turn("assistant", "old"), turn("user", "how old?"), turn("assistant", "very")],
        "rejected": [turn("assistant", "")],
    },
]


@pytest.mark.parametrize("max_length", [None, 64, 24])
@pytest.mark.parametrize("fixture", ["tiny_tokenizer", "bos_tokenizer"])
@pytest.mark.parametrize("kind", ["strings", "implicit strings", "chats", "implicit chats"])
def test_ids_equal_those_of_trl(request, kind, fixture, max_length):
    rows = CHATS if "chats" in kind else STRINGS
    if kind.startswith("implicit"):
        names = ("chosen", "rejected")
        rows = [{name: row["prompt"] + row[name] for name in names} for row in rows if row["prompt"]]
    tokenizer = request.getfixturevalue(fixture)
    theirs = trl_ids(rows, tokenizer, max_length)
    assert len(theirs) > 1 or max_length == 24
    # A prompt without any token cannot be trained on here: nothing predicts the first completion token.
    assert our_ids(rows, tokenizer, max_length) == [ids for ids in theirs if ids[0]]


def test_template_arguments_and_tools_reach_the_template_as_in_trl(make_tokenizer):
    template = (
        "{% if tools %}[{{ tools[0]['name'] }}]{% endif %}{% if loud %}!{% endif %}"
        "{% for m in messages %}{{ m['role'] + ':' + m['content'] + eos_token }}{% endfor %}"
    )
    tokenizer = make_tokenizer(chat_template=template)
    rows = [
        CHATS[0] | {"tools": '[{"name": "clock"}]', "chat_template_kwargs": {"loud": True}},
        CHATS[1] | {"tools": None, "chat_template_kwargs": {"loud": False}},
    ]
    ours = our_ids(rows, tokenizer, None)
    assert ours == trl_ids(rows, tokenizer, None)
    assert tokenizer.decode(ours[0][0]).startswith("[clock]!system:")


def test_ids_equal_those_of_trl_on_real_dialogues(shared_dir):
    import gzip
    import json

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared_dir / "models" / "tiny-chat-llama")
    with gzip.open(shared_dir / "data" / "hh-harmless-test.jsonl.gz", "rt") as stream:
        rows = [json.loads(next(stream)) for _ in range(60)]
    explicit = []
    for row in rows:
        prompt = row["chosen"][: row["chosen"].rindex("\n\nAssistant:") + len("\n\nAssistant:")]
        explicit.append({"prompt": prompt} | {name: text[len(prompt) :] for name, text in row.items()})
    theirs = trl_ids(explicit, tokenizer, 200)
    assert our_ids(explicit, tokenizer, 200) == theirs
    groups, _ = groups_of(rows, tokenizer, max_length=200, chat_template="none")
    assert [(g.prompt_ids.tolist(), *(ids.tolist() for ids in g.response_ids)) for g in groups] == theirs


words = st.text(alphabet=st.sampled_from("the seaT?. \n\u00e9\u4e16</>"), max_size=24)


@settings(max_examples=150)
@given(
    prompt=words,
    completions=st.lists(words, min_size=2, max_size=4),
    max_length=st.one_of(st.none(), st.integers(2, 30)),
    bos=st.booleans(),
)
def test_prompt_plus_response_is_the_joint_tokenisation_cut(
    plain_tokenizer, bos_tokenizer, prompt, completions, max_length, bos
):
    tokenizer = bos_tokenizer if bos else plain_tokenizer
    encoder = Encoder(tokenizer, DataConfig(dataset_name="unused"))
    report = LintReport("f")
    report.add_row()
    example = Example(0, "f, row 0", "text", prompt, tuple(completions))
    groups = list(make_groups([example], encoder, max_length=max_length, report=report))
    joint = [tokenizer(prompt + c + ("" if c.endswith("</s>") else "</s>"))["input_ids"] for c in completions]
    if not groups:
        assert report.dropped == 1
        return
    (group,) = groups
    for ids, expected in zip(group.response_ids, joint, strict=True):
        assert [*group.prompt_ids, *ids] == expected[:max_length]
        assert ids.dtype == group.prompt_ids.dtype == np.int32
        assert len(ids) > 0
    alone = tokenizer(prompt)["input_ids"]
    assert group.prompt_ids.tolist() == alone[: len(group.prompt_ids)]
    assert ("boundary_merge" in report.counts) == (len(group.prompt_ids) < len(alone))


def test_common_prefix_length():
    assert common_prefix_length([1, 2, 3], [1, 2, 3, 4]) == 3
    assert common_prefix_length([1, 2, 3], [1, 2]) == 2
    assert common_prefix_length([1, 2, 3], [1, 9, 3]) == 1
    assert common_prefix_length([], [1]) == 0


def test_many_rows_pass_through_calls_of_bounded_size(monkeypatch, plain_tokenizer):
    rows = [{"prompt": f"row {i}", "chosen": " a" * (i % 5 + 1), "rejected": " b"} for i in range(25)]
    whole, _ = groups_of(rows, plain_tokenizer)
    monkeypatch.setattr("engine.data.make_groups.ROWS_PER_CALL", 4)
    parts, _ = groups_of(rows, plain_tokenizer)
    for one, other in zip(whole, parts, strict=True):
        assert one.row == other.row
        assert np.array_equal(one.prompt_ids, other.prompt_ids)
        assert all(map(np.array_equal, one.response_ids, other.response_ids))


def test_dataset_returns_the_groups_it_was_built_from(plain_tokenizer):
    rows = [
        {"prompt": f"p {i}", "responses": [" a" * (j + 1) for j in range(i + 2)], "ranking": list(range(i + 2, 0, -1))}
        | ({"ref_logps": [-float(j) for j in range(i + 2)]} if i else {})
        for i in range(3)
    ]
    groups, _ = groups_of(rows, plain_tokenizer)
    dataset = PreferenceDataset(iter(groups))
    assert len(dataset) == 3
    for group, back, sizes in zip(groups, dataset, dataset.lengths, strict=True):
        assert np.array_equal(group.prompt_ids, back.prompt_ids)
        assert all(map(np.array_equal, group.response_ids, back.response_ids))
        assert (group.row, group.ref_logps) == (back.row, back.ref_logps)
        assert sizes.tolist() == [len(group.prompt_ids), *map(len, group.response_ids)]
    assert dataset[-1].ref_logps == (-3.0, -2.0, -1.0, 0.0)
    with pytest.raises(IndexError):
        dataset[3]


PAIR = {"prompt": "What is the sea?", "chosen": " It is blue.", "rejected": " It is green."}


def test_text_needs_eos(make_tokenizer):
    with pytest.raises(UserError, match=r"f\.jsonl, row 0: the tokenizer has no EOS token .* tokenizer_config\.json"):
        groups_of([PAIR], make_tokenizer(eos=False))


@pytest.mark.parametrize("chat_template", ["auto", "none"])
def test_messages_need_a_template(plain_tokenizer, tiny_tokenizer, chat_template):
    tokenizer = plain_tokenizer if chat_template == "auto" else tiny_tokenizer
    with pytest.raises(UserError, match=r"f\.jsonl, row 0: .*no chat template is in use.*set data\.chat_template"):
        groups_of(CHATS, tokenizer, chat_template=chat_template)


def test_sharegpt_needs_a_template(plain_tokenizer):
    said = {"from": "human", "value": "hi"}
    row = {"conversations": [said], "chosen": said | {"from": "gpt"}, "rejected": {"from": "gpt", "value": "no"}}
    with pytest.raises(UserError, match=r"set data\.chat_template to a Jinja file"):
        groups_of([row], plain_tokenizer)


def test_template_from_a_file(tmp_path, plain_tokenizer):
    path = tmp_path / "chat.jinja"
    path.write_text("{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}")
    groups, _ = groups_of(CHATS[:1], plain_tokenizer, chat_template=str(path))
    assert plain_tokenizer.decode(groups[0].prompt_ids) == "Be kind.</s>Where does the river go?</s>"
    with pytest.raises(UserError, match=r"absent\.jinja cannot be read: No such file"):
        Encoder(plain_tokenizer, DataConfig(dataset_name="unused", chat_template=str(tmp_path / "absent.jinja")))


def test_template_that_refuses_a_row_names_it(make_tokenizer):
    template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{{ m['content'] }}{% endfor %}"
    )
    with pytest.raises(UserError, match=r"row 0: the chat template does not accept this row: System role not supp"):
        groups_of(CHATS[:1], make_tokenizer(chat_template=template))
    with pytest.raises(UserError, match="row 0: the chat template does not accept this row"):
        groups_of(CHATS[:1], make_tokenizer(chat_template="{% for m in messages %}"))


def test_hh_dialogues_follow_the_template_setting(tiny_tokenizer):
    start = "\n\nHuman: hi\n\nAssistant:"
    rows = [{"chosen": start + " yes", "rejected": start + " no"}]
    chat, _ = groups_of(rows, tiny_tokenizer)
    plain, _ = groups_of(rows, tiny_tokenizer, chat_template="none")
    assert tiny_tokenizer.decode(chat[0].prompt_ids) == "<|user|>hi</s><|assistant|>"
    assert tiny_tokenizer.decode(chat[0].response_ids[0]) == "yes</s>"
    assert tiny_tokenizer.decode(plain[0].prompt_ids) == start
    assert tiny_tokenizer.decode(plain[0].response_ids[0]) == " yes</s>"


def test_tokenized_rows_are_taken_as_they_are_and_cut(plain_tokenizer):
    rows = [{"prompt_ids": [5, 6], "chosen_ids": [7, 8, 9, 2], "rejected_ids": [7, 2]}]
    groups, report = groups_of(rows, plain_tokenizer, max_length=5)
    assert groups[0].prompt_ids.tolist() == [5, 6]
    assert [ids.tolist() for ids in groups[0].response_ids] == [[7, 8, 9], [7, 2]]
    assert report.counts == {"truncated": 1, "eos_lost": 1}
    with pytest.raises(UserError, match=r"row 0: token id 9999 is outside the tokenizer's 400 tokens"):
        groups_of([rows[0] | {"chosen_ids": [9999]}], plain_tokenizer)


def test_tokenizer_that_builds_conversations_itself(plain_tokenizer):
    class OwnChat(type(plain_tokenizer)):
        def apply_chat_template(self, messages, *, tokenize, return_dict, **kwargs):
            assert tokenize
            assert return_dict
            return {"input_ids": [10 + len(m["content"]) for m in messages]}

    tokenizer = OwnChat(tokenizer_object=plain_tokenizer.backend_tokenizer, eos_token="</s>")
    row = {"prompt": [turn("user", "abc")], "chosen": [turn("assistant", "a")], "rejected": [turn("assistant", "")]}
    groups, _ = groups_of([row], tokenizer)
    assert [groups[0].prompt_ids.tolist(), *(ids.tolist() for ids in groups[0].response_ids)] == [[13], [11], [10]]


def test_a_tokenizer_with_modes_takes_answers_in_the_one_for_them(plain_tokenizer, monkeypatch):
    class RefusedError(Exception):
        pass

    class Modes(type(plain_tokenizer)):
        """As transformers' backend for mistral-common."""

        def __init__(self, tokenizer_path=None, mode="test"):
            type(self).added_tokens_decoder = type(plain_tokenizer).added_tokens_decoder
            super().__init__(tokenizer_object=plain_tokenizer.backend_tokenizer, eos_token="</s>")
            self._tokenizer_path, self.mode = tokenizer_path, mode
            # There it is a method that raises.
            type(self).added_tokens_decoder = lambda tokenizer: tokenizer.nothing

        def apply_chat_template(self, messages, *, tokenize, return_dict, **kwargs):
            if messages[0]["content"] == "odd" or (messages[-1]["role"] == "assistant") != (self.mode == "finetuning"):
                raise RefusedError("Expected last role\nAssistant")
            return {"input_ids": [10 + len(m["content"]) for m in messages]}

    row = {"prompt": [turn("user", "abc")], "chosen": [turn("assistant", "a")], "rejected": [turn("assistant", "")]}
    groups, _ = groups_of([row], Modes("tekken.json"))
    assert [groups[0].prompt_ids.tolist(), *(ids.tolist() for ids in groups[0].response_ids)] == [[13], [11], [10]]
    library = SimpleNamespace(MistralCommonException=RefusedError)
    monkeypatch.setitem(sys.modules, "mistral_common.exceptions", library)
    with pytest.raises(UserError, match="row 0: the chat template does not accept this row: Expected last role Assist"):
        groups_of([row | {"prompt": [turn("user", "odd")]}], Modes("tekken.json"))


def test_planted_faults_are_found_by_row(bos_tokenizer):
    good = {"prompt": "What is the sea?", "chosen": " It is blue.", "rejected": " It is green."}
    rows = [
        good,
        good | {"chosen": " "},  # 1
        good | {"rejected": good["chosen"]},  # 2
        good | {"prompt": "What is the se", "chosen": "a? blue", "rejected": "a? green"},  # 3
        good | {"prompt": "<s>What is the sky?"},  # 4
        good | {"prompt": "Where is the river?", "chosen": " sea" * 60},  # 5
        good | {"prompt": "the sea " * 40},  # 6
        dict(good),  # 7
        good | {"prompt": "Tell me.", "chosen": " sea" * 60 + " a", "rejected": " sea" * 60 + " b"},  # 8
    ]
    groups, report = groups_of(rows, bos_tokenizer, max_length=48)
    assert {name: report.rows(name) for name in report.counts} == {
        "prompt_too_long": [6],
        "empty_completion": [1],
        "identical_completions": [2, 8],
        "boundary_merge": [3],
        "double_bos": [4],
        "truncated": [5, 8],
        "eos_lost": [5, 8],
        "duplicate": [7],
    }
    assert (report.total, report.kept, report.dropped) == (9, 8, 1)
    assert [group.row for group in groups] == [0, 1, 2, 3, 4, 5, 7, 8]


def test_faults_of_templates_and_ids(make_tokenizer, plain_tokenizer):
    no_eos = make_tokenizer(chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}")
    row = {"prompt": [turn("user", "hi!")], "chosen": [turn("assistant", "a")], "rejected": [turn("assistant", " ")]}
    _, report = groups_of([row], no_eos)
    assert report.counts == {"empty_completion": 1, "missing_eos": 1}
    ended_by_newline = make_tokenizer(
        chat_template="{% for m in messages %}{{ m['content'] + eos_token + '\n' }}{% endfor %}"
    )
    _, report = groups_of([row], ended_by_newline)
    assert report.counts == {"empty_completion": 1}
    rows = [
        {"prompt_ids": [], "chosen_ids": [5, 2], "rejected_ids": [6, 2]},
        {"prompt_ids": [1], "chosen_ids": [], "rejected_ids": [6, 2]},
        {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [6, 2]},
        {"prompt_ids": [1], "chosen_ids": [1, 7, 2], "rejected_ids": [6]},
    ]
    _, report = groups_of(rows, plain_tokenizer)
    assert {name: report.rows(name) for name in report.counts} == {
        "no_prompt_tokens": [0],
        "no_completion_tokens": [1],
        "empty_completion": [2],
        "double_bos": [3],
        "missing_eos": [3],
    }


@pytest.mark.parametrize("side", ["prompt", "chosen"])
def test_half_a_character_names_its_row(side, tiny_tokenizer):
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    with pytest.raises(UserError, match=r"f\.jsonl, row 1: the text holds half of a surrogate pair"):
        groups_of([row, row | {side: "x\ud83d"}], tiny_tokenizer)
