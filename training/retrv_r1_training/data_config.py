"""The `data` block that all recipes share: an M-BEIR folder, and what other commands made for it."""

from __future__ import annotations

from dataclasses import dataclass

from retrv_r1_retriever.errors import OptionsError, explain
from retrv_r1_retriever.evaluation.offsets import MAX_BAD_SHARE
from retrv_r1_retriever.types import MAX_CANDIDATES
from retrv_r1_training.checks import check_ranges


@dataclass(frozen=True, slots=True)
class Part:
    """One query file and what belongs to it.

    queries, pool, qrels: files below the data folder; without qrels, every positive of a query row has grade 1
    lists: the first stage's lists, a TREC run. None = the checkpoint's own embedder searches the pool, all of it in memory; in
        `embedder` and `align` = no hard negatives
    traces: thoughts, as `synthesize` writes them; only `sft` reads them
    """

    queries: str
    pool: str
    qrels: str | None = None
    lists: str | None = None
    traces: str | None = None


@dataclass(frozen=True, slots=True)
class DataConfig:
    """root: folder of M-BEIR files; top_k: K of the lists

    min_k: the shortest lists trained on, which the checkpoint tells its users: in `sft` those of `synthesize --min-k`; in `grpo` and
        `distill` half of the lists are cut to a random length from this to K. 0 = all are of K; None = so, too, and the checkpoint
        tells as well of the shorter ones that its start was trained on
    validation_queries: at most, evenly over the validation parts (`base`: captions); 0 = none
    captions: JSONL below root, {"id", "caption"}, for `base` and `align`; without it, the caption in a candidate's `src_content`
    cache_gb: of candidates' memory, and as much again of pictures after the tower, in each process
    workers: processes that read ahead, in `base`, `embedder` and `align`
    max_bad_share: of rows, thoughts and validation lists that cannot be used; a larger share is an error
    """

    root: str
    train: tuple[Part, ...]
    validation: tuple[Part, ...] = ()
    top_k: int = 20
    min_k: int | None = None
    validation_queries: int = 200
    captions: str | None = None
    cache_gb: float = 2.0
    workers: int = 0
    max_bad_share: float = MAX_BAD_SHARE

    def __post_init__(self) -> None:
        check_ranges(
            self,
            {
                "1 or more": "top_k",
                "0 or more": "validation_queries cache_gb workers",
                "a share, 0 to 1": "max_bad_share",
            },
        )
        for what, good, expected, got in (
            ("train", bool(self.train), "at least one part", "none"),
            ("top_k", self.top_k <= MAX_CANDIDATES, f"1 to {MAX_CANDIDATES}", self.top_k),
            ("min_k", 0 <= (self.min_k or 0) <= self.top_k, f"0 to data.top_k ({self.top_k})", self.min_k),
        ):
            if not good:
                raise OptionsError(explain(f"data.{what}", expected=expected, got=got, fix="Fix the recipe."))
