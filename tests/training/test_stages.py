"""The miniature's stages: the losses see what the engine sees, frozen things stay frozen, every stage runs and resumes."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from retrv_r1_training import cli, sft
from retrv_r1_training.lists import MIN_K, ListConfig, Lists, candidate_list
from retrv_r1_training.loop import Schedule, train
from retrv_r1_training.loss import TokenWeights, hidden_states, token_weights
from retrv_r1_training.miniature import STAGES, Miniature, with_fewer_steps
from retrv_r1_training.overrides import load
from retrv_r1_training.recipe import Recipe, build
from retrv_r1_training.run_folder import locked
from retrv_r1_training.teacher import TeacherStyle

from retrv_r1_retriever.demo import catalogue
from retrv_r1_retriever.engines.local import LocalEngine
from retrv_r1_retriever.errors import OptionsError, RetrvR1Error
from retrv_r1_retriever.model.checkpoint import Checkpoint, Manifest, load_checkpoint, memory_digest
from retrv_r1_retriever.model.embedding import BackboneEmbedder
from retrv_r1_retriever.model.processing import collate
from retrv_r1_retriever.prompt import ADDED_TOKENS, ANSWER_START, ASSISTANT, build_prompt
from retrv_r1_retriever.types import Candidate, Document, Memory

RECIPE = cli.RECIPES / "miniature.yaml"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two steps of every stage on a shrunken catalogue, through the command line."""
    patch = pytest.MonkeyPatch()
    small = {n: catalogue.Split(n, "val", s.seed, 6) for n, s in catalogue.SPLITS.items()}
    patch.setattr(catalogue, "SPLITS", small)
    patch.setattr(catalogue, "combos", lambda part: _FEW)
    folder = tmp_path_factory.mktemp("run")
    recipe = folder / "recipe.yaml"
    text = RECIPE.read_text().replace("batch_size: 128", "batch_size: 8").replace("batch_size: 64", "batch_size: 8")
    recipe.write_text(text)
    argv = ["miniature", "--recipe", str(recipe), "--run", str(folder), "--steps", "2", "--threads", "1"]
    assert cli.main(argv) == 0
    patch.undo()
    return folder


_FEW = catalogue.combos("val")[:24]


def test_every_stage_leaves_a_checkpoint_that_serves(run):
    stages = [json.loads(line)["stage"] for line in (run / "stages.jsonl").read_text().splitlines()]
    assert stages == [stage for stage in STAGES if stage not in ("pointwise", "in_full")]
    loaded = load_checkpoint(run / "checkpoint", device="cpu")
    assert (loaded.manifest.trained_min_k, loaded.manifest.trained_top_k) == (MIN_K, 20)
    assert len(loaded.manifest.memory_digest) == 16
    assert BackboneEmbedder.from_pretrained(run / "checkpoint", device="cpu").dim == loaded.manifest.embedder_dim


def test_finished_stages_are_not_run_again(run, monkeypatch):
    monkeypatch.setattr("retrv_r1_training.sft.train_sft", lambda *a: pytest.fail("ran again"))
    recipe = with_fewer_steps(load(Recipe, run / "recipe.yaml"), 2)
    miniature = Miniature(recipe, run)
    monkeypatch.setattr(miniature, "export", lambda out: None)
    miniature.train(run / "again")
    with pytest.raises(OptionsError, match=r"align.json: expected what align reads of this recipe.*Remove align.pt"):
        Miniature(replace(recipe, pairs_per_query=3), run).train(run / "again")
    with pytest.raises(OptionsError, match=r"grpo.json: expected what grpo reads"):
        Miniature(replace(recipe, stages=replace(recipe.stages, polish=None)), run).train(run / "again")


