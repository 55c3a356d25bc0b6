"""A folder with a tiny random checkpoint and a few documents: the commands run for real, only nothing is learned."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import transformers

from retrv_r1_retriever.cli import main
from retrv_r1_retriever.model.checkpoint import Checkpoint, save_checkpoint
from tests.tiny import checkpoint, picture

__all__ = ["checkpoint"]


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Ran]


@pytest.fixture(scope="session")
def checkpoint_folder(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    manifest = replace(checkpoint.manifest, embedder_dim=16, licence="Apache-2.0", trained_top_k=20)
    save_checkpoint(folder, checkpoint.model, checkpoint.processor, manifest, embedder=checkpoint.model)
    return folder


@pytest.fixture
def workplace(tmp_path: Path, checkpoint_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: `items/` with three pictures (one with a text), one text and one broken picture; a config."""
    items = tmp_path / "items"
    items.mkdir()
    for number in range(3):
        picture(number).save(items / f"card{number}.png")
    (items / "card1.txt").write_text("two red circle")
    (items / "note.txt").write_text("which card")
    (items / "broken.png").write_bytes(b"no picture")
    (tmp_path / "retrv.toml").write_text(
        f"[model]\ncheckpoint = {json.dumps(str(checkpoint_folder))}\n[images]\nroot = 'items'\n"
        "[rerank]\ntop_k = 20\nmax_new_tokens = 24\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    transformers.utils.logging.disable_progress_bar()  # a fresh process does it by TQDM_DISABLE
    return tmp_path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> Ran:
        capsys.readouterr()
        try:
            code = main([str(a) for a in arguments])
        except SystemExit as error:
            code = int(error.code or 0)
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return call
