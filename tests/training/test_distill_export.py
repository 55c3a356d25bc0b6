"""`distill`: the thought's order as ranks, thoughts kept over a kill, the direct read learns them. `export`: verified, with licences."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import yaml

pytest.importorskip("trl")

from retrv_r1_training import cli, distill
from retrv_r1_training.distill import OwnThought, own_ranks, think_ahead
from retrv_r1_training.mbeir_tasks import checkpoint_folder
from retrv_r1_training.overrides import load
from retrv_r1_training.rollout import RolloutRunner
from retrv_r1_training.sft_recipe import DistillRecipe, Thinking
from safetensors.torch import load_file, save_file

from retrv_r1_retriever.errors import InputError, OptionsError
from retrv_r1_retriever.model.checkpoint import load_checkpoint, read_manifest
from retrv_r1_retriever.ranking import Order
from retrv_r1_retriever.trace import Sampled
from tests.training.grpo_tasks import make_tasks, miniature
from tests.training.parts import data_block, small_catalogue, with_lists

MODEL = checkpoint_folder("miniature")


def test_ranks_are_the_order_with_none_behind_the_answer_or_before_all():
    order = Order((2, 0, 1), 2, False, ())
    assert own_ranks(order) == (3, 4, 1, 2)
    assert own_ranks(replace(order, answer=None, none_chosen=True)) == (3, 4, 2, 1)


def test_thoughts_survive_a_kill_and_are_the_ones_of_an_uninterrupted_run(tmp_path, monkeypatch):
    checkpoint = miniature()
    tasks, runner = make_tasks(checkpoint, 3), RolloutRunner(checkpoint, concurrency=1)
    thinking = Thinking(max_new_tokens=100)
    whole = think_ahead(runner, tasks, thinking, tmp_path / "whole.jsonl")
    assert [OwnThought.from_json(t.to_json()) for t in whole] == [replace(t, turn=without_pictures(t)) for t in whole]
    assert any(s.token_ids for t in whole for s in t.turn if isinstance(s, Sampled)), "ids go back as ids"
    lines = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "cut.jsonl").write_text(lines[0] + lines[1][:40])
    asked = []
    readings = RolloutRunner.readings
    monkeypatch.setattr(RolloutRunner, "readings", lambda self, t, *a: asked.append(len(t)) or readings(self, t, *a))
    think_ahead(runner, tasks, thinking, tmp_path / "cut.jsonl")
    assert (tmp_path / "cut.jsonl").read_text() == "".join(lines)
    assert asked == [2]


def test_only_thoughts_that_ended_by_themselves_are_taught(tmp_path, caplog):
    """Cut in the middle, with the answer that the budget forced, one is no thought to learn, even if the answer is right."""
    checkpoint = miniature()
    cut = think_ahead(
        RolloutRunner(checkpoint), make_tasks(checkpoint, 2), Thinking(max_new_tokens=12), tmp_path / "cut.jsonl"
    )
    assert not any(t.ended or t.right for t in cut)
    whole = [replace(t, ended=True, right=t.number == 0) for t in cut]
    caplog.set_level("INFO")
    assert distill._taught([*cut, *whole], Thinking(right_only=False), 0) in (whole, whole[::-1])
    assert distill._taught([*cut, *whole], Thinking(), 0) == whole[:1]
    many = [replace(whole[0], number=n) for n in range(50)]
    orders = [[t.number for t in distill._taught(many, Thinking(), seed)] for seed in (0, 0, 1)]
    assert sorted(orders[0]) == list(range(50)), "all of them, parts mixed"
    assert orders[0] == orders[1] != orders[2]
    assert "distill: 4 thoughts, 2 cut by their budget, 1 right, 1 taught" in caplog.text
    with pytest.raises(InputError, match=r"some that end by themselves, got 2, 2 of them cut .*max_new_tokens"):
        distill._taught(cut, Thinking(right_only=False), 0)


def without_pictures(thought):
    return tuple(replace(s, content=None) if hasattr(s, "content") else s for s in thought.turn)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A distilled miniature: few lists, seen often, so that learning shows."""
    folder = tmp_path_factory.mktemp("distill")
    root = small_catalogue(folder / "data", queries=2)
    recipe = {
        "checkpoint": "miniature", "data": data_block(root, 5, with_lists, tasks=("t2i",)) | {"validation_queries": 4},
        "thinking": {"max_new_tokens": 120, "right_only": False}, "tune": "full",
        "optim": {"steps": 8, "batch_size": 4, "per_device": 4, "lr": 2e-4, "warmup": 0},
        "run": {"dtype": "float32", "every": 1, "evaluate": 8, "checkpointing": False, "report_to": []},
    }  # fmt: skip
    (folder / "distill.yaml").write_text(yaml.safe_dump(recipe))
    run = folder / "run"
    assert cli.main(["distill", str(folder / "distill.yaml"), "--run", str(run), "--threads", "1", "--think-only"]) == 0
    assert not (run / "checkpoint").exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distill.RolloutRunner, "readings", lambda *a: pytest.fail("thinks again"))
        assert cli.main(["distill", str(folder / "distill.yaml"), "--run", str(run), "--threads", "1"]) == 0
    return run


