"""The sixteen tasks of a generated root through index, first stage and reranking; killed, resumed, spoiled."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from retrv_r1_retriever._sync import run
from retrv_r1_retriever.cli.evaluate_mbeir import describe, write_results
from retrv_r1_retriever.engines.scripted import ScriptedEngine
from retrv_r1_retriever.errors import InputError, OptionsError
from retrv_r1_retriever.evaluation.benchmark import DEPTH, TASKS, Parts, Setup, Task, run_benchmark
from retrv_r1_retriever.evaluation.journal import fingerprint
from retrv_r1_retriever.evaluation.runs import read_qrels, read_run, read_scored_run
from retrv_r1_retriever.evaluation.scores import FIRST_STAGE, BenchmarkScore, SystemScore, TaskScore, score
from retrv_r1_retriever.options import FAST
from retrv_r1_retriever.parser import Check, Thought, Verdict
from retrv_r1_retriever.types import Query
from tests.evaluation.mbeir_root import SIZE, VARIANTS, TopicEmbedder, parts, topic_of, write_root

MODE = "K=20 never/logits"
OPTIONS = FAST.with_options(top_k=20, timeout_s=None)
CIRR = next(task for task in TASKS if task.name == "cirr_task7")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root, evaluated once: `root` and `out`."""
    folder = tmp_path_factory.mktemp("mbeir")
    write_root(folder / "root", 24, 4)
    evaluate(setup(folder))
    return folder


def setup(folder: Path, root: str = "root", out: str = "out") -> Setup:
    return Setup(folder / root, folder / out, (OPTIONS,))


def evaluate(setup: Setup, system: Parts | None = None) -> BenchmarkScore:
    system = system or parts(setup.root)
    runs = run(run_benchmark(setup, system, lambda *_: None))
    scores = BenchmarkScore(tuple(map(score, runs)), setup.absent())
    write_results(setup, runs, scores, describe(setup, system))
    return scores


def results(out: Path, pool: str = "local") -> Path:
    """The folder of the only configuration."""
    [folder] = out.glob(f"{pool}.*")
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*.*")}


class Listening(TopicEmbedder):
    """asked: the instructions of the queries"""

    def __init__(self) -> None:
        self.asked: list[str | None] = []

    def embed(self, items):
        self.asked += [item.instruction for item in items if isinstance(item, Query)]
        return super().embed(items)


def test_tasks_are_in_the_papers_order() -> None:
    names = (
        "visualnews0 mscoco0 fashion200k0 webqa1 edis2 webqa2 visualnews3 mscoco3 fashion200k3 nights4 oven6 infoseek6 "
    )
    names += "fashioniq7 cirr7 oven8 infoseek8"
    assert [f"{task.dataset}{task.number}" for task in TASKS] == names.split()
    assert [task.dataset for task in TASKS if task.headline == 10] == ["fashion200k", "fashion200k", "fashioniq"]
    assert TASKS[1].pool("local") == "cand_pool/local/mbeir_mscoco_task0_test_cand_pool.jsonl"
    assert TASKS[0].pool("local") == "cand_pool/local/mbeir_visualnews_task0_cand_pool.jsonl"


