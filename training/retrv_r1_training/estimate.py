"""What a recipe costs, by arithmetic: GB per GPU and GPU-hours. Nothing here was measured on a GPU; every assumption is printed."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import Qwen2_5_VLConfig

from retrv_r1_retriever.errors import OptionsError, explain
from retrv_r1_retriever.model.configuration import IcmConfig, RetrvR1Config
from retrv_r1_retriever.model.modeling import RetrvR1ForConditionalGeneration
from retrv_r1_retriever.prompt import ADDED_TOKENS
from retrv_r1_training.sft_recipe import SftRecipe

GB = 1e9
CONTEXT_GB = 2.0  #: CUDA context, NCCL buffers and fragmentation; a guess
RELATION_TOKENS = 5  #: two compressed tokens and the cue, read once more per candidate by the relation loss

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
    """Parameters, counted on a model without weights. matrices: of the LM's layers, which every token passes."""

    total: int
    matrices: int
    tables: int
    module: int
    lora_per_rank: int
    hidden: int
    layers: int
    intermediate: int
    vocab: int
    tied: bool


@dataclass(frozen=True, slots=True)
class Estimate:
    """GB on one GPU by part; hours on one GPU of the whole stage."""

    size: Size
    trained: int
    gb: dict[str, float]
    gpu_hours: float

    @property
    def total_gb(self) -> float:
        return sum(self.gb.values())


def size_of(recipe: SftRecipe) -> Size:
    """From the checkpoint's config.json if it is there, else from the named backbone."""
    file = Path(recipe.checkpoint) / "config.json"
    if file.is_file():
        manifest = json.loads((file.parent / "retrv" / "manifest.json").read_text(encoding="utf-8"))
        return count(Qwen2_5_VLConfig(**json.loads(file.read_text(encoding="utf-8"))), IcmConfig(**manifest["icm"]))
    if recipe.backbone not in BACKBONES:
        raise OptionsError(
            explain("backbone", expected=f"one of {', '.join(BACKBONES)} while {recipe.checkpoint} does not exist",
                    got=recipe.backbone or "nothing", fix="Set backbone or checkpoint.")
        )  # fmt: skip
    text = {**_TEXT, **BACKBONES[recipe.backbone]}
    vision = {**_VISION, "out_hidden_size": text["hidden_size"]}
    tied = text["tie_word_embeddings"]
    return count(Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied), IcmConfig())


def count(config: Qwen2_5_VLConfig, icm: IcmConfig) -> Size:
    plain = config.to_dict()
    plain.pop("model_type", None)
    with torch.device("meta"):
        model = RetrvR1ForConditionalGeneration(RetrvR1Config(**plain, icm=asdict(icm)))
    text = model.config.text_config
    tied = bool(text.tie_word_embeddings)
    layers = model.model.language_model.layers
    linear = [m for m in layers.modules() if isinstance(m, torch.nn.Linear)]
    tables = text.vocab_size * text.hidden_size * (1 if tied else 2)
    head = model.lm_head.weight.numel() if tied else 0  # tied, yet counted twice without weights
    total = sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
    shared = model.lm_head.weight is model.get_input_embeddings().weight
    return Size(
        total=total - (0 if shared else head), matrices=sum(m.weight.numel() for m in linear), tables=tables,
        module=sum(p.numel() for p in model.model.icm.parameters()),
        lora_per_rank=sum(m.in_features + m.out_features for m in linear), hidden=text.hidden_size,
        layers=text.num_hidden_layers, intermediate=text.intermediate_size, vocab=text.vocab_size, tied=tied,
    )  # fmt: skip


def estimate(recipe: SftRecipe) -> Estimate:
    size = size_of(recipe)
    slots = len(ADDED_TOKENS) * size.hidden * (1 if size.tied else 2)
    trained = size.module + (
        recipe.lora.rank * size.lora_per_rank + slots if recipe.tune == "lora" else size.matrices + size.tables
    )
    gb = _states(recipe, size, trained) | _activations(recipe, size)
    gb |= {"frozen copy": _frozen_copy(recipe, size), "context": CONTEXT_GB}
    seconds = recipe.optim.steps * recipe.optim.batch_size * _flops(recipe, size)
    seconds /= recipe.hardware.tflops * 1e12 * recipe.hardware.use
    return Estimate(size, trained, gb, seconds / 3600)


