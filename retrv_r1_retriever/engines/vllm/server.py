"""One completion of a vLLM server: parts of a prompt in, token ids and their log-probabilities out."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from retrv_r1_retriever.errors import EngineError, ServerError, explain
from retrv_r1_retriever.http import JsonHttp
from retrv_r1_retriever.model.wire import Part, RowsPart, TextPart

#: The chat template that the server is started with: a message is what its parts are, nothing around it.
TEMPLATE = (
    "{% for m in messages %}{% for p in m['content'] %}"
    "{{ p['text'] if p['type'] == 'text' else '<|image_pad|>' }}"
    "{% endfor %}{% endfor %}"
)
#: Header that vLLM itself and routers before it know requests of one sequence by.
SESSION = "X-Session-ID"
_TOKEN = "token_id:"
_MODELS_NAMED = 5


@dataclass(frozen=True, slots=True)
class Sampling:
    """tokens: at most; stop, allowed: token ids; read: tokens whose log-probability is wanted at every position."""

    tokens: int
    stop: tuple[int, ...] = ()
    allowed: tuple[int, ...] = ()
    read: tuple[int, ...] = ()
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Completion:
    """ids and logprobs: what was sampled; read: of `Sampling.read`, per position, over the whole vocabulary.

    prompt_tokens: as the server counts them; cached_tokens: of these, None where it does not say
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    read: tuple[Mapping[int, float], ...]
    prompt_tokens: int
    cached_tokens: int | None


@dataclass(slots=True)
class Traffic:
    """Totals so far. cached_tokens: of the prompt tokens, as far as the server says; sampled_tokens: what it wrote."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    sampled_tokens: int = 0


class VllmServer:
    def __init__(self, http: JsonHttp, model: str) -> None:
        self.http, self.model, self.traffic = http, model, Traffic()

    async def complete(self, parts: Sequence[Part], sampling: Sampling, session: str = "") -> Completion:
        """session: the same for requests that continue one another, and hard to guess. A router can send them where the prefix is
        kept, and the server shares what it keeps of them with no other caller, who could learn from an answer's time what was sent.

        Raises `ServerError` for a refusal, `EngineError` for an answer that cannot be used.
        """
        salt = {"cache_salt": session} if session else {}
        body = _body(parts, {"model": self.model, **_parameters(sampling), **salt})
        try:
            # Idempotent: the server keeps nothing of a completion but a cache.
            headers = {SESSION: session} if session else {}
            answer = await self.http.post("chat/completions", body, idempotent=True, headers=headers)
        except ServerError as error:
            raise await self._explained(error) from error
        done, sent = _completion(answer, sampling), sum(part.count for part in parts)
        if done.prompt_tokens != sent:
            fix = f"Serve the very checkpoint that is read here, with --chat-template {shlex.quote(TEMPLATE)}"
            raise EngineError(
                explain("the server's prompt", expected=f"{sent} tokens", got=done.prompt_tokens, fix=fix)
            )
        self.traffic.requests += 1
        self.traffic.prompt_tokens += sent
        self.traffic.cached_tokens += done.cached_tokens or 0
        self.traffic.sampled_tokens += len(done.ids)
        return done

    async def version(self) -> str:
        """Of vLLM; "unknown" behind a gateway that does not let it through."""
        try:
            return str((await self.http.get("../version"))["version"])
        except (EngineError, KeyError, TypeError):
            return "unknown"

    async def models(self) -> dict[str, int | None]:
        """Served names and the tokens each can hold. Raises `ServerError`."""
        answer = await self.http.get("models")
        listed = answer.get("data") if isinstance(answer, Mapping) else None
        models = [m for m in listed or () if isinstance(m, Mapping) and "id" in m]
        return {str(m["id"]): n if isinstance(n := m.get("max_model_len"), int) else None for m in models}

    async def _explained(self, error: ServerError) -> EngineError:
        """With what to change, where the server's words tell."""
        for pattern, expected, fix in _FLAGS:
            if error.status is not None and error.status < 500 and re.search(pattern, error.detail, re.IGNORECASE):
                return EngineError(explain(self.http.base_url, expected=expected, got=error.detail, fix=fix))
        if error.status != 404:
            return error
        try:
            names = list(await self.models())
        except EngineError:
            return error
        if not names or self.model in names:
            return error
        known = ", ".join(names[:_MODELS_NAMED]) + (", ..." if len(names) > _MODELS_NAMED else "")
        return EngineError(
            explain("model", expected=f"one of {known}", got=repr(self.model), fix="Fix the model's name.")
        )


