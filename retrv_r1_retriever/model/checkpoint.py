"""Checkpoints: a plain Qwen2.5-VL directory that stock transformers and stock vLLM load, and `retrv/` beside it.

    config.json, model.safetensors, tokenizer.json, preprocessor_config.json     stock
    retrv/icm.safetensors                                                        the compression module
    retrv/manifest.json                                                          `Manifest`
    retrv/embedder/                                                              optional: the first stage's backbone

No pickle, no remote code. Two digests: `memory_digest` covers exactly what stored candidate memory is made of and stays the same when
SFT, RL or weekly retraining leave that alone; `checkpoint_digest` covers every weight.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)
from transformers.utils import logging as hf_logging

from retrv_r1_retriever.errors import CheckpointError, explain
from retrv_r1_retriever.model.configuration import MEMORY_VERSION, IcmConfig, RetrvR1Config
from retrv_r1_retriever.model.icm import Icm
from retrv_r1_retriever.model.modeling import RetrvR1ForConditionalGeneration, RetrvR1Model
from retrv_r1_retriever.model.processing import Processor
from retrv_r1_retriever.prompt import ADDED_TOKENS, ESCAPING_VERSION, PROMPT_VERSION

FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a checkpoint is and what it was made for.

    base, base_revision, licence: of the backbone; they bind users of the checkpoint
    teachers: who wrote the thoughts it was trained on -> licence of what they wrote ("" = unknown)
    trained_top_k: K of the training lists; trained_min_k: the shortest of them, 0 = all were of K
    think_margin: calibrated threshold of `think="auto"`, None = not calibrated
    none_margin: nats by which none must lead the best candidate to be the answer, calibrated; None = any lead will do
    direct_read: whether the direct read was trained; False keeps it from deciding unless asked to (`think="never"`)
    max_text_tokens: longest candidate text kept; embedder_dim: 0 = no embedder inside
    embedder_digest: of the embedder's weights; vectors of two embedders cannot be told apart by looking at them
    """

    base: str
    base_revision: str = ""
    licence: str = ""
    teachers: Mapping[str, str] = field(default_factory=dict)
    icm: Mapping[str, Any] = field(default_factory=lambda: asdict(IcmConfig()))
    prompt_version: int = PROMPT_VERSION
    escaping_version: int = ESCAPING_VERSION
    memory_version: int = MEMORY_VERSION
    max_text_tokens: int = 512
    trained_top_k: int = 0
    trained_min_k: int = 0
    think_margin: float | None = None
    none_margin: float | None = None
    direct_read: bool = True
    embedder_dim: int = 0
    embedder_digest: str = ""
    memory_digest: str = ""
    checkpoint_digest: str = ""
    format_version: int = FORMAT_VERSION


@dataclass(frozen=True, slots=True)
class Checkpoint:
    model: RetrvR1ForConditionalGeneration
    processor: Processor
    manifest: Manifest


