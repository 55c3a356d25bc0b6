"""A teacher behind an OpenAI-compatible endpoint: it sees every candidate in full and writes in its own words."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from PIL import Image

from retrv_r1_retriever.errors import ImageError
from retrv_r1_retriever.images import ImageSource, image_reference
from retrv_r1_retriever.prompt import escape
from retrv_r1_retriever.types import Content, ImageInput
from retrv_r1_training.endpoint import ChatEndpoint, Completion, EndpointError
from retrv_r1_training.freetext import HINT, PROMPT_VERSION, SYSTEM, Unreadable, read_thought
from retrv_r1_training.labelled import LabelledList
from retrv_r1_training.synthesize import Cost, Written

_CHARS_PER_TOKEN = 4  # of English text, for the estimate
_PIXELS_PER_TOKEN = 28 * 28  # Qwen2.5-VL's; other models count pictures otherwise
_TOKENS_OUT = 60, 10, 35  # of the headings and hypothesis; of a verdict; of an inspection. Ours, for the estimate


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """max_tokens: of one answer; max_pixels: a larger picture is scaled down; max_chars: of a candidate's text

    hint: tell the teacher the right answer. More is admitted, but its reasons are found afterwards; off, it has to solve the query
    """

    max_inspections: int = 4
    max_tokens: int = 4096
    temperature: float = 0.7
    max_pixels: int = 200_704
    max_chars: int = 2_000
    hint: bool = False


@dataclass(frozen=True)
class ChatTeacher:
    """One request per answer; the seed of a request is the number of the attempt."""

    endpoint: ChatEndpoint
    images: ImageSource
    options: ChatOptions = ChatOptions()
    licence: str = ""
    pays: bool = True

    @property
    def name(self) -> str:
        return self.endpoint.options.model

    def prompt_hash(self, task: LabelledList) -> str:
        """Covers all that is asked; a picture counts by its reference, so that nothing is opened."""
        parts = [p if isinstance(p, str) else image_reference(p.image) for p in self._parts(task)]
        sampling = self.options.temperature, self.options.max_tokens, self.options.max_pixels
        body = dict(self.endpoint.options.body)
        shown = json.dumps([PROMPT_VERSION, self.name, self._system, parts, sampling, body], sort_keys=True)
        return hashlib.blake2b(shown.encode(), digest_size=16).hexdigest()

    def estimate(self, task: LabelledList) -> Cost:
        contents = [task.query.content, *(c.document.content for c in task.candidates)]
        pictures = sum(c.image is not None for c in contents)
        text = len(self._system) + sum(len(p) for p in self._parts(task) if isinstance(p, str))
        fixed, verdict, inspection = _TOKENS_OUT
        out = fixed + verdict * len(task.candidates) + inspection * min(2, self.options.max_inspections)
        return Cost(text // _CHARS_PER_TOKEN + pictures * (self.options.max_pixels // _PIXELS_PER_TOKEN), out)

    async def write(self, task: LabelledList, attempt: int) -> Written:
        """Raises `EndpointError` if there is no answer at all."""
        try:
            parts = [await self._part(p) for p in self._parts(task)]
        except ImageError as error:
            raise EndpointError(f"query {task.query_id}: {error}", "unreadable_picture") from error
        messages: list[dict[str, Any]] = [
            {"role": "system", "content": self._system},
            {"role": "user", "content": parts},
        ]
        body = {"temperature": self.options.temperature, "max_tokens": self.options.max_tokens, "seed": attempt}
        return self._read(await self.endpoint.ask(messages, body), len(task.candidates))

    def _read(self, answer: Completion, count: int) -> Written:
        cost = Cost(answer.tokens_in, answer.tokens_out)
        if answer.refusal or answer.finish == "content_filter":
            return Written(None, "refused", answer.refusal or answer.text, cost)
        if answer.finish == "length":
            return Written(None, "cut_by_length", answer.text, cost)
        if not answer.text.strip():
            return Written(None, "empty_answer", answer.text, cost)
        try:
            return Written(read_thought(answer.text, count, hinted=self.options.hint), None, answer.text, cost)
        except Unreadable as error:
            return Written(None, str(error), answer.text, cost)

    @property
    def _system(self) -> str:
        return SYSTEM.format(max_inspections=self.options.max_inspections)

    def _parts(self, task: LabelledList) -> Iterator[str | _Picture]:
        yield f"Query: {escape(task.query.instruction or '')} ".replace("  ", " ")
        yield from self._content(task.query.content)
        yield "\n\nCandidates:"
        for number, candidate in enumerate(task.candidates):
            yield f"\nc{number}: "
            yield from self._content(candidate.document.content)
        if self.options.hint:
            yield "\n\n" + HINT.format(answer=f"c{task.right[0]}" if task.right else "none")

    def _content(self, content: Content) -> Iterator[str | _Picture]:
        if content.text:
            yield " ".join(escape(content.text[: self.options.max_chars]).split())
        if content.image is not None:
            yield _Picture(content.image)

    async def _part(self, part: str | _Picture) -> dict[str, Any]:
        if isinstance(part, str):
            return {"type": "text", "text": part}
        picture = (await self.images.load(part.image)).image
        return {"type": "image_url", "image_url": {"url": _data_uri(picture, self.options.max_pixels)}}


@dataclass(frozen=True, slots=True)
class _Picture:
    image: ImageInput


def _data_uri(picture: Image.Image, max_pixels: int) -> str:
    share = (max_pixels / (picture.width * picture.height)) ** 0.5
    if share < 1:
        picture = picture.resize((max(1, int(picture.width * share)), max(1, int(picture.height * share))))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
