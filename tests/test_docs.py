"""README and docs are run: Python blocks with a tiny model, commands through the real argument parser, configs through the reader."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from retrv_r1_retriever import config as settings
from retrv_r1_retriever.cli import app
from retrv_r1_retriever.demo import catalogue
from retrv_r1_retriever.model.checkpoint import Checkpoint, save_checkpoint
from tests.serving.openai_stub import MODEL, openai_stub
from tests.tiny import checkpoint

__all__ = ["checkpoint"]

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str) -> list[object]:
    return list(_blocks(language))


def _blocks(language: str) -> Iterator[object]:
    for page in PAGES:
        found = re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M)
        for number, code in enumerate(found, 1):
            yield pytest.param(code, id=f"{page.name}-{number}")


@pytest.mark.parametrize("code", blocks("python"))
def test_python_blocks_run(code: str, checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "checkpoint"
    manifest = replace(checkpoint.manifest, embedder_dim=16)
    save_checkpoint(folder, checkpoint.model, checkpoint.processor, manifest, embedder=checkpoint.model)
    monkeypatch.setattr(settings, "checkpoint_path", lambda config: str(folder))
    everything = catalogue.combos
    monkeypatch.setattr(catalogue, "combos", lambda part: everything(part)[:16])
    monkeypatch.setitem(catalogue.SPLITS, "test", replace(catalogue.SPLITS["test"], queries=1))
    catalogue.write_catalogue(tmp_path / "demo-data")  # as `retrv-r1 demo` leaves it, only smaller
    (tmp_path / "pictures").mkdir()
    monkeypatch.chdir(tmp_path)
    with openai_stub() as (server, _):  # stands in for the model servers that pages name
        code = code.replace("http://127.0.0.1:8000/v1", server.url).replace("Qwen/Qwen2.5-VL-7B-Instruct", MODEL)
        names: dict[str, Any] = {"__name__": "block"}
        exec(compile(code, "block", "exec"), names)
    if server.url in code:
        assert names["results"].status == "reranked"


def test_the_main_path_prints_cards_a_reader_can_tell_apart(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = re.search(r"<!-- test: main-path -->\n```python\n(.*?)^```", PAGES[0].read_text("utf-8"), re.S | re.M)
    assert code
    test_python_blocks_run(code[1], checkpoint, tmp_path, monkeypatch)
    status, *lines = capsys.readouterr().out.splitlines()
    assert status.split()[0] in ("reranked", "partial")
    captions = [card.text for card, stratum in catalogue.make_cards(catalogue.SPLITS["test"]) if stratum == "fine"]
    assert len(lines) == 5
    assert all(any(caption in line for caption in captions) for line in lines)


@pytest.mark.parametrize("code", blocks("bash"))
def test_commands_parse(code: str) -> None:
    for line in code.replace("\\\n", "").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["retrv-r1"]:
            app._parser(words[1:]).parse_args(words[1:])
        elif words[:1] == ["make"]:
            targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
            assert words[1] in targets


@pytest.mark.parametrize("code", blocks("toml"))
def test_configs_are_read(code: str, tmp_path: Path) -> None:
    (tmp_path / "retrv.toml").write_text(code)
    settings.read_config(tmp_path / "retrv.toml")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target