def add_tokens(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Give the 136 Retrv-R1 tokens the spare rows of the embedding matrix; nothing is resized."""
    tokenizer.add_tokens(list(ADDED_TOKENS), special_tokens=True)
    if len(tokenizer) > vocab_size:
        raise CheckpointError(
            explain("embedding matrix", expected=f"at least {len(tokenizer)} rows", got=vocab_size,
                    fix="This backbone has too few spare rows; resize it before adding the tokens.")
        )  # fmt: skip


def from_backbone(
    backbone: Qwen2_5_VLForConditionalGeneration, icm: IcmConfig, weights: Mapping[str, Tensor] | None = None
) -> RetrvR1ForConditionalGeneration:
    """A Retrv-R1 model around a stock backbone, which is moved, not copied. weights None = a fresh compression module."""
    plain = backbone.config.to_dict()
    plain.pop("model_type", None)
    with torch.device("meta"):
        model = RetrvR1ForConditionalGeneration(RetrvR1Config(**plain, icm=asdict(icm)))
    model.model.visual, model.model.language_model = backbone.model.visual, backbone.model.language_model
    model.lm_head = backbone.lm_head
    model.model.icm = Icm(icm, backbone.config.text_config.hidden_size)
    model.model.init_icm()
    if weights is not None:
        model.model.icm.load_state_dict(dict(weights))
    model.model.icm.to(backbone.device, backbone.dtype)
    model.eval()
    return model


def create_checkpoint(
    base: str, *, icm: IcmConfig | None = None, revision: str | None = None, licence: str = "", max_text_tokens: int = 512,
    max_pixels: int | None = None, device: str | None = None, dtype: str | None = None,
) -> Checkpoint:  # fmt: skip
    """An untrained Retrv-R1 around a released backbone: where training starts.

    base: hub id or directory, e.g. "Qwen/Qwen2.5-VL-7B-Instruct" (Apache-2.0; the 3B is under a research licence)
    max_pixels: largest picture after resizing, in pixels; None = the backbone's own limit
    """
    device, torch_dtype = _placement(device, dtype)
    backbone = Qwen2_5_VLForConditionalGeneration.from_pretrained(base, revision=revision, dtype=torch_dtype).to(device)
    tokenizer = AutoTokenizer.from_pretrained(base, revision=revision)
    images = Qwen2VLImageProcessorPil.from_pretrained(base, revision=revision)
    if max_pixels is not None:
        images.size = {"shortest_edge": images.size["shortest_edge"], "longest_edge": max_pixels}
    first_ours = len(tokenizer)
    add_tokens(tokenizer, backbone.config.text_config.vocab_size)
    _init_rows(backbone, first_ours, len(tokenizer))
    model = from_backbone(backbone, icm or IcmConfig.fast())
    manifest = Manifest(base, revision or "", licence, icm=asdict(model.config.icm_config))
    return Checkpoint(model, Processor(tokenizer, images, max_text_tokens), manifest)


def _init_rows(backbone: Qwen2_5_VLForConditionalGeneration, start: int, end: int) -> None:
    """Our rows begin near the mean row, with a little noise to tell them apart; input table and head (when untied)."""
    for table in {id(t): t for t in (backbone.get_input_embeddings(), backbone.get_output_embeddings())}.values():
        weight = table.weight.data
        noise = torch.randn(end - start, weight.shape[1], generator=torch.Generator().manual_seed(0))
        weight[start:end] = weight[:start].mean(0) + (0.1 * weight[:start].std() * noise.to(weight.device)).to(
            weight.dtype
        )


def load_checkpoint(path: str | Path, *, device: str | None = None, dtype: str | None = None) -> Checkpoint:
    """Load a checkpoint directory. device None = CUDA if there is one; dtype None = bfloat16 on CUDA, float32 on CPU."""
    folder = Path(path)
    manifest = read_manifest(folder)
    device, torch_dtype = _placement(device, dtype)
    with whole(folder):
        backbone = _load_backbone(folder, torch_dtype, device)
        model = from_backbone(backbone, IcmConfig(**manifest.icm), load_file(folder / "retrv" / "icm.safetensors"))
        return Checkpoint(model, load_processor(folder, manifest), manifest)


def load_embedder_checkpoint(path: str | Path, *, device: str | None = None, dtype: str | None = None) -> Checkpoint:
    """The first stage's backbone of a checkpoint, with the checkpoint's own tokenizer and manifest."""
    folder = Path(path)
    manifest = read_manifest(folder)
    if not manifest.embedder_dim:
        raise CheckpointError(
            explain(
                str(folder), expected="an embedder inside", got="none", fix="Pass another embedder to the retriever."
            )
        )
    device, torch_dtype = _placement(device, dtype)
    with whole(folder):
        backbone = _load_backbone(folder / "retrv" / "embedder", torch_dtype, device)
        model = from_backbone(backbone, IcmConfig(**manifest.icm))
        return Checkpoint(model, load_processor(folder, manifest), manifest)


def numerics(model: RetrvR1Model | RetrvR1ForConditionalGeneration) -> dict[str, str]:
    """What makes other numbers of the same weights."""
    return {"dtype": str(model.dtype).removeprefix("torch."), "device": model.device.type}


@contextmanager
def whole(folder: Path) -> Iterator[None]:
    """Missing and broken files raise many types; all of them mean the same to a caller."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            explain(f"checkpoint {folder}", expected="a complete one", got=f"{type(error).__name__}: {str(error).partition(chr(10))[0]}",
                    fix="Copy or export it again.")
        ) from error  # fmt: skip


