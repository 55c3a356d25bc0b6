"""An OpenAI-compatible server with a scripted "vision-language model" behind it: it reads what it is sent, and has limits and manners.

    python -m tests.serving.openai_stub      # serves until interrupted, and says where

The model compares words, and the colour of pictures. It judges only what is in the request, so a test that passes has sent it.
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from tests.serving.http_stub import HttpStub, Reply, Request, http_stub

MODEL = "scripted-vlm"
COLOURS = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 200), "yellow": (230, 210, 40)}

#: One more reply to send in place of the model's, or None for the model's own.
Override = Callable[[int, dict[str, Any]], "Reply | str | dict[str, Any] | None"]


@dataclass
class Vlm:
    """formats: reply formats it knows, "text" always; refuses: parameters it answers 400 to, with the message

    max_images, max_chars: of one request; vision: takes pictures; logprobs: offers them; thinks: where its reasoning goes:
    "field" (reasoning_content), "inline" (<think>...</think> before the reply), "all" (the whole reply in reasoning_content)
    tokens_needed: with a smaller max_tokens the reply is cut; override: what to send instead, by number of the completion
    """

    formats: tuple[str, ...] = ("json_schema", "json_object")
    refuses: dict[str, str] = field(default_factory=dict)
    max_images: int | None = None
    max_chars: int | None = None
    vision: bool = True
    logprobs: bool = False
    thinks: str | None = None
    tokens_needed: int = 0
    override: Override | None = None
    bodies: list[dict[str, Any]] = field(default_factory=list)

    def __call__(self, request: Request) -> Reply:
        if request.path.endswith("/models"):
            return Reply({"object": "list", "data": [{"id": MODEL, "object": "model"}]})
        body = request.body
        self.bodies.append(body)
        if self.override and (instead := self.override(len(self.bodies) - 1, body)) is not None:
            return instead if isinstance(instead, Reply) else self._completion(body, instead)
        if refusal := self._refusal(body):
            return Reply({"error": {"message": refusal, "type": "invalid_request_error"}}, status=400)
        if body["model"] != MODEL:
            return Reply({"error": {"message": f"The model `{body['model']}` does not exist."}}, status=404)
        return self._completion(body, answer(body["messages"]))

    def _refusal(self, body: dict[str, Any]) -> str | None:
        format = body.get("response_format", {}).get("type", "text")
        if format != "text" and format not in self.formats:
            return f"response_format of type {format} is not available"
        for name, message in self.refuses.items():
            if name in body:
                return message
        images = sum(part["type"] == "image_url" for part in parts(body["messages"]))
        if images and not self.vision:
            return f"{MODEL} is not a multimodal model"
        if self.max_images is not None and images > self.max_images:
            return f"At most {self.max_images} image(s) may be provided in one prompt."
        chars = sum(len(part.get("text", "")) for part in parts(body["messages"]))
        if self.max_chars is not None and chars > self.max_chars:
            return f"This model's maximum context length is {self.max_chars} tokens. However, you requested {chars} tokens."
        return None

    def _completion(self, body: dict[str, Any], said: str | dict[str, Any]) -> Reply:
        text = said if isinstance(said, str) else json.dumps(said)
        cut = body.get("max_tokens", body.get("max_completion_tokens", 1 << 30)) < self.tokens_needed
        text = text[: len(text) // 2] if cut else text
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if self.thinks == "field":
            message["reasoning_content"] = "The query names a colour. c1 looks right."
        elif self.thinks == "inline":
            message["content"] = f'<think>maybe {{"answer": "c0"}} or not</think>\n{text}'
        elif self.thinks == "all":
            message |= {"content": None, "reasoning_content": f"So the reply is {text}"}
        choice: dict[str, Any] = {"index": 0, "message": message, "finish_reason": "length" if cut else "stop"}
        if self.logprobs and body.get("logprobs"):
            choice["logprobs"] = {"content": [token_logprobs(t) for t in re.findall(r"\w+|\W", message["content"])]}
        usage = {"prompt_tokens": 100, "completion_tokens": len(text) // 4, "total_tokens": 100 + len(text) // 4}
        return Reply(
            {"id": "x", "object": "chat.completion", "created": 0, "model": MODEL, "choices": [choice], "usage": usage}
        )


@contextmanager
def openai_stub(vlm: Vlm | None = None) -> Iterator[tuple[HttpStub, Vlm]]:
    vlm = vlm or Vlm()
    with http_stub(vlm) as stub:
        stub.url += "/v1"
        yield stub, vlm


def parts(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for message in messages:
        content = message["content"]
        found += [{"type": "text", "text": content}] if isinstance(content, str) else content
    return found


def answer(messages: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the model says to a conversation: a judgement of the list, or a check of the candidate in its last turn."""
    query, seen = read(messages)
    ask = parts(messages[-1:])[-1]["text"]
    if opened := re.search(r"This is candidate (c\d+) in full", ask):
        return check(opened[1], query, messages)
    asked = re.findall(r"c\d+", re.search(r"(?:each of|entry for:) ([c\d, ]+)", ask)[1])  # type: ignore[index]
    entries = {one: dict(zip(("verdict", "grade"), judge(query, *seen[one]), strict=True)) for one in asked}
    best = max(entries, key=lambda one: entries[one]["grade"])
    fits = entries[best]["grade"] >= 5
    return {
        "looking_for": f"something that is {query}",
        "candidates": entries,
        "none_fits": 1 if fits else 8,
        "answer": best if fits else "none",
        "open": [one for one in entries if entries[one]["verdict"] == "unsure"],
    }


