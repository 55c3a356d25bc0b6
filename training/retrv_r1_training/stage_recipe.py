"""The recipes of `retrv-r1-train base`, `embedder` and `align` as frozen values. Defaults are ours unless a docstring says whose."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from retrv_r1_retriever.errors import OptionsError, explain
from retrv_r1_retriever.model.configuration import IcmConfig
from retrv_r1_training.align import Frame
from retrv_r1_training.backbone import BackboneSize
from retrv_r1_training.checks import check_ranges
from retrv_r1_training.data_config import DataConfig
from retrv_r1_training.sft_recipe import Hardware, LoraSettings, Optimisation, Running


@dataclass(frozen=True, slots=True)
class Start:
    """A Retrv-R1 checkpoint; or a Qwen2.5-VL backbone (folder or hub id), which gets our tokens and a fresh module of size `icm`.

    All but `path` is for a backbone; a checkpoint has its own. max_pixels: largest picture after resizing, None = the backbone's
    """

    path: str
    revision: str | None = None
    licence: str = ""
    max_text_tokens: int = 512
    max_pixels: int | None = None
    icm: IcmConfig = field(default_factory=IcmConfig)


@dataclass(frozen=True, slots=True)
class EmbedderRecipe:
    """optim.batch_size: queries per step over all GPUs, each against all others' candidates; optim.per_device: texts or pictures
    read at once on one GPU (gradient caching: the batch is not cut, only read in parts)

    temperature: of the softmax over cosines; dim: leading dimensions kept, 0 = all
    hard_negatives: per query, drawn from the first `depth` of its list (LamRA draws from 100)
    across_modalities: also against candidates of other modalities than the positive's, as in a pool that is searched unfiltered
    pool: candidates searched in validation: positives, hard negatives, and random ones up to this number
    hardware, backbone, length: for the estimate, as in `SftRecipe`; length is of a text or picture
    """

    start: Start
    data: DataConfig
    optim: Optimisation
    temperature: float
    stage: Literal["embedder"] = "embedder"
    seed: int = 0
    dim: int = 0
    hard_negatives: int = 1
    depth: int = 100
    across_modalities: bool = False
    pool: int = 2000
    tune: Literal["lora", "full"] = "lora"
    lora: LoraSettings = field(default_factory=LoraSettings)
    run: Running = field(default_factory=Running)
    hardware: Hardware = field(default_factory=Hardware)
    backbone: str = ""
    length: int = 512

    def __post_init__(self) -> None:
        check_ranges(self, {"0 or more": "dim hard_negatives pool", "1 or more": "depth length"})
        if not self.temperature > 0:
            raise _bad("temperature", "a number above 0", self.temperature)
        for part in self.data.train:
            if self.hard_negatives and not part.lists:
                raise _bad(f"data.train, lists of {part.queries}", "a TREC run", "none",
                           "Make one (retrv-r1-train first-stage), or set hard_negatives: 0.")  # fmt: skip
        _refuse_zero3(self.run)


@dataclass(frozen=True, slots=True)
class AlignRecipe:
    """optim.batch_size: queries per step over all GPUs

    data.top_k: candidates of each, the positive and negatives, of which the share `hard` from the first `depth` of its list, as far
    as there is one, and the others at random
    described: candidates per query that are described from their two tokens
    frame: around a candidate that is described; tokens: longest description; by_word: coarse words whose agreement the relation
    token is to tell, where captions are aligned by word as the catalogue's are, else 0
    hardware, backbone, length: for the estimate, as in `SftRecipe`; length is of a candidate in full
    """

    start: Start
    data: DataConfig
    optim: Optimisation
    stage: Literal["align"] = "align"
    seed: int = 0
    hard: float = 0.5
    depth: int = 100
    described: int = 2
    frame: Frame = field(default_factory=Frame)
    tokens: int = 64
    by_word: int = 0
    run: Running = field(default_factory=Running)
    hardware: Hardware = field(default_factory=Hardware)
    backbone: str = ""
    length: int = 512

    @property
    def top_k(self) -> int:
        return self.data.top_k

    def __post_init__(self) -> None:
        check_ranges(self, {"0 or more": "by_word", "1 or more": "depth tokens length"})
        if self.top_k < 2:
            raise _bad("data.top_k", "at least 2", self.top_k)
        if not 1 <= self.described <= self.top_k:
            raise _bad("described", f"1 to data.top_k ({self.top_k})", self.described)
        if not 0 <= self.hard <= 1:
            raise _bad("hard", "a share, 0 to 1", self.hard)
        _refuse_zero3(self.run)


@dataclass(frozen=True, slots=True)
class BaseRecipe:
    """A backbone from scratch. vocab: most tokens of the tokenizer, ours not counted; optim.batch_size: captions per step"""

    data: DataConfig
    optim: Optimisation
    stage: Literal["base"] = "base"
    seed: int = 0
    vocab: int = 8192
    max_text_tokens: int = 64
    backbone: BackboneSize = field(default_factory=BackboneSize)
    icm: IcmConfig = field(default_factory=IcmConfig)
    run: Running = field(default_factory=lambda: Running(dtype="float32", checkpointing=False))
    hardware: Hardware = field(default_factory=lambda: Hardware(gpus=1))

    def __post_init__(self) -> None:
        check_ranges(self, {"1 or more": "vocab max_text_tokens"})
        # A process whose batch is all texts comes by the tower's gradients at another moment than one with pictures, and ZeRO adds
        # up what comes at the same moment: the sums would be of different weights. DDP waits for each by its name.
        if self.run.deepspeed is not None:
            raise _bad(
                "run.deepspeed",
                "null",
                self.run.deepspeed,
                "Several processes work without it, and there is nothing to shard.",
            )


StageRecipe: TypeAlias = EmbedderRecipe | AlignRecipe | BaseRecipe


def _refuse_zero3(run: Running) -> None:
    if run.deepspeed == "zero3":
        raise _bad("run.deepspeed", "null or zero2", "zero3",
                   "So little is trained here that there is nothing to shard but the frozen weights.")  # fmt: skip


def _bad(what: str, expected: str, got: object, fix: str = "Fix the recipe.") -> OptionsError:
    return OptionsError(explain(what, expected=expected, got=got, fix=fix))
