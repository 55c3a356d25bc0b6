"""The ablation: what rows share, what a removed part does, a smoke test of all of it, and a kill in the middle."""

from __future__ import annotations

import copy
import json
import random
from dataclasses import fields

import pytest
import torch
from retrv_r1_training import cli
from retrv_r1_training.ablation import Ablation, Result, Row, Study, shared
from retrv_r1_training.card import write_card
from retrv_r1_training.memory_training import learn_memory, learns_memory
from retrv_r1_training.miniature import READS, STAGES, Miniature
from retrv_r1_training.overrides import load
from retrv_r1_training.quality import Quality
from retrv_r1_training.recipe import Recipe, Stages
from retrv_r1_training.seeds import by_seed
from retrv_r1_training.sft import freeze_for_sft
from retrv_r1_training.teacher import Caption, TeacherStyle, write_thought

from retrv_r1_retriever.demo import catalogue
from retrv_r1_retriever.errors import InputError, OptionsError
from retrv_r1_retriever.model.checkpoint import Manifest, load_checkpoint
from retrv_r1_retriever.model.configuration import IcmConfig
from retrv_r1_retriever.model.icm import Icm
from retrv_r1_retriever.model.processing import collate
from retrv_r1_retriever.prompt import build_prompt
from retrv_r1_retriever.types import Candidate, Content, Document, Memory, Query
from tests.tiny import checkpoint

__all__ = ["checkpoint"]
RECIPE = cli.RECIPES / "ablation.yaml"


def study(tmp_path, **kwargs) -> Study:
    return Study(RECIPE, tmp_path / "out", tmp_path / "work", **kwargs)


def test_every_key_of_a_recipe_belongs_to_a_stage():
    assert list(READS) == [f.name for f in fields(Stages)]
    keys = {key for keys in READS.values() for key in keys}
    assert keys | {"seed", "top_k", "stages"} == {f.name for f in fields(Recipe)}


def test_the_shipped_rows_and_what_each_shares_with_full(tmp_path):
    made = study(tmp_path)
    rows = {row.slug: row for row in made.ablation.rows}
    full = made.recipe_of(rows["full"], 0)
    up_to = {slug: shared(full, made.recipe_of(row, 0))[-1] for slug, row in rows.items()}
    assert up_to == {
        "full": "grpo", "no-rl": "polish", "fixed-lambda-0.5": "polish", "no-sft": "align", "no-inspection": "eliminate",
        "no-icm-all-full": "align", "no-content-token": "embedder", "no-relation-token": "embedder",
        "no-self-alignment": "embedder", "memory-not-frozen": "align", "preset-paper": "embedder",
        "pointwise": "align", "all-full": "polish",
    }  # fmt: skip
    assert shared(full, made.recipe_of(rows["full"], 1)) == []


def test_rows_are_chosen_by_name_or_slug(tmp_path):
    made = study(tmp_path).ablation
    assert [row.name for row in made.only(["no RL", "full"])] == ["full", "no RL"]
    assert made.only(["no-rl"]) == made.only(["no RL"])
    with pytest.raises(OptionsError, match="got no-such"):
        made.only(["no-such"])
    with pytest.raises(OptionsError, match="a first row without `set`"):
        Ablation("miniature.yaml", (Row("x", ("seed=1",)),))


@pytest.mark.parametrize("blank", ["content", "relation"])
def test_a_blank_token_knows_nothing_of_its_candidate(blank):
    torch.manual_seed(0)
    icm = Icm(IcmConfig(width=8, heads=2, memory_rows=4, blank=blank), 16)
    memory, query = torch.randn(2, 3, 8), torch.randn(1, 2, 8)
    out = icm(
        memory,
        torch.ones(2, 3, dtype=torch.bool),
        query,
        torch.ones(1, 2, dtype=torch.bool),
        torch.zeros(2, dtype=torch.long),
    )
    left, other = out if blank == "content" else out[::-1]
    assert (left == 0).all()
    assert not torch.equal(other[0], other[1])


def test_a_teacher_without_inspections_answers_from_the_elimination():
    captions = {i: Caption.of(f"one red circle dots a{i} b1 c1") for i in range(3)}
    style = TeacherStyle(max_inspections=0)
    thought = write_thought(captions, Caption.of("one red circle dots a1 b1 c1"), 1, random.Random(0), style)
    assert not thought.checks
    assert thought.answer == 1
    assert len(thought.verdicts) == 3


