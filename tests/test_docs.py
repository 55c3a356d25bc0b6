"""README and docs are run: Python blocks with a tiny model, commands through the real argument parser, configs through the reader."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from retrv_r1_retriever import config as settings
from retrv_r1_retriever import errors
from retrv_r1_retriever.cli import app
from retrv_r1_retriever.demo import catalogue
from retrv_r1_retriever.model.checkpoint import Checkpoint, save_checkpoint
from retrv_r1_retriever.types import Status
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


@pytest.mark.slow  # run by `make pages`
def test_migrations_run(checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The setup, then our side of each diff; the other side at least is Python."""
    page = (ROOT / "docs" / "migrating.md").read_text(encoding="utf-8")
    [setup] = re.findall(r"^```python\n(.*?)^```", page, re.S | re.M)
    diffs = re.findall(r"^```diff\n(.*?)^```", page, re.S | re.M)
    assert len(diffs) == 6
    ours = ["\n".join(line[1:] for line in diff.splitlines() if line[0] in " +") for diff in diffs]
    for diff in diffs:
        compile("\n".join(line[1:] for line in diff.splitlines() if line[0] in " -"), "theirs", "exec")
    test_python_blocks_run("\n".join([setup, *ours]), checkpoint, tmp_path, monkeypatch)


def _classes(base: type[Exception]) -> set[str]:
    return {base.__name__}.union(*map(_classes, base.__subclasses__()))


def _reasons() -> Iterator[str]:
    """The longest fixed part of everything that may become a result's `reason`."""
    for name in ("reranker", "driver", "ranking", "memory", "engines/local/batcher"):
        for node in ast.walk(ast.parse((ROOT / "retrv_r1_retriever" / f"{name}.py").read_text(encoding="utf-8"))):
            said = None
            if isinstance(node, ast.Call) and node.args:
                match ast.unparse(node.func):
                    case "EngineError" | "RerankTimeout" | "reasons.append" | "self._give_up":
                        said = node.args[0]
                    case "fallback":
                        said = node.args[-1]
            elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "reason":
                said = node.value
            parts = [n.value for n in ast.walk(said) if isinstance(n, ast.Constant)] if said else []
            yield (
                max((part for part in parts if isinstance(part, str)), key=len, default="")
                .strip(" :;.")
                .partition(". ")[0]
            )


def test_the_error_index_is_complete() -> None:
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    assert [name for name in _classes(errors.RetrvR1Error) if f"`{name}`" not in page] == []
    reasons = {reason for reason in _reasons() if reason}
    assert len(reasons) > 15
    assert [reason for reason in sorted(reasons) if reason not in page] == []
    assert all(f"`{status}`" in page for status in Status if status is not Status.RERANKED)
