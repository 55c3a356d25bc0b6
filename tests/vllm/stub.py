"""An HTTP server that takes and refuses what a vLLM server does, around a scripted model: for what a real one does not do on demand."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from PIL import Image

from retrv_r1_retriever.model.processing import IMAGE_PAD, Processor
from tests.serving.http_stub import HttpStub, Reply, Request, http_stub

MODEL = "retrv"
Override = Callable[[int, Mapping[str, Any]], Reply | None]


def received(
    parts: Sequence[Mapping[str, Any]], processor: Processor
) -> tuple[list[int], dict[int, torch.Tensor], list[Image.Image]]:
    """As a server reads parts: ids (-1 where a row is), rows by place, pictures. Adjacent texts are tokenised as one."""
    ids: list[int] = []
    rows: dict[int, torch.Tensor] = {}
    pictures, text = [], ""
    for part in (*parts, {"type": "end"}):
        if part["type"] == "text":
            text += part["text"]
            continue
        ids += processor.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
        text = ""
        if part["type"] == "prompt_embeds":
            tensor = torch.load(io.BytesIO(base64.b64decode(part["data"])), weights_only=True)
            rows |= {len(ids) + i: row for i, row in enumerate(tensor)}
            ids += [-1] * len(tensor)
        elif part["type"] == "image_url":
            data = part["image_url"]["url"].partition("base64,")[2]
            pictures.append(Image.open(io.BytesIO(base64.b64decode(data))))
            t, h, w = processor.grid(pictures[-1])
            ids += [processor.token_id(IMAGE_PAD)] * (t * h * w // processor.merge**2)
    return ids, rows, pictures


@dataclass
class Vllm:
    """texts: what it writes, one after the other, the last one for ever; slots: raw log-probabilities of labels by token id

    override: given the number of the completion (the engine's own check is not counted) and its body, a reply instead
    """

    processor: Processor
    texts: Sequence[str] = ()
    slots: Callable[[int], float] = lambda token: -1.0
    override: Override = lambda number, body: None
    max_model_len: int = 4096
    bodies: list[Mapping[str, Any]] = field(default_factory=list)
    written: int = 0

    def __call__(self, request: Request) -> Reply:
        if request.path == "/version":
            return Reply({"version": "9.9.9"})
        if request.path == "/v1/models":
            return Reply({"data": [{"id": MODEL, "max_model_len": self.max_model_len}]})
        body = request.body
        if body["model"] != MODEL:
            return refusal(404, f"The model `{body['model']}` does not exist.")
        self.bodies.append(body)
        return self.override(len(self.bodies) - 1, body) or Reply(self.completion(body))

    def completion(self, body: Mapping[str, Any]) -> dict[str, Any]:
        sent, _, _ = received(body["messages"][0]["content"], self.processor)
        if allowed := body.get("allowed_token_ids"):
            ids = [max(allowed, key=self.slots)]
        else:
            text = self.texts[min(self.written, len(self.texts) - 1)]
            self.written += 1
            ids = [i for word in text.split() for i in self.processor.tokenise(word)][: body["max_tokens"]]
        read = [{"token": f"token_id:{i}", "logprob": self.slots(i)} for i in body.get("logprob_token_ids", ())]
        places = [{"token": f"token_id:{i}", "logprob": -0.5, "top_logprobs": read} for i in ids]
        return {
            "choices": [{"token_ids": ids, "logprobs": {"content": places}, "message": {"content": "..."}}],
            "usage": {"prompt_tokens": len(sent), "completion_tokens": len(ids)},
        }


def refusal(status: int, message: str, **headers: str) -> Reply:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Reply(
        {"error": {"message": message, "type": "BadRequestError", "code": status}}, status=status, headers=named
    )


@contextmanager
def vllm_stub(vllm: Vllm) -> Iterator[HttpStub]:
    """url: the API's base URL, up to the version"""
    with http_stub(vllm) as stub:
        yield replace(stub, url=f"{stub.url}/v1")