def test_the_average_is_what_the_run_files_say(whole: Path) -> None:
    """Worked out from the TREC files and qrels alone."""
    out = results(whole / "out")
    found = json.loads((out / "results.json").read_text())
    for system, file in ((FIRST_STAGE, "first-stage"), (MODE, "retrv-r1.K20.never.logits")):
        headline = []
        for task in TASKS:
            ranked = read_run(out / f"runs/{task.name}.local.{file}.txt")
            qrels = read_qrels(whole / "root" / task.qrels)
            hits = [any(did in grades for did in ranked[qid][: task.headline]) for qid, grades in qrels.items()]
            headline.append(sum(hits) / len(hits))
        assert found["average"][system] == pytest.approx(sum(headline) / 16)
    cirr = found["tasks"]["cirr_task7"]["systems"]
    assert cirr[MODE]["recall"]["1"] > cirr[FIRST_STAGE]["recall"]["1"], "or nothing was reranked"
    assert 0.2 < found["average"][FIRST_STAGE] < found["average"][MODE] < 1, "or the data decide nothing"
    lost = sum(cirr[MODE]["lost"].values())
    assert lost == round(4 * (1 - cirr[MODE]["recall"]["5"]))
    configuration = found["configuration"]
    assert (configuration["pool"], configuration["fusion"], configuration["modes"][MODE]["top_k"]) == (
        "local",
        "none",
        20,
    )
    table = (out / "results.tsv").read_text().splitlines()
    assert json.loads(table[0][2:]) == configuration
    assert table[1].split("\t") == ["system", *(task.title for task in TASKS), "average"]
    line = (out / "runs/cirr_task7.local.first-stage.txt").read_text().splitlines()[0]
    assert line.split()[-1] == f"mbeir.local.{configuration['id']}.first-stage"


def test_a_second_run_asks_neither_embedder_nor_engine(whole: Path) -> None:
    before = files(results(whole / "out"))
    evaluate(setup(whole), replace(parts(whole / "root"), embedder=None, images=None))  # type: ignore[arg-type]
    assert files(results(whole / "out")) == before


def test_results_of_other_settings_stand_beside_the_first(whole: Path, tmp_path: Path) -> None:
    mine = replace(setup(whole), out=tmp_path, tasks=(CIRR,))
    evaluate(mine)
    first = results(tmp_path)
    before = files(first)
    for other in (replace(mine, seed=1), replace(mine, modes=(OPTIONS.with_options(top_k=3),))):
        evaluate(other)
    evaluate(replace(mine, pool="global"))
    assert len([*tmp_path.glob("local.*")]) == 3
    assert files(first) == before
    assert len([*(tmp_path / "index").iterdir()]) == 2, "of the local pool and of the union"


def test_results_of_other_tasks_and_data_stand_beside_the_first(whole: Path, tmp_path: Path) -> None:
    mine = spoiled(whole, tmp_path, "", str)
    evaluate(mine)
    first = results(mine.out)
    before = files(first)
    cached = replace(parts(mine.root), embedder=None)  # type: ignore[arg-type]
    evaluate(replace(mine, tasks=(TASKS[0], CIRR)), cached)  # of fewer tasks than asked for, the lists are the same
    assert len([*mine.out.glob("local.*")]) == 2
    qrels = mine.root / CIRR.qrels
    qrels.write_text(qrels.read_text().replace(" 1 7", " 0 7", 1))
    evaluate(mine, cached)
    assert len([*mine.out.glob("local.*")]) == 3
    assert files(first) == before
    assert len([*(mine.out / "lists").iterdir()]) == 2, "one of the first stage, one reranked"


class Killed(BaseException):
    """Nothing catches it on its way out, as nothing catches a kill."""


def dying(after: int, function: Callable) -> Callable:
    calls = iter(range(after))

    def call(*args):
        if next(calls, None) is None:
            raise Killed
        return function(*args)

    return call


@pytest.mark.parametrize(("where", "after"), [("embed", 3), ("embed", 40), ("slots", 30)])
def test_killed_and_resumed_to_identical_files(whole: Path, tmp_path: Path, where: str, after: int) -> None:
    """In the index, in the first stage, and in the reranking; with half a line at the end of every list."""
    mine = replace(setup(whole), out=tmp_path / "out", concurrency=2)
    system = parts(mine.root)
    target = system.embedder if where == "embed" else system.engine
    setattr(target, where, dying(after, getattr(target, where)))
    with pytest.raises(Killed):
        evaluate(mine, system)
    lists = list((tmp_path / "out/lists").iterdir())
    assert len(lists) == 32
    for path in lists:
        path.write_bytes(path.read_bytes() + b'{"query": "0:')
    evaluate(mine)
    assert files(results(tmp_path / "out")) == files(results(whole / "out"))


