"""One call of a chat server, whatever it is: what it does not know is left out, what it cannot take at once is said in a type.

What a server refuses is learned once and kept for later calls (`Known`): parameters, reply formats, pictures, list lengths.
"""

from __future__ import annotations

import asyncio
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from retrv_r1_retriever.engines.chat.messages import Message
from retrv_r1_retriever.engines.chat.replies import Token
from retrv_r1_retriever.errors import EngineError, ServerError, explain
from retrv_r1_retriever.http import HttpLimits, JsonHttp

#: Reply formats, from the one that rules out malformed replies to none at all.
FORMATS = ("json_schema", "json_object", "text")
_OPTIONAL = ("top_logprobs", "logprobs", "temperature", "seed")
_TOP_LOGPROBS = 5  # each one costs bytes at every token; digits beyond the fifth weigh next to nothing
_MODELS_NAMED = 5
_BLANK = 100  # characters; no model indents that far
_TOO_LARGE = re.compile(
    r"context.{0,12}(length|window|size)|maximum.{0,20}(context|tokens|length)|too (many|long|large)"
    r"|reduce the (length|number)|(at most|exceeds?).{0,30}(image|token|context)|n_ctx",
    re.IGNORECASE,
)
_IMAGE_CAP = re.compile(
    r"(?:at most|max\w*(?: \w+)?(?: is| of|:)?) (\d+) ?image|image.{0,40}(?:at most|max\w*(?: is| of|:)?) (\d+)",
    re.IGNORECASE,
)
_NO_PICTURES = re.compile(
    r"not a multimodal model|image.{0,40}not.{0,12}support|not.{0,12}support.{0,40}image|only.{0,12}text"
    r"|no endpoints.{0,30}image|unknown variant `image_url`",
    re.IGNORECASE,
)


class TooLarge(EngineError):
    """More than the server takes in one request. images: how many pictures it takes, if it says."""

    def __init__(self, message: str, images: int | None = None) -> None:
        super().__init__(message)
        self.images = images


class NoPictures(EngineError):
    """The model behind the server reads text only."""


class Refused(EngineError):
    """The model, or a filter around it, declined."""


@dataclass(frozen=True, slots=True)
class Reply:
    """tokens: sampled, reasoning included; cut: the length limit ended it; top: its tokens with alternatives, if offered."""

    text: str
    reasoning: str
    cut: bool
    prompt_tokens: int
    tokens: int
    reasoning_tokens: int
    top: tuple[Token, ...] = ()


@dataclass(slots=True)
class Known:
    """What one server has taught us. most, images: candidates and pictures in one request; None = no limit met yet."""

    format: str = FORMATS[0]
    dropped: set[str] = field(default_factory=set)
    length_name: str = "max_tokens"
    extra_tokens: int = 0
    pictures: bool = True
    most: int | None = None
    images: int | None = None


class Transport(Protocol):
    """How requests get there."""

    async def complete(self, body: dict[str, Any]) -> Any:
        """The decoded answer of `chat/completions`. Raises `ServerError`."""

    async def models(self) -> list[str]:
        """Names of the models there are; empty if the server does not say."""


class HttpTransport:
    def __init__(self, http: JsonHttp) -> None:
        self.http = http

    async def complete(self, body: dict[str, Any]) -> Any:
        # Idempotent: a completion leaves nothing on the server. Asking twice costs tokens, and only where no answer came.
        return await self.http.post("chat/completions", body, idempotent=True)

    async def models(self) -> list[str]:
        answer = await self.http.get("models")
        listed = answer.get("data") if isinstance(answer, Mapping) else None
        return [str(m["id"]) for m in listed or () if isinstance(m, Mapping) and "id" in m]


class ClientTransport:
    """An `openai` client, sync or async. Its own timeouts and retries hold; `answer_s` ends what they do not."""

    def __init__(self, client: Any, limits: HttpLimits) -> None:
        self.client, self.limits = client, limits

    async def complete(self, body: dict[str, Any]) -> Any:
        answer = await self._call(self.client.chat.completions.create, **body)
        return answer.model_dump() if hasattr(answer, "model_dump") else answer

    async def models(self) -> list[str]:
        return [str(m.id) for m in (await self._call(self.client.models.list)).data]

    async def _call(self, function: Callable[..., Any], **body: Any) -> Any:  # the client's parameters are the API's
        try:
            async with asyncio.timeout(self.limits.answer_s) as limit:
                if _is_async(self.client):
                    return await function(**body)
                return await asyncio.to_thread(function, **body)
        except Exception as error:  # the client's own classes, which we do not import
            if isinstance(error, TimeoutError) and not limit.expired():
                raise
            got = "no answer in time" if isinstance(error, TimeoutError) else f"{type(error).__name__}: {error}"
            status = getattr(error, "status_code", None)
            message = explain(
                "the client's call", expected="an answer", got=got, fix="Check the server and the client."
            )
            raise ServerError(message, status=status, detail=str(getattr(error, "message", error))) from error


def _is_async(client: Any) -> bool:
    return inspect.iscoroutinefunction(client.chat.completions.create) or type(client).__name__.startswith("Async")


