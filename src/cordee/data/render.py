"""Dialogues to token ids and labels.

Owns which tokens are trained. Labels come from where a token stands, never from its id, and text of a message that
looks like a special token stays text."""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from cordee.data.messages import ANSWERS, IGNORED, BadRecord, Dialogue, Message, calls_of, tools_of
from cordee.data.templates import CLOSE, EOS, OPEN, Pieces, PromptTemplate, Template
from cordee.errors import Problem, raise_all
from cordee.tokenizer import Tokenizer
from cordee.tokenizer.base import ESCAPE

_PROBE = (Message("user", "x"), Message("assistant", "y"))


@dataclass(frozen=True)
class Turn:
    """What comes before an answer, and the answer. labels[i] is the id that position i has to be predicted as, not
    shifted; -100 where it is not trained. `unproved` counts answers in `source` that were to be trained but that the
    template writes otherwise once others follow."""

    source: list[int]
    target: list[int]
    source_labels: list[int]
    target_labels: list[int]
    unproved: int = 0


_Part: TypeAlias = tuple[list[int], list[int], bool, int]  # source, target, whether that is trained, unproved


class Renderer:
    """A template for a tokenizer.

    train_on: "assistant" trains answers, "last" the last one, "all" the text before them too. mask_history: only the
    last turn. Raises `ProblemError` if the tokenizer lacks a token that the template needs."""

    def __init__(
        self,
        template: Template,
        tokenizer: Tokenizer,
        *,
        train_on: Literal["assistant", "last", "all"] = "assistant",
        mask_history: bool = False,
    ):
        self.template = template
        self._tokenizer = tokenizer
        self._on_all = train_on == "all"
        self._last_only = mask_history or train_on == "last" or template.last_only
        words = tokenizer.vocabulary()
        named = (*template.stop_words, *template.special) if isinstance(template, PromptTemplate) else ()
        self._ids = {text: i for i, text in words.items() if text in named}
        self.eos = tokenizer.eos
        if isinstance(template, PromptTemplate):
            if template.replace_eos:
                self.eos = self._ids.get(template.stop_words[0])
            raise_all(self._missing(template))
        else:
            roles = {"bos_token": tokenizer.bos, "eos_token": tokenizer.eos, "pad_token": tokenizer.roles.pad}
            known = {role: words[i] for role, i in roles.items() if i is not None}
            self.template = replace(template, variables={**known, **template.variables})
        added = tokenizer.added_tokens()
        special = [text for text, is_special in added.items() if is_special]
        # What marks the structure of a dialogue need not be special (DeepSeek's <｜User｜>), and what is not special an
        # answer may have (<think>).
        own = [text for text in added if text.strip() and text in template.written]
        self._forged = {True: _any_of(special), False: _any_of([*special, *own])}
        self._ends = _any_of([*special, *([] if self.eos is None else [words[self.eos]])])
        plain, around = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a")
        at = next(i for i in range(len(around) + 1) if around[i : i + len(plain)] == plain)
        use = not isinstance(template, PromptTemplate) and template.around
        self._before, self._after = (around[:at], around[at + len(plain) :]) if use else ([], [])

    def _missing(self, template: PromptTemplate) -> list[Problem]:
        lacking = [word for word in template.special if word not in self._ids]
        if self.eos is None and (template.efficient_eos or EOS in template.assistant):
            lacking.append(template.stop_words[0] if template.replace_eos else "eos")
        fix = "give the template of this tokenizer, or add the token to it"
        return [Problem("--prompt-type", word, "the tokenizer has no such token", fix, "missing") for word in lacking]

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer."""
        if isinstance(self.template, PromptTemplate):
            found = [self._ids.get(word) for word in self.template.stop_words]
        else:
            try:
                found = self.turns(Dialogue(_PROBE))[-1].target_labels
            except BadRecord:
                found = []
            found = [i for i in found if i != IGNORED][-1:]
        return tuple(dict.fromkeys(i for i in (self.eos, *found) if i is not None))

    def turns(self, dialogue: Dialogue) -> list[Turn]:
        """Raises `BadRecord` for a dialogue that the template does not take, or of which nothing is trained."""
        answers = [i for i, message in enumerate(dialogue.messages) if message.role in ANSWERS]
        if not answers or answers[-1] != len(dialogue.messages) - 1:
            raise BadRecord("the last message is no answer")
        wanted = {i for i in (answers[-1:] if self._last_only else answers) if dialogue.messages[i].trained}
        dialogue = self._escaped(dialogue)
        if isinstance(self.template, PromptTemplate):
            pieces = zip(answers, self.template.turns(dialogue), strict=True)
            parts = [(self._encode(source), self._encode(target), i in wanted, 0) for i, (source, target) in pieces]
            turns = self._labelled(parts, [not self.template.efficient_eos] * len(parts), [])
        else:
            turns = self._text_turns(dialogue, wanted)
        if not any(label != IGNORED for turn in turns for label in (*turn.source_labels, *turn.target_labels)):
            raise BadRecord("no token of it is trained")
        return turns

    def prompt(self, messages: Sequence[Message], tools: str | None = None) -> list[int]:
        """The ids that a model is given to answer the last message. Raises `BadRecord`."""
        dialogue = self._escaped(Dialogue(tuple(messages), tools))
        if not isinstance(self.template, PromptTemplate):
            return self._before + self._tokenizer.encode_escaped(self.template.text(dialogue, generation=True))
        turns = self.template.turns(dialogue)
        if not turns or turns[-1][1]:
            raise BadRecord("the last message awaits no answer")
        return [i for source, target in turns for i in (*self._encode(source), *self._encode(target))]

    def _encode(self, pieces: Pieces) -> list[int]:
        ids: list[int] = []
        for piece in pieces:
            if isinstance(piece, str):
                ids += self._tokenizer.encode_escaped(piece)
            elif isinstance(piece.token, int):
                ids.append(piece.token)
            else:
                own = {"bos_token": self._tokenizer.bos, "eos_token": self.eos}
                i = own[piece.token] if piece.token in own else self._ids[piece.token]
                ids += [] if i is None else [i]  # a tokenizer without bos needs none
        return ids

    def _text_turns(self, dialogue: Dialogue, wanted: set[int]) -> list[Turn]:
        assert not isinstance(self.template, PromptTemplate)
        text, spans = self.template.spans(dialogue, self._ends)
        if spans[-1].message in wanted and not spans[-1].proved:
            raise BadRecord("the chat template writes the last answer otherwise than it asks for it")
        ids = self._before + self._tokenizer.encode_escaped(text) + self._after
        parts: list[_Part] = []
        closed, at, unproved = [], 0, 0
        borders = self._borders(ids, text, (end for span in spans if span.proved for end in (span.start, span.end)))
        for span in spans:
            if not span.proved:
                unproved += span.message in wanted
                continue
            start = max(at, next(borders))
            end = max(start, next(borders))
            parts.append((ids[at:start], ids[start:end], span.message in wanted, unproved))
            closed.append(span.closed or not self.template.efficient_eos)
            at, unproved = end, 0
        if not parts:
            raise BadRecord("no token of it is trained")
        return self._labelled(parts, closed, ids[at:])

    def _borders(self, ids: list[int], text: str, ends: Iterable[int]) -> Iterator[int]:
        """How many of `ids`, those of a text, are of its beginning up to each of `ends`: none of a token beyond it.

        What is before a special token has ids of its own, so it is tokenized once for all of `ends`, which go up."""
        at, known = 0, len(self._before)
        for end in ends:
            last = max((found.start() for found in self._ends.finditer(text, at, end)), default=at)
            sure = self._tokenizer.encode_escaped(text[at:last])
            if ids[known : known + len(sure)] == sure:
                at, known = last, known + len(sure)
            head = self._tokenizer.encode_escaped(text[at:end])
            pairs = enumerate(zip(head, ids[known:], strict=False))
            yield known + next((i for i, (own, whole) in pairs if own != whole), len(head))

    def _labelled(self, parts: Sequence[_Part], closed: Sequence[bool], rest: list[int]) -> list[Turn]:
        """Turns, each with whether it is trained, and `rest`; eos is to follow a trained answer not `closed`."""
        turns = []
        awaited = False  # an eos in place of the next token
        for n, (source, target, trained, unproved) in enumerate(parts):
            shown = self._on_all and (trained or not self._last_only)
            source_labels = list(source) if shown else [IGNORED] * len(source)
            target_labels = list(target) if trained else [IGNORED] * len(target)
            if awaited and source_labels and self.eos is not None:
                source_labels[0] = self.eos
            awaited = trained and not closed[n]
            if n == len(parts) - 1:
                if not (closed[n] or rest or self.eos is None):
                    rest = [self.eos]
                target = [*target, *rest]
                target_labels += [IGNORED] * len(rest)
                if awaited and rest and self.eos is not None:
                    target_labels[-len(rest)] = self.eos
            turns.append(Turn(source, target, source_labels, target_labels, unproved))
        return turns

    def _escaped(self, dialogue: Dialogue) -> Dialogue:
        """The dialogue with `ESCAPE` in all that looks like a special token."""
        messages, tools = [], dialogue.tools
        for message in dialogue.messages:
            pattern = self._forged[message.role in ANSWERS]
            content = message.content
            if message.role == "function":
                content = json.dumps(_escaped(calls_of(content), pattern), ensure_ascii=False)
            else:
                content = _escaped(content, pattern)
            messages.append(replace(message, content=content, more=_escaped(dict(message.more), pattern)))
        if tools is not None:
            tools = json.dumps(_escaped(tools_of(tools), self._forged[False]), ensure_ascii=False)
        return Dialogue(tuple(messages), tools)


def _any_of(texts: Sequence[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(filter(None, texts), key=len, reverse=True))) or "(?!)")


def _escaped(value: Any, pattern: re.Pattern[str]) -> Any:
    """A value of JSON in whose texts `ESCAPE` stands behind the first character of what the pattern matches."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise BadRecord(f"it is not valid UTF-8: {value[error.start : error.start + 1]!r}") from error
        if any(mark in value for mark in (ESCAPE, OPEN, CLOSE)):
            raise BadRecord("it holds a noncharacter of Unicode, U+FDD0 to U+FDD2")
        return pattern.sub(lambda found: found[0][0] + ESCAPE + found[0][1:], value)
    if isinstance(value, dict):
        return {_escaped(key, pattern): _escaped(each, pattern) for key, each in value.items()}
    return [_escaped(each, pattern) for each in value] if isinstance(value, list | tuple) else value
