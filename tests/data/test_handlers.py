"""Layouts of records against dialogues written out by hand, and real records of every layout."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from cordee.data.handlers import HANDLER_NAMES, LLAMA_FACTORY, from_dataset_info, handler_named
from cordee.data.messages import BadRecord, Dialogue, Message, calls_of
from cordee.data.render import IGNORED, Renderer
from cordee.errors import ProblemError
from tests.data.test_templates import LETTERS, ids_and_labels, load, trained, written
from tests.problems import facts, limits

PROMPTER = """
Below is an instruction that describes a task, paired with an input that provides further context. Write a response \
that appropriately completes the request. Please note that you need to think through your response logically and step \
by step.
"""
HEAD = "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
HEAD += "detailed, and polite answers to the user's questions."
WORDS = {"function": "F", "observation": "O", "assistant": "A", "user": "U", "system": "S"}


def said(dialogue: Dialogue) -> list[tuple[str, str]]:
    return [(WORDS[message.role], message.content) for message in dialogue.messages]


def one(name: str, record: dict, map_keys: object = None) -> list[tuple[str, str]]:
    handler = handler_named(name, None if map_keys is None else json.dumps(map_keys))
    (dialogue,) = pickle.loads(pickle.dumps(handler)).dialogues(record)
    return said(dialogue)


# ---- layouts ---------------------------------------------------------------------------------------------------------


def test_general_instructions_are_one_text_of_which_the_answer_is_trained():
    handler = handler_named("GeneralInstructionHandler")
    assert not handler.pairwise and handler.own_template is not None
    (dialogue,) = handler.dialogues({"instruction": "a", "input": "", "output": "b"})
    renderer = Renderer(handler.own_template, LETTERS)
    turns = renderer.turns(dialogue)
    assert written(turns) == (f"<s>{PROMPTER}### Instruction:\na\n\n### Response:\n", "b\n")  # the tokenizer's bos
    assert trained(turns) == ["b\n"]
    assert renderer.prompt(dialogue.messages[:1]) == turns[0].source
    with pytest.raises(BadRecord):
        handler.dialogues({"instruction": "a", "input": "", "output": " "})
    with pytest.raises(BadRecord):
        handler.dialogues({"instruction": "a"})


def test_belle_trains_its_last_answer():
    handler = handler_named("BelleMultiTurnInstructionHandler")
    record = {"instruction": "Human:Q1 \nAssistant: A1\nHuman:Q2\nAssistant:", "input": "", "output": "A2\n"}
    (dialogue,) = handler.dialogues(record)
    assert said(dialogue) == [("U", "Q1"), ("A", "A1"), ("U", "Q2"), ("A", "A2")]
    turns = Renderer(handler.own_template, LETTERS).turns(dialogue)
    asked = "### Instruction:\nQ{}\n### Response:\n"
    assert written(turns) == ("<s>" + PROMPTER + asked.format(1), "A1\n", asked.format(2), "A2\n")
    assert trained(turns) == ["", "A2\n"]
    for text in ("Q1", "Human:Q1\nAssistant:A1", "Human:Q1\nAssistant:\nHuman:Q2\nAssistant:"):
        with pytest.raises(BadRecord):
            handler.dialogues(record | {"instruction": text})


MOSS = {
    "chat": {
        "turn_1": {"Human": "<|Human|>: Q1<eoh>\n", "MOSS": "<|MOSS|>: A1<eom>\n"},
        "turn_2": {"Human": "<|Human|>: Q2<eoh>\n", "MOSS": "<|MOSS|>: A2<eom>\n"},
        "turn_3": None,  # as Arrow has it
    }
}


def test_moss_is_one_sequence_a_turn():
    turns = handler_named("MOSSInstructionHandler").dialogues(MOSS)
    assert [said(turn) for turn in turns] == [
        [("U", "Q1"), ("A", "A1")],
        [("U", "Q1"), ("A", "A1"), ("U", "Q2"), ("A", "A2")],
    ]
    with pytest.raises(BadRecord):
        handler_named("MOSSInstructionHandler").dialogues({"chat": {}})


def test_moss_for_baichuan_has_ids_of_who_speaks():
    handler = handler_named("MOSSMultiTurnHandler")
    (dialogue,) = handler.dialogues(MOSS)
    ids, labels = ids_and_labels(Renderer(handler.own_template, LETTERS).turns(dialogue))
    eos, q1, a1, q2, a2 = LETTERS.eos, [ord("Q"), ord("1")], [ord("A"), ord("1")], [ord("Q"), ord("2")], [65, ord("2")]
    assert ids == [195, *q1, 196, *a1, 195, *q2, 196, *a2, eos]
    none = [IGNORED] * 3
    assert labels == [IGNORED, *none, *a1, eos, *none, *a2, eos]  # at the first position nothing predicts


def test_leetcode():
    record = {"code_with_problem": "Add.\n```python\n1\n```", "code_only": "```\n1\n```", "explanation_only": "why"}
    assert one("LeetcodePythonInstructionHandler", record) == [("U", "Add."), ("A", "```\n1\n```\nwhy")]


def test_text_handlers():
    record = {"instruction": "I", "input": "N", "output": "O"}
    head = f"{HEAD}USER: Below is an instruction that describes a task. Write a response that appropriately completes "
    head += "the request.\n\n### Instruction:\nI\n\n###"
    handler = handler_named("AlpacaPretrainHandler")
    assert handler.is_text and handler.own_template is None
    assert handler.text(record) == head + " Input:\nN\n\n### Response: ASSISTANT: O"
    assert handler.text(record | {"input": ""}) == head + "None\n\n### Response: ASSISTANT: O"
    record = {"title": "T", "question_body": "Q", "answer_body": "A"}
    expected = "In python, T\n### Question:\nQ\n### Response:\nA\n"
    assert handler_named("StackOverflowPythonPretrainHandler").text(record) == expected
    assert handler_named("GeneralPretrainHandler").text({"text": "x"}) == "x"


def test_wikitext_is_written_as_before_it_was_cut():
    cut = " The 19 @-@ year @-@ old paid 1 @,@ 000 @.@ 50 ( 24 in ) ; it 's [ 3 ] at 5 \u00b0 C . N dogs ' run = = x "
    whole = "The 19-year-old paid 1,000.50 (24 in); it's [3] at 5\u00b0C. 1 dogs' run == x"
    read = handler_named("WikitextPretrainHandler").text
    assert read({"text": cut}) == whole
    assert read({"text": " = = Head = = \n"}) == ""


def test_vicuna_and_squad():
    handler = handler_named("VicunaHandler")
    record = {"conversations": [{"from": ("human", "gpt")[i % 2], "value": v} for i, v in enumerate("abcd")]}
    (dialogue,) = handler.dialogues(record)
    turns = Renderer(handler.own_template, LETTERS).turns(dialogue)
    assert written(turns) == (f"<s>{HEAD} USER: a ASSISTANT: ", "b</s>", "USER: c ASSISTANT: ", "d</s>")
    assert trained(turns) == ["b</s>", "d</s>"]
    handler = handler_named("SquadHandler")
    answers = {"question": "Q", "answers": [{"text": "A"}, {"text": "B"}]}
    record = {"data": [{"paragraphs": [{"context": "C", "qas": [answers, answers]}] * 2}]}
    dialogues = handler.dialogues(record)
    assert len(dialogues) == 2 and handler.dialogues(record["data"][0]["paragraphs"][0]) == dialogues[:1]
    prompt = (
        "<s>Read the passage and answer the question below.\n\n### Instruction:\nC\n\n### Input:\nQ\n\n### Response:"
    )
    assert written(Renderer(handler.own_template, LETTERS).turns(dialogues[0])) == (prompt, "A</s>")


def test_alpaca_style_and_its_map():
    name = "AlpacaStyleInstructionHandler"
    record = {"instruction": "I", "input": "N", "output": "O", "system": "S", "history": [["q", "a"]]}
    assert one(name, record) == [("U", "I\nN"), ("A", "O")]
    assert one(name, record | {"input": ""}) == [("U", "I"), ("A", "O")]
    mapped = one(name, record, {"system": "system", "history": "history"})
    assert mapped == [("S", "S"), ("U", "q"), ("A", "a"), ("U", "I\nN"), ("A", "O")]
    assert one(name, {"q": "I", "output": "O"}, {"prompt": "q"}) == [("U", "I"), ("A", "O")]
    handler = handler_named(name, '{"prompt": "q", "system": "s"}')
    assert handler.own_template is None and set(handler.columns) == {"q", "input", "output", "s"}
    assert set(handler.required) == {"q", "output", "s"}
    for bad in ({"instruction": 1}, {"output": None}, {"output": ""}):
        with pytest.raises(BadRecord):
            one(name, record | bad)
    with pytest.raises(BadRecord):
        one(name, record | {"history": [["q"]]}, {"history": "history"})


def test_sharegpt_style_and_its_tags():
    name = "SharegptStyleInstructionHandler"
    values = [
        ("system", "S"),
        ("human", "U"),
        ("function_call", '{"name": "f", "arguments": {}}'),
        ("observation", "O"),
        ("gpt", "A"),
    ]
    record = {"conversations": [{"from": by, "value": text} for by, text in values], "tools": [{"name": "f"}]}
    expected = [("S", "S"), ("U", "U"), ("F", '{"name": "f", "arguments": {}}'), ("O", "O"), ("A", "A")]
    assert one(name, record) == expected
    (dialogue,) = handler_named(name).dialogues(record)
    assert json.loads(dialogue.tools or "") == [{"name": "f"}]
    assert one(name, {"conversations": record["conversations"][1:], "system": "S2"})[0] == ("S", "S2")
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    other = {"chat": [{"role": "user", "content": "U"}, {"role": "assistant", "content": "A"}]}
    assert one(name, other, {"messages": "chat", "tags": tags}) == [("U", "U"), ("A", "A")]
    system = {"chat": [{"role": "system", "content": "S"}, *other["chat"]]}
    with pytest.raises(BadRecord):  # a tag that is not listed is none
        one(name, system, {"messages": "chat", "tags": tags})
    turns = record["conversations"]
    for wrong in (
        [],
        turns[:2],
        turns[1:2] * 2,
        turns[2:],
        [turns[1], turns[0]],
        [{"from": "x", "value": "y"}] * 2,
        "text",
    ):
        with pytest.raises(BadRecord):
            one(name, {"conversations": wrong})


def test_pairs():
    name = "AlpacaStylePairwiseHandler"
    handler = handler_named(name)
    assert handler.pairwise and handler.own_template is None
    pair = handler.pairs({"instruction": "I", "input": "N", "chosen": "C", "rejected": "R"})
    assert [said(dialogue) for dialogue in pair] == [[("U", "I\nN"), ("A", "C")], [("U", "I\nN"), ("A", "R")]]
    handler = handler_named("SharegptStylePairwiseHandler")
    asked = [{"from": "human", "value": "U"}]
    record = {
        "conversations": asked,
        "chosen": {"from": "gpt", "value": "C"},
        "rejected": {"from": "gpt", "value": "R"},
    }
    assert [said(dialogue) for dialogue in handler.pairs(record)] == [
        [("U", "U"), ("A", "C")],
        [("U", "U"), ("A", "R")],
    ]
    for wrong in ({"chosen": None}, {"rejected": asked[0]}, {"conversations": [*asked, record["chosen"]]}):
        with pytest.raises(BadRecord):
            handler.pairs(record | wrong)


def test_messages_of_openai():
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": "北"}'}}
    messages = [
        {"role": "developer", "content": "S"},
        {"role": "user", "content": [{"type": "text", "text": "U"}]},
        {"role": "assistant", "content": "let me", "tool_calls": [call], "train": False, "refusal": None},
        {"role": "tool", "content": "O", "tool_call_id": "1"},
        {"role": "assistant", "content": "A", "reasoning_content": "why"},
    ]
    (dialogue,) = handler_named("MessagesHandler").dialogues({"messages": messages, "tools": "[]"})
    system, user, function, observation, answer = dialogue.messages
    assert (system, user) == (Message("system", "S"), Message("user", "U")) and dialogue.tools is None
    assert calls_of(function.content) == [{"id": "1", "name": "f", "arguments": {"a": "北"}}]
    assert not function.trained and function.more == {"content": "let me"}
    assert observation == Message("observation", "O", more={"tool_call_id": "1"})
    assert answer == Message("assistant", "A", more={"reasoning_content": "why"})
    unweighted = {"role": "assistant", "content": "A", "weight": 0}
    assert not handler_named("MessagesHandler").dialogues({"messages": [unweighted]})[0].messages[0].trained
    image = {"role": "user", "content": [{"type": "image_url"}]}
    for wrong in ([], messages[:2], [image, *messages[4:]], [{"role": "nobody", "content": ""}, messages[4]], None):
        with pytest.raises(BadRecord):
            handler_named("MessagesHandler").dialogues({"messages": wrong})


# ---- names and columns -----------------------------------------------------------------------------------------------


def problems(name: str, map_keys: str | None = None) -> pytest.ExceptionInfo[ProblemError]:
    with pytest.raises(ProblemError) as caught:
        handler_named(name, map_keys)
    return caught


def test_names_and_keys_that_are_wrong():
    caught = problems("AlpacaHandler")
    assert facts(caught) == [("--handler-name", "AlpacaHandler", "choice")] and limits(caught) == [HANDLER_NAMES]
    assert facts(problems(LLAMA_FACTORY)) == [("--handler-name", LLAMA_FACTORY, "requires")]
    assert facts(problems("GeneralInstructionHandler", "{}")) == [("--map-keys", "{}", "excludes")]
    style = "AlpacaStyleInstructionHandler"
    assert facts(problems(style, "{")) == [("--map-keys", "{", "format")]
    assert facts(problems(style, "[]")) == [("--map-keys", [], "choice")]
    caught = problems(style, '{"tools": "t", "prompt": 3, "messages": "m"}')
    assert [value for _, value, _ in facts(caught)] == ["tools", "prompt = 3", "messages"]
    caught = problems("SharegptStyleInstructionHandler", '{"tags": {"role_tag": "role", "x": "y"}}')
    assert {value for _, value, _ in facts(caught)} == {"x", "content_tag", "user_tag", "assistant_tag"}


def test_llama_factory(tmp_path):
    info = {
        "plain": {"file_name": "a.json"},
        "named": {"file_name": "b.json", "columns": {"prompt": "q", "response": "a", "history": "h"}},
        "pairs": {"file_name": "c.json", "formatting": "sharegpt", "ranking": True},
        "tagged": {
            "file_name": "d.json",
            "formatting": "sharegpt",
            "columns": {"messages": "m"},
            "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
        },
        "hub": {"hf_hub_url": "x/y"},
        "odd": {"file_name": "e.json", "columns": {"prompt": "q", "response": "a", "images": "i"}},
        "empty": {"file_name": "f.json", "columns": {"prompt": "q"}},
        "other": {"file_name": "g.json", "formatting": "parquet"},
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    path, handler = from_dataset_info(tmp_path, "plain")
    assert path == tmp_path / "a.json" and handler.name == LLAMA_FACTORY and handler.own_template is None
    assert said(handler.dialogues({"instruction": "I", "input": "N", "output": "O"})[0]) == [("U", "I\nN"), ("A", "O")]
    _, handler = from_dataset_info(tmp_path, "named")
    record = {"q": "Q", "a": "A", "h": [["q", "a"]], "input": "not a column"}
    assert said(handler.dialogues(record)[0]) == [("U", "q"), ("A", "a"), ("U", "Q"), ("A", "A")]
    assert from_dataset_info(tmp_path, "pairs")[1].pairwise
    record = {"m": [{"role": "user", "content": "U"}, {"role": "assistant", "content": "A"}]}
    assert said(from_dataset_info(tmp_path, "tagged")[1].dialogues(record)[0]) == [("U", "U"), ("A", "A")]
    found = {}
    for name in ("hub", "odd", "empty", "other", "absent"):
        with pytest.raises(ProblemError) as caught:
            from_dataset_info(tmp_path, name)
        found[name] = [(value, kind) for _, value, kind in facts(caught)]
    assert found == {
        "hub": [("hub", "invalid")],
        "odd": [("images", "choice")],
        "empty": [("response", "missing")],
        "other": [("other", "choice")],
        "absent": [("absent", "choice")],
    }
    with pytest.raises(ProblemError) as caught:
        from_dataset_info(tmp_path / "nowhere", "plain")
    assert facts(caught) == [("--dataset-dir", tmp_path / "nowhere", "unreadable")]


# ---- real records ----------------------------------------------------------------------------------------------------


def records(path: Path) -> list[dict]:
    text = path.read_text(encoding="utf-8")
    return json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]


REAL = [  # file, handler, how many records it takes
    ("alpaca/alpaca_data.json", "GeneralInstructionHandler", None),
    ("alpaca/alpaca_zh_demo.json", "AlpacaStyleInstructionHandler", None),
    ("belle/belle_multiturn_layout.json", "BelleMultiTurnInstructionHandler", 54),
    ("moss/conversation_without_plugins.jsonl", "MOSSInstructionHandler", 80),
    ("moss/conversation_with_plugins.jsonl", "MOSSMultiTurnHandler", 25),
    ("leetcode/leetcode_python_layout.jsonl", "LeetcodePythonInstructionHandler", 50),
    ("sharegpt/sharegpt_zh.jsonl", "SharegptStyleInstructionHandler", None),
    ("sharegpt/sharegpt_zh.jsonl", "VicunaHandler", None),
    ("sharegpt/glaive_toolcall_en_demo.json", "SharegptStyleInstructionHandler", 90),
    ("preference/dpo_en_demo.json", "SharegptStylePairwiseHandler", 108),
    ("preference/dpo_zh_demo.json", "SharegptStylePairwiseHandler", 72),
    ("preference/dpo_en_alpaca_style.json", "AlpacaStylePairwiseHandler", 38),
]


@pytest.mark.parametrize("file, name, count", REAL)
def test_real_records(shared, file, name, count):
    found = records(shared / "data" / file)
    handler = handler_named(name)
    from cordee.data.templates import template_named

    renderer = Renderer(handler.own_template or template_named("qwen"), LETTERS)
    taken = 0
    for record in found:
        assert set(handler.required) <= record.keys()
        try:
            dialogues = list(handler.pairs(record)) if handler.pairwise else handler.dialogues(record)
        except BadRecord:
            assert count is None and not sound(record), record
            continue
        taken += 1
        for dialogue in dialogues[:1]:
            answer = dialogue.messages[-1].content
            assert answer.strip() in trained(renderer.turns(dialogue))[-1]
    assert taken == count or (count is None and taken > 0.7 * len(found))


def sound(record: dict) -> bool:
    """Whether every answer of a record has text and stands where one is due."""
    if "conversations" in record:
        said = record["conversations"]
        due = [("human", "gpt")[i % 2] for i in range(len(said))]
        return (
            len(said) % 2 == 0
            and [each["from"] for each in said] == due
            and all(e["value"].strip() for e in said[1::2])
        )
    return bool(record["output"].strip())


@pytest.mark.slow
def test_real_alpaca_of_a_real_tokenizer(shared):
    """The masks of AscendSpeed: everything up to the last "### Response:\\n", tokenized by itself, is not trained."""
    import sentencepiece

    directory = shared / "data" / "tokenizers" / "llama"
    model = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    tokenizer, handler = load(directory), handler_named("GeneralInstructionHandler")
    for record in records(shared / "data" / "alpaca" / "alpaca_data.json")[:50]:
        text = f"{PROMPTER}### Instruction:\n{record['instruction']}\n{record['input']}\n### Response:\n"
        ids, labels = ids_and_labels(Renderer(handler.own_template, tokenizer).turns(handler.dialogues(record)[0]))
        before = [1, *model.encode(text)]
        assert ids == [1, *model.encode(f"{text}{record['output']}\n")]
        assert labels == [IGNORED] * len(before) + ids[len(before) :]