def load_processor(folder: Path, manifest: Manifest) -> Processor:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    images = Qwen2VLImageProcessorPil.from_pretrained(folder)
    return Processor(tokenizer, images, manifest.max_text_tokens)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint, checked against the versions this release reads."""
    file = folder / "retrv" / "manifest.json"
    if not file.is_file():
        raise CheckpointError(
            explain(str(folder), expected="a Retrv-R1 checkpoint", got="no retrv/manifest.json",
                    fix="Train or export one (docs/training.md), or use a plain VLM through the chat engine.")
        )  # fmt: skip
    known = {f.name for f in fields(Manifest)}
    with whole(folder):
        data: Any = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(data, dict):
            raise TypeError(f"manifest.json holds a {type(data).__name__}, no object")
        manifest = Manifest(**{k: v for k, v in data.items() if k in known})
    for name, ours in (
        ("format_version", FORMAT_VERSION), ("prompt_version", PROMPT_VERSION),
        ("escaping_version", ESCAPING_VERSION), ("memory_version", MEMORY_VERSION),
    ):  # fmt: skip
        theirs = getattr(manifest, name)
        if theirs != ours:
            raise CheckpointError(
                explain(f"{name} of {folder}", expected=ours, got=theirs,
                        fix="Use the release that made this checkpoint, or train one with this release.")
            )  # fmt: skip
    return manifest


def save_checkpoint(
    folder: Path, model: RetrvR1ForConditionalGeneration, processor: Processor, manifest: Manifest,
    embedder: RetrvR1ForConditionalGeneration | None = None, dtype: torch.dtype = torch.bfloat16,
) -> Manifest:  # fmt: skip
    """Write a checkpoint; returns the manifest with both digests filled in, computed from the weights as stored."""
    folder.mkdir(parents=True, exist_ok=True)
    _save_backbone(folder, model, dtype)
    processor.tokenizer.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
    retrv = folder / "retrv"
    retrv.mkdir(exist_ok=True)
    icm = {k: v.detach().to(dtype).contiguous() for k, v in model.model.icm.state_dict().items()}
    save_file(icm, retrv / "icm.safetensors")
    if embedder is not None:
        _save_backbone(retrv / "embedder", embedder, dtype)
    stored = {k: v.to(dtype) for k, v in model.state_dict().items()}
    embedding = {k: v.to(dtype) for k, v in embedder.state_dict().items()} if embedder is not None else {}
    manifest = replace(
        manifest, embedder_digest=_digest(embedding.items()) if embedding else "",
        icm=asdict(model.config.icm_config), max_text_tokens=processor.max_text_tokens,
        memory_digest=memory_digest(stored, processor, manifest), checkpoint_digest=_digest(stored.items()),
    )  # fmt: skip
    (retrv / "manifest.json").write_text(json.dumps(asdict(manifest), indent=2) + "\n", encoding="utf-8")
    return manifest


def memory_digest(weights: Mapping[str, Tensor], processor: Processor, manifest: Manifest) -> str:
    """Digest of what candidate memory is made of: base, tower, embedding table (without our rows), in_proj, P and pool, limits."""
    first_ours = min(processor.token_id(t) for t in ADDED_TOKENS)
    parts = []
    for name, tensor in sorted(weights.items()):
        if ".visual." in name or ".icm.in_proj." in name:
            parts.append((name, tensor))
        elif name.endswith("embed_tokens.weight"):
            parts.append((name, tensor[:first_ours]))
    images = processor.image_processor
    facts = {
        "base": manifest.base, "revision": manifest.base_revision, "memory": MEMORY_VERSION,
        "escaping": ESCAPING_VERSION, "rows": manifest.icm["memory_rows"], "text": processor.max_text_tokens,
        "pixels": [images.size["shortest_edge"], images.size["longest_edge"]],
    }  # fmt: skip
    return _digest(parts, json.dumps(facts, sort_keys=True))


def _digest(parts: Iterable[tuple[str, Tensor]], facts: str = "") -> str:
    out = hashlib.blake2b(facts.encode(), digest_size=8)
    for name, tensor in sorted(parts, key=lambda part: part[0]):
        out.update(name.encode())
        out.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return out.hexdigest()


def _placement(device: str | None, dtype: str | None) -> tuple[str, torch.dtype]:
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return device, getattr(torch, dtype) if dtype else torch.bfloat16 if device.startswith("cuda") else torch.float32


def _load_backbone(folder: Path, dtype: torch.dtype, device: str) -> Qwen2_5_VLForConditionalGeneration:
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()  # a bar per load is noise in a command's output
    try:
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    finally:
        if shown:
            hf_logging.enable_progress_bar()
    return model.to(device)


def _save_backbone(folder: Path, model: RetrvR1ForConditionalGeneration, dtype: torch.dtype) -> None:
    plain = model.config.to_dict()
    for ours in ("icm", "model_type", "architectures"):
        plain.pop(ours, None)
    with torch.device("meta"):
        stock = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**plain))
    weights = {k: v.detach().to(dtype) for k, v in model.state_dict().items() if ".icm." not in k}
    stock.load_state_dict(weights, assign=True)
    stock.tie_weights()
    stock.save_pretrained(folder)