def test_the_direct_read_learns_the_thoughts_order_and_memory_stays_valid(done):
    rows = [json.loads(line) for line in (done / "log.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 8
    assert losses[-1] < 0.7 * losses[0]
    assert [row["step"] for row in rows if "eval_direct" in row] == [0, 8], "before and after"
    assert {row["stage"] for row in rows} == {"distill"}
    assert read_manifest(done / "checkpoint").memory_digest == read_manifest(MODEL).memory_digest


def test_changed_data_under_old_thoughts_are_refused(done, tmp_path):
    thoughts = [OwnThought.from_json(line) for line in (done / "thoughts-train.jsonl").read_text().splitlines()]
    tasks = make_tasks(miniature(), 1)
    source = distill.OwnExamples(tasks, [replace(thoughts[0], number=0)], None, 1, judged=False)
    with pytest.raises(ValueError, match="thought 0: expected q0, got"):
        source[0]


def test_several_processes_are_told_to_think_first(tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    lines = [OwnThought(n, f"q{n}", (), (1, 2), True, True, "of this").to_json() + "\n" for n in range(3)]
    whole.write_text("".join(lines))
    cut.write_text(lines[0] + lines[1][:20])
    distill._one_process("of this", {cut: 9})
    monkeypatch.setenv("WORLD_SIZE", "2")
    distill._one_process("of this", {whole: 3, tmp_path / "no validation.jsonl": 0})
    with pytest.raises(OptionsError, match=r"got 1 of 3 in .*cut\.jsonl.*--think-only"):
        distill._one_process("of this", {whole: 3, cut: 3})  # killed during validation
    with pytest.raises(OptionsError, match=r"got 0 of 3 in .*none\.jsonl"):
        distill._one_process("of this", {tmp_path / "none.jsonl": 3})


def test_whole_thoughts_are_only_read_and_those_of_other_weights_or_data_refused(tmp_path):
    """Other processes read them at the same time."""
    runner, file = RolloutRunner(miniature()), tmp_path / "thoughts.jsonl"
    own = OwnThought(0, "q0", (), (1, 2), True, True, read_manifest(MODEL).checkpoint_digest)
    file.write_text(own.to_json() + "\n")
    before = file.stat()
    assert think_ahead(runner, [None], Thinking(), file) == [own]
    assert file.stat().st_mtime_ns == before.st_mtime_ns
    with pytest.raises(InputError, match=r"expected 0 thoughts, got 1\. The data changed"):
        think_ahead(runner, [], Thinking(), file)
    for other in (replace(own, checkpoint="0123").to_json(), own.to_json().replace('"checkpoint"', '"none"')):
        file.write_text(other + "\n")
        said = r"expected thoughts of checkpoint \w+, got those of (0123|unknown)\. Remove the run's thoughts-\*\.jsonl, and its checkpoint"
        with pytest.raises(InputError, match=said):
            think_ahead(runner, [None, None], Thinking(), file)
        assert file.read_text() == other + "\n"


def test_shipped_recipe_loads_and_relation_loss_is_refused():
    assert load(DistillRecipe, cli.RECIPES / "distill-7b.yaml").loss.ranknet == 10
    with pytest.raises(OptionsError, match=r"loss\.relation: expected 0 in distill"):
        load(DistillRecipe, cli.RECIPES / "distill-7b.yaml", ["loss.relation=1"])


def export(*arguments):
    return cli.main(["export", *map(str, arguments)])


def test_export_carries_the_licences_of_base_and_teachers(tmp_path, capsys):
    start, out = copy_of_the_miniature(tmp_path, licence="Qwen Research", base="Qwen/Qwen2.5-VL-3B-Instruct")
    change(start, teachers={"words": "", "qwen2.5-vl-72b": "", "gpt": ""})
    assert export(start, "--out", out, "--teacher-licence", "gpt=its terms", "--name", "Shop reranker") == 0
    card, manifest = (out / "README.md").read_text(), read_manifest(out)
    assert card.startswith(
        "---\nlicense: other\nlicense_name: Qwen Research\nbase_model: Qwen/Qwen2.5-VL-3B-Instruct\n"
    )
    for row in (
        "| backbone | Qwen/Qwen2.5-VL-3B-Instruct | Qwen Research |", "| thoughts it was trained on | gpt | its terms |",
        "| thoughts it was trained on | qwen2.5-vl-72b | **unknown** |", "# Shop reranker",
        "| thoughts it was trained on | words | that of the data: rules, no model |", "| trained on | lists of 2 to 20 |",
    ):  # fmt: skip
        assert row in card
    assert manifest.teachers["gpt"] == "its terms"
    said = capsys.readouterr().out
    assert "--teacher-licence qwen2.5-vl-72b=NAME" in said
    assert "words" not in said
    loaded = load_checkpoint(out, device="cpu")
    assert loaded.manifest.checkpoint_digest == read_manifest(MODEL).checkpoint_digest
    before, after = (load_file(f / "retrv" / "embedder" / "model.safetensors") for f in (start, out))
    assert before.keys() == after.keys()


def test_recipes_of_folders_of_one_name_are_all_in_the_card(tmp_path):
    start, out = copy_of_the_miniature(tmp_path)
    runs = [tmp_path / name for name in ("a/sft", "b/sft", "b/grpo")]
    for number, run in enumerate(runs):
        run.mkdir(parents=True)
        (run / "recipe.yaml").write_text(f"seed: {number}\n")
    assert export(start, "--out", out, *(word for run in runs for word in ("--run", run))) == 0
    card = (out / "README.md").read_text()
    at = [card.index(f"### {name}\n\n```yaml\nseed: {n}\n") for n, name in enumerate(("a/sft", "b/sft", "b/grpo"))]
    assert at == sorted(at)


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({"licence": ""}, (), "licence of retrv-r1-miniature.*expected a name, got nothing.*--base-licence"),
        ({}, ("--teacher-licence", "gpt=x"), "--teacher-licence: expected TEACHER=NAME, a teacher of none, got gpt=x"),
        ({"checkpoint_digest": "0" * 16}, (), "weights of .*expected 0000000000000000, got"),
        ({}, ("--run", "nowhere"), "--run nowhere: expected a folder with recipe.yaml"),
    ],
)
def test_what_cannot_be_handed_on_says_why(tmp_path, capsys, changes, arguments, message):
    start, out = copy_of_the_miniature(tmp_path, **changes)
    assert export(start, "--out", out, *arguments) == 1
    import re

    assert re.search(message, capsys.readouterr().err)


def test_weights_that_were_changed_by_hand_are_refused(tmp_path, capsys):
    start, out = copy_of_the_miniature(tmp_path)
    file = start / "retrv" / "icm.safetensors"
    weights = load_file(file)
    weights["in_proj.1.weight" if "in_proj.1.weight" in weights else next(k for k in weights if "in_proj" in k)] += 1
    save_file(weights, file)
    assert export(start, "--out", out) == 1
    assert "memory digest" in capsys.readouterr().err
    out.mkdir(exist_ok=True)
    assert export(start, "--out", out) == 1
    assert "expected a folder that does not exist yet" in capsys.readouterr().err


def copy_of_the_miniature(tmp_path, **changes):
    start = tmp_path / "start"
    shutil.copytree(MODEL, start)
    if "base" in changes:  # part of the memory digest: a backbone of another name makes other memory
        changes |= {"memory_digest": digest_under(start, changes["base"])}
    change(start, **changes)
    return start, tmp_path / "out"


def digest_under(folder, base):
    from retrv_r1_retriever.model.checkpoint import memory_digest

    loaded = load_checkpoint(folder, device="cpu", dtype="float16")
    return memory_digest(loaded.model.state_dict(), loaded.processor, replace(loaded.manifest, base=base))


def change(folder, **changes):
    file = folder / "retrv" / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
