"""`retrv-r1-train align`: the compression module learns, the language model is frozen (arXiv 2510.02745, ICM self-alignment).

content   the frozen model says of two tokens what it says of the full ones: a caption, or its own words (`describe.py`)
relation  a linear reading of the relation token, thrown away afterwards, tells the positive among K; why: `align.py`
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from retrv_r1_retriever.model.checkpoint import Manifest, save_checkpoint
from retrv_r1_retriever.model.modeling import RetrvR1ForConditionalGeneration
from retrv_r1_retriever.model.processing import Processor
from retrv_r1_training.adapters import freeze_folded, load_trained
from retrv_r1_training.align import Frame, agreement, described, read_two_tokens, relation_loss, two_tokens
from retrv_r1_training.data import content_embeds
from retrv_r1_training.describe import Descriptions
from retrv_r1_training.draws import Contrasted, Contrasts, Draws, Opened, Source
from retrv_r1_training.loss import accuracy, of_each_sequence, weighted_ce
from retrv_r1_training.processes import is_first
from retrv_r1_training.run_folder import finish
from retrv_r1_training.stage_checkpoint import keep_embedder
from retrv_r1_training.stage_recipe import AlignRecipe
from retrv_r1_training.stage_run import Figures, Work, dtype_of, is_checkpoint, load_start, train
from retrv_r1_training.teacher import Caption
from retrv_r1_training.trl_sft import SftModel
from retrv_r1_training.unreadable import Chosen

SAMPLE = 8  #: lists whose candidates show how long the full tokens are
SCALE = "model.icm.tag_scale"  #: chosen by `prepare`, not trained


class AlignModel(SftModel):
    """reading: thrown away at the end"""

    reading: nn.Linear


def train_align(recipe: AlignRecipe, run: Path) -> Path:
    """Train or resume in folder `run`; returns the checkpoint. Memories made with the start are stale after this."""
    torch.manual_seed(recipe.seed)
    start = load_start(recipe.start, recipe.run.dtype)
    files, processor = Opened(recipe.data), start.processor
    made = _contrasts(recipe, files.train)
    draws = made.draws(recipe.optim.steps * recipe.optim.batch_size, recipe.seed, recipe.data.max_bad_share)
    said = Descriptions(start, recipe.frame, recipe.tokens, run / "descriptions.sqlite")
    objective = Objective(processor, said, recipe.frame, recipe.by_word)
    model = prepare(AlignModel.of(start.model), processor, recipe.by_word, draws)
    measure = None
    if files.validated:
        held_out = _contrasts(recipe, files.validation).draws(files.validated, 0).readable(recipe.data.max_bad_share)
        measure = Measure(objective, held_out, recipe.optim.per_device)
    state = train(recipe, run, Work(processor, model, draws, objective, measure))
    state[SCALE] = model.get_parameter(SCALE).detach().cpu()
    out = run / "checkpoint"
    if is_first():
        finish(out, lambda aside: export(recipe, state, aside))
    return out


def _contrasts(recipe: AlignRecipe, sources: Sequence[Source]) -> Contrasts:
    negatives = recipe.top_k - 1
    return Contrasts(sources, negatives, round(recipe.hard * negatives), recipe.depth, recipe.described)


def prepare(model: SftModel, processor: Processor, by_word: int, draws: Draws[Contrasted]) -> AlignModel:
    """Only the module and the reading are trained; the two tokens start as long as what the model reads in full."""
    contents = [item.content for n in range(min(SAMPLE, len(draws))) for item in draws[n].items]
    norm = float(torch.cat(content_embeds(model, processor, contents, {})).float().norm(dim=-1).mean())
    model.model.init_icm(norm)
    _train_module(model)
    model.reading = nn.Linear(model.config.text_config.hidden_size, 1 + by_word).to(model.device)
    return model


def _train_module(model: RetrvR1ForConditionalGeneration) -> None:
    """All of the module but the label tag's scale: nothing is labelled here, and DDP waits for every gradient."""
    model.requires_grad_(False)
    model.model.icm.requires_grad_(True)
    model.model.icm.tag_scale.requires_grad_(False)
    freeze_folded(model)


def export(recipe: AlignRecipe, state: dict[str, Tensor], out: Path) -> Manifest:
    """The start with the trained module, and its embedder as it is."""
    start = load_start(recipe.start, "float32", "cpu")
    _train_module(start.model)
    start.model.get_parameter(SCALE).requires_grad_(True)  # `load_trained` fills exactly what is trainable
    load_trained(start.model, {name: value for name, value in state.items() if not name.startswith("reading.")})
    saved = save_checkpoint(out, start.model, start.processor, start.manifest, dtype=dtype_of(recipe))
    return keep_embedder(Path(recipe.start.path), out, saved) if is_checkpoint(recipe.start) else saved


@dataclass(frozen=True)
class Objective:
    processor: Processor
    said: Descriptions
    frame: Frame
    by_word: int

    def __call__(self, net: AlignModel, examples: Sequence[Contrasted]) -> tuple[Tensor, Figures]:
        cache: dict[int, Tensor] = {}
        content, words = self.content(net, examples, cache)
        items = [item for e in examples for item in e.items]
        read = net.reading(two_tokens(net, self.processor, [e.query for e in examples], items, cache)[1]).float()
        relation, right, more = relation_loss(read, len(examples), self._same(examples, read.device))
        return content + relation, {
            "content": content.item(), "words": words, "relation": right.float().mean().item(), **more,
        }  # fmt: skip

    def content(
        self, net: AlignModel, examples: Sequence[Contrasted], cache: dict[int, Tensor]
    ) -> tuple[Tensor, float]:
        """Cross-entropy of the descriptions (each one's mean) read from two tokens, and the share of their tokens that is the arg-max."""
        items = [e.items[i] for e in examples for i in e.described]
        training = net.training
        said = self.said.of(items)
        net.train(training)  # the engine reads in `eval`
        chunks = [described(self.processor, i.content, s, self.frame) for i, s in zip(items, said, strict=True)]
        tokens = two_tokens(net, self.processor, [e.query for e in examples], items, cache)
        hidden, batch = read_two_tokens(net, self.processor, chunks, tokens)
        loss = weighted_ce(net, hidden, batch.input_ids, of_each_sequence(batch.sampled))
        return loss, accuracy(net, hidden, batch.input_ids, batch.sampled)

    def _same(self, examples: Sequence[Contrasted], device: torch.device) -> Tensor | None:
        if not self.by_word:
            return None
        captions = [[Caption.of(item.caption) for item in e.items] for e in examples]
        return torch.cat([agreement(part, self.by_word) for part in captions]).to(device)


@dataclass(frozen=True)
class Measure:
    """The objective's figures on held-out lists, read `at_once` at a time."""

    objective: Objective
    held_out: Chosen[Contrasted]
    at_once: int

    def __call__(self, net: AlignModel) -> Figures:
        sums: dict[str, float] = {}
        for start in range(0, len(self.held_out), self.at_once):
            numbers = range(start, min(start + self.at_once, len(self.held_out)))
            loss, figures = self.objective(net, [self.held_out[n] for n in numbers])
            for name, value in {"loss": loss.item(), **figures}.items():
                sums[name] = sums.get(name, 0.0) + value * len(numbers)
        return {name: value / len(self.held_out) for name, value in sums.items()}