def test_one_problem_in_one_task_refuses_the_average() -> None:
    system = {MODE: SystemScore({5: 0.5, 10: 0.25}, 0.5, {}, {})}
    tasks = [TaskScore(task.name, task.title, task.headline, 4, system) for task in TASKS]
    assert BenchmarkScore(tuple(tasks), {}).average == {MODE: (13 * 0.5 + 3 * 0.25) / 16}
    tasks[3] = replace(tasks[3], problems=("a picture",))
    assert BenchmarkScore(tuple(tasks), {}).average == {MODE: None}


def test_the_union_pool(whole: Path) -> None:
    mine = replace(setup(whole), pool="global", tasks=(TASKS[0], CIRR), modes=(OPTIONS.with_options(top_k=2), OPTIONS))
    scores = evaluate(mine)
    assert scores.average == {FIRST_STAGE: None, "K=2 never/logits": None, MODE: None}
    first, small, large = (scores.tasks[1].systems[name] for name in scores.systems)
    assert len(read_run(results(mine.out, "global") / "runs/cirr_task7.global.first-stage.txt")["8:70"]) == DEPTH
    assert large.recall[10] <= first.recall[20], "no reranking of K finds what is not among the K"
    assert small.recall[5] == first.recall[5], "what was retrieved beyond the K stays behind them"


def spoiled(whole: Path, tmp_path: Path, file: str, change: Callable[[str], str]) -> Setup:
    """A copy of one task's files, one of them changed."""
    root = tmp_path / "root"
    for name in (CIRR.queries, CIRR.qrels, CIRR.pool("local"), "instructions/query_instructions.tsv"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        text = (whole / "root" / name).read_text()
        (root / name).write_text(change(text) if name == file else text)
    (root / "mbeir_images").mkdir()
    for row in map(json.loads, (whole / "root" / CIRR.pool("local")).read_text().splitlines()):
        shutil.copy(whole / "root" / row["img_path"], root / row["img_path"])
    return replace(setup(tmp_path), tasks=(CIRR,))


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (CIRR.queries, lambda text: text[:-20], r"cirr_task7_test.jsonl: expected at most 0.0% bad rows, got 1 of 4"),
        (CIRR.queries, lambda text: text + text.splitlines()[0] + "\n", r"id '8:70' a second time"),
        (CIRR.pool("local"), lambda text: text[:-20], r"cirr_task7_cand_pool.jsonl: expected at most 0.0% bad rows"),
        (
            CIRR.qrels,
            lambda text: text + text.splitlines()[0].replace(" 1 7", " 0 7"),
            r"expected one grade per candidate",
        ),
        (CIRR.queries, lambda text: "", r"cirr_task7_test.jsonl: expected at least one query, got none"),
        (
            "instructions/query_instructions.tsv",
            lambda text: text.replace("\tFind it.\tShow cirr.", ""),
            r"query_instructions.tsv: expected at most 0.0% bad rows, got 1 of 16; query_instructions.tsv:15: expected",
        ),
    ],
)
def test_bad_files_are_errors(whole: Path, tmp_path: Path, file: str, change: Callable, message: str) -> None:
    with pytest.raises(InputError, match=message):
        evaluate(spoiled(whole, tmp_path, file, change))


@pytest.mark.parametrize(
    ("file", "change", "problem"),
    [
        (CIRR.qrels, lambda text: text.replace(" 8:", " 8:9", 1), "its right answers are not in the pool (8:9"),
        (CIRR.qrels, lambda text: text.replace(" 1 7", " 0 7", 1), "query 8:70: no right answer in the qrels"),
        (
            CIRR.qrels,
            lambda text: text.replace("8:70 ", "9:70 "),
            "query 8:70: not in the qrels; the positives of its own",
        ),
        (
            CIRR.qrels,
            lambda text: text + "8:70 0 8:99 1 7\n",
            "query 8:70: 1 of 2 of its right answers are not in the pool (8:99)",
        ),
        (CIRR.qrels, lambda text: text + "8:79 0 8:312 1 7\n", "query 8:79: in the qrels, but not among the queries"),
        (
            "instructions/query_instructions.tsv",
            lambda text: text[: text.index("image,text\timage\tcirr")],
            "query 8:70: no instruction for image,text → image of its data set",
        ),
    ],
)
def test_queries_that_cannot_be_answered_are_named(
    whole: Path, tmp_path: Path, file: str, change: Callable, problem: str
) -> None:
    [task] = evaluate(spoiled(whole, tmp_path, file, change)).tasks
    assert any(problem in line for line in task.problems), task.problems
    assert task.queries == 4, "counted as a miss"


