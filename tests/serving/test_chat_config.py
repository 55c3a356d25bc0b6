"""`[engine] kind = "chat"` drives the command line and the retriever, without a checkpoint where none is needed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from retrv_r1_retriever.cli.app import main
from retrv_r1_retriever.config import open_chat, open_reader, read_config
from retrv_r1_retriever.engines.chat import ChatEngine
from retrv_r1_retriever.errors import OptionsError
from retrv_r1_retriever.options import RerankOptions
from retrv_r1_retriever.retriever import RetrvR1Retriever
from retrv_r1_retriever.types import Candidate, Content, Document, Query, Status
from tests.serving.openai_stub import MODEL, Vlm, openai_stub, picture


def write(folder: Path, engine: str, more: str = "") -> Path:
    path = folder / "retrv.toml"
    path.write_text(f"[engine]\n{engine}\n{more}")
    return path


def chat(url: str, model: str = MODEL) -> str:
    return f'kind = "chat"\nbase_url = "{url}"\nmodel = "{model}"\ntimeout_s = 20'


def test_the_keys_reach_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = read_config(write(tmp_path, chat("http://127.0.0.1:1/v1") + '\napi_key_env = "CHAT_KEY"\nmax_images = 3'))
    with pytest.raises(OptionsError, match="environment variable CHAT_KEY"):
        open_chat(config)
    monkeypatch.setenv("CHAT_KEY", "secret")
    engine = open_reader(config)
    assert isinstance(engine, ChatEngine)
    assert engine.display.max_images == 3
    assert "secret" not in repr(engine.versions)


@pytest.mark.parametrize(
    ("engine", "says"),
    [
        ('kind = "chat"\nmodel = "m"', "expected base_url and model, got"),
        ('base_url = "http://x"', "expected none of the keys of 'chat', got"),
        ('kind = "vlm"', "kind: expected"),
        ('kind = "chat"\nbase_url = "http://x"\nmodel = "m"\ntimeout_s = 0', "timeout_s: expected seconds > 0"),
    ],
)
def test_keys_that_do_not_fit_are_refused(tmp_path: Path, engine: str, says: str) -> None:
    with pytest.raises(OptionsError, match=says):
        read_config(write(tmp_path, engine))


def test_a_base_url_without_scheme_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionsError, match="base_url: expected http"):
        open_chat(read_config(write(tmp_path, chat("localhost:8000"))))


def test_the_command_line_reranks_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("a blue hat")
    (tmp_path / "b.png").write_bytes(picture("red"))
    files = [str(tmp_path / "a.txt"), str(tmp_path / "b.png")]
    loaded = "torch" in sys.modules
    with openai_stub() as (stub, _):
        path = write(tmp_path, chat(stub.url))
        assert main(["rerank", "--config", str(path), "--json", "--text", "red", *files]) == 0
        found = json.loads(capsys.readouterr().out)
        assert [Path(r["id"]).name for r in found["results"]] == ["b.png", "a.txt"]
        stub.kill()
        assert main(["rerank", "--config", str(path), "--text", "red", *files]) == 1
    assert "Is the server running" in capsys.readouterr().out
    assert ("torch" in sys.modules) == loaded


def test_doctor_asks_the_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def line(text: str, name: str = "engine") -> str:
        main(["doctor", "--config", str(write(tmp_path, text)), "--json"])
        found = {f["name"]: f for f in json.loads(capsys.readouterr().out)}
        return f"{found[name]['level']} {found[name]['detail']}"

    with openai_stub(Vlm(logprobs=True)) as (stub, vlm):
        assert line(chat(stub.url)) == f"ok {MODEL} at {stub.url}"
        assert line(chat(stub.url), "judging") == "ok replies as json schema, pictures, log-probabilities"
        vlm.formats, vlm.refuses, vlm.vision = (), {"logprobs": "logprobs: not here"}, False
        assert line(chat(stub.url), "judging") == "warn replies as text; no pictures, no log-probabilities"
        vlm.override = lambda number, body: "I like both."
        assert line(chat(stub.url), "judging").startswith("fail reply: expected verdicts as JSON")
        assert line(chat(stub.url, "other")) == f"fail no other at {stub.url}, but {MODEL}"
        stub.kill()
        assert line(chat(stub.url)).startswith("fail ")


async def test_the_retriever_takes_any_first_stage() -> None:
    documents = [Document("hat", Content("a blue hat")), Document("red", Content(image=picture("red")))]

    async def first_stage(query: Query, *, top_k: int, filter: object) -> list[Candidate]:
        return [Candidate(d, 1.0 / i, i) for i, d in enumerate(documents, 1)]

    with openai_stub() as (stub, _):
        retriever = RetrvR1Retriever(first_stage=first_stage, engine=ChatEngine(MODEL, base_url=stub.url))
        results = await retriever.aretrieve("red", options=RerankOptions(think="always"))
    assert results.status is Status.RERANKED
    assert [r.document.id for r in results] == ["red", "hat"]
