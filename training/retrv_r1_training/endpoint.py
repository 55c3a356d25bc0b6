"""One OpenAI-compatible chat endpoint: bounded waiting, retries with jitter, and errors sorted by what a caller can do.

A request is tried again after: no connection, a timeout, a cut or malformed body, and the statuses of `_RETRIED`. A cut, malformed or
late answer may have been charged, so failed tries are counted by name (`ChatEndpoint.retries`).
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Any

import httpx2

from retrv_r1_retriever.errors import EngineError, OptionsError, explain

_RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
#: The whole run is wrong, not this request: key, address or model name.
_FATAL = frozenset({401, 402, 403, 404, 405})


class EndpointError(EngineError):
    """No answer for this request, all retries included. `reason` is a short name to count by."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class FatalEndpointError(EndpointError):
    """No request will succeed: stop asking."""


@dataclass(frozen=True, slots=True)
class EndpointOptions:
    """url: up to and including `/v1`; model: as the server names it; key: sent as bearer token, never written anywhere

    body: merged into every request, a None removes a field (`{"max_tokens": None, "max_completion_tokens": 4096}`)
    timeout_s: for one answer; retries: after the first try; backoff_s: doubled each time; max_wait_s: between two tries, also
        when Retry-After asks for more
    """

    url: str
    model: str
    key: str | None = field(default=None, repr=False)
    body: Mapping[str, Any] = field(default_factory=dict)
    timeout_s: float = 180.0
    retries: int = 6
    backoff_s: float = 1.0
    max_wait_s: float = 120.0

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise OptionsError(
                explain("endpoint", expected="http://HOST/v1 or https://...", got=repr(self.url), fix="Pass its URL.")
            )
        if self.retries < 0:
            raise OptionsError(explain("retries", expected="0 or more", got=self.retries, fix="0 tries once."))


@dataclass(frozen=True, slots=True)
class Completion:
    """text: "" where there is none; finish: the server's finish_reason; refusal: the server's words, where it marks refusals"""

    text: str
    finish: str | None
    refusal: str | None
    tokens_in: int
    tokens_out: int


@dataclass(frozen=True, slots=True)
class _Retry:
    """Why the last try failed, and how many seconds the server asks to wait (0 = it does not say)."""

    reason: str
    message: str
    wait_s: float = 0.0


class ChatEndpoint:
    """Use as an async context manager; any number of `ask` at a time. A 429 makes all of them wait."""

    def __init__(self, options: EndpointOptions, *, concurrency: int = 8, rng: random.Random | None = None) -> None:
        self.options = options
        self.retries: Counter[str] = Counter()
        self._rng = rng or random.Random()
        self._resume_at = 0.0
        limits = httpx2.Limits(max_connections=concurrency)
        headers = {"Authorization": f"Bearer {options.key}"} if options.key else {}
        timeout = httpx2.Timeout(options.timeout_s, connect=min(20.0, options.timeout_s))
        self._client = httpx2.AsyncClient(timeout=timeout, limits=limits, headers=headers)

    async def __aenter__(self) -> ChatEndpoint:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.aclose()

    async def ask(self, messages: list[dict[str, Any]], body: Mapping[str, Any]) -> Completion:
        """One chat completion. Raises `EndpointError`, or `FatalEndpointError` where asking on makes no sense."""
        fields = {"model": self.options.model, "messages": messages, **body, **self.options.body}
        content = json.dumps({k: v for k, v in fields.items() if v is not None}).encode()
        number = 0
        while True:
            await self._wait_until(self._resume_at)
            outcome = await self._try(content)
            if isinstance(outcome, Completion):
                return outcome
            self.retries[outcome.reason] += 1
            if number == self.options.retries:
                raise EndpointError(f"no answer after {number + 1} tries: {outcome.message}", outcome.reason)
            await self._back_off(number, outcome)
            number += 1

    async def _try(self, content: bytes) -> Completion | _Retry:
        url = self.options.url.rstrip("/") + "/chat/completions"
        try:
            async with asyncio.timeout(
                self.options.timeout_s
            ):  # httpx2's own is per read: a trickle would last for ever
                response = await self._client.post(url, content=content, headers={"Content-Type": "application/json"})
        except (TimeoutError, httpx2.TimeoutException) as error:
            return _Retry("timeout", f"no answer within {self.options.timeout_s} s ({type(error).__name__})")
        except httpx2.ConnectError as error:
            return _Retry("no_connection", f"{self.options.url}: {error}")
        except (httpx2.TransportError, httpx2.DecodingError) as error:
            return _Retry("cut_answer", f"{type(error).__name__}: {error}")
        if response.status_code in _RETRIED:
            wait = _retry_after(response.headers.get("Retry-After"))
            return _Retry(f"http_{response.status_code}", _shown(response), wait)
        if response.status_code != 200:
            kind = FatalEndpointError if response.status_code in _FATAL else EndpointError
            raise kind(_refused(response, self.options), f"http_{response.status_code}")
        return _completion(response)

    async def _back_off(self, number: int, outcome: _Retry) -> None:
        """Exponential, with jitter in [0.5, 1), so that workers that failed together do not come back together."""
        wait = self.options.backoff_s * 2**number * (0.5 + self._rng.random() / 2)
        if outcome.wait_s:
            asked = min(outcome.wait_s, self.options.max_wait_s)
            self._resume_at = max(self._resume_at, time.monotonic() + asked)
            wait = asked + self.options.backoff_s * self._rng.random()
        await asyncio.sleep(min(wait, self.options.max_wait_s))

    async def _wait_until(self, moment: float) -> None:
        left = moment - time.monotonic()
        if left > 0:
            await asyncio.sleep(left + self.options.backoff_s * self._rng.random())


def _completion(response: httpx2.Response) -> Completion | _Retry:
    """What a 200 says. Anything but a chat completion counts as malformed, and is asked for again."""
    try:
        data = response.json()
        choice = data["choices"][0]
        message = choice["message"]
        text, refusal = message.get("content"), message.get("refusal")
        if not isinstance(text, str | None) or not isinstance(refusal, str | None):
            raise TypeError("content is no string")
        usage = data.get("usage") or {}
        tokens = int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)
        whole = (text or "").encode("utf-8", "replace").decode()  # JSON may smuggle in half a surrogate pair
        return Completion(whole, choice.get("finish_reason"), refusal, *tokens)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        return _Retry("malformed_answer", f"{type(error).__name__}: {error} in {_shown(response)}")


def _retry_after(value: str | None) -> float:
    """Seconds of a Retry-After header, in either form; 0 for none or a broken one."""
    if not value:
        return 0.0
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):  # TypeError: a date without a time zone
        return 0.0


def _refused(response: httpx2.Response, options: EndpointOptions) -> str:
    fix = {401: "Check the key.", 403: "Check the key.", 404: "Check the URL (it ends in /v1) and the model's name."}
    expected = f"a completion of {options.model}"
    return explain(
        options.url, expected=expected, got=_shown(response), fix=fix.get(response.status_code, "See its words.")
    )


def _shown(response: httpx2.Response) -> str:
    return f"{response.status_code} {' '.join(response.text.split())[:200]!r}"