def test_bad_rows_that_are_allowed_refuse_the_average(whole: Path, tmp_path: Path) -> None:
    mine = spoiled(whole, tmp_path, CIRR.qrels, lambda text: text + "8:70 0 8:312 x 7\n")
    [task] = evaluate(replace(mine, max_bad_share=0.5)).tasks
    [problem] = task.problems
    assert problem.startswith(
        "qrels: 1 bad rows left out; mbeir_cirr_task7_test_qrels.txt:5: invalid literal for int()"
    )
    for share in (math.nan, 2.0, -0.1):
        with pytest.raises(OptionsError, match="max_bad_share: expected a share, 0 to 1"):
            replace(mine, max_bad_share=share)


def test_judgements_decide_scores_and_not_lists(whole: Path, tmp_path: Path) -> None:
    """A query's instruction does not depend on where its right answers are, so its list is good for all judgements."""
    wrong = spoiled(whole, tmp_path, CIRR.qrels, lambda text: text.replace(" 8:", " 8:9"))
    systems = [replace(parts(mine.root), embedder=Listening()) for mine in (setup(whole, out="fresh"), wrong)]
    evaluate(replace(setup(whole), out=tmp_path / "fresh", tasks=(CIRR,)), systems[0])
    assert len(evaluate(wrong, systems[1]).tasks[0].problems) == 4
    fresh, asked = (system.embedder.asked for system in systems)  # type: ignore[union-attr]
    assert fresh == asked
    assert None not in asked
    shutil.copy(whole / "root" / CIRR.qrels, wrong.root / CIRR.qrels)
    for same in (True, False):
        again = replace(parts(wrong.root), embedder=None)  # type: ignore[arg-type]
        assert evaluate(replace(wrong, same_dataset=same), again).tasks[0].problems == ()


def test_a_local_pool_lacks_the_positives_of_other_data_sets(whole: Path, tmp_path: Path) -> None:
    """OVEN and InfoSeek judge each other's candidates; only the union pool has them."""
    mine = spoiled(whole, tmp_path, CIRR.qrels, lambda text: text + "8:70 0 7:99 1 7\n")
    assert evaluate(mine).tasks[0].problems == ()
    (mine.root / CIRR.pool("global")).parent.mkdir()
    shutil.copy(mine.root / CIRR.pool("local"), mine.root / CIRR.pool("global"))
    [task] = evaluate(replace(mine, pool="global")).tasks
    assert task.problems == ("query 8:70: 1 of 2 of its right answers are not in the pool (7:99)",)


def test_a_byte_order_mark_hides_no_judgement(whole: Path, tmp_path: Path) -> None:
    assert evaluate(spoiled(whole, tmp_path, CIRR.qrels, lambda text: f"\ufeff{text}")).tasks[0].problems == ()


