"""Every command over a real store and a real (untrained) model."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from retrv_r1_retriever import _sync
from retrv_r1_retriever import config as settings
from retrv_r1_retriever.cli import index as index_command
from retrv_r1_retriever.config import read_config
from retrv_r1_retriever.errors import CheckpointError
from retrv_r1_retriever.indexing import Indexer, IndexReport, Row
from retrv_r1_retriever.retriever import RetrvR1Retriever
from retrv_r1_retriever.store import VectorFirstStage
from tests.cli.conftest import Run
from tests.helpers import header_only_png
from tests.tiny import picture

MODE = "K=20 auto/hybrid"  # of the workplace's config


def test_index_search_and_again(workplace: Path, run: Run) -> None:
    first = run("index", "items", "--json")
    assert first.code == 0
    assert first.json["indexed"] == 4
    assert [f["id"] for f in first.json["failed"]] == ["broken"]
    assert run("index", "items", "--json").json["skipped"] == 4

    found = run("search", "--text", "red circle", "--json")
    assert found.code == 0
    ids = [r["id"] for r in found.json["results"]]
    assert sorted(ids) == ["card0", "card1", "card2", "note"]
    assert [r["rank"] for r in found.json["results"]] == [1, 2, 3, 4]
    assert sorted(r["retrieval_rank"] for r in found.json["results"]) == [1, 2, 3, 4]
    assert found.json["status"] == "reranked"
    assert found.json["trace"]["usage"]["uncompressed_tokens"] > 0


def test_an_interrupted_run_says_that_it_can_go_on(workplace: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Indexer.index

    def interrupted(self: Indexer, rows: Iterable[Row], *, force: bool = False) -> IndexReport:
        whole(self, itertools.islice(rows, 3), force=force)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Indexer, "index", interrupted)
        stopped = run("index", "items")
    assert (stopped.code, stopped.out) == (130, "")
    assert stopped.err.endswith("\nstopped: what was written stays; the same command goes on from there\ninterrupted\n")
    again = run("index", "items", "--json").json
    assert (again["indexed"], again["skipped"]) == (2, 2)


def test_a_bomb_is_told_once_and_costs_itself_only(workplace: Path, run: Run, recwarn: pytest.WarningsRecorder) -> None:
    """Pillow warns of its own limit on the way; the failure says all of it."""
    Path("items/bomb.png").write_bytes(header_only_png(10_000, 10_000))
    failed = {f["id"]: f["reason"] for f in run("index", "items", "--json").json["failed"]}
    assert "expected at most 50,000,000 pixels, got 10000 x 10000 = 100,000,000 pixels" in failed["bomb"]
    assert not [w for w in recwarn if "bomb" in str(w.message)]


def test_search_by_picture_filters_and_writes_a_report(workplace: Path, run: Run) -> None:
    run("index", "items")
    query = ["--image", "items/card2.png", "--text", "two", "--filter", "modality=image"]
    found = run("search", *query, "--report", "page.html")
    assert found.code == 0
    assert "reranked" in found.out
    assert "card0 [card0.png]" in found.out
    assert "note  which card" not in found.out
    page = (workplace / "page.html").read_text()
    assert page.count("<img") >= 3  # the query and two candidates
    direct = run("search", *query, "--think", "never", "--ranking", "logits", "--top-n", 1, "--json")
    assert len(direct.json["results"]) == 1
    assert direct.json["trace"]["stop_reason"] is None


def test_terminal_output_stays_within_a_narrow_terminal(
    workplace: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    (workplace / "items" / "long.txt").write_text("red circle " * 40)
    run("index", "items")
    monkeypatch.setenv("COLUMNS", "50")
    lines = run("search", "--text", "red").out.splitlines()
    assert len(lines) > 8
    assert max(map(len, lines)) <= 50


def test_foreign_text_cannot_drive_the_terminal(workplace: Path, run: Run) -> None:
    (workplace / "items" / "evil.txt").write_text("red \x1b[2J\x1b]0;owned\x07 circle")
    run("index", "items")
    found = run("search", "--text", "red")
    assert "evil" in found.out
    assert "\x1b" not in found.out


def test_words_that_are_no_unicode_are_read_shown_and_written(workplace: Path, run: Run) -> None:
    """A terminal may pass any bytes, and JSON half a surrogate pair."""
    Path("docs.jsonl").write_text('{"id": "a", "text": "red \\ud800"}\n{"id": "b", "text": "two"}\n')
    found = run("rerank", "--text", "red \udcff", "docs.jsonl", "--report", "page.html", "--traces", "traces.jsonl")
    assert (found.code, found.err) == (0, "")
    found.out.encode()
    Path("page.html").read_text(encoding="utf-8")
    as_json = run("rerank", "--text", "red \udcff", "docs.jsonl", "--json")
    as_json.out.encode()
    assert as_json.json["query"]["text"] == "red \udcff"
    assert run("view", "traces.jsonl", "--out", "view.html").code == 0
    indexed = run("index", "docs.jsonl", "--json").json
    assert (indexed["indexed"], [f["id"] for f in indexed["failed"]]) == (1, ["a"])
    assert "expected valid Unicode" in indexed["failed"][0]["reason"]


def test_rerank_files_and_jsonl(workplace: Path, run: Run) -> None:
    (workplace / "docs.jsonl").write_text('{"id": 7, "text": "two red"}\n{"id": "p", "image": "card0.png"}\n')
    found = run("rerank", "--text", "red", "items/card0.png", "items/note.txt", "docs.jsonl", "--json")
    assert found.code == 0
    assert {r["id"] for r in found.json["results"]} == {"items/card0.png", "items/note.txt", "7", "p"}
    assert found.json["unranked"] == []


def test_a_fallback_is_said_and_is_no_success(workplace: Path, run: Run) -> None:
    found = run("rerank", "--text", "red", "items/broken.png")
    assert found.code == 1
    assert found.out.startswith("fallback")
    assert "NOT RERANKED: no candidate has usable memory" in found.out
    assert found.err == ""


def test_doctor_says_what_fits_and_what_to_change(workplace: Path, run: Run) -> None:
    before = run("doctor", "--json")
    assert before.code == 1
    assert {f["name"]: f["level"] for f in before.json}["store"] == "fail"
    run("index", "items")
    after = {f["name"]: f for f in run("doctor", "--json").json}
    assert {f["level"] for f in after.values()} == {"ok"}
    assert after["base"]["detail"] == "tiny-random, licence Apache-2.0"
    assert "on all 4 sampled documents" in after["memory"]["detail"]
    manifest = read_config("retrv.toml").path(read_config("retrv.toml").model.checkpoint) / "retrv" / "manifest.json"
    original = manifest.read_text()
    try:
        values = json.loads(original)
        manifest.write_text(
            json.dumps({**values, "direct_read": False, "memory_digest": "other", "licence": "Qwen Research License"})
        )
        changed = run("doctor")
    finally:
        manifest.write_text(original)
    assert "0 of 4 sampled documents have memory other; 4 have another" in " ".join(changed.out.split())
    assert "direct read" not in after
    assert "direct read not trained in this checkpoint" in " ".join(changed.out.split())
    assert "Check the licence of the base before commercial use." in " ".join(changed.out.split())


def test_index_without_a_config_writes_one_that_search_uses(
    workplace: Path, run: Run, checkpoint_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("retrv.toml").unlink()
    monkeypatch.setattr(index_command.settings, "checkpoint_path", lambda config: str(checkpoint_folder))
    folder = workplace / "mbeir"
    (folder / "cand_pool").mkdir(parents=True)
    (folder / "images").mkdir()
    picture(5).save(folder / "images" / "a.png")
    row = {"did": "9:1", "txt": None, "img_path": "images/a.png", "modality": "image", "src_content": None}
    (folder / "cand_pool" / "pool.jsonl").write_text(json.dumps(row) + "\n")
    assert run("index", "mbeir/cand_pool/pool.jsonl", "--json").json["indexed"] == 1
    config = read_config("retrv.toml")
    assert config.images.root == "mbeir"
    assert config.rerank.top_k == 20
    assert [r["id"] for r in run("search", "--text", "red", "--max-inspections", 0, "--json").json["results"]] == [
        "9:1"
    ]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["search"], 2, "query: expected --text, --image or both, got neither"),
        (["search", "--text", "  "], 2, "query: expected --text, --image or both, got neither"),
        (["search", "--text", "x", "--top-k", "128"], 2, "top_k: expected an integer from 1 to 127, got 128"),
        (["search", "--text", "x", "--filter", "red"], 2, "--filter: expected field=value, got 'red'"),
        (["search", "--image", "none.png"], 2, "none.png: expected a readable picture"),
        (["search", "--image", "http://e.com/x.png"], 2, "http://e.com/x.png: expected a file, got a URL"),
        (["search", "--image", "items/broken.png"], 2, "expected a readable PNG"),
        (["search", "--text", "x", "--config", "none.toml"], 2, "none.toml: expected a config file, got no such file"),
        (["rerank", "--text", "x", "a.pdf"], 2, "a.pdf: expected one of"),
        (["index", "none"], 2, "none: expected a readable file"),
        (["index", "."], 2, "expected a folder below [images] root"),
        (["search", "--text", "x", "--report", "items"], 2, "items: expected a file that can be written, got a folder"),
        (["search", "--text", "x", "--report", "bad.jsonl/p.html"], 2, "p.html: expected a file that can be written"),
        (["eval", "list.jsonl"], 2, "list.jsonl:1: row: expected a JSON object, got list"),
        (
            ["eval", "sub/down/out.jsonl"],
            2,
            "out.jsonl:1: image ../../bad.jsonl: expected a file below [images] root or beside",
        ),
        (["eval", "none.jsonl"], 2, "none.jsonl: expected a JSONL or CSV of queries"),
        (["eval", "bad.jsonl"], 2, "bad.jsonl: expected right answers for all or none, got 1 of 2 queries"),
    ],
)
def test_wrong_input_is_one_message_and_exit_code_2(
    workplace: Path, run: Run, arguments: list[str], code: int, message: str
) -> None:
    Path("bad.jsonl").write_text('{"text": "x", "positives": ["a"]}\n{"text": "y"}\n')
    Path("list.jsonl").write_text("[1]\n")
    Path("sub/down").mkdir(parents=True)
    Path("sub/down/out.jsonl").write_text('{"image": "../../bad.jsonl", "positives": ["a"]}\n')
    run("index", "items")
    ran = run(*arguments)
    assert ran.code == code
    assert message in ran.err
    assert len(ran.err.strip().splitlines()) == 1
    as_json = run(*arguments, "--json")
    assert message in as_json.json["error"]["message"]
    assert as_json.code == code


def test_searching_without_an_index_says_what_to_do(workplace: Path, run: Run, no_model: None) -> None:
    ran = run("search", "--text", "x")
    assert ran.code == 2
    assert "expected an index made by this package, got none there. Run: retrv-r1 index SOURCE (" in ran.err
    assert "spec=" not in ran.err
    as_json = run("search", "--text", "x", "--json").json["error"]
    assert as_json["message"] == ran.err.strip().removeprefix("retrv-r1: ")
    doctor = " ".join(run("doctor").out.split())
    assert "Run: retrv-r1 index SOURCE (" in doctor
    assert "spec=" not in doctor


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever fails under this fixture failed before any weight was read."""
    monkeypatch.setattr(settings, "open_engine", lambda config: pytest.fail("the engine was loaded"))
    monkeypatch.setattr(settings, "open_embedder", lambda config: pytest.fail("the embedder was loaded"))