class ChatServer:
    def __init__(self, transport: Transport, model: str, *, logprobs: bool = True) -> None:
        self._transport, self.model, self.known = transport, model, Known()
        if not logprobs:
            self.known.dropped |= {"logprobs", "top_logprobs"}

    async def ask(
        self,
        messages: Sequence[Message],
        schema: Mapping[str, Any],
        *,
        tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Reply:
        """Raises `TooLarge`, `NoPictures`, `Refused`, or `EngineError` for all else."""
        wanted = {"temperature": temperature, "seed": seed, "logprobs": True, "top_logprobs": _TOP_LOGPROBS}
        format, freed = self.known.format, False
        while True:
            extra = self.known.extra_tokens
            body: dict[str, Any] = {
                "model": self.model,
                "messages": list(messages),
                self.known.length_name: tokens + extra,
            }
            body |= {name: value for name, value in wanted.items() if name not in self.known.dropped}
            if format != "text":
                body["response_format"] = _response_format(format, schema)
            try:
                reply = read_reply(await self._transport.complete(body))
            except ServerError as error:
                if error.status not in (400, 404, 413, 422):
                    raise
                following = self._without_what_it_refuses(error, body, format)
                if following is None:
                    raise await self._explained(error) from error
                format = following
                continue
            if freed:
                return reply
            if reply.cut and format != "text" and _runs_on(reply.text):
                format, freed = "text", True  # for this call alone: most replies of such a server are fine
                continue
            self.known.format = format  # only a format that worked: a 400 may have had another reason
            if reply.cut and extra < 4 * tokens:
                self.known.extra_tokens = max(self.known.extra_tokens, 4 * tokens)  # a model that reasons first
                continue
            return reply

    def _without_what_it_refuses(self, error: ServerError, body: Mapping[str, Any], format: str) -> str | None:
        """The reply format to try next, after what the error names was left out; None = nothing left to leave out."""
        detail = error.detail
        if error.status == 413 or _IMAGE_CAP.search(detail) or _TOO_LARGE.search(detail):
            cap = _IMAGE_CAP.search(detail)
            raise TooLarge(str(error), int(cap[1] or cap[2]) if cap else None) from error
        if _NO_PICTURES.search(detail):
            raise NoPictures(str(error)) from error
        if error.status == 404:
            return None
        if "max_tokens" in body and "max_completion_tokens" in detail:
            self.known.length_name = "max_completion_tokens"
            return format
        for name in _OPTIONAL:
            if name in body and re.search(rf"\b{name}\b", detail):
                self.known.dropped |= {name, "top_logprobs"} if name == "logprobs" else {name}
                return format
        place = FORMATS.index(format) + 1
        return FORMATS[place] if place < len(FORMATS) else None

    async def _explained(self, error: ServerError) -> EngineError:
        """The error, with the models there are where the name may be wrong."""
        if error.status != 404 and "model" not in error.detail.lower():
            return error
        try:
            names = await self._transport.models()
        except (EngineError, AttributeError, TypeError):
            return error
        if not names or self.model in names:
            return error
        known = ", ".join(names[:_MODELS_NAMED]) + (", ..." if len(names) > _MODELS_NAMED else "")
        return EngineError(
            explain("model", expected=f"one of {known}", got=repr(self.model), fix="Fix the model's name.")
        )


def read_reply(answer: Any) -> Reply:
    """Raises `Refused`, or `EngineError` for what is no completion."""
    choice = _first(answer)
    message = choice.get("message")
    if not isinstance(message, Mapping):
        raise _no_completion(answer)
    if message.get("refusal") or choice.get("finish_reason") == "content_filter":
        raise Refused(
            f"the model refused to answer: {str(message.get('refusal') or 'stopped by a content filter')[:300]}"
        )
    text, reasoning = (
        _plain(message.get("content")),
        _plain(message.get("reasoning_content") or message.get("reasoning")),
    )
    if "</think>" in text:  # a server that leaves the reasoning in the text
        reasoning, _, text = text.rpartition("</think>")
        reasoning = reasoning.replace("<think>", "")
    if not text.strip() and choice.get("finish_reason") == "stop" and reasoning.rstrip().endswith("}"):
        text, reasoning = reasoning[reasoning.find("{") :], ""  # a server that takes the whole reply for reasoning
    usage = _mapping(answer.get("usage"))
    return Reply(
        text=text,
        reasoning=reasoning,
        cut=choice.get("finish_reason") == "length",
        prompt_tokens=_count(usage.get("prompt_tokens")),
        tokens=_count(usage.get("completion_tokens")) or len(text) // 4,
        reasoning_tokens=_count(_mapping(usage.get("completion_tokens_details")).get("reasoning_tokens")),
        top=_tokens(choice.get("logprobs")),
    )


def _runs_on(text: str) -> bool:
    """Nothing but whitespace at the end: any JSON grammar allows it for ever, and some models then never stop."""
    return len(text) >= _BLANK and not text[-_BLANK:].strip()


def _response_format(format: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    if format == "json_object":
        return {"type": "json_object"}
    return {"type": "json_schema", "json_schema": {"name": "judgement", "strict": True, "schema": schema}}


def _first(answer: Any) -> Mapping[str, Any]:
    choices = answer.get("choices") if isinstance(answer, Mapping) else None
    if not (isinstance(choices, Sequence) and choices and isinstance(choices[0], Mapping)):
        raise _no_completion(answer)
    return choices[0]


def _no_completion(answer: Any) -> EngineError:
    fix = "Is this an OpenAI-compatible server?"
    return EngineError(explain("chat/completions", expected="a completion", got=str(answer)[:300], fix=fix))


def _plain(content: object) -> str:
    """Content is a string, or on some servers a list of parts."""
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    return content if isinstance(content, str) else ""


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _count(value: object) -> int:
    return value if isinstance(value, int) and value > 0 else 0


def _tokens(logprobs: Any) -> tuple[Token, ...]:
    """Empty for anything that is not of the documented form."""
    try:
        return tuple(
            (
                str(one["token"]),
                tuple((str(top["token"]), float(top["logprob"])) for top in one.get("top_logprobs") or ()),
            )
            for one in logprobs["content"]
        )
    except (TypeError, KeyError, ValueError, AttributeError):
        return ()
