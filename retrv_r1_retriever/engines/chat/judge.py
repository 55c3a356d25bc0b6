"""Reading a whole list by one request, or by as few as the server allows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from retrv_r1_retriever.engines.chat import messages as say
from retrv_r1_retriever.engines.chat.messages import Asked, Message, Shown
from retrv_r1_retriever.engines.chat.replies import Checked, Reading, clean, merge, name, parse_reading, reading_schema
from retrv_r1_retriever.engines.chat.server import ChatServer, NoPictures, Reply, TooLarge
from retrv_r1_retriever.errors import EngineError, explain
from retrv_r1_retriever.prompt import Prompt
from retrv_r1_retriever.reranker import bounded
from retrv_r1_retriever.session import GenerateParams

PARTS_AT_ONCE = 4
_TOKENS_PER_CANDIDATE, _TOKENS_BESIDE = 48, 256
_REASONING_CHARS = 4000


@dataclass(slots=True, eq=False)
class ChatHandle:
    """One list in work. turns: the conversation that checks continue; opened: the candidate appended and not yet checked."""

    prompt: Prompt
    shown: tuple[Shown, ...]
    asked: Asked
    prompt_tokens: int = 0
    said: list[str] = field(default_factory=list)
    requests: int = 0
    written: int = 0
    reading: Reading | None = None
    reasoning: str = ""
    turns: list[Message] = field(default_factory=list)
    parts: int = 1
    told: bool = False
    opened: tuple[int, Message] | None = None
    checks: dict[int, Checked] = field(default_factory=dict)
    asked_for: set[int] = field(default_factory=set)
    queue: tuple[int, ...] = ()
    answer: int | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """For the trace."""
        cost = f"requests: {self.requests}; tokens by the server's count: {self.prompt_tokens} sent, {self.written} written"
        return (*dict.fromkeys(self.said), *([cost] if self.requests else []))


class ListJudge:
    """Asks one server. What it learns about the server's limits holds for every later list."""

    def __init__(self, server: ChatServer) -> None:
        self._server = server

    async def read(self, handle: ChatHandle) -> Reading:
        if handle.reading is None:
            reading = await self._judge(handle, range(len(handle.shown)))
            if not reading.grades and reading.answer is None:
                raise EngineError("the model was shown no candidate. " + "; ".join(dict.fromkeys(handle.said)))
            if not reading.grades:
                handle.said.append(
                    "the model named an answer and judged nothing: the rest stays as retrieved (promote)"
                )
            elif reading.answer is None:
                best = max(reading.grades, key=lambda i: (reading.grades[i].value, -i))
                reading = replace(reading, answer=best)
                handle.said.append("the model named no answer: the highest grade was taken for it")
            handle.reading, handle.answer, handle.queue = reading, reading.answer, reading.open
            if handle.parts > 1:
                handle.said.append(f"read in {handle.parts} requests, whose grades are compared as they are")
                handle.turns = self.summary(handle)
        return handle.reading

    async def _judge(self, handle: ChatHandle, indices: Sequence[int]) -> Reading:
        """All at once if the server takes that; else in parts as it takes. The first goes alone: it meets what is wrong with all."""
        while True:
            indices = self._readable(handle, indices)
            if not indices:
                return Reading()
            parts, with_pictures = self._parts(handle, indices), self._server.known.pictures
            try:
                first = await self._judge_part(handle, parts[0])
                break
            except NoPictures:
                if not with_pictures:
                    raise
                self._server.known.pictures = False
            except TooLarge as error:
                self._learn(handle, parts[0], error)
        handle.parts += len(parts) - 1
        rest = await bounded(lambda part: self._judge_rest(handle, part), parts[1:], PARTS_AT_ONCE)
        return merge([first, *rest])

    async def _judge_rest(self, handle: ChatHandle, part: Sequence[int]) -> Reading:
        """One lost part does not cost the others: its candidates stay unread."""
        try:
            return await self._judge(handle, part)
        except EngineError as error:
            handle.said.append(f"candidates {name(part[0])} to {name(part[-1])} were not judged: {error}")
            return Reading()

    async def _judge_part(self, handle: ChatHandle, part: Sequence[int]) -> Reading:
        pictures = self._takes_pictures(handle)
        shown = [handle.shown[i] if pictures else replace(handle.shown[i], picture=None) for i in part]
        turns, schema = say.list_messages(shown, handle.asked), reading_schema(part)
        tokens = _TOKENS_BESIDE + _TOKENS_PER_CANDIDATE * len(part)
        reply = await self.ask(handle, turns, schema, tokens)
        reading = parse_reading(reply.text, part, reply.top)
        if missing := [i for i in part if i not in reading.grades]:
            turns = [*turns, say.assistant_message(reply.text), say.again_message(missing)]
            try:
                reply = await self.ask(handle, turns, schema, tokens)
                reading = merge([reading, parse_reading(reply.text, missing, reply.top)])
            except EngineError:
                if not reading.grades and reading.answer is None:
                    raise
        if not reading.grades and reading.answer is None:
            fix = "Use a model that can write JSON."
            got = repr(" ".join(reply.text.split())[:200])
            raise EngineError(explain("reply", expected="verdicts as JSON", got=got, fix=fix))
        handle.turns = [*turns, say.assistant_message(reply.text)]
        handle.reasoning = handle.reasoning or clean(reply.reasoning, _REASONING_CHARS)
        return reading

    def _readable(self, handle: ChatHandle, indices: Sequence[int]) -> tuple[int, ...]:
        """Candidates that have something to show on this server."""
        known = self._server.known
        if handle.asked.picture is not None and (not known.pictures or known.images == 0):
            got = f"{self._server.model!r}, which takes no pictures"
            fix = "Use another model, or a query in words."
            raise EngineError(explain("query picture", expected="a vision-language model", got=got, fix=fix))
        if self._takes_pictures(handle):
            return tuple(i for i in indices if handle.shown[i].text or handle.shown[i].picture)
        hidden = sum(one.picture is not None for one in handle.shown)
        if hidden:
            handle.said.append(
                f"the server leaves no room for pictures: {hidden} candidates were shown as text, if they have any"
            )
        return tuple(i for i in indices if handle.shown[i].text)

    def _takes_pictures(self, handle: ChatHandle) -> bool:
        room = self._server.known.images
        return self._server.known.pictures and (room is None or room > _pictures_of(handle.asked))

    def _parts(self, handle: ChatHandle, indices: Sequence[int]) -> list[list[int]]:
        """As few requests as the known limits allow, in first-stage order."""
        known, parts, pictures = self._server.known, [[indices[0]]], 0
        room = math.inf if known.images is None else known.images - _pictures_of(handle.asked)
        most = math.inf if known.most is None else known.most
        pictures = 0 if handle.shown[indices[0]].picture is None else 1
        for i in indices[1:]:
            more = 0 if handle.shown[i].picture is None else 1
            if len(parts[-1]) + 1 > most or (pictures + more > room and self._takes_pictures(handle)):
                parts.append([])
                pictures = 0
            parts[-1].append(i)
            pictures += more
        return parts

    def _learn(self, handle: ChatHandle, part: Sequence[int], error: TooLarge) -> None:
        """Remember what the server takes at once. Raises if it takes not even one candidate."""
        known = self._server.known
        sent = _pictures_of(handle.asked) + sum(handle.shown[i].picture is not None for i in part)
        if error.images is not None and sent > error.images and error.images != known.images:
            known.images = error.images
        elif len(part) > 1:
            known.most = len(part) // 2
        else:
            raise EngineError(f"not even one candidate fits into a request: {error}") from error

    async def ask(
        self,
        handle: ChatHandle,
        turns: Sequence[Message],
        schema: Mapping[str, Any],
        tokens: int,
        params: GenerateParams | None = None,
    ) -> Reply:
        temperature, seed = (params.temperature, params.seed) if params else (0.0, 0)
        reply = await self._server.ask(turns, schema, tokens=tokens, temperature=temperature, seed=seed)
        handle.requests += 1
        handle.prompt_tokens += reply.prompt_tokens
        handle.written += reply.tokens
        return reply

    def room_for(self, turns: Sequence[Message], turn: Message) -> bool:
        room = self._server.known.images
        return room is None or sum(map(say.pictures, (*turns, turn))) <= room

    def summary(self, handle: ChatHandle) -> list[Message]:
        return say.summary_messages(handle.shown, handle.asked, handle.reading or Reading(), handle.checks)


def _pictures_of(asked: Asked) -> int:
    return 0 if asked.picture is None else 1