def test_wrong_input_does_not_wait_for_a_model(workplace: Path, run: Run, no_model: None) -> None:
    picture = run("search", "--image", "items/broken.png")
    assert (picture.code, picture.err.startswith("retrv-r1: items/broken.png: image")) == (2, True)
    assert run("rerank", "--image", "items/broken.png", "items/note.txt").code == 2
    assert run("search", "--text", "x", "--filter", "red").code == 2
    assert "64-bit integer" in run("search", "--text", "x", "--filter", f"price={10**20}").err
    (workplace / "empty").mkdir()
    assert run("index", "empty", "--images", ".", "--config", "new.toml").code == 2
    assert not Path("new.toml").exists()
    assert not Path("retrv-index").exists()


def test_a_filter_that_matches_nothing_is_an_answer(workplace: Path, run: Run) -> None:
    run("index", "items")
    ran = run("search", "--text", "red", "--filter", "modality=sound", "--report", "page.html")
    assert ran.code == 0
    assert ran.out.splitlines()[0] == "0 of 4 documents match the filter modality=sound"
    assert "Nothing to rank: 0 of 4 documents" in Path("page.html").read_text()
    as_json = run("search", "--text", "red", "--filter", "modality=sound", "--json").json
    assert (as_json["results"], as_json["status"]) == ([], "fallback")