def check(label: str, query: str, messages: Sequence[dict[str, Any]]) -> dict[str, Any]:
    _, seen = read(messages[-1:])
    verdict, grade = judge(query, *seen[label])
    before = [m["content"] for m in messages if m["role"] == "assistant"]
    earlier = json.loads(before[-1])["answer"] if before else "none"
    match = grade >= 5 and verdict != "unsure"
    answer = label if match else earlier if earlier != label else "none"
    return {"check": f"it is {verdict}", "match": match, "answer": answer, "open": []}


def read(messages: Sequence[dict[str, Any]]) -> tuple[str, dict[str, tuple[str, str | None]]]:
    """The query, and each label's text and colour. A picture belongs to the label last named before it."""
    query, seen, label = "", dict[str, tuple[str, "str | None"]](), None
    for part in parts(messages):
        if part["type"] == "text":
            for line in part["text"].splitlines():
                if found := re.match(r"(c\d+)(?:, its whole text)?:(?: (\".*\"))?", line):
                    label = found[1]
                    seen[label] = (json.loads(found[2]) if found[2] else "", None)
                elif found := re.match(r"Query: (\".*\")", line):
                    query, label = json.loads(found[1]), None
                elif line.startswith("Query: "):
                    query, label = "", None
                elif found := re.match(r"This is candidate (c\d+) in full", line):
                    seen.setdefault(found[1], ("", None))
        elif label is not None:
            seen[label] = (seen[label][0], colour_of(part["image_url"]["url"]))
        else:
            query = query or colour_of(part["image_url"]["url"])
    return query, seen


def judge(query: str, text: str, colour: str | None) -> tuple[str, int]:
    """By share of the query's words found in the text or as the picture's colour; "..." in a text makes it unsure."""
    wanted = query.lower().split()
    have = {*re.findall(r"\w+", text.lower()), colour}
    share = sum(word in have for word in wanted) / max(1, len(wanted))
    if "maybe" in have:
        return "unsure", 6
    return ("keep", 5 + round(4 * share)) if share >= 0.5 else (f"not {' '.join(wanted)[:30]}", round(6 * share))


def colour_of(uri: str) -> str:
    data = base64.b64decode(uri.partition(",")[2])
    mean = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), float).mean((0, 1))
    return min(COLOURS, key=lambda name: float(np.abs(mean - COLOURS[name]).sum()))


def token_logprobs(token: str) -> dict[str, Any]:
    """Digits are unsure between themselves and the next one up; all else is certain."""
    sure = [{"token": token, "logprob": -0.0}]
    if token.isdigit() and len(token) == 1 and token != "9":
        sure = [{"token": token, "logprob": -0.693147}, {"token": str(int(token) + 1), "logprob": -0.693147}]
    return {"token": token, "logprob": sure[0]["logprob"], "top_logprobs": sure}


def picture(colour: str, size: int = 400) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), COLOURS[colour]).save(buffer, "PNG")
    return buffer.getvalue()


if __name__ == "__main__":
    with openai_stub() as (server, _):
        print(f"{MODEL} at {server.url}", flush=True)
        with suppress(EOFError, KeyboardInterrupt):
            input("Enter ends it.\n")