def test_missing_pictures_and_tasks_refuse_the_average(whole: Path, tmp_path: Path) -> None:
    mine = spoiled(whole, tmp_path, "", str)
    rows = [json.loads(line) for line in (mine.root / CIRR.queries).read_text().splitlines()]
    lost = rows[0]["query_img_path"]
    (mine.root / lost).unlink()
    scores = evaluate(replace(mine, tasks=TASKS))
    assert scores.average[FIRST_STAGE] is None
    assert len(scores.absent) == 15
    (mine.root / "instructions/query_instructions.tsv").rename(mine.root / "away")
    assert mine.absent() == {CIRR.name: ["instructions/query_instructions.tsv"]}
    (mine.root / "away").rename(mine.root / "instructions/query_instructions.tsv")
    assert scores.absent["nights_task4"][0] == "query/test/mbeir_nights_task4_test.jsonl"
    [task] = scores.tasks
    assert [line.split(":")[0] for line in task.problems] == ["candidate 8", "query 8"]
    assert all(lost in line for line in task.problems)
    (mine.root / lost).write_bytes((whole / "root" / lost).read_bytes())
    assert evaluate(mine).tasks[0].problems == (), "what was missing is done when it is there"
    assert runs_of(CIRR, mine.out) == runs_of(CIRR, whole / "out")


def test_lists_over_an_incomplete_index_are_not_those_of_the_pool(whole: Path, tmp_path: Path) -> None:
    """Queries in words: all can be read while the pictures of their right answers cannot."""
    news = TASKS[0]
    shutil.copytree(whole / "root", tmp_path / "root")
    mine = replace(setup(tmp_path), tasks=(news,))
    right = {did for grades in read_qrels(mine.root / news.qrels).values() for did in grades}
    pool = map(json.loads, (mine.root / news.pool("local")).read_text().splitlines())
    pictures = [mine.root / row["img_path"] for row in pool if row["did"] in right]
    for path in pictures:
        path.rename(path.with_suffix(".away"))
    told: list[tuple[str, int, int]] = []
    [first] = map(score, run(run_benchmark(mine, parts(mine.root), lambda *now: told.append(now))))
    assert len(first.problems) == len(pictures) == 4
    assert told[-1] == ("reranking", 4, 4)
    told.clear()
    assert list(map(score, run(run_benchmark(mine, parts(mine.root), lambda *now: told.append(now))))) == [first]
    assert {what for what, *_ in told} == {"index mbeir_visualnews_task0_cand_pool"}, "its lists are kept all the same"
    for path in pictures:
        path.with_suffix(".away").rename(path)
    assert evaluate(mine).tasks[0].problems == ()
    assert runs_of(news, mine.out) == runs_of(news, whole / "out")


def runs_of(task: Task, out: Path) -> dict[str, object]:
    """The newest, without their tags: these name the data."""
    folder = max(out.glob("local.*"), key=lambda path: (path / "results.json").stat().st_mtime_ns)
    return {path.name: read_scored_run(path) for path in (folder / "runs").glob(f"{task.name}*")}


def test_a_query_picture_lost_before_another_mode_is_one_problem(whole: Path, tmp_path: Path) -> None:
    mine = spoiled(whole, tmp_path, "", str)
    evaluate(mine)
    lost = json.loads((mine.root / CIRR.queries).read_text().splitlines()[0])["query_img_path"]
    (mine.root / lost).unlink()
    others = tuple(OPTIONS.with_options(top_k=k) for k in (10, 15))
    [task] = evaluate(replace(mine, modes=others)).tasks
    assert [line.partition(": image")[0] for line in task.problems] == ["query 8:70"]
    assert [system.statuses for system in task.systems.values()] == [{}, {"reranked": 3}, {"reranked": 3}]


def test_equal_scores_are_ordered_by_id_and_not_by_the_store(whole: Path, tmp_path: Path) -> None:
    """Two vectors for a pool of 150: every list ends among equals."""

    class Tied(TopicEmbedder):
        def _vector(self, item):
            if isinstance(item, Query):
                return np.eye(SIZE)[0]
            return np.eye(SIZE)[0] + np.eye(SIZE)[1] * (topic_of(item)[1] % 5 != 0)

    root = write_root(tmp_path / "root", 150, 2)
    mine = Setup(root, tmp_path / "out", (), tasks=(TASKS[0],))
    evaluate(mine, replace(parts(root), embedder=Tied(), engine=None))
    ranked = read_scored_run(results(mine.out) / "runs/visualnews_task0.local.first-stage.txt")
    numbers = sorted(range(150), key=lambda n: (n % VARIANTS % 5 != 0, f"0:{n}"))
    assert [did for did, _ in ranked["0:00"]] == [f"0:{n}" for n in numbers[:DEPTH]]