def test_weights_of_an_unknown_recipe_and_folders_in_use_are_refused(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    miniature = Miniature(with_fewer_steps(load(Recipe, run / "recipe.yaml"), 2), folder)
    (folder / "direct.json").unlink()
    with pytest.raises(
        OptionsError, match=r"direct.json: expected .* got no such file beside direct.pt. Remove direct.pt and"
    ):
        miniature.stage("direct")
    (folder / "direct.pt").unlink()
    with locked(folder), pytest.raises(RetrvR1Error, match="expected no other run at work here"):
        miniature.stage("direct")
    assert not (folder / "direct.json").exists()


def test_grpo_goes_on_from_states_of_its_own_recipe_only(run, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    recipe = with_fewer_steps(load(Recipe, run / "recipe.yaml"), 2)
    other = replace(recipe, stages=replace(recipe.stages, grpo=replace(recipe.stages.grpo, lr=1e-6)))
    found = []
    monkeypatch.setattr(
        Miniature, "grpo", lambda self: found.append((self.run / "grpo-states").exists()) or self._load("polish")
    )
    for made in (recipe, other):  # as if killed before the end
        (folder / "grpo.pt").unlink()
        Miniature(made, folder).stage("grpo")
    assert found == [True, False]


def test_sft_keeps_what_memory_is_made_of(run):
    before, after = (torch.load(run / f"{s}.pt", weights_only=True) for s in ("align", "sft"))
    processor = load_checkpoint(run / "checkpoint", device="cpu").processor
    manifest = Manifest("x")
    assert memory_digest(before, processor, manifest) == memory_digest(after, processor, manifest)
    rows = [processor.token_id(t) for t in ADDED_TOKENS]
    table = "model.language_model.embed_tokens.weight"
    moved = (before[table] != after[table]).any(1)
    assert moved[rows].any()
    assert not moved[: min(rows)].any()
    assert not moved[max(rows) + 1 :].any()


def test_direct_read_branch_is_the_engines_probe(run):
    """What training reads behind the last column is what serving reads at `<answer>`."""
    import asyncio

    loaded = load_checkpoint(run / "checkpoint", device="cpu")
    miniature = Miniature(with_fewer_steps(load(Recipe, RECIPE), 2), run)
    miniature.__dict__["processor"] = loaded.processor
    lists = miniature.lists[-1]
    examples = [
        sft.make_example(loaded.processor, lists, n, ListConfig.as_served(6), TeacherStyle(), random.Random(n))
        for n in range(0, len(lists.pool.queries), 4)
    ]
    with torch.no_grad():
        hidden, branch, _, batch = sft.forward_with_direct_read(loaded.model, loaded.processor, examples)
        logits = loaded.model.lm_head(branch)
    engine = LocalEngine(Checkpoint(loaded.model, loaded.processor, loaded.manifest))

    async def probe(number: int):
        query = lists.pool.queries[number]
        chosen = lists.ranked[number, :6].tolist()
        items = [lists.pool.items[i] for i in chosen]
        prompt = build_prompt(
            query.query,
            [Candidate(Document(x.id, x.content), None, r, lists.memories[i])
             for r, (i, x) in enumerate(zip(chosen, items, strict=True), 1)],
        )  # fmt: skip
        handle = await engine.open(prompt)
        return (await engine.probe(handle, ANSWER_START)).logprobs

    for row, example, number in zip(logits, examples, range(0, len(lists.pool.queries), 4), strict=True):
        slots = [loaded.processor.token_id(s) for s in example.slots]
        want = torch.tensor(asyncio.run(probe(number)))
        torch.testing.assert_close(torch.log_softmax(row[slots], -1), want, atol=1e-3, rtol=1e-3)
    chunks = [type(e.prompt).join([e.prompt, e.turn]) for e in examples]
    with torch.no_grad():
        plain, _ = hidden_states(loaded.model, loaded.processor, chunks)
    for b, chunk in enumerate(chunks):
        torch.testing.assert_close(hidden[b, : len(chunk)], plain[b, : len(chunk)], atol=1e-3, rtol=1e-3)
    assert batch.sampled.any()


def test_candidates_in_full_are_read_at_their_last_tokens(run, monkeypatch):
    """The loss on each verdict is taken where a candidate ends, of every candidate once, in order."""
    loaded = load_checkpoint(run / "checkpoint", device="cpu")
    model, processor = loaded.model, loaded.processor
    miniature = Miniature(with_fewer_steps(load(Recipe, RECIPE), 2), run)
    miniature.__dict__["processor"] = processor
    lists = replace(miniature.lists[-1], full=True)
    examples = [
        sft.make_example(processor, lists, n, ListConfig(6), TeacherStyle(), random.Random(n))
        for n in range(0, len(lists.pool.queries), 5)
    ]
    seen = []
    monkeypatch.setattr(sft, "_verdict_loss", lambda model, processor, read, examples: seen.append(read))
    columns = torch.arange(max(len(e.prompt) for e in examples))
    rows = torch.arange(len(examples))
    sft.reading_loss(model, processor, torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1), examples)
    at = iter(seen[0].tolist())
    end, slots = processor.tokenise(ASSISTANT), set(processor.slot_ids)
    for row, example in enumerate(examples):
        ids = example.prompt.ids.tolist()
        for number in range(len(example.verdicts)):
            where, column = next(at)
            assert where == row
            assert ids[column] not in slots
            last = number == len(example.verdicts) - 1
            assert ids[column + 1 :] == end if last else ids[column + 1] in slots
    assert next(at, None) is None
    monkeypatch.undo()
    loss, metrics, _ = sft.losses(model, processor, examples, sft.SftLoss())
    without, _, _ = sft.losses(model, processor, examples, sft.SftLoss(relation=0.0))
    assert loss > without
    assert 0 <= metrics["relation"] <= 1


def test_weights_follow_the_role_of_a_token(run):
    loaded = load_checkpoint(run / "checkpoint", device="cpu")
    miniature = Miniature(with_fewer_steps(load(Recipe, RECIPE), 2), run)
    miniature.__dict__["processor"] = loaded.processor
    lists = miniature.lists[-1]
    fine = next(i for i, q in enumerate(lists.pool.queries) if q.stratum == "fine")
    config, style = ListConfig(20, 0.0, 1.0, 0.0, 0.0, 0.0), TeacherStyle(extra=1.0, careful=1.0)
    example = sft.make_example(loaded.processor, lists, fine, config, style, random.Random(1))
    batch = collate([type(example.prompt).join([example.prompt, example.turn])], loaded.processor)
    weights = token_weights(batch, loaded.processor, TokenWeights())[0]
    assert (weights[: len(example.prompt)] == 0).all(), "the prompt carries no loss"
    words = loaded.processor.tokenizer.convert_ids_to_tokens(batch.input_ids[0].tolist())
    by_word = {w: weights[i].item() for i, w in enumerate(words) if weights[i] > 0}
    assert by_word["Ġkeep"] == TokenWeights().verdict
    assert by_word["<inspection-index-start>"] == TokenWeights().inspect
    answer = max(i for i, w in enumerate(words) if w == ANSWER_START) + 1
    assert weights[answer] == TokenWeights().answer
    injected = [i for i, w in enumerate(words) if w == "<|image_pad|>"]
    assert all(weights[i] == 0 for i in injected), "opened candidates carry no loss"


def test_half_of_the_lists_are_short(run):
    lists = Miniature(with_fewer_steps(load(Recipe, RECIPE), 2), run).lists[-1]
    rng, config, count = random.Random(0), ListConfig(20), len(lists.pool.queries)
    made = [candidate_list(lists, number % count, config, rng) for number in range(400)]
    lengths = Counter(len(chosen) for chosen, _ in made)
    assert set(lengths) == set(range(MIN_K, 21))
    assert 0.4 < sum(n for length, n in lengths.items() if length < 20) / 400 < 0.6
    assert all(len(candidate_list(lists, n, ListConfig.as_served(20), rng)[0]) == 20 for n in range(count))
    positives = [lists.pool.target(lists.pool.queries[number % count]) for number in range(400)]
    assert all(
        at is None if p not in chosen else chosen[at] == p for (chosen, at), p in zip(made, positives, strict=True)
    )


def test_memory_of_lists_is_what_the_engine_compresses(run):
    loaded = load_checkpoint(run / "checkpoint", device="cpu")
    miniature = Miniature(with_fewer_steps(load(Recipe, RECIPE), 2), run)
    miniature.__dict__["processor"] = loaded.processor
    lists: Lists = miniature.lists[-1]
    memory: Memory = lists.memories[0]
    got = LocalEngine(loaded).compress([miniature.raw_pools[-1].items[0].content])[0].rows
    assert memory.rows.shape == got.shape
    assert abs(memory.rows.astype(float) - got.astype(float)).max() < 0.1, "bfloat16 weights, same memory"


def test_a_stage_stops_as_soon_as_validation_is_content(tmp_path):
    weight = torch.nn.Parameter(torch.ones(()))
    steps, scores = [], iter([0.2, 0.6, 0.9])

    def loss(step):
        steps.append(step)
        return weight**2, {}

    train("short", Schedule(50, 0.1, 1), [weight], loss, tmp_path / "log.jsonl",
          evaluate=lambda: {"recall": next(scores)}, every=1, until=lambda found: found["recall"] >= 0.5)  # fmt: skip
    assert steps == [0, 1, 2, 3]  # looked at after steps 2 and 4
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 4


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    weight = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(FloatingPointError, match="loss at step 0: expected a finite number, got nan"):
        train("x", Schedule(2, 0.1, 1), [weight], lambda s: (weight.sum() * float("nan"), {}), tmp_path / "log")


@pytest.mark.parametrize(("change", "message"), [({"sed": 1}, "got sed"), ({"icm": {"wide": 1}}, "got wide")])
def test_unknown_recipe_keys_are_named(change, message):
    with pytest.raises(OptionsError, match=message):
        build(Recipe, {"seed": 0, **change}, "recipe")


def test_shipped_recipe_loads():
    assert load(Recipe, RECIPE).top_k == 20
    assert Path(RECIPE).name == "miniature.yaml"
