"""The client's half of a checkpoint: what a prompt becomes on its way to a server that runs the backbone.

It holds the tokenizer, the compression module and the embedding table, mapped from the file, so that only rows in use are read.
No layer of the language model is ever loaded. The vision tower is, once a picture has to be compressed here: an image query's, or
that of a candidate without memory. A picture that the model is to see itself travels as it is.
"""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from PIL.Image import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from retrv_r1_retriever.engines.base import CompressedContent
from retrv_r1_retriever.errors import InputError, explain
from retrv_r1_retriever.model.checkpoint import Manifest, load_processor, read_manifest, whole
from retrv_r1_retriever.model.compress import compress
from retrv_r1_retriever.model.configuration import IcmConfig, RetrvR1Config
from retrv_r1_retriever.model.embedding import encode_pictures
from retrv_r1_retriever.model.modeling import RetrvR1Model
from retrv_r1_retriever.model.processing import Chunk, Processor, memories
from retrv_r1_retriever.prompt import CONTENT_PAD
from retrv_r1_retriever.types import Content

_CPU = torch.device("cpu")
_TABLE = "embed_tokens.weight"
#: Stands for rows in vLLM's own prompt, so it refuses it in text.
RESERVED = "<prompt_embeds>"


@dataclass(frozen=True, slots=True)
class TextPart:
    """ids: what the checkpoint's tokenizer makes of `text`, here and on the server."""

    text: str
    ids: tuple[int, ...]

    @property
    def count(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class RowsPart:
    """data: base64 of a saved tensor (count, H): input embeddings in the dtype of the checkpoint."""

    data: bytes
    count: int


@dataclass(frozen=True, slots=True)
class PicturePart:
    """png: base64; count: its tokens, those of the tower alone."""

    png: bytes
    count: int


Part = TextPart | RowsPart | PicturePart


class Wire:
    """Turns chunks into parts, and contents into memory (`Compressor`). Computes in float32 on the CPU; may be used by many threads."""

    def __init__(self, model: RetrvR1Model, processor: Processor, manifest: Manifest, folder: Path) -> None:
        self.processor, self.manifest = processor, manifest
        self._model, self._folder = model, folder
        self._loading = threading.Lock()
        self._words: dict[int, str | None] = {}
        self._labels = torch.tensor(processor.slot_ids)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> Wire:
        """path: the checkpoint that the server serves. Raises `CheckpointError`."""
        folder = Path(path)
        manifest = read_manifest(folder)
        with whole(folder):
            config = _config(folder, IcmConfig(**manifest.icm))
            with torch.device("meta"):
                model = RetrvR1Model(config)
            icm = load_file(folder / "retrv" / "icm.safetensors")
            model.icm.load_state_dict({name: weight.float() for name, weight in icm.items()}, assign=True)
            model.language_model.norm = None
            model.language_model.embed_tokens = _Rows(next(_tensors(folder, _TABLE))[1])
            model.visual = None
            return cls(model.eval(), load_processor(folder, manifest), manifest, folder)

    @property
    def max_context(self) -> int:
        return int(self._model.config.text_config.max_position_embeddings)

    @property
    def memory_shape(self) -> tuple[int, int]:
        """(rows at most, width)."""
        icm = self._model.config.icm_config
        return icm.memory_rows or self.max_context, icm.width

    @property
    def holds_tower(self) -> bool:
        """Whether the vision tower was needed so far."""
        return self._model.visual is not None

    def compress(self, contents: Sequence[Content]) -> list[CompressedContent]:
        """Contents with pictures already decoded -> memory rows, as `LocalEngine.compress`."""
        if any(content.image is not None for content in contents):
            self._load_tower()
        return compress(self._model, self.processor, contents, device=_CPU)

    @torch.inference_mode()
    def parts(self, chunk: Chunk, before: Sequence[int] = ()) -> list[Part]:
        """A chunk as parts of one message. before: ids of the text that it follows without a break (`text_tail`).

        Text goes as text where the server's tokenizer is bound to make the same ids of it, and as rows where it is not.
        """
        tokens, pictures = iter(self._compressed(chunk)), iter(chunk.pictures)
        parts: list[Part] = []
        for kind, start, end in _spans(chunk, self.processor.token_id(CONTENT_PAD)):
            ids = tuple(chunk.ids[start:end].tolist())
            text = self._as_text(ids, before if start == 0 else text_tail(parts)) if kind == "text" else None
            if kind == "memory":
                parts.append(RowsPart(_saved(next(tokens)), end - start))
            elif kind == "picture":
                parts.append(PicturePart(_png(next(pictures)), end - start))
            else:
                parts.append(self._rows(ids) if text is None else TextPart(text, ids))
        return parts

    @torch.inference_mode()
    def as_rows(self, part: TextPart) -> RowsPart:
        """The same tokens as their embeddings."""
        return self._rows(part.ids)

    def _rows(self, ids: Sequence[int]) -> RowsPart:
        return RowsPart(_saved(self._table.weight[torch.tensor(ids)]), len(ids))

    @property
    def _table(self) -> _Rows:
        table = self._model.language_model.embed_tokens
        assert isinstance(table, _Rows)
        return table

    def _compressed(self, chunk: Chunk) -> Tensor:
        """The two tokens of each candidate, as they are sent: (N, 2, H) in the dtype of the checkpoint."""
        if not chunk.candidates:
            return torch.empty(0)
        icm, (stored, mask) = self._model.icm, map(torch.from_numpy, memories([chunk], np.float16))
        query = icm.rows([self._query(chunk)])[0]
        content, relation = icm.of_one_query(stored.float(), mask, query)
        tag: Tensor = self._table(self._labels[torch.tensor(chunk.candidates)]) * icm.tag_scale
        tokens = torch.empty(len(tag), 2, tag.shape[1], dtype=self._table.weight.dtype)
        tokens[:, 0], tokens[:, 1] = content + tag, relation + tag
        return tokens

    def _query(self, chunk: Chunk) -> Tensor:
        """T_q, the input embeddings that relation tokens are made of: (q, H)."""
        embeds: Tensor = self._table(torch.from_numpy(chunk.ids[chunk.query]))
        if not chunk.pictures:
            return embeds
        self._load_tower()
        features = encode_pictures(self._model, self.processor, chunk.pictures)
        assert features is not None
        return embeds.masked_scatter(torch.from_numpy(chunk.image[chunk.query])[:, None], features)

    def _as_text(self, ids: tuple[int, ...], before: Sequence[int]) -> str | None:
        """The text of which, after that of `before`, a tokenizer makes exactly these ids again; None if there is none."""
        if len(ids) > 1 or before:
            return self._tokenised_again(ids, before)
        if ids[0] not in self._words:  # between candidates every text is one label: asked for K times a prompt
            self._words[ids[0]] = self._tokenised_again(ids, before)
        return self._words[ids[0]]

    def _tokenised_again(self, ids: tuple[int, ...], before: Sequence[int]) -> str | None:
        decode = self.processor.tokenizer.decode
        text = str(decode(ids, skip_special_tokens=False))
        if RESERVED in text:
            return None
        joined = str(decode(before, skip_special_tokens=False)) + text if before else text
        again = self.processor.tokenizer(joined, add_special_tokens=False)["input_ids"]
        return text if tuple(again) == (*before, *ids) else None

    def _load_tower(self) -> None:
        with self._loading:
            if self._model.visual is not None:
                return
            tower = Qwen2_5_VisionTransformerPretrainedModel._from_config(
                self._model.config.vision_config, dtype=torch.float32
            )
            with whole(self._folder):
                weights = {name: tensor.float() for name, tensor in _tensors(self._folder, "visual.")}
                tower.load_state_dict({name.split("visual.", 1)[1]: weight for name, weight in weights.items()})
            self._model.visual = tower.eval()


class _Rows(nn.Module):
    """The embedding table as it lies in the file. forward: ids -> their rows in float32."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight  # no parameter: nothing is to move or cast a table of a gigabyte

    def forward(self, ids: Tensor) -> Tensor:
        return self.weight[ids].float()


def text_tail(parts: Sequence[Part]) -> tuple[int, ...]:
    """Ids of the text at the end: a server reads it as one with the text that comes next."""
    tail: tuple[int, ...] = ()
    for part in reversed(parts):
        if not isinstance(part, TextPart):
            break
        tail = (*part.ids, *tail)
    return tail


def _spans(chunk: Chunk, content_pad: int) -> Iterator[tuple[str, int, int]]:
    """(kind, start, end) of runs: "text", "memory" (two tokens a candidate), "picture" (one each)."""
    kinds = np.where(chunk.image, 2, 0)
    first = np.flatnonzero(chunk.ids == content_pad)[: len(chunk.memories)]
    kinds[first] = kinds[first + 1] = 1
    names = ("text", "memory", "picture")
    start = 0
    for kind, run in groupby(kinds.tolist()):
        end = start + len(list(run))
        yield names[kind], start, end
        start = end


def _config(folder: Path, icm: IcmConfig) -> RetrvR1Config:
    """The checkpoint's, of a language model without layers."""
    plain = Qwen2_5_VLConfig.from_pretrained(folder).to_dict()
    plain.pop("model_type", None)
    plain["text_config"] |= {"num_hidden_layers": 0, "layer_types": []}
    return RetrvR1Config(**plain, icm=asdict(icm))


def _tensors(folder: Path, part: str) -> Iterator[tuple[str, Tensor]]:
    """Weights of the served model whose name has `part` in it, mapped from their files. Raises KeyError if there is none."""
    found = False
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118  (no mapping)
                if part in name:
                    found = True
                    yield name, weights.get_tensor(name)
    if not found:
        raise KeyError(part)


def _saved(rows: Tensor) -> bytes:
    """Base64 of what `torch.save` writes of (n, H), in the older of its formats: a head that depends on the shape alone, then the bytes."""
    head = _head(*rows.shape, rows.dtype)
    return base64.b64encode(head + rows.contiguous().view(torch.uint8).numpy().tobytes())


@cache
def _head(count: int, hidden: int, dtype: torch.dtype) -> bytes:
    blank, buffer = torch.zeros(count, hidden, dtype=dtype), io.BytesIO()
    torch.save(blank, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()[: -blank.nbytes]


def _png(picture: object) -> bytes:
    if not isinstance(picture, Image):
        fix = "Pass decoded pictures; the server encodes them itself."
        raise InputError(explain("picture", expected="a Pillow image", got=type(picture).__name__, fix=fix))
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "PNG", compress_level=1)
    return base64.b64encode(buffer.getbuffer())
