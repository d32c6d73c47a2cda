"""Rows in the layouts of other tools, each with the same row as messages.

Every layout of the table in docs/data.md is here by name.
"""

from __future__ import annotations

import json


def user(text):
    return {"role": "user", "content": text}


def reply(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


def said(speaker, text):
    return {"from": speaker, "value": text}


ASK, GOOD, BAD = "Where does the river go?", "It goes to the sea.", "It does not."
KIND = "Be kind."
SIDES = {"chosen": GOOD, "rejected": BAD}
SIDES_OF_TURNS = {"chosen": [reply(GOOD)], "rejected": [reply(BAD)]}
PAIR = {"prompt": [user(ASK)], **SIDES_OF_TURNS}
KIND_PAIR = {"prompt": [system(KIND), user(ASK)], **SIDES_OF_TURNS}
EARLIER = [user("hi"), reply("hello")]
LATER_PAIR = {"prompt": [*EARLIER, user(ASK)], **SIDES_OF_TURNS}
CALL = {"type": "function", "function": {"name": "clock", "arguments": {"city": "Oslo"}}}
TOOLS = [{"type": "function", "function": {"name": "clock", "description": "the time", "parameters": {}}}]
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
TOOL_PAIR = {
    "prompt": [user("Time in Oslo?"), CALLING, {"role": "tool", "content": "noon"}],
    "chosen": [reply("Noon.")],
    "rejected": [reply("Late.")],
    "tools": TOOLS,
}
GOOD_ROW = {"prompt": [user(ASK)], "completion": [reply(GOOD)], "label": True}
BAD_ROW = {"prompt": [user(ASK)], "completion": [reply(BAD)], "label": False}
REFERENCE = {"better_response_id": 1, "safer_response_id": 0, "is_response_0_safe": True}

TEXT_PAIR = {"prompt": ASK, "chosen": f" {GOOD}", "rejected": f" {BAD}"}
ASK_TEXT = {"prompt": ASK, **SIDES}
TEXTS = [TEXT_PAIR["chosen"], TEXT_PAIR["rejected"]]
DIALOGUES = {side: f"\n\nHuman: {ASK}\n\nAssistant: {text}" for side, text in SIDES.items()}
WHOLE = {side: f"{ASK} {text}" for side, text in SIDES.items()}

TOKENS: dict[str, tuple[str, dict]] = {
    # name: (format that is recognised, a row whose prompt is 5, 6, and whose sides are 7, 2 and 8, 9, 2)
    "trl ids": ("tokenized", {"prompt_ids": [5, 6], "chosen_ids": [7, 2], "rejected_ids": [8, 9, 2]}),
    "old trl ids": ("input_ids", {"prompt_input_ids": [5, 6], "chosen_input_ids": [7, 2],
                                  "rejected_input_ids": [8, 9, 2]}),
    "old trl ids with labels": ("input_ids", {
        "prompt_input_ids": [5, 6], "chosen_input_ids": [5, 6, 7, 2], "chosen_labels": [-100, -100, 7, 2],
        "rejected_input_ids": [5, 6, 8, 9, 2], "rejected_labels": [-100, -100, 8, 9, 2]}),
}  # fmt: skip
UNPAIRED: dict[str, tuple[str, dict, dict]] = {
    # As in LAYOUTS: the row as TRL takes it for KTO.
    "trl": ("unpaired", {"prompt": ASK, "completion": f" {GOOD}", "label": True},
            {"prompt": ASK, "completion": f" {GOOD}", "label": True}),
    "trl messages": ("unpaired", {"prompt": [user(ASK)], "completion": [reply(BAD)], "label": False}, BAD_ROW),
    "system beside prompt": ("labelled", {"system": KIND, "prompt": ASK, "completion": GOOD, "label": "True"},
                             GOOD_ROW | {"prompt": [system(KIND), user(ASK)]}),
    "prompt and response": ("labelled", {"prompt": ASK, "response": GOOD, "label": 1}, GOOD_ROW),
    "instruction": ("labelled", {"instruction": "Where does", "input": "the river go?", "completion": BAD, "label": 0},
                    BAD_ROW | {"prompt": [user("Where does\nthe river go?")]}),
    "instruction and output": ("labelled", {"instruction": ASK, "output": GOOD, "label": "1"}, GOOD_ROW),
    "axolotl intel": ("labelled", {"system": KIND, "question": ASK, "completion": GOOD, "label": True},
                      GOOD_ROW | {"prompt": [system(KIND), user(ASK)]}),
    "query": ("labelled", {"query": ASK, "response": BAD, "label": False, "history": [["hi", "hello"]]},
              BAD_ROW | {"prompt": [*EARLIER, user(ASK)]}),
    "ms-swift": ("labelled", {"messages": [*EARLIER, user(ASK), reply(BAD)], "label": False},
                 BAD_ROW | {"prompt": [*EARLIER, user(ASK)]}),
    "conversations": ("labelled", {"conversations": [said("human", ASK), said("gpt", GOOD)], "label": True}, GOOD_ROW),
    "llama-factory": ("kto_tag", {"instruction": ASK, "input": "", "output": GOOD, "kto_tag": True}, GOOD_ROW),
    "llama-factory sharegpt": ("kto_tag", {"conversations": [said("human", ASK), said("gpt", GOOD)], "kto_tag": True},
                               GOOD_ROW),
    "llama-factory messages": ("kto_tag", {"messages": [user(ASK), reply(BAD)], "kto_tag": False}, BAD_ROW),
}  # fmt: skip
"""Rows of one labelled completion."""

LAYOUTS: dict[str, tuple[str, dict, dict]] = {
    # name: (format that is recognised, the row, the row as messages, or as text where it stays text)
    "trl text": ("preference", TEXT_PAIR, TEXT_PAIR),
    "trl without prompt": ("preference", WHOLE, WHOLE),
    "hh": ("hh", DIALOGUES, PAIR),
    "ranking": ("kwise", {"prompt": ASK, "responses": TEXTS[::-1], "ranking": [2, 1]}, TEXT_PAIR),
    "scored": ("scored", {"prompt": ASK, "responses": TEXTS, "scores": [5, 1]}, TEXT_PAIR),
    "ultrafeedback": ("scored", {"instruction": ASK, "completions": [
        {"response": GOOD, "overall_score": 5.0, "model": "m"},
        {"response": BAD, "overall_score": 1.0, "model": "n"}]}, ASK_TEXT),
    "distilabel": ("scored", {"instruction": ASK, "generations": [GOOD, BAD], "ratings": [5, 1]}, ASK_TEXT),
    "scored question": ("scored", {"question": ASK, "completions": [GOOD, BAD], "scores": [5, 1]}, ASK_TEXT),
    "sharegpt with a system text": ("sharegpt", {"system": KIND, "conversations": [said("human", ASK)],
                                                 "chosen": said("gpt", GOOD), "rejected": said("gpt", BAD)}, KIND_PAIR),
    "history beside prompt": ("conversation", {"system": "", "history": [["hi", "hello"]], "prompt": ASK, **SIDES},
                              LATER_PAIR),
    "problem": ("question", {"problem": ASK, **SIDES}, PAIR),
    "context": ("messages", {"context": [*EARLIER, user(ASK)], **SIDES}, LATER_PAIR),
    "history of turns": ("messages", {"history": [*EARLIER, user(ASK)], **SIDES}, LATER_PAIR),
    "alpaca": ("alpaca", {"instruction": "Where does", "input": "the river go?", **SIDES},
               PAIR | {"prompt": [user("Where does\nthe river go?")]}),
    "alpaca without input": ("alpaca", {"instruction": ASK, "input": "", "system": KIND, **SIDES}, KIND_PAIR),
    "alpaca with history": ("alpaca", {"instruction": ASK, "input": "", "history": [["hi", "hello"]], **SIDES},
                            LATER_PAIR),
    "orca": ("question", {"system": KIND, "question": ASK, **SIDES}, KIND_PAIR),
    "orca without a system text": ("question", {"system": "", "question": ASK, **SIDES}, PAIR),
    "argilla orca": ("question", {"system": KIND, "input": ASK, "generations": [GOOD, BAD], "rating": [9, 5], **SIDES},
                     KIND_PAIR),
    "query": ("question", {"query": ASK, **SIDES}, PAIR),
    "system beside prompt": ("conversation", {"system": KIND, "prompt": ASK, **SIDES}, KIND_PAIR),
    "system beside message prompts": ("conversation", {"system": KIND, **PAIR}, KIND_PAIR),
    "axolotl messages": ("messages", {"messages": [user(ASK)], "chosen": reply(GOOD), "rejected": reply(BAD)}, PAIR),
    "axolotl conversation": ("messages", {"conversation": [*EARLIER, user(ASK)], **SIDES_OF_TURNS}, LATER_PAIR),
    "axolotl icr": ("question", {"system": KIND, "input": ASK, **SIDES}, KIND_PAIR),
    "context messages": ("messages", {"context_messages": [user(ASK)], **SIDES}, PAIR),
    "ultra interact": ("messages", {"trajectory": [said("user", "hi"), said("assistant", "hello"), said("user", ASK)],
                                    "parent_id": 3, **SIDES}, LATER_PAIR),
    "ms-swift": ("ms_swift", {"messages": [system(KIND), user(ASK), reply(GOOD)], "rejected_response": BAD}, KIND_PAIR),
    "ms-swift messages": ("ms_swift", {"messages": [user(ASK), reply(GOOD)],
                                       "rejected_messages": [user(ASK), reply(BAD)]}, PAIR),
    "ms-swift query": ("ms_swift", {"system": KIND, "query": ASK, "response": GOOD, "rejected_response": BAD,
                                    "history": []}, KIND_PAIR),
    "ms-swift tools": ("ms_swift", {
        "messages": [user("Time in Oslo?"), {"role": "tool_call", "content": json.dumps(CALL["function"])},
                     {"role": "tool_response", "content": "noon"}, reply("Noon.")],
        "rejected_response": "Late.", "tools": json.dumps(TOOLS)}, TOOL_PAIR),
    "argilla": ("chosen_response", {"instruction": ASK, "chosen_response": GOOD, "rejected_response": BAD,
                                    "chosen_avg_rating": 5.0}, PAIR),
    "nemo aligner": ("chosen_response", {"prompt": ASK, "chosen_response": GOOD, "rejected_response": BAD}, PAIR),
    "nectar": ("nectar", {"prompt": f"\n\nHuman: hi\n\nAssistant: hello\n\nHuman: {ASK}\n\nAssistant: ", "turns": 2,
                          "answers": [{"answer": BAD, "rank": 2.0, "model": "m"},
                                      {"answer": GOOD, "rank": 1.0, "model": "n"}]}, LATER_PAIR),
    "shp": ("shp", {"history": ASK, "human_ref_A": BAD, "human_ref_B": GOOD, "labels": 0, "score_ratio": 2.0}, PAIR),
    "pku saferlhf": ("pku_saferlhf", {"prompt": ASK, "response_0": BAD, "response_1": GOOD, **REFERENCE}, PAIR),
    "helpsteer2": ("helpsteer2", {"prompt": f"hi\n<extra_id_1>Assistant\nhello\n<extra_id_1>User\n{ASK}",
                                  "response_1": GOOD, "response_2": BAD, "preference_strength": -2}, LATER_PAIR),
    "helpsteer3": ("helpsteer3", {"domain": "general", "context": [user(ASK)], "response1": BAD, "response2": GOOD,
                                  "overall_preference": 1}, PAIR),
    "math step dpo": ("step_dpo", {"prompt": "2 + 3 + 4?", "initial_reason_steps": "Step 1: 2 + 3 is 5.\nStep 2:",
                                   "chosen": " 5 + 4 is 9.", "rejected": " 5 + 4 is 8.", "answer": "9",
                                   "full_chosen": "x", "full_rejected": "y"},
                      {"prompt": [user("2 + 3 + 4?")],
                       "chosen": [reply("Step 1: 2 + 3 is 5.\nStep 2: 5 + 4 is 9.")],
                       "rejected": [reply("Step 1: 2 + 3 is 5.\nStep 2: 5 + 4 is 8.")]}),
    "openai": ("openai", {"input": {"messages": TOOL_PAIR["prompt"][:1] + [
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "clock", "arguments": '{"city": "Oslo"}'}}]},
        {"role": "tool", "content": "noon", "tool_call_id": "1"}], "tools": TOOLS, "parallel_tool_calls": True},
        "preferred_output": TOOL_PAIR["chosen"], "non_preferred_output": TOOL_PAIR["rejected"]}, TOOL_PAIR),
    "nemo-rl": ("nemo_rl", {"context": [user(ASK)], "completions": [{"rank": 1, "completion": [reply(BAD)]},
                                                                   {"rank": 0, "completion": [reply(GOOD)]}]}, PAIR),
    "torchtune": ("torchtune", {"chosen_conversations": [said("human", ASK), said("gpt", GOOD)],
                                "rejected_conversations": [said("human", ASK), said("gpt", BAD)]}, PAIR),
    "stack exchange": ("stack_exchange", {"question": ASK, "response_j": GOOD, "response_k": BAD, "qid": 1}, PAIR),
    "llama-factory lists": ("llama_factory", {"instruction": ASK, "input": "", "output": [GOOD, BAD]}, PAIR),
    "llama-factory sharegpt": ("sharegpt", {
        "conversations": [said("human", "Time in Oslo?"), said("function_call", json.dumps(CALL["function"])),
                          said("observation", "noon")],
        "chosen": said("gpt", "Noon."), "rejected": said("gpt", "Late."), "tools": json.dumps(TOOLS)}, TOOL_PAIR),
    "arena": ("arena", {"conversation_a": [user(ASK), reply(BAD)], "conversation_b": [user(ASK), reply(GOOD)],
                        "winner": "model_b", "turn": 1}, PAIR),
    "prompt repeated in messages": ("preference", {"prompt": ASK, "messages": [user(ASK), reply(GOOD)],
                                                   "chosen": [user(ASK), reply(GOOD)],
                                                   "rejected": [user(ASK), reply(BAD)]}, PAIR),
    "conversations as JSON text": ("preference", {"chosen": json.dumps([user(ASK), reply(GOOD)]),
                                                  "rejected": json.dumps([user(ASK), reply(BAD)])}, PAIR),
    "conversations as Python text": ("preference", {"chosen": str([user(ASK), reply(GOOD)]),
                                                    "rejected": str([user(ASK), reply(BAD)])}, PAIR),
    "content in parts": ("preference", {
        "prompt": [{"role": "user", "content": [{"type": "text", "text": "Where does"},
                                                {"type": "text", "text": " the river go?"}]}],
        "chosen": [{"role": "assistant", "content": [{"type": "output_text", "text": GOOD}]}],
        "rejected": [reply(BAD)]}, PAIR),
    "filler nulls": ("preference", {
        "prompt": [user("Time in Oslo?") | {"tool_calls": None}, {**CALLING, "tool_calls": [
            {"type": "function", "function": {"name": "clock", "arguments": {"city": "Oslo", "zone": None}}}]},
            {"role": "tool", "content": "noon", "tool_calls": None}],
        "chosen": [reply("Noon.")], "rejected": [reply("Late.")],
        "tools": [{"type": "function", "function": {"name": "clock", "description": "the time", "parameters": {},
                                                    "strict": None}}]}, TOOL_PAIR),
}  # fmt: skip
