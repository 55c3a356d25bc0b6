"""`[engine] kind = "vllm"`: what it takes, and what `doctor` finds on such a server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from retrv_r1_retriever.cli.app import main
from retrv_r1_retriever.config import open_reader, read_config
from retrv_r1_retriever.engines.vllm import TEMPLATE, VllmEngine
from retrv_r1_retriever.errors import OptionsError
from retrv_r1_retriever.model.checkpoint import Checkpoint
from tests.serving.http_stub import Reply
from tests.tiny import checkpoint, folder
from tests.vllm.server import ROOT
from tests.vllm.stub import MODEL, Vllm, refusal, vllm_stub

__all__ = ["checkpoint", "folder"]


def write(place: Path, folder: Path, url: str, more: str = "") -> Path:
    path = place / "retrv.toml"
    engine = f'kind = "vllm"\nbase_url = "{url}"\nmodel = "{MODEL}"\ntimeout_s = 20\n{more}'
    path.write_text(f'[model]\ncheckpoint = "{folder}"\n[engine]\n{engine}\n')
    return path


def test_the_keys_reach_the_engine(tmp_path: Path, folder: Path, checkpoint: Checkpoint) -> None:
    with vllm_stub(Vllm(checkpoint.processor)) as stub:
        engine = open_reader(read_config(write(tmp_path, folder, stub.url)))
    assert isinstance(engine, VllmEngine)
    assert engine.versions["server"] in stub.url


def test_the_guide_starts_the_server_as_the_engine_needs_it() -> None:
    guide = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    assert f'--chat-template "{TEMPLATE}"' in guide
    for flag in (
        "--enable-prompt-embeds",
        "--enable-prompt-tokens-details",
        '--limit-mm-per-prompt \'{"image":8,"video":0}\'',
    ):
        assert flag in guide


def test_what_only_a_chat_model_takes_is_refused(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(OptionsError, match="max_images: expected none with kind = 'vllm'"):
        read_config(write(tmp_path, folder, "http://x/v1", "max_images = 3"))


def test_doctor_says_what_the_server_can_do(
    tmp_path: Path, folder: Path, checkpoint: Checkpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    vllm, cached = Vllm(checkpoint.processor), [0]

    def counted(number: int, body: object) -> Reply:
        answer = vllm.completion(body)  # type: ignore[arg-type]
        answer["usage"]["prompt_tokens_details"] = {"cached_tokens": cached[0]}
        return Reply(answer)

    with vllm_stub(vllm) as stub:
        path = write(tmp_path, folder, stub.url)

        def found(name: str) -> str:
            main(["doctor", "--config", str(path), "--json"])
            lines = {f["name"]: f for f in json.loads(capsys.readouterr().out)}
            return " | ".join(lines[name][key] for key in ("level", "detail", "fix"))

        vllm.texts = ["red"]
        assert found("engine") == f"ok | {MODEL} at {stub.url}: vLLM 9.9.9, 4,096 tokens | "
        assert "--enable-prompt-tokens-details" in found("prefix cache")
        vllm.override = counted
        assert found("prefix cache").startswith("warn | 0% of a prompt sent twice | Every step")
        cached[0] = 192
        assert found("prefix cache").startswith("ok | 75%")
        vllm.override = lambda number, body: refusal(
            400, "You must set `--enable-prompt-embeds` to input `prompt_embeds`"
        )
        assert found("engine").startswith("fail | ")
        assert "Start it with --enable-prompt-embeds" in found("engine")
