"""Handlers: how records of each layout become dialogues, pairs of them, or text. The values of --handler-name.

Owns the layouts, the names of their columns (--map-keys, dataset_info.json), and the templates that some of them fix.
Knows no token."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from cordee.data.messages import ANSWERS, BadRecord, Dialogue, Message, Role, raise_unless_alternating
from cordee.data.readers.chunk import lacks
from cordee.data.templates import BOS, ChatTemplate, PromptTemplate, Special, Template
from cordee.errors import Problem, ProblemError, raise_all
from cordee.files import read_json

Record = Mapping[str, Any]
Columns = Mapping[str, str]  # of a record, or its tags, by the names that handlers have for them

_ASSISTANT = "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
_ASSISTANT += "detailed, and polite answers to the user's questions."
_INSTRUCT = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
# The template of AscendSpeed's Prompter, tokenized as one text; only its last answer is trained, and no eos.
PROMPTER = ChatTemplate(
    source="\nBelow is an instruction that describes a task, paired with an input that provides further context. Write "
    "a response that appropriately completes the request. Please note that you need to think through your response "
    "logically and step by step.\n{% for message in messages %}"
    "{{ '### Response:\n' if message.role == 'assistant' else '### Instruction:\n' }}{{ message.content + '\n' }}"
    "{% endfor %}{{ '### Response:\n' if add_generation_prompt else '' }}",
    around=True,
    last_only=True,
    efficient_eos=False,
)
# FastChat's vicuna, by which MindFormers tunes Llama 2.
VICUNA = ChatTemplate(
    source=f"{_ASSISTANT} {{% for message in messages %}}"
    "{{ 'ASSISTANT: ' + message.content + eos_token if message.role == 'assistant' else 'USER: ' + message.content }}"
    "{{ ' ' if message.role == 'user' else '' }}{% endfor %}{{ 'ASSISTANT: ' if add_generation_prompt else '' }}",
    around=True,
)
# Baichuan's ids of who speaks; the first of them, which nothing predicts, has no label here.
BAICHUAN = PromptTemplate(user=(Special(195), "{c}", Special(196)), assistant=("{c}",), efficient_eos=True)
SQUAD = PromptTemplate(prefix=(BOS,))
# Wikitext was cut into words; how it was written before, as MindFormers and Megatron restore it, in this order.
_WIKITEXT = [
    ("s '", "s'"),
    *((f" @{mark}@ ", mark) for mark in "-,."),
    *((f" {mark} ", f"{mark} ") for mark in ":;.!?,"),
    (re.compile(r"\(\s*([^)]*?)\s*\)"), r"(\1)"),
    (re.compile(r"\[\s*([^\]]*?)\s*\]"), r"[\1]"),
    (re.compile(r"{\s*([^}]*?)\s*}"), r"{\1}"),
    (re.compile(r"\"\s*([^\"]*?)\s*\""), r'"\1"'),
    (re.compile(r"'\s*([^']*?)\s*'"), r"'\1'"),
    *(("= " * count + "=", "=" * (count + 1)) for count in (3, 2, 1)),
    *((" \u00b0 ", "\u00b0"), (" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s")),
]


@dataclass(frozen=True, kw_only=True)
class Handler:
    """A layout of records.

    columns: the fields of a record that it reads, of which no record may lack those `required`.
    own_template: the one that it fixes; None: it takes --prompt-type, or the tokenizer's, unless it is of text.
    pairwise: a record has a chosen and a rejected answer, read by `pairs`. is_text: it is plain text, read by `text`.
    flags: the fields of which one says whether an answer is desirable. Each reading raises `BadRecord`."""

    name: str
    read: Callable[[Record], Any]
    columns: tuple[str, ...]
    required: tuple[str, ...]
    own_template: Template | None = None
    pairwise: bool = False
    is_text: bool = False
    flags: tuple[str, ...] = ("kto_tag", "label")

    def dialogues(self, record: Record) -> list[Dialogue]:
        assert not (self.pairwise or self.is_text)
        return self.read(record)

    def pairs(self, record: Record) -> tuple[Dialogue, Dialogue]:
        """With the chosen and with the rejected answer."""
        assert self.pairwise
        return self.read(record)

    def text(self, record: Record) -> str:
        assert self.is_text
        return self.read(record)

    def desirable(self, record: Record) -> bool:
        """Whether its answers shall become likelier, or less likely."""
        value = next((record[name] for name in self.flags if record.get(name) is not None), None)
        if value not in (True, False):
            raise BadRecord(f"its {' or '.join(self.flags)} is not true or false")
        return bool(value)


def _text(record: Record, column: str, *, optional: bool = False) -> str:
    value = record.get(column)
    if value is None and optional:
        return ""
    if not isinstance(value, str):
        raise BadRecord(lacks(column) if value is None else f"its {column!r} is {type(value).__name__}, not text")
    return value


def _message(text: str, role: Role = "assistant", **more: Any) -> Message:
    if role in ANSWERS and not text.strip():
        raise BadRecord("an answer is empty")
    return Message(role, text, **more)


def _asked(*questions_and_answers: str, system: str = "") -> list[Message]:
    """Messages that alternate between user and assistant."""
    messages = [_message(text, "assistant" if i % 2 else "user") for i, text in enumerate(questions_and_answers)]
    return [Message("system", system)] * bool(system) + messages


def _dialogue(*questions_and_answers: str) -> Dialogue:
    return Dialogue(tuple(_asked(*questions_and_answers)))


def _list(value: Any, what: str) -> Sequence[Any]:
    if not isinstance(value, list | tuple):
        raise BadRecord(f"{what} is {type(value).__name__}, not a list")
    return value


def _tools(value: Any) -> str | None:
    text = value if isinstance(value, str) or value is None else json.dumps(value, ensure_ascii=False)
    return text if text and text.strip() not in ("", "[]") else None


def _general(record: Record) -> list[Dialogue]:
    question = f"{_text(record, 'instruction')}\n{_text(record, 'input', optional=True)}"
    return [_dialogue(question, _text(record, "output"))]


def _belle(record: Record) -> list[Dialogue]:
    first, *parts = _text(record, "instruction").split("Human:")
    if first.strip() or not parts or not parts[-1].rstrip().endswith("Assistant:"):
        raise BadRecord("its 'instruction' does not go from 'Human:' to 'Assistant:'")
    texts = [text.strip() for part in parts for text in part.partition("Assistant:")[::2]]
    return [_dialogue(*texts[:-1], _text(record, "output").strip())]


def _moss(record: Record) -> list[str]:
    texts = []
    chat = record.get("chat")
    for turn in chat.values() if isinstance(chat, Mapping) else ():
        if turn:  # Arrow has every turn of the longest chat
            texts.append(_text(turn, "Human").replace("<eoh>", "").replace("<|Human|>: ", "").strip())
            texts.append(_text(turn, "MOSS").replace("<|MOSS|>:", "").replace("<eom>", "").strip())
    if not texts:
        raise BadRecord("its 'chat' holds no turn")
    return texts


def _moss_dialogue(record: Record) -> list[Dialogue]:
    return [_dialogue(*_moss(record))]


def _moss_turns(record: Record) -> list[Dialogue]:
    texts = _moss(record)
    return [_dialogue(*texts[:end]) for end in range(2, len(texts) + 1, 2)]


_LEETCODE = ("code_with_problem", "code_only", "explanation_only")


def _leetcode(record: Record) -> list[Dialogue]:
    question = _text(record, "code_with_problem").split("```")[0].strip()
    return [_dialogue(question, f"{_text(record, 'code_only')}\n{_text(record, 'explanation_only')}")]


def _squad(record: Record) -> list[Dialogue]:
    """The first question of each paragraph with its first answer; of a paragraph, an article or the whole file."""
    for inner in ("data", "paragraphs"):
        if inner in record:
            return [each for part in _list(record[inner], f"its {inner!r}") for each in _squad(part)]
    questions = _list(record.get("qas"), "its 'qas'")
    if not questions or not (answers := _list(questions[0].get("answers"), "its 'answers'")):
        raise BadRecord("a paragraph has no question with an answer")
    passage, query = _text(record, "context"), _text(questions[0], "question")
    asked = "Read the passage and answer the question below.\n\n"
    asked += f"### Instruction:\n{passage}\n\n### Input:\n{query}\n\n### Response:"
    return [_dialogue(asked, _text(answers[0], "text"))]


def _alpaca_asked(record: Record, columns: Columns) -> list[Message]:
    history = record.get(columns["history"]) if "history" in columns else None
    said = []
    for pair in [] if history is None else _list(history, "its history"):
        if len(_list(pair, "a turn of its history")) != 2 or not all(isinstance(text, str) for text in pair):
            raise BadRecord("a turn of its history is no question with its answer")
        said += pair
    parts = [_text(record, columns["prompt"])]
    parts += [_text(record, columns["query"], optional=True)] if "query" in columns else []
    system = _text(record, columns["system"], optional=True) if "system" in columns else ""
    return _asked(*said, "\n".join(filter(None, parts)), system=system)


def _alpaca(record: Record, columns: Columns) -> list[Dialogue]:
    return [Dialogue((*_alpaca_asked(record, columns), _message(_text(record, columns["response"]))))]


def _alpaca_pair(record: Record, columns: Columns) -> tuple[Dialogue, Dialogue]:
    asked = _alpaca_asked(record, columns)
    chosen, rejected = (Dialogue((*asked, _message(_text(record, columns[key])))) for key in ("chosen", "rejected"))
    return chosen, rejected


_SAID_BY: tuple[Role, ...] = ("user", "assistant", "observation", "function", "system")


def _sharegpt_message(value: Any, tags: Columns) -> Message:
    if not isinstance(value, Mapping):
        raise BadRecord("a message is no object")
    said_by = value.get(tags["role_tag"])
    role: Role | None = next((role for role in _SAID_BY if tags.get(f"{role}_tag") == said_by), None)
    if role is None:
        raise BadRecord(f"a message is of {said_by!r}")
    return _message(_text(value, tags["content_tag"]), role)


def _sharegpt_messages(record: Record, columns: Columns, tags: Columns, answered: bool) -> list[Message]:
    column = columns["messages"]
    messages = [_sharegpt_message(value, tags) for value in _list(record.get(column), f"its {column!r}")]
    system = [Message("system", text)] if (text := _text(record, columns.get("system", ""), optional=True)) else []
    if messages and messages[0].role == "system":
        system = [messages.pop(0)]
    if not messages or len(messages) % 2 == answered:
        raise BadRecord("it does not end with an answer" if answered else "it ends with an answer already")
    raise_unless_alternating(messages)
    return system + messages


def _sharegpt(record: Record, columns: Columns, tags: Columns) -> list[Dialogue]:
    messages = _sharegpt_messages(record, columns, tags, answered=True)
    return [Dialogue(tuple(messages), _tools(record.get(columns.get("tools", ""))))]


def _sharegpt_pair(record: Record, columns: Columns, tags: Columns) -> tuple[Dialogue, Dialogue]:
    asked = _sharegpt_messages(record, columns, tags, answered=False)
    tools = _tools(record.get(columns.get("tools", "")))
    answers = [_sharegpt_message(record.get(columns[key]), tags) for key in ("chosen", "rejected")]
    if not all(answer.role in ANSWERS for answer in answers):
        raise BadRecord("chosen or rejected is no answer")
    return Dialogue((*asked, answers[0]), tools), Dialogue((*asked, answers[1]), tools)


def _openai(record: Record, columns: Columns) -> list[Dialogue]:
    column = columns["messages"]
    messages = [_openai_message(value) for value in _list(record.get(column), f"its {column!r}")]
    if not messages or messages[-1].role not in ANSWERS:
        raise BadRecord("it does not end with an answer")
    return [Dialogue(tuple(messages), _tools(record.get(columns["tools"])))]


def _openai_message(value: Any) -> Message:
    if not isinstance(value, Mapping):
        raise BadRecord("a message is no object")
    roles: Mapping[Any, Role] = {"developer": "system", "tool": "observation", "system": "system", "user": "user"}
    given, content, calls = value.get("role"), value.get("content"), value.get("tool_calls")
    if isinstance(content, list | tuple):
        if not all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content):
            raise BadRecord("a message has content that is no text")
        content = "".join(part["text"] for part in content)
    fields = ("role", "content", "tool_calls", "train", "weight")
    more = {key: each for key, each in value.items() if key not in fields and each is not None}
    if given in roles:
        return Message(roles[given], _text({"content": content}, "content"), more=more)
    if given != "assistant":
        raise BadRecord(f"a message is of {given!r}")
    if not isinstance(flag := value.get("train", True), bool):
        raise BadRecord(f"its 'train' is {flag!r}, not true or false")
    trained = flag and value.get("weight") != 0
    if not calls:
        return _message(_text({"content": content}, "content"), trained=trained, more=more)
    said = [{**call.get("function", call), **({"id": call["id"]} if call.get("id") else {})} for call in calls]
    more |= {"content": content} if content else {}
    return Message("function", json.dumps(said, ensure_ascii=False), trained, more)


def _alpaca_text(record: Record) -> str:
    given = _text(record, "input", optional=True)
    given = f" Input:\n{given}" if given else None  # written as the word None, as AscendSpeed does
    asked = f"{_INSTRUCT}\n\n### Instruction:\n{_text(record, 'instruction')}\n\n###{given}\n\n### Response:"
    return f"{_ASSISTANT}USER: {asked} ASSISTANT: {_text(record, 'output')}"


def _stack_overflow(record: Record) -> str:
    title, question, answer = (_text(record, column) for column in ("title", "question_body", "answer_body"))
    return f"In python, {title}\n### Question:\n{question}\n### Response:\n{answer}\n"


def _wikitext(record: Record) -> str:
    """A paragraph; nothing of a heading."""
    text = _text(record, "text").strip()
    if text.startswith("="):
        return ""
    for cut, whole in _WIKITEXT:
        text = cut.sub(whole, text) if isinstance(cut, re.Pattern) else text.replace(cut, whole)
    return text


_ALPACA = {"prompt": "instruction", "query": "input", "response": "output", "history": None, "system": None}
_SHAREGPT = {"messages": "conversations", "system": "system", "tools": "tools"}
_ALPACA_ASKED = {key: column for key, column in _ALPACA.items() if key != "response"}
_PAIR = {"chosen": "chosen", "rejected": "rejected"}
_FLAG = {"kto_tag": None}
_TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}
# The layouts whose columns have names of their own: how they are read, the default names, which a record may not lack.
_LAYOUTS: Mapping[str, tuple[Callable[..., Any], Mapping[str, str | None], tuple[str, ...]]] = {
    "AlpacaStyleInstructionHandler": (_alpaca, _ALPACA | _FLAG, ("prompt", "response")),
    "SharegptStyleInstructionHandler": (_sharegpt, _SHAREGPT | _FLAG, ("messages",)),
    "AlpacaStylePairwiseHandler": (_alpaca_pair, _ALPACA_ASKED | _PAIR, ("prompt", *_PAIR)),
    "SharegptStylePairwiseHandler": (_sharegpt_pair, _SHAREGPT | _PAIR, ("messages", *_PAIR)),
    "MessagesHandler": (_openai, {"messages": "messages", "tools": "tools"} | _FLAG, ("messages",)),
}


def _fixed(name: str, read: Callable[[Record], Any], own: Template | None, *columns: str) -> Handler:
    needed = tuple(column for column in columns if column != "input")
    return Handler(name=name, read=read, columns=columns, required=needed, own_template=own, is_text=own is None)


_FIXED = {
    handler.name: handler
    for handler in (
        _fixed("GeneralPretrainHandler", partial(_text, column="text"), None, "text"),
        _fixed("AlpacaPretrainHandler", _alpaca_text, None, "instruction", "input", "output"),
        _fixed("StackOverflowPythonPretrainHandler", _stack_overflow, None, "title", "question_body", "answer_body"),
        _fixed("WikitextPretrainHandler", _wikitext, None, "text"),
        _fixed("GeneralInstructionHandler", _general, PROMPTER, "instruction", "input", "output"),
        _fixed("BelleMultiTurnInstructionHandler", _belle, PROMPTER, "instruction", "output"),
        _fixed("MOSSInstructionHandler", _moss_turns, PROMPTER, "chat"),
        _fixed("MOSSMultiTurnHandler", _moss_dialogue, BAICHUAN, "chat"),
        _fixed("LeetcodePythonInstructionHandler", _leetcode, PROMPTER, *_LEETCODE),
        _fixed("VicunaHandler", partial(_sharegpt, columns=_SHAREGPT, tags=_TAGS), VICUNA, "conversations"),
        replace(_fixed("SquadHandler", _squad, SQUAD, "data", "paragraphs", "qas", "context"), required=()),
    )
}
LLAMA_FACTORY = "LlamaFactoryInstructionHandler"  # its datasets are named in a dataset_info.json: `from_dataset_info`
HANDLER_NAMES = (*_FIXED, *_LAYOUTS, LLAMA_FACTORY)


def handler_named(name: str, map_keys: str | None = None) -> Handler:
    """Raises `ProblemError` for an unknown name and for --map-keys that are not such of this handler."""
    if name == LLAMA_FACTORY:
        why = "its datasets are those of a dataset_info.json"
        raise ProblemError.of("--handler-name", name, why, "give --dataset-dir", "requires", limit="--dataset-dir")
    if name not in HANDLER_NAMES:
        fix = f"give one of {', '.join(HANDLER_NAMES)}"
        raise ProblemError.of("--handler-name", name, "there is no such handler", fix, "choice", limit=HANDLER_NAMES)
    if name in _FIXED:
        if map_keys is not None:
            fix = f"leave it out, or give one of {', '.join(_LAYOUTS)}"
            why = f"the columns of {name} have no other names"
            raise ProblemError.of("--map-keys", map_keys, why, fix, "excludes", ("handler_name",), name)
        return _FIXED[name]
    try:
        given = json.loads(map_keys or "{}")
    except (ValueError, RecursionError) as error:
        why, fix = f"it is not JSON: {error}", 'write it as {"prompt": "question"}'
        raise ProblemError.of("--map-keys", map_keys, why, fix, "format") from error
    return _mapped(name, given, "--map-keys", _LAYOUTS[name][1])


def _mapped(name: str, given: Any, option: str, defaults: Mapping[str, str | None]) -> Handler:
    """The handler of a layout with the columns `given` in place of `defaults`."""
    read, known, needed = _LAYOUTS[name]
    tagged = "sharegpt" in read.__name__
    problems: list[Problem] = []

    def wrong(value: object, why: str, limit: object = None) -> None:
        fix = f"give an object of columns by {', '.join(known)}" + (f", tags by {', '.join(_TAGS)}" if tagged else "")
        problems.append(Problem(option, value, why, fix, "choice", ("handler_name",), limit))

    if not isinstance(given, dict):
        wrong(given, "it is no JSON object")
        raise ProblemError(problems)
    columns, tags = dict(given), dict(_TAGS)
    if tagged and "tags" in columns:
        named = columns.pop("tags")
        tags = named if isinstance(named, dict) else {}
        for key in {*tags} - {*_TAGS}:
            wrong(key, f"{name} has no such tag", tuple(_TAGS))
        for key in ("role_tag", "content_tag", "user_tag", "assistant_tag"):  # one that is not listed is none
            if not isinstance(tags.get(key), str):
                wrong(key, "tags must name it", tuple(_TAGS))
    for key, column in columns.items():
        if key not in known:
            wrong(key, f"{name} has no such key", tuple(known))
        elif not isinstance(column, str):
            wrong(f"{key} = {column}", "it is no name of a column")
    raise_all(problems)
    found = {key: column for key, column in {**defaults, **columns}.items() if column is not None}
    raise_all(Problem(option, key, f"{name} needs it", "name it", "missing") for key in needed if key not in found)
    required = tuple(found[key] for key in dict.fromkeys((*needed, *columns)))
    reading = partial(read, columns=found, tags=tags) if tagged else partial(read, columns=found)
    handler = Handler(name=name, read=reading, columns=tuple(found.values()), required=required)
    flags = (found["kto_tag"],) if "kto_tag" in found else handler.flags
    return replace(handler, pairwise=set(_PAIR) <= set(known), flags=flags)


def from_dataset_info(directory: Path, name: str) -> tuple[Path, Handler]:
    """The file of a dataset that LLaMA-Factory's dataset_info.json names, and how its records are read. Raises
    `ProblemError` for a dataset that is not there, not local, or in a layout that is not known."""
    path = directory / "dataset_info.json"
    try:
        info = read_json(path)
    except (OSError, ValueError) as error:
        fix = "give the directory of a dataset_info.json"
        raise ProblemError.of("--dataset-dir", directory, f"{path.name}: {error}", fix, "unreadable") from error
    if not isinstance(info, dict) or not isinstance(entry := info.get(name), dict):
        names = ", ".join(info) if isinstance(info, dict) else "no object"
        raise ProblemError.of("--input", name, f"{path} has {names}", "give one of its datasets", "choice")
    if not isinstance(file := entry.get("file_name"), str):
        raise ProblemError.of("--input", name, f"{path} names no file of it", "download it; give file_name")
    style = {"alpaca": "AlpacaStyle", "sharegpt": "SharegptStyle"}.get(entry.get("formatting", "alpaca"))
    if style is None:
        why = f"{path}: its formatting is {entry['formatting']!r}"
        raise ProblemError.of("--input", name, why, "alpaca and sharegpt are known", "choice")
    kind = f"{style}{'PairwiseHandler' if entry.get('ranking') else 'InstructionHandler'}"
    columns = entry.get("columns")
    # Where columns are given, one that is not listed is none; the messages and the answers of a pair are always there.
    defaults = _LAYOUTS[kind][1] if columns is None else {"messages": "conversations", **_PAIR}
    defaults = {key: column for key, column in defaults.items() if key in _LAYOUTS[kind][1]}
    given = {**(columns or {}), **({"tags": entry["tags"]} if entry.get("tags") else {})}
    return directory / file, replace(_mapped(kind, given, str(path), defaults), name=LLAMA_FACTORY)
