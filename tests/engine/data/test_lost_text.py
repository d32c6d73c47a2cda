"""Text that a chat template leaves out is named by row and field; what it writes in another form is not lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.config.schema import DataConfig
from engine.data.lint import LintReport
from engine.data.make_groups import make_groups
from engine.data.problems import LOST
from engine.data.rows import RowReader
from engine.data.sources import Row
from engine.data.tokenize import Encoder
from engine.errors import UserError
from tests.engine.data.layout_rows import CALL, CALLING, PAIR, TOOL_PAIR, TOOLS, reply, system, user

CONTENT = "{{ '<|' + m['role'] + '|>' + (m['content'] or '') + eos_token }}"
ALL = "{% for m in messages %}" + CONTENT + "{% endfor %}"
ANSWERS = "{% for m in messages %}{% if m['role'] in ('user', 'assistant') %}" + CONTENT + "{% endif %}{% endfor %}"
AFTER_THOUGHT = (
    "{% for m in messages %}{% set c = m['content'].split('</think>')[-1] %}"
    "{{ '<|' + m['role'] + '|>' + c + eos_token }}{% endfor %}"
)
CUT = "{% for m in messages %}{{ m['content'][:12] + eos_token }}{% endfor %}"
THINKING = {"role": "assistant", "content": "4", "reasoning_content": "2 and 2"}


def groups_of(tokenizer, *rows, tolerant=False, **data):
    config = DataConfig(dataset_name="rows.jsonl", **data)
    encoder, report = Encoder(tokenizer, config), LintReport("rows.jsonl", tolerant=tolerant, counted=counted(config))
    read = RowReader(config, use_messages=encoder.use_messages)
    for _ in rows:
        report.add_row()
    examples = [read(Row(i, row, "rows.jsonl")) for i, row in enumerate(rows)]
    return list(make_groups(examples, encoder, max_length=None, report=report)), report


def counted(config):
    return LOST if config.lost_text == "count" else frozenset()


@pytest.mark.parametrize(
    ("template", "row", "problem", "place"),
    [
        (ALL, PAIR | {"chosen": [THINKING]}, "lost_reasoning", "chosen[0].reasoning_content"),
        # The answer alone would be found in the prompt.
        (ALL, PAIR | {"prompt": [user("2 and 2: 4?")], "rejected": [THINKING]}, "lost_reasoning",
         "rejected[0].reasoning_content"),
        (AFTER_THOUGHT, PAIR | {"chosen": [reply("<think>\n2 and 2\n</think>\n\n4")]}, "lost_reasoning",
         "chosen[0].content (the reasoning)"),
        (ALL, {k: v for k, v in TOOL_PAIR.items() if k != "tools"}, "lost_tool_calls", "prompt[1].tool_calls"),
        (ALL, PAIR | {"prompt": [user("clock Oslo?")], "chosen": [CALLING]}, "lost_tool_calls", "chosen[0].tool_calls"),
        (ALL, PAIR | {"tools": TOOLS}, "lost_tools", "tools"),
        (ANSWERS, PAIR | {"prompt": [{"role": "developer", "content": "a"}, user("a?")]}, "lost_turn",
         "prompt[0].content"),
        (ANSWERS, PAIR | {"prompt": [system("river"), *PAIR["prompt"]]}, "lost_turn", "prompt[0].content"),
        (ANSWERS, PAIR | {"prompt": [user("when?"), reply("wait"), {"role": "tool", "content": "noon"}]}, "lost_turn",
         "prompt[2].content"),
        (CUT, PAIR, "lost_turn", "prompt[0].content"),
        (ALL, PAIR | {"prompt": [user("when?") | {"background": "the river runs"}]}, "lost_field",
         "prompt[0].background"),
        (ALL, PAIR | {"prompt": [user("clock Oslo?")],
                      "chosen": [reply("b") | {"function_call": {"name": "clock", "arguments": "{}"}}]},
         "lost_tool_calls", "chosen[0].tool_calls"),
    ],
)  # fmt: skip
def test_what_a_template_leaves_out_is_named_by_row_and_field(make_tokenizer, template, row, problem, place):
    tokenizer = make_tokenizer(chat_template=template)
    good = PAIR | {"prompt": [user("a")], "chosen": [reply("b")], "rejected": [reply("c")]}
    with pytest.raises(UserError) as error:
        groups_of(tokenizer, good, row)
    assert str(error.value).startswith(f"rows.jsonl, row 1: {place}")
    groups, report = groups_of(tokenizer, good, row, tolerant=True)
    assert (report.rows(problem), report.stopping, len(groups)) == ([1], 1, 1)
    assert place in report.format()
    groups, report = groups_of(tokenizer, good, row, lost_text="count")
    assert (report.rows(problem), report.stopping, report.kept, len(groups)) == ([1], 0, 2, 2)


def test_labels_of_a_turn_are_no_text(make_tokenizer):
    labels = {"name": "Ada", "turn_id": "3", "model": "gpt 4", "time": "2023-01-01 10:00:00", "score": 1.5}
    row = PAIR | {"prompt": [user("a") | labels], "chosen": [reply("b") | labels], "rejected": [reply("c") | labels]}
    groups, report = groups_of(make_tokenizer(chat_template=ALL), row)
    assert (len(groups), report.stopping) == (1, 0)


TOJSON = "{% for m in messages %}{{ m['content'] | tojson + eos_token }}{% endfor %}"
TRIM = "{% for m in messages %}{{ m['content'] | trim + eos_token }}{% endfor %}"
THOUGHTS = (
    "{% for m in messages %}{% if '</think>' in m['content'] %}{% set a = m['content'].split('</think>') %}"
    "{{ '<think>' + a[0].split('<think>')[-1].strip() + '|' + a[-1].strip() }}{% else %}{{ m['content'] }}{% endif %}"
    "{{ eos_token }}{% endfor %}"
)
SYSTEM_LAST = (
    "{% if messages[0]['role'] == 'system' %}{% set s = messages[0]['content'] %}{% set messages = messages[1:] %}"
    "{% endif %}{% for m in messages %}{% if m['role'] == 'user' and s %}{{ s + '\n' }}{% endif %}{{ m['content'] }}"
    "{{ eos_token }}{% endfor %}"
)
TEXT_ARGUMENTS = (
    "{% for m in messages %}{{ m['content'] or '' }}{% for c in m['tool_calls'] or [] %}"
    "{{ c['function']['name'] + '(' + c['function']['arguments'] + ')' }}{% endfor %}{{ eos_token }}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "row"),
    [
        (TOJSON, PAIR | {"prompt": [user('say "hi"\nthen\tgo \u00e9')]}),
        (TRIM, PAIR | {"prompt": [user(" \n go \n\n on \n ")], "chosen": [reply("\n")]}),
        (THOUGHTS, PAIR | {"chosen": [reply("<think>\n 2 and 2\n</think>\n\n4")]}),
        (SYSTEM_LAST, PAIR | {"prompt": [system("Be kind."), *PAIR["prompt"]]}),
        (TEXT_ARGUMENTS, {k: v for k, v in TOOL_PAIR.items() if k != "tools"}),
        (ALL, PAIR | {"tools": [], "chosen": [THINKING | {"reasoning_content": ""}]}),
    ],
)
def test_what_a_template_writes_in_another_form_is_not_lost(make_tokenizer, template, row):
    _, report = groups_of(make_tokenizer(chat_template=template), row)
    assert not LOST.intersection(report.counts)


def test_arguments_as_text_reach_a_template_of_text_as_they_came(make_tokenizer):
    tokenizer = make_tokenizer(chat_template=TEXT_ARGUMENTS)
    call = {"type": "function", "function": {"name": "clock", "arguments": '{"city":"Oslo"}'}}
    for given, written in ((call, 'clock({"city":"Oslo"})'), (CALL, 'clock({"city": "Oslo"})')):
        groups, _ = groups_of(tokenizer, PAIR | {"chosen": [{"role": "assistant", "tool_calls": [given]}]})
        assert tokenizer.decode(groups[0].response_ids[0]) == written + "</s>"


SHIPPED = {
    "llama3": {"lost_reasoning", "lost_tool_calls", "lost_tools"},
    "phi3": {"lost_reasoning", "lost_tool_calls", "lost_tools", "lost_turn"},
    "qwen2_5": {"lost_reasoning"},
    "deepseek_r1_distill": {"lost_reasoning", "lost_tool_calls", "lost_tools"},
}


@pytest.mark.parametrize("name", SHIPPED)
def test_published_templates(make_tokenizer, name):
    trl = pytest.importorskip("trl")
    text = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")
    call = {"role": "assistant", "content": "On it.", "tool_calls": [CALL]}
    rows = [
        PAIR | {"chosen": [THINKING]},
        PAIR | {"prompt": [user("Oslo?"), call, {"role": "tool", "content": "late"}]},
        PAIR | {"tools": TOOLS},
    ]
    _, report = groups_of(make_tokenizer(chat_template=text), *rows, tolerant=True)
    assert set(report.counts) & LOST == SHIPPED[name]