def _states(recipe: SftRecipe, size: Size, trained: int) -> dict[str, float]:
    """Weights, gradients and Adam (fp32 copy, two moments); ZeRO-2 shards the last two, ZeRO-3 all three."""
    width, zero, gpus = 2 if recipe.run.dtype == "bfloat16" else 4, recipe.run.deepspeed, recipe.hardware.gpus
    adapters = trained if recipe.tune == "lora" else 0
    if zero is None:
        upcast = trained * (4 - width)  # what is trained is kept in fp32
        return {"weights": ((size.total + adapters) * width + upcast) / GB, "gradients": trained * 4 / GB,
                "optimiser": trained * 8 / GB}  # fmt: skip
    weights = (size.total + adapters) * width / GB
    gradients = trained * (width + 4) / GB  # as they come, and in fp32 for the step
    return {"weights": weights / gpus if zero == "zero3" else weights, "gradients": gradients / gpus,
            "optimiser": trained * 12 / GB / gpus}  # fmt: skip


def _activations(recipe: SftRecipe, size: Size) -> dict[str, float]:
    tokens = recipe.optim.per_device * (recipe.length + recipe.data.top_k * RELATION_TOKENS)
    layer = tokens * (10 * size.hidden + 4 * size.intermediate) * 2  # a layer with nothing recomputed
    kept = size.layers * tokens * size.hidden * 2 + layer if recipe.run.checkpointing else size.layers * layer
    logits = recipe.optim.per_device * recipe.thought * size.vocab * 12  # fp32 logits, log-softmax, gradient
    parts = {"activations": kept / GB, "logits": logits / GB}
    if (
        recipe.tune == "lora"
    ):  # PEFT writes the slot rows into a copy of the head at each of three reads, and its gradient
        parts["slot rows"] = 4 * size.vocab * size.hidden * 2 / GB
    if recipe.run.deepspeed == "zero3":  # gathered for use: the tables, and two layers
        parts["gathered"] = (size.tables + 2 * size.matrices / size.layers) * 2 / GB
    return parts


def _frozen_copy(recipe: SftRecipe, size: Size) -> float:
    """Tower, embedding table and norms once more, not sharded: what reads candidates while the model trains."""
    table = size.tables if size.tied else size.tables // 2
    return (
        (size.total - size.matrices - size.module - size.tables + table)
        * (2 if recipe.run.dtype == "bfloat16" else 4)
        / GB
    )


def _flops(recipe: SftRecipe, size: Size) -> float:
    """Of one example: 2 per weight and token forward, 2 for the gradient of the input, 2 for that of a trained weight."""
    passes = (4 if recipe.tune == "lora" else 6) + (2 if recipe.run.checkpointing else 0)
    read = size.matrices * (recipe.length + recipe.data.top_k * RELATION_TOKENS)
    said = size.vocab * size.hidden * (recipe.thought + recipe.data.top_k)
    attention = 2 * recipe.length**2 * size.hidden * size.layers
    return float(passes * (read + said + attention))


def table(recipe: SftRecipe, result: Estimate) -> str:
    hardware, optim = recipe.hardware, recipe.optim
    verdict = "fits" if result.total_gb <= hardware.gpu_gb else "DOES NOT FIT"
    gb = "\n".join(f"  {name:<12}{value:8.1f}" for name, value in result.gb.items())
    return f"""stage sft, {recipe.tune}, {recipe.run.deepspeed or "no ZeRO"}, {hardware.gpus} GPU(s) of {hardware.gpu_gb:.0f} GB
parameters: {result.size.total / 1e9:.2f} B, trained {result.trained / 1e6:.1f} M
GB per rank:
{gb}
  {"total":<12}{result.total_gb:8.1f}   {verdict} {hardware.gpu_gb:.0f} GB
GPU-hours: {result.gpu_hours:.1f} ({result.gpu_hours / hardware.gpus:.1f} hours on {hardware.gpus})
assumed, not measured:
  {optim.steps} steps x {optim.batch_size} lists of {recipe.data.top_k}; {recipe.length} tokens each, {recipe.thought} of them sampled
  {optim.per_device} list(s) at a time per GPU; activation checkpointing {"on" if recipe.run.checkpointing else "off"}
  pictures go through the tower once, while the cache holds them; that time is not counted
  {hardware.tflops:.0f} TFLOP/s per GPU by data sheet, {hardware.use:.0%} of it reached; {CONTEXT_GB:.0f} GB for CUDA and fragmentation
"""
