"""A small Qwen2.5-VL and its tokenizer from scratch. Only the miniature needs it: real recipes start from a released backbone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2VLImageProcessorPil

from retrv_r1_retriever.model.configuration import IcmConfig, RetrvR1Config
from retrv_r1_retriever.model.modeling import RetrvR1ForConditionalGeneration
from retrv_r1_retriever.model.processing import Processor
from retrv_r1_retriever.prompt import ADDED_TOKENS
from retrv_r1_training.checks import check_ranges

QWEN_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class BackboneSize:
    """Language model and tower. head_dim 32 is the smallest that vLLM's CPU attention takes."""

    hidden: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    intermediate: int = 320
    tower_hidden: int = 96
    tower_depth: int = 3
    tower_heads: int = 4
    patch: int = 8
    image_pixels: int = 64 * 64
    max_positions: int = 4096

    def __post_init__(self) -> None:
        check_ranges(self, {"1 or more": " ".join(f.name for f in fields(self))})


def build_tokenizer(texts: Iterable[str], vocab: int = 8192) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which every word of `texts` becomes one token, as long as there is room, and any other text is spelled."""
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(r" ?[^\s]+|\s"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=list(QWEN_TOKENS), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), min_frequency=2,
    )  # fmt: skip
    tokenizer.train_from_iterator((text for text in texts for _ in range(2)), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        additional_special_tokens=list(QWEN_TOKENS[1:]), clean_up_tokenization_spaces=False,
    )  # fmt: skip
    fast.add_tokens(list(ADDED_TOKENS), special_tokens=True)
    return fast


def build_processor(tokenizer: PreTrainedTokenizerFast, size: BackboneSize, max_text_tokens: int = 64) -> Processor:
    factor = 2 * size.patch
    images = Qwen2VLImageProcessorPil(
        patch_size=size.patch, temporal_patch_size=2, merge_size=2,
        size={"shortest_edge": factor * factor, "longest_edge": size.image_pixels},
    )  # fmt: skip
    return Processor(tokenizer, images, max_text_tokens)


def build_model(
    tokenizer: PreTrainedTokenizerFast, size: BackboneSize, icm: IcmConfig, seed: int
) -> RetrvR1ForConditionalGeneration:
    torch.manual_seed(seed)
    vocab = -(-(len(tokenizer) + 1) // 64) * 64  # larger than the tokenizer, as real Qwen: vLLM needs a spare id
    return RetrvR1ForConditionalGeneration(model_config(size, icm, vocab, tokenizer.convert_tokens_to_ids))


def model_config(size: BackboneSize, icm: IcmConfig, vocab: int, token: Callable[[str], int]) -> RetrvR1Config:
    """token: id of one of the special tokens"""
    half = size.hidden // size.heads // 2
    third = half // 3
    return RetrvR1Config(
        text_config={
            "vocab_size": vocab, "hidden_size": size.hidden, "intermediate_size": size.intermediate,
            "num_hidden_layers": size.layers, "num_attention_heads": size.heads, "num_key_value_heads": size.kv_heads,
            "max_position_embeddings": size.max_positions, "initializer_range": 0.05, "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [half - 2 * third, third, third],
            },
            "bos_token_id": token("<|endoftext|>"), "eos_token_id": token("<|im_end|>"),
            "pad_token_id": token("<|endoftext|>"),
        },
        vision_config={
            "depth": size.tower_depth, "hidden_size": size.tower_hidden, "intermediate_size": 2 * size.tower_hidden,
            "num_heads": size.tower_heads, "patch_size": size.patch, "spatial_merge_size": 2,
            "temporal_patch_size": 2, "out_hidden_size": size.hidden, "window_size": 8 * size.patch,
            "fullatt_block_indexes": list(range(size.tower_depth)), "initializer_range": 0.05,
        },
        image_token_id=token("<|image_pad|>"), video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"), vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True, icm=asdict(icm),
    )  # fmt: skip