def test_an_edit_in_the_middle_of_a_large_file_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "pool.jsonl"
    path.write_bytes(b"a" * 3_000_000)
    os.utime(path, ns=(0, 0))
    before = fingerprint(path)
    with path.open("r+b") as file:
        file.seek(1_500_000)
        file.write(b"b")
    assert fingerprint(path) != before


def test_a_share_of_a_batch_that_thinks_is_refused(whole: Path) -> None:
    shared = OPTIONS.with_options(think="auto", ranking="hybrid", max_think_share=0.5)
    with pytest.raises(OptionsError, match="max_think_share: expected 1 in an evaluation"):
        replace(setup(whole), modes=(OPTIONS, shared))
    replace(setup(whole), modes=(shared.with_options(think="always"), shared.with_options(ranking="logits")))


def test_fallbacks_are_not_kept(whole: Path, tmp_path: Path) -> None:
    mine = spoiled(whole, tmp_path, "", str)
    system = parts(mine.root)
    system.engine.failing["probe"] = RuntimeError("out of memory")  # type: ignore[union-attr]
    [task] = evaluate(mine, system).tasks
    assert len(task.problems) == 4
    assert "not reranked: the engine failed at direct read" in task.problems[0]
    [again] = evaluate(mine).tasks
    assert again.problems == ()
    assert again.systems[MODE].statuses == {"reranked": 4}


def test_a_thought_that_the_engine_broke_off_is_not_kept(whole: Path, tmp_path: Path) -> None:
    """The direct read stands in for it: for a caller that is better than nothing, and for a number it is another mode."""
    mine = replace(spoiled(whole, tmp_path, "", str), modes=(OPTIONS.with_options(think="always", ranking="hybrid"),))
    broken = ScriptedEngine(slots=[0.0] * 21, failing={"generate": RuntimeError("out of memory")})
    [task] = evaluate(mine, replace(parts(mine.root), engine=broken)).tasks
    assert [line.partition(": the thought")[0] for line in task.problems] == [
        f"query 8:7{n}, K=20 always/hybrid: not as asked for" for n in range(4)
    ]


def test_what_a_thought_leaves_unjudged_counts(whole: Path, tmp_path: Path) -> None:
    """It is the system's own doing: `partial`, and a number like any other."""
    mine = replace(spoiled(whole, tmp_path, "", str), modes=(OPTIONS.with_options(think="always", ranking="hybrid"),))
    brief = ScriptedEngine(Thought("a topic", (Verdict(0, "keep"),), (), 0), direct_read=False)
    [task] = evaluate(mine, replace(parts(mine.root), engine=brief)).tasks
    assert task.problems == ()
    assert task.systems["K=20 always/hybrid"].statuses == {"partial": 4}


def test_a_candidates_picture_that_is_gone_when_it_is_opened(whole: Path, tmp_path: Path) -> None:
    """The index is whole and the list is not: it must be made again when the picture is there."""
    mine = spoiled(whole, tmp_path, "", str)
    mine = replace(mine, modes=(OPTIONS.with_options(think="always", ranking="hybrid", max_inspections=1),))
    opening = Thought("a topic", (Verdict(0, "keep"),), (Check(0, "it is a match", True),), 0)
    run(run_benchmark(replace(mine, modes=()), parts(mine.root), lambda *_: None))
    rows = next((mine.out / "lists").glob("*first-stage*")).read_text().splitlines()[1:]
    first = json.loads(rows[0])["ranked"][0][0]
    picture = mine.root / f"mbeir_images/{first.partition(':')[2]}.ppm"
    picture.rename(tmp_path / "away")

    def system() -> Parts:
        return replace(parts(mine.root), engine=ScriptedEngine(opening, slots=[0.0] * 21))

    [task] = evaluate(mine, system()).tasks
    assert any("not as asked for: 1 could not be opened" in line for line in task.problems)
    (tmp_path / "away").rename(picture)
    [task] = evaluate(mine, system()).tasks
    assert task.problems == ()
    assert task.systems["K=20 always/hybrid"].statuses == {"reranked": 4}