#: What a refusal says -> what the server should be able to do, and how it is started for that.
_FLAGS = (
    (r"enable-prompt-embeds", "a server that takes embedding rows", "Start it with --enable-prompt-embeds."),
    (r"at most 0 image|not a multimodal model", "a server that takes pictures",
     "Start it with --limit-mm-per-prompt '{\"image\":8,\"video\":0}'."),
    (r"at most \d+ image", "a server that takes more pictures",
     "Raise image in --limit-mm-per-prompt to max_inspections + 1."),
    (r"chat.?template", "a server with our chat template", f"Start it with --chat-template {shlex.quote(TEMPLATE)}"),
    (r"out of vocabulary", "a vocabulary with a spare row", "Export the checkpoint again: vLLM adds one token of its own."),
)  # fmt: skip


def as_json(part: Part) -> bytes:
    """A part of a message as vLLM reads it. Base64 needs no escaping: a megabyte of it is copied here, not walked through."""
    if isinstance(part, TextPart):
        return json.dumps({"type": "text", "text": part.text}).encode()
    if isinstance(part, RowsPart):
        return b'{"type":"prompt_embeds","data":"%b"}' % part.data
    return b'{"type":"image_url","image_url":{"url":"data:image/png;base64,%b"}}' % part.png


def _body(parts: Sequence[Part], parameters: Mapping[str, Any]) -> bytes:
    """One message of these parts, and the parameters."""
    content = b",".join(map(as_json, parts))
    return b'{"messages":[{"role":"user","content":[%b]}],%b' % (content, json.dumps(parameters).encode()[1:])


def _parameters(sampling: Sampling) -> dict[str, Any]:
    """Everything that a server's `generation_config.json` could otherwise set is set."""
    body: dict[str, Any] = {
        "max_tokens": sampling.tokens, "temperature": sampling.temperature, "seed": sampling.seed,
        "top_p": 1.0, "top_k": 0, "min_p": 0.0,
        "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
        "stop_token_ids": list(sampling.stop), "skip_special_tokens": False,
        "add_generation_prompt": False, "logprobs": True,
        "return_token_ids": True, "return_tokens_as_token_ids": True,
    }  # fmt: skip
    if sampling.allowed:
        body["allowed_token_ids"] = list(sampling.allowed)
    if sampling.read:
        body["logprob_token_ids"] = list(sampling.read)
    return body


def _completion(answer: Any, sampling: Sampling) -> Completion:
    try:
        choice, usage = answer["choices"][0], answer["usage"]
        ids = tuple(int(i) for i in choice["token_ids"])
        places = choice["logprobs"]["content"]
        read = tuple({_id(top["token"]): float(top["logprob"]) for top in place["top_logprobs"]} for place in places)
        logprobs = tuple(float(place["logprob"]) for place in places)
        details = usage.get("prompt_tokens_details") or {}
        whole = Completion(ids, logprobs, read, int(usage["prompt_tokens"]), details.get("cached_tokens"))
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        fix = "Is this a vLLM server of version 0.26 or newer?"
        got = f"{type(error).__name__}: {error} in {str(answer)[:300]}"
        raise EngineError(
            explain("chat/completions", expected="token ids with log-probabilities", got=got, fix=fix)
        ) from error
    if not (0 < len(ids) == len(logprobs) <= sampling.tokens):
        got = f"{len(ids)} ids and {len(logprobs)} log-probabilities"
        raise EngineError(
            explain(
                "chat/completions", expected=f"1 to {sampling.tokens} tokens", got=got, fix="Look at the server's log."
            )
        )
    if sampling.allowed and not set(ids) <= set(sampling.allowed):
        raise EngineError(
            explain("chat/completions", expected=f"one of {len(sampling.allowed)} tokens", got="another one",
                    fix="Is this a vLLM server that knows `allowed_token_ids`?")
        )  # fmt: skip
    if any(not set(sampling.read) <= set(one) for one in read):
        raise EngineError(
            explain("chat/completions", expected=f"log-probabilities of {len(sampling.read)} tokens", got="not all of them",
                    fix="Is this a vLLM server that knows `logprob_token_ids`?")
        )  # fmt: skip
    return whole


def _id(token: str) -> int:
    if not token.startswith(_TOKEN):
        raise ValueError(f"token {token!r} is no {_TOKEN}...")
    return int(token.removeprefix(_TOKEN))