def test_a_failed_items_reason_is_shown_whole(workplace: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    out = run("index", "items").out
    assert "Save it again as PNG or JPEG." in " ".join(out.split())
    assert max(map(len, out.splitlines()[1:])) <= 60


def test_usage_errors_and_help(run: Run) -> None:
    assert run("serach").code == 2
    wrong = run("search", "--top-k", "many")
    assert (wrong.code, wrong.out) == (2, "")
    assert wrong.err.startswith("usage: retrv-r1 search")
    as_json = run("search", "--top-k", "many", "--json")
    assert (as_json.code, as_json.err) == (2, "")
    assert as_json.json["error"]["message"].startswith("argument --top-k: invalid int value: 'many'. See: retrv-r1 sea")
    for command, flag in (("demo", "--queries"), ("eval", "--limit"), ("index", "--batch-size")):
        for count in ("0", "-2", "x"):
            source = [] if command == "demo" else ["file"]
            ran = run(command, *source, flag, count)
            assert (ran.code, f"argument {flag}: expected a whole number of at least 1, got '{count}'" in ran.err) == (
                2,
                True,
            )
    assert run("serach", "--json").json["error"]["type"] == "OptionsError"
    assert "COMMAND" in run("--help").out
    assert run("search", "--help").code == 0


def test_help_does_not_load_torch() -> None:
    code = (
        "import sys\nfrom retrv_r1_retriever.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\nprint('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False False"


def test_a_retriever_from_the_same_config(workplace: Path, run: Run) -> None:
    run("index", "items")
    retriever = RetrvR1Retriever.from_config("retrv.toml")
    assert retriever.options.top_k == 20
    assert isinstance(retriever.first_stage, VectorFirstStage)
    try:
        assert len(retriever.retrieve("red circle", image=(workplace / "items" / "card0.png").read_bytes())) == 4
    finally:
        _sync.run(retriever.first_stage.store.close())


def test_files_as_other_systems_write_them(workplace: Path, run: Run) -> None:
    """A byte order mark at the start, and a line separator inside a string, which Python takes for the end of a line."""
    mark = b"\xef\xbb\xbf"
    Path("pool.jsonl").write_bytes(mark + b'{"did": "9:1", "txt": "two red", "modality": "text"}\n')
    Path("retrv.toml").write_bytes(mark + Path("retrv.toml").read_bytes())
    assert run("index", "pool.jsonl", "--json").json["indexed"] == 1
    query = '{"text": "red\u2028two", "positives": ["9:1"]}\n'.encode()
    for text in (query, mark + query):
        Path("queries.jsonl").write_bytes(text)
        assert run("eval", "queries.jsonl", "--json").json["modes"][MODE]["ceiling"] == 1.0


def test_filters_by_number(workplace: Path, run: Run) -> None:
    rows = [{"id": "a", "text": "red", "price": 3.5}, {"id": "b", "text": "red", "price": 4}]
    Path("docs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run("index", "docs.jsonl")
    found = run("search", "--text", "red", "--filter", "price=3.5", "--json")
    assert [r["id"] for r in found.json["results"]] == ["a"]
    found = run("search", "--text", "red", "--filter", "price=4", "--json")
    assert [r["id"] for r in found.json["results"]] == ["b"]
    ran = run("search", "--text", "red", "--filter", f"price={10**20}")
    assert (ran.code, "expected a 64-bit integer" in ran.err) == (2, True)


def test_indexing_nothing_is_no_success(workplace: Path, run: Run) -> None:
    (workplace / "items" / "sub").mkdir()
    Path("empty.jsonl").write_text("\n")
    for source, message in (("items/sub", "expected pictures or .txt files, got none"), ("empty.jsonl", "got none")):
        ran = run("index", source)
        assert ran.code == 2
        assert message in ran.err


def test_duplicate_ids_are_named(workplace: Path, run: Run) -> None:
    Path("docs.jsonl").write_text('{"id": "a", "text": "red"}\n{"id": "a", "text": "two"}\n')
    ran = run("index", "docs.jsonl", "--json").json
    assert (ran["indexed"], ran["documents"]) == (1, 1)
    assert "expected distinct ids, got 'a' more than once" in ran["failed"][0]["reason"]


def test_vectors_of_another_embedder_are_refused(workplace: Path, run: Run, checkpoint_folder: Path) -> None:
    run("index", "items")
    other = workplace / "other"
    shutil.copytree(checkpoint_folder, other)
    manifest = other / "retrv" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"embedder_digest": "another"}))
    Path("other.toml").write_text(Path("retrv.toml").read_text().replace(str(checkpoint_folder), str(other)))
    for arguments in (("search", "--text", "red"), ("index", "items")):
        ran = run(*arguments, "--config", "other.toml")
        assert ran.code == 2
        assert "embedder: expected another, got" in ran.err
    found = {f["name"]: f for f in run("doctor", "--config", "other.toml", "--json").json}
    assert found["embedder"]["level"] == "fail"
    assert run("search", "--text", "red").code == 0, "a refused attempt leaves no lock behind"


def test_a_failed_attempt_leaves_no_lock_behind(workplace: Path, run: Run) -> None:
    run("index", "items")
    good = Path("retrv.toml").read_text()
    Path("broken.toml").write_text(good.replace("checkpoint =", "checkpoint = 'nowhere' #"))
    with pytest.raises(CheckpointError, match="'nowhere'") as kept:
        RetrvR1Retriever.from_config("broken.toml")
    retriever = RetrvR1Retriever.from_config("retrv.toml")
    assert isinstance(retriever.first_stage, VectorFirstStage)
    _sync.run(retriever.first_stage.store.close())
    assert kept.value is not None  # an error that is still looked at, as in a notebook, keeps its frames alive