def test_memory_that_learns_is_the_stored_one_made_anew(checkpoint):
    """T_c through the hook gives the tokens that stored memory gives, and in_proj gets a gradient."""
    texts = ("red shoe", "a blue hat with a brim")
    chunks = [checkpoint.processor.content_chunk(Content(text)) for text in texts]
    table = checkpoint.model.get_input_embeddings()
    embeds = [table(torch.from_numpy(c.ids)).detach() for c in chunks]
    stored = [rows.detach().numpy() for rows in checkpoint.model.model.icm.memories(embeds)]
    learning = learn_memory(copy.deepcopy(checkpoint.model))
    assert learns_memory(learning)
    assert not learns_memory(checkpoint.model)
    freeze_for_sft(learning)
    seen = []
    for model, rows in ((checkpoint.model, stored), (learning, [e.numpy() for e in embeds])):
        candidates = [
            Candidate(Document(t, Content(t)), None, i, Memory(r, "", "", 0))
            for i, (t, r) in enumerate(zip(texts, rows, strict=True), 1)
        ]
        prompt = build_prompt(Query.of("shoe"), candidates)
        batch = collate([checkpoint.processor.chunk(prompt.segments, prompt)], checkpoint.processor)
        seen.append(model.model.embed(batch.input_ids, None, batch.image_mask, batch.compressed))
    torch.testing.assert_close(seen[0], seen[1], atol=1e-5, rtol=1e-4)
    seen[1].sum().backward()
    assert learning.model.icm.in_proj[1].weight.grad.abs().sum() > 0


