"""Real servers that were started without what the engine needs: the constructor names the very flag."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from retrv_r1_retriever.engines.vllm import VllmEngine
from retrv_r1_retriever.errors import EngineError
from tests.vllm.server import FLAGS, MODEL, vllm_server

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


def without(flag: str) -> list[str]:
    return [f for f in FLAGS if f != flag]


def with_other(flag: str, value: str) -> list[str]:
    place = FLAGS.index(flag) + 1
    return [*FLAGS[:place], value, *FLAGS[place + 1 :]]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (lambda: without("--enable-prompt-embeds"), "Start it with --enable-prompt-embeds"),
        (lambda: with_other("--limit-mm-per-prompt", '{"image":0}'), "Start it with --limit-mm-per-prompt"),
        (
            lambda: with_other("--chat-template", "{{ messages[0]['content'] }} {{ bos_token }} x"),
            "with --chat-template",
        ),
        (lambda: [f for f in FLAGS if not f.startswith(("--chat-t", "{%"))], "tart it with --chat-template"),
    ],
    ids=["rows", "pictures", "other template", "no template"],
)
def test_a_missing_flag_is_named(flags: Callable[[], list[str]], says: str, installed: Path, tmp_path: Path) -> None:
    with vllm_server(tmp_path, flags()) as bare, pytest.raises(EngineError) as caught:
        VllmEngine(bare.checkpoint, base_url=bare.base_url, model=MODEL)
    print(caught.value)
    assert says in str(caught.value)
