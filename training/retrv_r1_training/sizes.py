"""How large a backbone is, counted on a model without weights: a checkpoint that is there, or a released one by its name."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import Qwen2_5_VLConfig

from retrv_r1_retriever.config import Config, checkpoint_path
from retrv_r1_retriever.errors import OptionsError, explain
from retrv_r1_retriever.model.configuration import IcmConfig, RetrvR1Config
from retrv_r1_retriever.model.modeling import RetrvR1ForConditionalGeneration
from retrv_r1_retriever.prompt import ADDED_TOKENS
from retrv_r1_training.backbone import model_config
from retrv_r1_training.grpo_config import GrpoRecipe
from retrv_r1_training.sft_recipe import SftRecipe
from retrv_r1_training.stage_recipe import AlignRecipe, BaseRecipe, EmbedderRecipe

_VISION = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "patch_size": 14}
_TEXT = {"max_position_embeddings": 128000, "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24],
                                                                 "rope_theta": 1e6}}  # fmt: skip
#: Sizes as in the released config.json files.
BACKBONES = {
    "Qwen2.5-VL-3B": {"hidden_size": 2048, "num_hidden_layers": 36, "intermediate_size": 11008, "num_attention_heads": 16,
                      "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "Qwen2.5-VL-7B": {"hidden_size": 3584, "num_hidden_layers": 28, "intermediate_size": 18944, "num_attention_heads": 28,
                      "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False},
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Size:
    """Parameters. matrices: of the LM's layers, which every token passes; tables: embedding, and head where it is another;
    frozen: what a copy that reads candidates holds (tower, embedding table, norms); kv_width: of a key in one layer
    """

    total: int
    matrices: int
    tables: int
    tower: int
    module: int
    frozen: int
    lora_per_rank: int
    hidden: int
    layers: int
    intermediate: int
    vocab: int
    kv_width: int
    tied: bool


def size_of(recipe: SftRecipe | GrpoRecipe | EmbedderRecipe | AlignRecipe | BaseRecipe) -> Size:
    """From the start's config.json if it is there, else from a released backbone that the recipe names."""
    if isinstance(recipe, BaseRecipe):
        config = model_config(recipe.backbone, recipe.icm, recipe.vocab + len(ADDED_TOKENS), lambda token: 0)
        return count(config, recipe.icm)
    start = recipe.start.path if isinstance(recipe, EmbedderRecipe | AlignRecipe) else recipe.checkpoint
    start = str(checkpoint_path(Config())) if start == "miniature" else start
    icm = recipe.start.icm if isinstance(recipe, EmbedderRecipe | AlignRecipe) else IcmConfig()
    file = Path(start) / "config.json"
    if file.is_file():
        manifest = file.parent / "retrv" / "manifest.json"
        if manifest.is_file():
            icm = IcmConfig(**json.loads(manifest.read_text(encoding="utf-8"))["icm"])
        return count(Qwen2_5_VLConfig(**json.loads(file.read_text(encoding="utf-8"))), icm)
    name = recipe.backbone or next((name for name in BACKBONES if name in start), "")
    if name not in BACKBONES:
        raise OptionsError(
            explain("backbone", expected=f"one of {', '.join(BACKBONES)} while {start} does not exist",
                    got=name or "nothing", fix="Set backbone or checkpoint.")
        )  # fmt: skip
    text = {**_TEXT, **BACKBONES[name]}
    vision = {**_VISION, "out_hidden_size": text["hidden_size"]}
    tied = text["tie_word_embeddings"]
    return count(Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied), icm)


def count(config: Qwen2_5_VLConfig, icm: IcmConfig) -> Size:
    plain = config.to_dict()
    plain.pop("model_type", None)
    with torch.device("meta"):
        model = RetrvR1ForConditionalGeneration(RetrvR1Config(**{**plain, "icm": asdict(icm)}))
    text = model.config.text_config
    tied = bool(text.tie_word_embeddings)
    layers = model.model.language_model.layers
    linear = [m for m in layers.modules() if isinstance(m, torch.nn.Linear)]
    table = text.vocab_size * text.hidden_size
    total = sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
    if tied and model.lm_head.weight is not model.get_input_embeddings().weight:
        total -= table  # without weights it is counted twice
    matrices, tables = sum(m.weight.numel() for m in linear), table * (1 if tied else 2)
    module = sum(p.numel() for p in model.model.icm.parameters())
    return Size(
        total=total, matrices=matrices, tables=tables, module=module, frozen=total - matrices - module - tables + table,
        tower=sum(p.numel() for p in model.model.visual.parameters()),
        lora_per_rank=sum(m.in_features + m.out_features for m in linear), hidden=text.hidden_size,
        layers=text.num_hidden_layers, intermediate=text.intermediate_size, vocab=text.vocab_size,
        kv_width=text.num_key_value_heads * text.hidden_size // text.num_attention_heads, tied=tied,
    )  # fmt: skip
