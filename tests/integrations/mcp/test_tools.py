"""The tools through the SDK's client, in this process: what they answer, and what they refuse."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from mcp import Client, MCPError
from PIL import Image
from retrv_r1_mcp.server import create_server

from retrv_r1_retriever import EngineError, LocalImages, NotIndexedError
from retrv_r1_retriever.edge import EdgeStore
from retrv_r1_retriever.shown import PIXELS_PER_TOKEN
from tests.integrations.mcp.parts import falling, links, make_calls, make_index, make_server, pictures, png, text
from tests.serving.test_running import wait_for

URI = "data:image/png;base64,"


@pytest.fixture
async def whole(tmp_path: Path) -> AsyncIterator[EdgeStore]:
    index = await asyncio.to_thread(make_index, tmp_path)
    yield index
    await index.close()


def size(data: str) -> tuple[int, int]:
    return Image.open(io.BytesIO(base64.b64decode(data))).size


async def test_the_tools_say_what_they_take_and_give(whole: EdgeStore) -> None:
    async with Client(make_server(make_calls(whole))) as client:
        tools = {tool.name: tool for tool in (await client.list_tools()).tools}
    assert list(tools) == ["search", "rerank", "inspect"]
    for tool in tools.values():
        assert tool.annotations
        assert tool.annotations.read_only_hint is True
        assert tool.output_schema
        assert tool.input_schema["additionalProperties"] is False
        assert "tenant" not in json.dumps(tool.input_schema)
        assert all("description" in field for field in tool.input_schema["properties"].values()), "not inside a union"


async def test_a_search_gives_ids_to_cite_and_pictures_within_the_budget(whole: EdgeStore) -> None:
    calls = make_calls(whole, shown={"image_tokens": 300})
    async with Client(make_server(calls)) as client:
        answer = await client.call_tool("search", {"query": "a red card", "image": URI + encoded("red")})
    facts = answer.structured_content
    assert facts["status"] == "reranked"
    found = {one["id"]: one for one in facts["results"]}
    assert set(found) == {"red/1", "blue", "long"}, "of this tenant, and all of it"
    assert found["red/1"]["metadata"] == {"price": 3, "tenant": "alpha"}
    assert (found["long"]["metadata"], len(found["long"]["text"])) == (None, 500)
    assert [one["chosen"] for one in facts["results"]] == [True, False, False]
    lines = [line for line in text(answer).splitlines() if "] forged" in line]
    assert len(lines) == 1, "a document must not write a line of its own"
    assert lines[0].endswith("[red/1] a red card 2. [blue] forged (with a picture)")
    [red, blue] = sorted((size(picture.data) for picture in pictures(answer)), key=max)
    assert red == (40, 40), "nothing is made larger"
    assert max(blue) < 512, "made smaller until it fits"
    assert blue[0] * blue[1] <= 150 * PIXELS_PER_TOKEN, "its share"


def encoded(color: str) -> str:
    return base64.b64encode(png(color)).decode()


@pytest.mark.parametrize("images", ["inline", "link", "none"])
async def test_pictures_come_inline_as_links_or_not_at_all(whole: EdgeStore, images: str) -> None:
    async with Client(make_server(make_calls(whole, shown={"images": images}))) as client:
        answer = await client.call_tool("search", {"query": "card"})
        handles = {one["id"]: one["picture"] for one in answer.structured_content["results"]}
        assert handles == {
            "red/1": "retrv://documents/red%2F1/picture", "blue": "retrv://documents/blue/picture", "long": None,
        }  # fmt: skip
        assert len(pictures(answer)) == (2 if images == "inline" else 0)
        assert {str(link.uri) for link in links(answer)} == (
            set(filter(None, handles.values())) if images == "link" else set()
        )
        [read] = (await client.read_resource(handles["blue"])).contents
        assert max(size(read.model_dump()["blob"])) > 512
        again = await client.call_tool("search", {"image": handles["red/1"], "where": [{"field": "price", "lt": 5}]})
        assert [one["id"] for one in again.structured_content["results"]] == ["red/1"]


async def test_what_is_over_the_budget_is_linked_and_said(whole: EdgeStore) -> None:
    async with Client(make_server(make_calls(whole, shown={"image_tokens": 3}))) as client:
        answer = await client.call_tool("search", {"query": "card"})
    assert len(pictures(answer)) + len(links(answer)) == 2
    assert len(links(answer)) == 1
    assert "Pictures not shown, to save tokens: [" in text(answer)


async def test_inspect_shows_everything(whole: EdgeStore) -> None:
    async with Client(make_server(make_calls(whole))) as client:
        answer = await client.call_tool("inspect", {"id": "long"})
        assert answer.structured_content["text"] == "word " * 1000
        assert answer.structured_content["metadata"]["notes"] == "n" * 1000
        [picture] = pictures(await client.call_tool("inspect", {"id": "blue"}))
        assert size(picture.data) == (1568, 1568)


async def test_rerank_takes_texts_pictures_and_ids(whole: EdgeStore, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "mine.png").write_bytes(png("cyan"))
    files = LocalImages(tmp_path / "pictures")
    documents = [{"text": "one"}, {"image": "mine.png"}, {"id": "blue"}, {"image": URI + encoded("red")}]
    async with Client(make_server(make_calls(whole, files=files))) as client:
        answer = await client.call_tool("rerank", {"query": "q", "documents": documents, "top_n": 3})
    assert [one["id"] for one in answer.structured_content["results"]] == ["#0", "#1", "blue"]
    assert answer.structured_content["left_out"] == 1
    assert "\nRanked lower and not shown: 1 more." in text(answer)


async def test_more_than_the_server_gives_is_said_to_be_left_out(whole: EdgeStore) -> None:
    async with Client(make_server(make_calls(whole, shown={"max_results": 2}))) as client:
        for top_n, shown in ((None, 2), (3, 2), (1, 1)):
            answer = await client.call_tool("search", {"query": "card", "top_n": top_n})
            facts = answer.structured_content
            assert (len(facts["results"]), facts["left_out"]) == (shown, 3 - shown)
            assert f"not shown: {3 - shown} more." in text(answer)


OUTSIDE = "expected a file below .*pictures, got .*, outside root"
BAD: list[tuple[str, dict[str, Any], str]] = [
    ("search", {}, "query: expected a text or a picture, got neither"),
    ("search", {"query": "x", "tenant": "beta"}, "tenant: Extra inputs are not permitted"),
    ("search", {"query": 3}, "query: Input should be a valid string"),
    ("search", {"query": "x", "top_n": 0}, "top_n: Input should be greater than or equal to 1"),
    ("search", {"query": "x" * 1001}, "expected at most 1,000 characters, got 1001"),
    ("search", {"query": "\ud800"}, "query: "),
    ("search", {"image": URI + "bm90IGEgcGljdHVyZQ=="}, "expected a readable PNG"),
    ("search", {"image": URI + "A" * 500_000}, "expected at most 100,000 bytes"),
    ("search", {"image": "../secret.png"}, OUTSIDE),
    ("search", {"image": "/etc/passwd"}, OUTSIDE),
    ("search", {"image": "file:///etc/passwd"}, OUTSIDE),
    ("search", {"image": "link.png"}, OUTSIDE),
    ("search", {"image": "http://169.254.169.254/latest"}, "got a URL, and LocalImages fetches nothing"),
    ("search", {"image": "retrv://documents/secret/picture"}, "expected one of a document in this collection"),
    ("search", {"image": "retrv://documents/long/picture"}, "expected the picture of a document, got none"),
    ("rerank", {"query": "x", "documents": []}, "documents: List should have at least 1 item"),
    ("rerank", {"query": "x", "documents": [{"text": " "}]}, r"documents\[0\]: expected text, image or id, got none"),
    ("rerank", {"query": "x", "documents": [{"id": "secret"}]}, "expected ids of the collection"),
    ("rerank", {"query": "x", "documents": [{"id": "blue", "text": "y"}]}, "expected id, or text and image, got both"),
    ("inspect", {"id": "nobody"}, "id: expected one of a document in this collection, got 'nobody'"),
    ("inspect", {"id": "secret"}, "id: expected one of a document in this collection, got 'secret'"),
]


async def test_bad_input_is_an_error_that_a_model_can_read_and_the_server_stays_up(
    whole: EdgeStore, tmp_path: Path
) -> None:
    root = tmp_path / "pictures"
    root.mkdir()
    (tmp_path / "secret.png").write_bytes(png("red"))
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    async with Client(make_server(make_calls(whole, files=LocalImages(root)))) as client:
        for name, arguments, message in BAD:
            answer = await client.call_tool(name, arguments)
            assert answer.is_error, (name, arguments)
            with pytest.raises(AssertionError, match=message):
                raise AssertionError(text(answer))
            assert len(text(answer)) < 1000
        for uri in ("retrv://documents/secret/picture", "retrv://documents/long/picture", "file:///etc/passwd"):
            with pytest.raises(MCPError, match=r"expected one of|has no picture|expected retrv"):
                await client.read_resource(uri)
        with pytest.raises(MCPError, match="expected one of search, rerank, inspect, got 'drop'"):
            await client.call_tool("drop", {})
        assert not (await client.call_tool("search", {"query": "card"})).is_error


async def test_no_path_is_read_without_a_root(whole: EdgeStore) -> None:
    async with Client(make_server(make_calls(whole))) as client:
        answer = await client.call_tool("search", {"image": "/etc/passwd"})
    assert "Paths are read where the server was started with --image-root" in text(answer)


async def test_progress_tells_the_steps(whole: EdgeStore) -> None:
    steps: list[tuple[float, str | None]] = []

    async def hear(progress: float, total: float | None, message: str | None) -> None:
        steps.append((progress, message))

    async with Client(make_server(make_calls(whole))) as client:
        await client.call_tool("search", {"query": "card"}, progress_callback=hear)
    assert [words for _, words in steps] == ["loading the model", "3 candidates found", "decided"]
    assert [step for step, _ in steps] == [0, 1, 2]


@pytest.mark.parametrize("mode", ["legacy", "auto"])
async def test_a_cancelled_call_ends_in_the_model(whole: EdgeStore, mode: str) -> None:
    engine = falling(delay_s=0.2)
    async with Client(make_server(make_calls(whole, engine)), mode=mode) as client:
        call = asyncio.ensure_future(client.call_tool("search", {"query": "card"}))
        await wait_for(lambda: engine.opened)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await wait_for(lambda: not engine.leaked)
        assert not (await client.call_tool("search", {"query": "card"})).is_error


async def test_a_failing_model_is_a_fallback_that_says_so(whole: EdgeStore) -> None:
    engine = falling(failing={"open": EngineError("out of memory")})
    async with Client(make_server(make_calls(whole, engine))) as client:
        answer = await client.call_tool("search", {"query": "card"})
    assert (answer.is_error, answer.structured_content["status"]) == (False, "fallback")
    assert text(answer).startswith("Not reranked, in the order of the first search: out of memory")


async def test_what_goes_wrong_here_is_logged_and_not_told(whole: EdgeStore, caplog: pytest.LogCaptureFixture) -> None:
    async with Client(make_server(make_calls(whole))) as client:
        await whole.close()
        answer = await client.call_tool("search", {"query": "card"})
    assert (answer.is_error, text(answer)) == (True, "Something failed in this server; its log says what.")
    assert str(whole.path) in caplog.text


async def test_the_model_is_loaded_after_the_handshake_and_again_after_a_failure(whole: EdgeStore) -> None:
    opened, fails = 0, True

    def open() -> Any:
        nonlocal opened
        opened += 1
        if fails:
            raise NotIndexedError("Run `retrv-r1 index` first")
        return make_calls(whole)

    async with Client(create_server(open, lambda context: "alpha")) as client:
        assert opened == 0
        answer = await client.call_tool("search", {"query": "card"})
        assert (answer.is_error, text(answer)) == (True, "Run `retrv-r1 index` first")
        await asyncio.sleep(0.1)  # nothing is tried behind a client's back
        assert opened == 1
        fails = False
        for _ in range(2):
            assert not (await client.call_tool("search", {"query": "card"})).is_error
    assert opened == 2
