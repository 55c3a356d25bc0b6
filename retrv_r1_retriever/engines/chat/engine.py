"""Day one: a stock vision-language model behind an OpenAI-compatible server judges the whole list, opens candidates and answers.

    engine = ChatEngine("Qwen/Qwen2.5-VL-7B-Instruct", base_url="http://127.0.0.1:8000/v1")
    results = RetrvR1Reranker(engine, images=LocalImages("pictures")).rerank("a red shoe", documents)

One request asks for a verdict and a grade per candidate: the engine's direct read. An inspection is a new turn of the same
conversation. Grades are what the model states, sharpened by the log-probabilities of their digits where the server offers these.
"""

from __future__ import annotations

import asyncio
import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

from retrv_r1_retriever.engines.base import SlotRead
from retrv_r1_retriever.engines.chat import messages as say
from retrv_r1_retriever.engines.chat.judge import ChatHandle, ListJudge
from retrv_r1_retriever.engines.chat.messages import Asked, Display, Message, Shown
from retrv_r1_retriever.engines.chat.replies import Grade, Reading, check_schema, parse_check
from retrv_r1_retriever.engines.chat.server import ChatServer, ClientTransport, HttpTransport, Known, TooLarge
from retrv_r1_retriever.engines.scripted import log_softmax
from retrv_r1_retriever.errors import ImageError, OptionsError, explain
from retrv_r1_retriever.http import HttpLimits, JsonHttp
from retrv_r1_retriever.images import ImageSource, LocalImages
from retrv_r1_retriever.prompt import (
    DIFFERS,
    INSPECT_END,
    INSPECT_START,
    MATCH,
    NONE,
    NONE_INDEX,
    THINK_END,
    Prompt,
    label,
)
from retrv_r1_retriever.reranker import bounded
from retrv_r1_retriever.session import GenerateParams, Generation
from retrv_r1_retriever.trace import Full, Segment
from retrv_r1_retriever.types import Content, ImageInput

_PICTURES_AT_ONCE = 8
_NO_FILES = LocalImages()


