"""Templates: how messages are written for a model.

Owns the values of --prompt-type, literally, and what is done with a tokenizer's own chat template. Knows no token id.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from cordee.data.messages import ANSWERS, BadRecord, Dialogue, Message, calls_of, raise_unless_alternating, tools_of
from cordee.errors import ProblemError
from cordee.tokenizer.special import NAMES, chat_sources, read_special_tokens

if TYPE_CHECKING:
    import jinja2

MOST_TEXT = 1 << 24  # characters that a template may write
OPEN, CLOSE = "\ufdd1", "\ufdd2"  # stand in no text: around what the model writes, while a template is examined
_REASONING = ("reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True)
class Special:
    """A token looked up as it is: by its text or id, "bos_token" and "eos_token" by role."""

    token: str | int


BOS, EOS = Special("bos_token"), Special("eos_token")
Piece: TypeAlias = str | Special  # each text is tokenized by itself
Pieces: TypeAlias = tuple[Piece, ...]
Objects: TypeAlias = list[dict[str, Any]]  # as OpenAI has messages and tools


@dataclass(frozen=True, kw_only=True)
class PromptTemplate:
    """A template of pieces, in which {c} is a message's content, {idx} the number of its turn from 0 on, {name} and
    {args} those of a tool call. The first turn begins with `prefix` and the system text, each later one with
    `separator`.

    efficient_eos: what follows an answer is to be predicted as eos instead of an eos that is written. replace_eos: eos
    is the first stop word. system_in_user: the system text is glued to the first user message's."""

    user: Pieces = ("{c}",)
    assistant: Pieces = ("{c}", EOS)
    system: Pieces = ("{c}",)
    separator: Pieces = ()
    prefix: Pieces = ()
    observation: Pieces | None = None
    function: Pieces = ("Action: {name}\nAction Input: {args}",)
    stop_words: tuple[str, ...] = ()
    efficient_eos: bool = False
    replace_eos: bool = False
    default_system: str = ""
    system_in_user: bool = False
    last_only: bool = False

    @property
    def pieces(self) -> Pieces:
        slots = (self.prefix, self.system, self.separator, self.user, self.observation or (), self.assistant)
        return sum((*slots, self.function), start=())

    @property
    def special(self) -> list[str]:
        """The tokens that it looks up by their text, each once."""
        named = [piece.token for piece in self.pieces if isinstance(piece, Special) and piece not in (BOS, EOS)]
        return list(dict.fromkeys(token for token in named if isinstance(token, str)))

    @property
    def written(self) -> str:
        """All text that is the template's own."""
        return "\n".join([*(str(getattr(piece, "token", piece)) for piece in self.pieces), *self.stop_words])

    def turns(self, dialogue: Dialogue) -> list[tuple[Pieces, Pieces]]:
        """What comes before each answer, and the answer; none behind a message that awaits it."""
        messages, system = list(dialogue.messages), ""
        if messages and messages[0].role == "system":
            system = messages.pop(0).content
        system = (system or self.default_system) + (_tools_text(dialogue.tools) if dialogue.tools else "")
        turns: list[tuple[Pieces, Pieces]] = []
        before: Pieces = self.prefix
        if system and not self.system_in_user:
            before += _filled(self.system, c=system)
        glued = str(_filled(self.system, c=system)[0]) if system and self.system_in_user else ""
        raise_unless_alternating(messages)
        for i, message in enumerate(messages):
            if lost := [key for key in ("content", *_REASONING) if message.more.get(key)]:
                raise BadRecord(f"--prompt-type has no place for {lost[0]}; the tokenizer's own template may have")
            if message.role in ANSWERS:
                turns[-1] = (turns[-1][0], self._answer(message))
                continue
            slot = self.user if message.role == "user" else self.observation or self.user
            before = before if i == 0 else self.separator
            turns.append((before + _filled(slot, c=glued + message.content, idx=str(i // 2)), ()))
            glued = ""
        return turns

    def _answer(self, message: Message) -> Pieces:
        if message.role == "assistant":
            return _filled(self.assistant, c=message.content)
        calls = [
            _filled(self.function, name=call["name"], args=json.dumps(call["arguments"], ensure_ascii=False))
            for call in calls_of(message.content)
        ]
        text = "\n".join(str(piece) for call in calls for piece in call)
        return (text,) if self.efficient_eos else (text, EOS)


def _filled(slot: Pieces, **values: str) -> Pieces:
    """The pieces of a slot with their values, which are not looked into."""

    def value(found: re.Match[str]) -> str:
        return values[found[1]]

    filled = (re.sub(r"\{(c|idx|name|args)\}", value, piece) if isinstance(piece, str) else piece for piece in slot)
    return tuple(filter(None, filled))


def _tools_text(tools: str) -> str:
    """LLaMA-Factory's default form of tools."""
    text, names = "", []
    for tool in tools_of(tools):
        names.append(tool["name"])
        parameters = tool.get("parameters") or {}
        required = parameters.get("required") or ()
        lines = ""
        for name, each in (parameters.get("properties") or {}).items():
            need = ", required" if name in required else ""
            choice = f", should be one of [{', '.join(map(str, each['enum']))}]" if each.get("enum") else ""
            item = f", where each item should be {each['items'].get('type', '')}" if each.get("items") else ""
            lines += f"  - {name} ({each.get('type', '')}{need}): {each.get('description', '')}{choice}{item}\n"
        description = tool.get("description", "")
        text += f"> Tool Name: {tool['name']}\nTool Description: {description}\nTool Args:\n{lines}\n"
    return (
        f"You have access to the following tools:\n{text}Use the following format if using a tool:\n```\n"
        f"Action: tool name (one of [{', '.join(names)}]).\nAction Input: the input to the tool, in a JSON format "
        'representing the kwargs (e.g. ```{"input": "hello world", "num_beams": 5}```).\n```\n'
    )


def _chatml(default_system: str = "", stop_words: tuple[str, ...] = ("<|im_end|>", "<|im_start|>")) -> PromptTemplate:
    return PromptTemplate(
        user=("<|im_start|>user\n{c}<|im_end|>\n<|im_start|>assistant\n",),
        system=("<|im_start|>system\n{c}<|im_end|>\n",),
        separator=("\n",),
        default_system=default_system,
        stop_words=stop_words,
        replace_eos=True,
    )


def _chatglm3(**fields: Any) -> PromptTemplate:
    return PromptTemplate(
        user=(Special("<|user|>"), "\n", "{c}", Special("<|assistant|>")),
        assistant=("\n", "{c}"),
        observation=(Special("<|observation|>"), "\n", "{c}", Special("<|assistant|>")),
        stop_words=("<|user|>", "<|observation|>"),
        efficient_eos=True,
        **fields,
    )


_GLM = (Special("[gMASK]"), Special("sop"))
_MISTRAL = PromptTemplate(prefix=(BOS,), user=("[INST] {c} [/INST]",))
_DEEPSEEK = PromptTemplate(prefix=(BOS,), user=("User: {c}\n\nAssistant:",), system=("{c}\n\n",))
_HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"
_ROUND = ("[Round {idx}]\n\n问：{c}\n\n答：",)
PROMPT_TYPES: Mapping[str, PromptTemplate] = {
    "default": PromptTemplate(user=("Human: {c}\nAssistant: ",), system=("{c}\n",), separator=("\n",)),
    "empty": PromptTemplate(assistant=("{c}",)),
    "chatglm2": PromptTemplate(prefix=_GLM, user=_ROUND, assistant=("{c}",), separator=("\n\n",), efficient_eos=True),
    "chatglm3": _chatglm3(prefix=_GLM, system=(Special("<|system|>"), "\n", "{c}")),
    "chatglm3_system": _chatglm3(
        system=(*_GLM, Special("<|system|>"), "\n", "{c}"),
        function=("{name}\n{args}",),
        default_system="You are ChatGLM3, a large language model trained by Zhipu.AI. Follow the user's instructions "
        "carefully. Respond using markdown.",
    ),
    "glm4": PromptTemplate(
        prefix=("[gMASK]<sop>",),
        user=("<|user|>\n{c}<|assistant|>",),
        assistant=("\n{c}",),
        system=("<|system|>\n{c}",),
        stop_words=("<|user|>", "<|observation|>"),
        efficient_eos=True,
    ),
    "chatml": _chatml(),
    "chatml_de": _chatml("Du bist ein freundlicher und hilfsbereiter KI-Assistent."),
    "qwen": _chatml("You are a helpful assistant.", ("<|im_end|>",)),
    "llama2": PromptTemplate(
        user=(BOS, "[INST] {c} [/INST]"), system=("<<SYS>>\n{c}\n<</SYS>>\n\n",), system_in_user=True
    ),
    "llama3": PromptTemplate(
        prefix=(BOS,),
        user=(_HEADER.format("user") + "{c}<|eot_id|>" + _HEADER.format("assistant"),),
        system=(_HEADER.format("system") + "{c}<|eot_id|>",),
        stop_words=("<|eot_id|>",),
        replace_eos=True,
    ),
    "mistral": _MISTRAL,
    "mixtral": _MISTRAL,
    "gemma": PromptTemplate(
        prefix=(BOS,),
        user=("<start_of_turn>user\n{c}<end_of_turn>\n<start_of_turn>model\n",),
        assistant=("{c}",),
        separator=("<end_of_turn>\n",),
        efficient_eos=True,
    ),
    "alpaca": PromptTemplate(
        user=("### Instruction:\n{c}\n\n### Response:\n",),
        separator=("\n\n",),
        default_system="Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n",
    ),
    "deepseek2": _DEEPSEEK,
    "deepseek2-lite": _DEEPSEEK,
}


def template_named(prompt_type: str) -> PromptTemplate:
    """Raises `ProblemError` for an unknown name."""
    if prompt_type not in PROMPT_TYPES:
        fix = f"give one of {', '.join(PROMPT_TYPES)}"
        raise ProblemError.of("--prompt-type", prompt_type, "there is no such template", fix, "choice")
    return PROMPT_TYPES[prompt_type]


@dataclass(frozen=True)
class Span:
    """Where an answer stands in a text. `message` is its number in the dialogue. `closed`: a token that ends it
    belongs to it. `proved`: the text before it is what the model is given at inference."""

    start: int
    end: int
    message: int
    closed: bool = True
    proved: bool = True


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """A Jinja template as `transformers` renders it, which writes a dialogue as one text.

    tool_source: the one that is taken if there are tools. variables: what it may name, such as bos_token, and
    enable_thinking. around: the tokenizer puts its own special tokens around the text. last_only: only the last answer
    is trained. efficient_eos: what follows an answer without an end is to be predicted as eos."""

    source: str
    tool_source: str | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)
    around: bool = False
    last_only: bool = False
    efficient_eos: bool = True

    @property
    def written(self) -> str:
        """All text that is the template's own."""
        return self.source + (self.tool_source or "")

    def text(self, dialogue: Dialogue, *, generation: bool = False) -> str:
        """The dialogue as text; with `generation`, as the model is given it to write the next message."""
        return self._render(*self._variables(dialogue), generation=generation)

    def spans(self, dialogue: Dialogue, ends: re.Pattern[str]) -> tuple[str, list[Span]]:
        """The dialogue as text, and where the answers in it are. `ends` matches tokens that may end one.

        They are what `{% generation %}` encloses; in a template without it, what is rendered more if the answer is
        there than when the model is asked for it, up to the token behind its text that ends it."""
        messages, tools = self._variables(dialogue)
        whole = self._render(messages, tools)
        answers = [i for i, message in enumerate(dialogue.messages) if message.role in ANSWERS]
        if re.search(r"\{%-?\s*generation\b", self._source(tools)):
            return whole, self._marked_spans(whole, self._render(messages, tools, marks=(OPEN, CLOSE)), answers)
        spans = []
        for i in answers:
            asked = self._render(messages[:i], tools, generation=True)
            shown = self._render(messages[: i + 1], tools)
            end, closed = self._end(shown, len(asked), messages[: i + 1], tools, ends)
            proved = shown.startswith(asked) and whole.startswith(shown[:end]) and end > len(asked)
            spans.append(Span(len(asked), end, i, closed, proved))
        return whole, spans

    def _end(self, shown: str, start: int, messages: Objects, tools: Any, ends: re.Pattern[str]) -> tuple[int, bool]:
        """Where the last answer of `shown` ends: at the first end token, or the last if the template looks inside."""
        *before, answer = messages
        text, at = "" if "tool_calls" in answer else answer["content"], -1
        for marked in filter(None, dict.fromkeys((text, text.rstrip()))):  # a template may strip it
            marked = self._render([*before, answer | {"content": marked + CLOSE}], tools)
            if marked.replace(CLOSE, "") == shown:
                at = marked.find(CLOSE)
                break
        found = [match.end() for match in ends.finditer(shown, max(start, at))]
        if found:
            return (found[-1] if at < 0 else found[0]), True
        return (at if at >= 0 and self.efficient_eos else len(shown)), False

    def _marked_spans(self, whole: str, marked: str, answers: list[int]) -> list[Span]:
        parts = re.split(f"[{OPEN}{CLOSE}]", marked)
        if "".join(parts) != whole or len(parts) != 2 * len(answers) + 1:
            raise BadRecord(f"the chat template's generation tags enclose {len(parts) // 2} of {len(answers)} answers")
        at, spans = 0, []
        for before, answer, i in zip(parts[::2], parts[1::2], answers, strict=False):
            spans.append(Span(at + len(before), at + len(before) + len(answer), i))
            at = spans[-1].end
        return spans

    def _variables(self, dialogue: Dialogue) -> tuple[Objects, Objects | None]:
        """Messages and tools as OpenAI has them."""
        tools = [{"type": "function", "function": one} for one in tools_of(dialogue.tools)] if dialogue.tools else None
        if tools and not self._writes_tools:
            raise BadRecord("the chat template has no place for tools")
        return [self._message(message) for message in dialogue.messages], tools

    def _message(self, message: Message) -> dict[str, Any]:
        if message.role != "function":
            role = "tool" if message.role == "observation" else message.role
            return {"role": role, "content": message.content, **message.more}
        if self._arguments is None:
            raise BadRecord("the chat template has no place for tool calls")
        calls = [self._arguments(call) for call in calls_of(message.content)]
        return {"role": "assistant", **message.more, "tool_calls": calls}

    @cached_property
    def _arguments(self) -> Callable[[dict[str, Any]], dict[str, Any]] | None:
        """How the template takes a call: arguments as an object, as JSON where it writes Python, None if neither."""
        for form in (_call_of_object, _call_of_text):
            call = form({"name": "probe", "arguments": {"probed": "value"}, "id": "probed000"})
            probe = [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [call]}]
            try:
                shown = self._render(probe, None)
            except BadRecord:
                continue
            if "value" in shown and "'value'" not in shown and '\\"value' not in shown:
                return form
        return None

    @cached_property
    def _writes_tools(self) -> bool:
        tool = {"type": "function", "function": {"name": "probed", "description": "", "parameters": {}}}
        return "probed" in self._render([{"role": "user", "content": "x"}], [tool])

    def _source(self, tools: Any) -> str:
        return self.tool_source if tools and self.tool_source is not None else self.source

    @cached_property
    def _compiled(self) -> "dict[str, jinja2.Template]":
        from cordee.data.chat_environment import compiled

        return {source: compiled(source) for source in (self.source, self.tool_source) if source is not None}

    def _render(
        self, messages: Objects, tools: Any, *, generation: bool = False, marks: tuple[str, str] = ("", "")
    ) -> str:
        from cordee.data.chat_environment import REFUSALS

        template = self._compiled[self._source(tools)]
        given = {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": generation}
        parts, size = [], 0
        try:
            for part in template.generate(**self.variables, **given, generation_marks=marks):
                parts.append(part)
                if (size := size + len(part)) > MOST_TEXT:
                    raise BadRecord(f"the chat template writes more than {MOST_TEXT:,} characters")
        except REFUSALS as error:
            raise BadRecord(f"the chat template refuses the dialogue: {error}") from error
        return "".join(parts)

    def __getstate__(self) -> dict[str, Any]:
        return {each.name: getattr(self, each.name) for each in fields(self)}  # what is compiled stays here


Template: TypeAlias = PromptTemplate | ChatTemplate


def _call_of_object(call: dict[str, Any]) -> dict[str, Any]:
    more = {"id": call["id"]} if "id" in call else {}
    return {**more, "type": "function", "function": {"name": call["name"], "arguments": call["arguments"]}}


def _call_of_text(call: dict[str, Any]) -> dict[str, Any]:
    return _call_of_object(call | {"arguments": json.dumps(call["arguments"], ensure_ascii=False)})


def chat_template(directory: Path, **variables: Any) -> ChatTemplate:
    """The tokenizer's own template, with further variables for it, such as enable_thinking. Raises `ProblemError` if
    the directory has none that can be used."""
    sources = chat_sources(directory)
    if "default" not in sources:
        named = f"; it has {', '.join(sources)}" if sources else ""
        why, fix = f"its tokenizer has no default chat template{named}", "give --prompt-type"
        raise ProblemError.of("--hf-chat-template", directory, why, fix, "missing")
    named = {name: token for name, token in read_special_tokens(directory, {}).named.items() if name in NAMES}
    template = ChatTemplate(
        source=sources["default"], tool_source=sources.get("tool_use"), variables={**named, **variables}
    )
    template._compiled  # noqa: B018  # raises what is wrong with it now
    return template