def test_positives_of_other_data_sets(whole: Path, tmp_path: Path) -> None:
    """The first stage's best candidate is made a positive under another data set's id."""
    run_file = results(whole / "out") / "runs/cirr_task7.local.first-stage.txt"
    best = {qid: ranked[0] for qid, ranked in read_run(run_file).items()}
    wrong = [qid for qid, did in best.items() if did not in read_qrels(whole / "root" / CIRR.qrels)[qid]]
    assert wrong
    mine = spoiled(whole, tmp_path, CIRR.qrels, lambda text: text + f"{wrong[0]} 0 9{best[wrong[0]]} 1 7\n")
    pool = mine.root / CIRR.pool("local")
    pool.write_text(pool.read_text().replace(f'"{best[wrong[0]]}"', f'"9{best[wrong[0]]}"'))
    with_it, without = (
        evaluate(replace(mine, same_dataset=same)).tasks[0].systems[FIRST_STAGE] for same in (False, True)
    )
    assert with_it.recall[1] == without.recall[1] + 1 / 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: [lines[0], b"{\n", *lines[2:]], r"jsonl:2: expected a row, got Expecting"),
        (
            lambda lines: [lines[0].replace(b'"seed": 0', b'"seed": 7'), *lines[1:]],
            r"expected our settings, got others",
        ),
        (lambda lines: [*lines, lines[1].replace(b"8:70", b"5:1")], "expected queries of the task, got '5:1'"),
        (lambda lines: [*lines, lines[1]], r"jsonl:6: expected each query once, got '8:70' a second time"),
    ],
)
def test_spoiled_lists_are_errors(whole: Path, tmp_path: Path, change: Callable, message: str) -> None:
    spoil_a_list(whole, tmp_path, "*first-stage*", change, message)


def spoil_a_list(whole: Path, tmp_path: Path, file: str, change: Callable, message: str) -> None:
    mine = spoiled(whole, tmp_path, "", str)
    evaluate(mine)
    path = next((mine.out / "lists").glob(file))
    path.write_bytes(b"".join(change(path.read_bytes().splitlines(keepends=True))))
    with pytest.raises(InputError, match=message):
        evaluate(mine)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("first-stage", lambda row: row["ranked"][0].__setitem__(1, math.nan), "no list of ids with finite scores"),
        ("first-stage", lambda row: row.pop("ranked"), "one without 'ranked'"),
        ("K20", lambda row: row.pop("record"), "one without 'record'"),
        ("K20", lambda row: row["record"].pop("status"), "one without 'status'"),
        ("K20", lambda row: row["record"].__setitem__("status", "fine"), "'fine' is not a valid Status"),
        ("K20", lambda row: row["record"]["after"].pop(), "a record of another query, or of other candidates after"),
    ],
)
def test_rows_of_a_list_that_are_edited_are_errors(
    whole: Path, tmp_path: Path, file: str, change: Callable, message: str
) -> None:
    def edited(lines: list[bytes]) -> list[bytes]:
        row = json.loads(lines[1])
        change(row)
        return [lines[0], json.dumps(row).encode() + b"\n", *lines[2:]]

    spoil_a_list(whole, tmp_path, f"*{file}*", edited, rf"jsonl:2: expected a row, got {message}")


def test_instructions_are_drawn_by_the_seed(whole: Path) -> None:
    asked: list[str | None] = []
    for seed in (0, 0, 1):
        listening = Listening()
        mine = replace(setup(whole, out=f"seed{len(asked)}"), seed=seed, tasks=(CIRR,))
        evaluate(mine, replace(parts(whole / "root"), embedder=listening))
        asked += listening.asked
    first, again, other = asked[:4], asked[4:8], asked[8:]
    assert first == again != other
    assert {*asked} == {"Find it.", "Show cirr."}
