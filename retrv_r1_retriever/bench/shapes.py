"""Model sizes to time. The miniature has trained weights; the others are random, which costs the same and says nothing about quality."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import Qwen2VLImageProcessorPil

from retrv_r1_retriever.config import Config, ModelConfig, checkpoint_path
from retrv_r1_retriever.model.checkpoint import Checkpoint, Manifest, load_checkpoint
from retrv_r1_retriever.model.configuration import IcmConfig, RetrvR1Config
from retrv_r1_retriever.model.modeling import RetrvR1ForConditionalGeneration
from retrv_r1_retriever.model.processing import Processor
from retrv_r1_retriever.types import Candidate, Content, Document, Query


@dataclass(frozen=True, slots=True)
class Shape:
    """picture: pixels per side of every picture; words: text tokens per candidate; query_words: of the query."""

    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    picture: int
    words: int
    query_words: int
    icm: IcmConfig = field(default_factory=IcmConfig.fast)


_QWEN_VISION = {
    "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "patch_size": 14, "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
}  # fmt: skip
_QWEN_ROPE = {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}

#: `ratio`: tower to language model FLOPs per token as in the 7B model (0.40), small enough for one CPU thread. 3b, 7b: as released.
SHAPES = {
    "ratio": Shape(
        {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
         "intermediate_size": 1024, "vocab_size": 1024, "max_position_embeddings": 16384,
         "rope_parameters": {"rope_type": "default", "mrope_section": [12, 10, 10], "rope_theta": 1e4}},
        {"depth": 3, "hidden_size": 96, "intermediate_size": 272, "num_heads": 4, "patch_size": 8, "window_size": 64,
         "fullatt_block_indexes": [0, 1, 2]},
        picture=128, words=8, query_words=16, icm=IcmConfig(width=128, heads=4, memory_rows=64),
    ),
    "3b": Shape(
        {"hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2,
         "intermediate_size": 11008, "vocab_size": 151936, "rope_parameters": _QWEN_ROPE, "tie_word_embeddings": True},
        _QWEN_VISION, picture=512, words=20, query_words=60,
    ),
    "7b": Shape(
        {"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
         "intermediate_size": 18944, "vocab_size": 152064, "rope_parameters": _QWEN_ROPE},
        _QWEN_VISION, picture=512, words=20, query_words=60,
    ),
}  # fmt: skip


def random_checkpoint(shape: Shape, device: str | None = None) -> Checkpoint:
    """Seeded random weights around the miniature's tokenizer; bfloat16 on CUDA, else float32."""
    folder = Path(checkpoint_path(Config(model=ModelConfig("miniature"))))
    words = load_checkpoint(folder, device="cpu").processor.tokenizer
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    ids = {
        name: words.convert_tokens_to_ids(f"<|{name}|>")
        for name in ("image_pad", "video_pad", "vision_start", "vision_end")
    }
    text = {**shape.text, **{f"{k}_token_id": words.convert_tokens_to_ids("<|im_end|>") for k in ("eos", "bos", "pad")}}
    vision = {**shape.vision, "out_hidden_size": text["hidden_size"], "spatial_merge_size": 2, "temporal_patch_size": 2}
    config = RetrvR1Config(
        text_config=text, vision_config=vision, image_token_id=ids["image_pad"], video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"], vision_end_token_id=ids["vision_end"],
        tie_word_embeddings=bool(text.get("tie_word_embeddings")), icm=asdict(shape.icm),
    )  # fmt: skip
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        model = RetrvR1ForConditionalGeneration(config).to(dtype).eval()
    images = Qwen2VLImageProcessorPil(
        patch_size=vision["patch_size"], temporal_patch_size=2, merge_size=2,
        size={"shortest_edge": 56 * 56, "longest_edge": shape.picture**2},
    )  # fmt: skip
    manifest = Manifest("random weights", icm=asdict(shape.icm), memory_digest="random", checkpoint_digest="random")
    return Checkpoint(model, Processor(words, images, 512), manifest)


def random_task(shape: Shape, top_k: int, seed: int = 0) -> tuple[Query, tuple[Candidate, ...]]:
    """A query of words and a picture over K candidates, each a picture and words; no memory yet."""
    rng, noise = random.Random(seed), np.random.default_rng(seed)

    def content(words: int) -> Content:
        pixels = noise.integers(0, 256, (shape.picture, shape.picture, 3), dtype=np.uint8)
        return Content(" ".join(rng.choices(("red", "two", "ring", "dots"), k=words)), Image.fromarray(pixels))

    documents = [Document(str(i), content(shape.words)) for i in range(top_k)]
    return Query(content(shape.query_words)), tuple(Candidate(d, None, i) for i, d in enumerate(documents, 1))