def test_the_card_leaves_out_a_stage_of_no_steps(tmp_path):
    """It has no line in the log."""
    recipe = load(Recipe, cli.RECIPES / "miniature.yaml", ["stages.direct.steps=0"])
    rows = [
        {"stage": name, "minutes": 1.0, "steps": steps, "lr": 0.1, "batch_size": 2}
        for name, steps in (("align", 5), ("direct", 0))
    ]
    (tmp_path / "stages.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "log.jsonl").write_text('{"stage": "align", "step": 5, "val_coarse": 0.5}\n')
    write_card(tmp_path, tmp_path, recipe, Manifest("x"), 7)
    card = (tmp_path / "README.md").read_text()
    assert "| align | 5 |" in card
    assert "| direct |" not in card


def quality(r1: float, opened: float) -> dict[str, Quality]:
    return {s: Quality(9, 0.1, 0.5, r1, 0.9, opened, 0.0, 1.0, 80.0) for s in ("coarse", "fine", "all")}


def test_the_page_and_the_seed_table_say_what_the_files_say(tmp_path):
    from retrv_r1_training.ablation_page import write

    made = study(tmp_path)
    rows = {row.name: row for row in made.ablation.rows}
    for name, seed, r1 in (
        ("full", 0, 0.8),
        ("full", 1, 0.9),
        ("no RL", 0, 0.7),
        ("no RL", 1, 0.82),
        ("fixed lambda 0.5", 0, 0.79),
    ):
        Result(name, seed, {}, quality(r1, 1.25), {}).write(made.file(rows[name], seed))
    write(made)
    page = (made.out / "README.md").read_text()
    assert "| full | 0, 1 | 0.850 ± 0.071 |" in page
    assert "| no RL | 0, 1 | 0.760 ± 0.085 |" in page
    assert "| -9.0 (-10.0, -8.0) | 0.500 ± 0.000 | 1.250 ± 0.000 | -6.8 / -4.9 |" in page
    assert "R@1 of the first stage 0.100 (seed 0), 0.100 (seed 1)." in page
    assert "| -1.0 | 0.500 | 1.250 | -1.3 / ? |" in page
    assert "Not finished: no SFT, no inspection" in page
    assert (made.out / "ablation.png").stat().st_size > 5000
    assert "0.850 ± 0.071" in by_seed({"sft": [quality(0.8, 1.0), quality(0.9, 1.0)]})


def test_a_result_of_another_recipe_is_refused(tmp_path):
    made = study(tmp_path)
    row = made.ablation.rows[0]
    Result(row.name, 0, {"seed": 9}, quality(0.5, 1.0), {}).write(made.file(row, 0))
    with pytest.raises(InputError, match="expected this recipe's result"):
        made.run(row, 0)


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A shrunken catalogue, and the shipped rows with batches to match."""
    few = catalogue.combos("val")[:24]
    shrunk = {n: catalogue.Split(n, "val", s.seed, 6) for n, s in catalogue.SPLITS.items()}
    monkeypatch.setattr(catalogue, "SPLITS", shrunk)
    monkeypatch.setattr(catalogue, "combos", lambda part: few)
    base = (cli.RECIPES / "miniature.yaml").read_text()
    for old, new in (
        ("batch_size: 128", "batch_size: 8"), ("batch_size: 64", "batch_size: 8"), ("max_new_tokens: 160", "max_new_tokens: 24"),
        ("batch_size: 10, group_size: 8, micro_batch: 16", "batch_size: 1, group_size: 2, micro_batch: 2"),
    ):  # fmt: skip
        assert old in base
        base = base.replace(old, new)
    (tmp_path / "miniature.yaml").write_text(base)
    (tmp_path / "ablation.yaml").write_text(RECIPE.read_text())
    return tmp_path


def arguments(folder):
    places = {"recipe": "ablation.yaml", "out": "out", "work": "work"}
    return ["ablation", *(word for name, place in places.items() for word in (f"--{name}", str(folder / place)))]


@pytest.mark.slow
def test_two_rows_train_measure_and_resume(small, monkeypatch):
    argv = arguments(small)
    argv += ["--steps", "2", "--threads", "1", "--seeds", "0"]
    stages: list[tuple[str, str]] = []
    inner = Miniature.stage

    def spy(self, name):
        before = (self.run / f"{name}.pt").exists()
        inner(self, name)
        if not before and (self.run / f"{name}.pt").exists():
            stages.append((self.run.name, name))
            if len(stages) == 3:
                raise KeyboardInterrupt  # killed after the embedder

    monkeypatch.setattr(Miniature, "stage", spy)
    with pytest.raises(KeyboardInterrupt):
        cli.main([*argv, "--rows", "full", "no-content-token"])
    assert cli.main([*argv, "--rows", "full", "no-content-token"]) == 0
    mine = [stage for run, stage in stages if run == "full-s0"]
    assert mine == [s for s in STAGES if s not in ("pointwise", "in_full")], "each stage once, over the kill"
    assert [stage for run, stage in stages if run != "full-s0"] == mine[3:]
    results = sorted(p.name for p in (small / "out").glob("*.json"))
    assert results == ["full-s0.json", "no-content-token-s0.json"]
    row = json.loads((small / "out" / "no-content-token-s0.json").read_text())
    assert row["recipe"]["icm"]["blank"] == "content"
    assert list(row["minutes"]) == mine[3:]
    served = load_checkpoint(small / "work" / "no-content-token-s0" / "checkpoint", device="cpu")
    assert served.model.config.icm_config.blank == "content"


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "no-rl",  # it trains nothing of its own
        "no-icm-all-full",
        "memory-not-frozen",
        "no-self-alignment",
        "no-inspection",
        "no-sft",
        "preset-paper",
        "pointwise",
        "all-full",
    ],
)
def test_the_other_rows_train_and_measure(small, name):
    seed = load(Ablation, cli.RECIPES / "ablation.yaml").only([name])[0].seeds[0]
    argv = [*arguments(small), "--steps", "1", "--threads", "1", "--seeds", str(seed), "--rows", name]
    assert cli.main(argv) == 0
    found = json.loads((small / "out" / f"{name}-s{seed}.json").read_text())
    assert 0 <= found["quality"]["all"]["hybrid"] <= 1
    if name == "no-inspection":
        assert found["quality"]["all"]["opened"] == 0


def test_seeds_that_no_row_has_are_told(tmp_path, capsys):
    argv = ["ablation", "--out", str(tmp_path / "out"), "--work", str(tmp_path), "--rows", "no-sft", "--seeds", "7"]
    assert cli.main(argv) == 1
    assert "--seeds: expected of no SFT 0, got 7. Name such seeds" in capsys.readouterr().err


def test_a_kept_optional_block_is_typed():
    assert load(Recipe, cli.RECIPES / "miniature.yaml", ["stages.grpo.lr=1e-5"]).stages.grpo.lr == 1e-5
    assert load(Recipe, cli.RECIPES / "miniature.yaml", ["stages.grpo=null"]).stages.grpo is None
    with pytest.raises(OptionsError, match="grpo: steps: expected int"):
        load(Recipe, cli.RECIPES / "miniature.yaml", ["stages.grpo.steps=x"])


@pytest.mark.slow
def test_several_seeds_print_one_table(small, caplog):
    caplog.set_level("INFO")
    argv = [
        "miniature",
        "--recipe",
        str(small / "miniature.yaml"),
        "--run",
        str(small / "runs"),
        "--steps",
        "1",
        "--threads",
        "1",
    ]
    assert cli.main([*argv, "--seeds", "0", "1"]) == 0
    table = (small / "runs" / "seeds.md").read_text()
    assert table.startswith("2 seeds, 36 validation queries each")
    names = [line.split(" | ")[0] for line in table.splitlines()[4:]]
    assert names == [f"| {name}" for name in ("first stage", "polish", "grpo") for _ in range(3)]
    weights = [torch.load(small / "runs" / f"seed-{seed}" / "captions.pt", weights_only=True) for seed in (0, 1)]
    assert not all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


def test_thoughts_over_candidates_in_full_are_not_reinforced():
    in_full = "stages.in_full={steps: 1, lr: 0.1, batch_size: 2}"
    with pytest.raises(OptionsError, match="in_full: expected no grpo behind it, got 150 steps"):
        load(Recipe, cli.RECIPES / "miniature.yaml", [in_full])
    assert load(Recipe, cli.RECIPES / "miniature.yaml", [in_full, "stages.grpo.steps=0"]).stages.in_full