class ChatEngine:
    """Any vision-language model behind an OpenAI-compatible server. Needs no candidate memory and no checkpoint.

    base_url: up to the version, with the extra `http`; or client: an `openai` client object, sync or async
    images: where candidates' pictures come from; by default the reranker's own source
    limits: timeouts and retries of one request (a client object keeps its own retries); `timeout_s` of the call holds as well
    logprobs: ask for log-probabilities; a server that refuses them is not asked again
    """

    max_context: int | None = None
    think_margin: float | None = None
    none_margin: float | None = None
    trained_top_k = trained_min_k = 0
    direct_read = True

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        client: Any = None,
        images: ImageSource | None = None,
        display: Display | None = None,
        limits: HttpLimits | None = None,
        logprobs: bool = True,
    ) -> None:
        if (base_url is None) == (client is None) or (client is not None and api_key is not None):
            fix = "A client brings its own URL and key."
            raise OptionsError(explain("ChatEngine", expected="base_url or client", got="both or neither", fix=fix))
        self.display, self._images = display or Display(), images
        self._http = None if base_url is None else JsonHttp(base_url, api_key=api_key, limits=limits)
        transport = ClientTransport(client, limits or HttpLimits()) if self._http is None else HttpTransport(self._http)
        self._transport = transport
        self._server = ChatServer(transport, model, logprobs=logprobs)
        self._judge = ListJudge(self._server)
        self._server.known.images = self.display.max_images
        where = "client" if base_url is None else urlsplit(base_url).netloc.rpartition("@")[2]
        self.versions = {"engine": "chat", "model": model, "server": where, "prompt": say.CHAT_PROMPT_VERSION}

    def with_images(self, images: ImageSource) -> ChatEngine:
        """The same engine with `images`, unless it was given a source of its own. Connections are shared."""
        if self._images is not None:
            return self
        other = copy.copy(self)
        other._images = images
        return other

    @property
    def known(self) -> Known:
        """What calls so far have taught of the server."""
        return self._server.known

    async def models(self) -> list[str]:
        """Names of the models the server lists. Raises `ServerError`."""
        return await self._transport.models()

    async def aclose(self) -> None:
        if self._http is not None:
            await self._http.aclose()

    # -- the engine --------------------------------------------------------------------------------------------------

    async def open(self, prompt: Prompt) -> ChatHandle:
        """Loads and shrinks the pictures; nothing is sent yet."""
        said: list[str] = []
        contents = [c.document.content for c in prompt.candidates]
        shown = await bounded(lambda i: self._shown(i, contents[i], said), range(len(contents)), _PICTURES_AT_ONCE)
        image = prompt.query.content.image
        picture = None if image is None else await self._picture(image, self.display.full_pixels)
        return ChatHandle(prompt, tuple(shown), Asked(prompt.query, picture), said=said)

    async def probe(self, handle: ChatHandle, suffix: str) -> SlotRead:
        """The stated grades as slots, the named answer first among equals. Not measured: a chat server has no K-way slot."""
        reading = await self._judge.read(handle)
        bonus = {reading.answer: 0.5}

        def score(index: int, stated: float | None) -> float:
            return -math.inf if stated is None else Grade("", stated + bonus.get(index, 0.0)).logprob

        count = len(handle.shown)
        values = [reading.grades[i].value if i in reading.grades else None for i in range(count)]
        none_fits = reading.none_fits
        if not reading.grades and reading.answer is not None:  # the last resort: an answer and nothing else
            values = [9.0 if i == reading.answer else None for i in range(count)]
            none_fits = 9.0 if reading.answer == NONE_INDEX else None
        scores = [*(score(i, value) for i, value in enumerate(values)), score(NONE_INDEX, none_fits)]
        unread = tuple(i for i in range(count) if i not in reading.grades and i != reading.answer)
        return SlotRead(log_softmax(scores), unread)

    async def append(self, handle: ChatHandle, segments: Sequence[Segment]) -> None:
        for segment in segments:
            if isinstance(segment, Full):
                content = segment.content or handle.prompt.candidates[segment.index].document.content
                handle.opened = segment.index, await self._full(handle, segment.index, content)

    async def generate(self, handle: ChatHandle, params: GenerateParams) -> Generation:
        reading = await self._judge.read(handle)
        if params.allowed:
            return Generation(_slot(handle.answer), 1, None)
        if not handle.told:
            handle.told = True
            return self._elimination(handle, reading)
        if handle.opened is None:  # what it wanted to open was refused or could not be loaded
            return _onward(handle, "", 1)
        return await self._check(handle, params)

    async def close(self, handle: ChatHandle) -> None:
        """Nothing is held on the server."""

    # -- opening candidates ------------------------------------------------------------------------------------------

    def _elimination(self, handle: ChatHandle, reading: Reading) -> Generation:
        """What was read, as the first part of a thought; already paid for."""
        head = " ".join(filter(None, (handle.reasoning, reading.looking_for)))
        graded = sorted(reading.grades.items())
        text = (f" {head}" if head else "") + "".join(f"{label(i)} {grade.verdict}" for i, grade in graded)
        return replace(_onward(handle, text, 1), tracked=tuple((i, grade.logprob) for i, grade in graded))

    async def _check(self, handle: ChatHandle, params: GenerateParams) -> Generation:
        assert handle.opened is not None
        index, turn = handle.opened
        everyone = range(len(handle.shown))
        schema, tokens = check_schema(everyone), params.max_new_tokens
        if not self._judge.room_for(handle.turns, turn):
            handle.turns = self._judge.summary(handle)
        try:
            reply = await self._judge.ask(handle, [*handle.turns, turn], schema, tokens, params)
        except TooLarge as error:
            self._server.known.images = self._server.known.images if error.images is None else error.images
            handle.turns = self._judge.summary(handle)
            reply = await self._judge.ask(handle, [*handle.turns, turn], schema, tokens, params)
        checked = parse_check(reply.text, everyone)
        handle.turns = [*handle.turns, turn, say.assistant_message(reply.text)]
        handle.opened, handle.checks[index], handle.queue = None, checked, checked.open
        handle.answer = handle.answer if checked.answer is None else checked.answer
        word = {True: MATCH, False: DIFFERS, None: "undecided"}[checked.match]
        return _onward(handle, f" {checked.text} {word}", max(1, reply.tokens - reply.reasoning_tokens))

    # -- sending and showing -----------------------------------------------------------------------------------------

    async def _shown(self, index: int, content: Content, said: list[str]) -> Shown:
        text, picture = content.text, None
        if content.image is not None:
            try:
                picture = await self._picture(content.image, self.display.thumbnail_pixels)
            except ImageError as error:
                said.append(f"candidate {index} is shown without its picture: {error}")
        cut = text is not None and len(text) > self.display.text_chars
        return Shown(index, text[: self.display.text_chars] if text else None, picture, cut)

    async def _full(self, handle: ChatHandle, index: int, content: Content) -> Message:
        text, picture = content.text, None
        if content.image is not None and self._server.known.pictures:
            picture = await self._picture(content.image, self.display.full_pixels)
        if text is not None and len(text) > self.display.full_chars:
            handle.said.append(
                f"candidate {index} was opened with the first {self.display.full_chars:,} characters of its text"
            )
            text = text[: self.display.full_chars]
        return say.full_message(index, text, picture)

    async def _picture(self, image: ImageInput, pixels: int) -> str:
        decoded = await (self._images or _NO_FILES).load(image)
        return await asyncio.to_thread(say.picture_uri, decoded.image, pixels)


def _onward(handle: ChatHandle, text: str, tokens: int) -> Generation:
    """`text`, then the next candidate the model wants to see, or the end of the thought."""
    wanted = next((i for i in handle.queue if i not in handle.asked_for), None)
    if wanted is None:
        return Generation(text + THINK_END, tokens, THINK_END)
    handle.asked_for.add(wanted)
    return Generation(f"{text}{INSPECT_START}{label(wanted)}{INSPECT_END}", tokens, INSPECT_END)


def _slot(answer: int | None) -> str:
    return "" if answer is None else NONE if answer == NONE_INDEX else label(answer)
