"""`retrv-r1 memory` and `doctor --write-config`: the commands run as a user runs them, over HTTP and on an index of this disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from qdrant_client import models

from retrv_r1_retriever.config import read_config
from retrv_r1_retriever.errors import OptionsError
from tests.first_stage.rest_stub import Stub, rest_stub

from .conftest import Run


@pytest.fixture
def server() -> Iterator[Stub]:
    """A collection made by hand: titles, pictures, vectors as wide as the checkpoint's embedder makes them."""
    with rest_stub() as stub:
        params = models.VectorParams(size=16, distance=models.Distance.COSINE)
        stub.client.create_collection("shop", vectors_config={"clip": params})
        payloads = [
            {"sku": f"card-{i}", "title": f"card number {i}", "picture": f"card{i}.png", "price": i} for i in range(3)
        ]
        stub.client.upsert(
            "shop",
            [models.PointStruct(id=i, vector={"clip": [float(i)] * 16}, payload=p) for i, p in enumerate(payloads)],
        )
        yield stub


@pytest.fixture
def shop(workplace: Path, server: Stub) -> Path:
    """The config of that collection, beside the one that is there."""
    with (workplace / "retrv.toml").open("a") as file:
        file.write(
            f"[store]\nkind = 'qdrant'\nurl = '{server.url}'\ncollection = 'shop'\ngrpc = false\n"
            "text = 'title'\nimage = 'picture'\nid = 'sku'\nvector = 'clip'\n"
        )
    return workplace


def test_from_plan_to_drop(run: Run, shop: Path, server: Stub) -> None:
    planned = run("memory", "plan")
    assert planned.code == 0, planned.err
    for words in (
        "documents   3, of which 0 have memory",
        "size ",
        "time ",
        " end ",
        "over REST",
        "Nothing was written",
    ):
        assert words.strip() in planned.out
    assert server.log == []
    figures = run("memory", "plan", "--json", "--shard", "1/2").json
    assert figures["gigabytes"] > 0
    assert figures["rest_bytes_per_query"] > figures["grpc_bytes_per_query"] > 0

    before = {f["name"]: f for f in run("doctor", "--json").json}
    assert before["qdrant"]["detail"] == "version 1.16.0, shop: clip 16 Cosine"
    assert before["digests"]["level"] == "warn"
    assert "no memory. Run: retrv-r1 memory build" in ". ".join(before["digests"][k] for k in ("detail", "fix"))
    refused = run("memory", "switch")
    assert refused.code == 1
    assert "expected one that was built, got no memory beside this collection" in refused.err
    parts = [run("memory", "build", "--shard", f"{i}/2", "--json").json for i in (1, 2)]
    assert sum(part["written"] for part in parts) == 3
    assert all(part["failed"] == [] for part in parts)
    again = run("memory", "build")
    assert "0 written, 3 there already, 0 failed" in again.out
    assert "memory 1/1" in again.err
    switched = run("memory", "switch", "--json").json
    assert switched == {"before": None, "in_use": parts[0]["digest"], "points": 3, "documents": 3}
    after = {f["name"]: f for f in run("doctor", "--json").json}["digests"]
    assert (after["level"], parts[0]["digest"] in after["detail"], "in use" in after["detail"]) == ("ok", True, True)
    found = run("search", "--text", "card number 1", "--json").json
    assert not [note for note in found["trace"]["notes"] if "recomputed" in note]
    assert "on all 3 sampled documents" in run("doctor").out

    server.client.set_payload("shop", {"title": "a new title"}, points=[1])
    assert "1 of 3 sampled documents changed since it was made" in run("doctor").out
    found = run("search", "--text", "card number 1", "--json").json
    assert [note for note in found["trace"]["notes"] if "memory of 1 candidates was recomputed" in note]
    assert run("memory", "build", "--json").json["written"] == 1

    server.client.delete("shop", [2])
    name = f"shop__retrv_{parts[0]['digest']}"
    params = models.VectorParams(size=8, distance=models.Distance.DOT)
    mark = {"retrv": {"memory_of": "shop"}}
    server.client.create_collection("shop__retrv_older", vectors_config={"memory": params}, metadata=mark)
    listed = run("memory", "drop")
    assert "1 of deleted documents" in listed.out
    assert "Nothing was deleted: pass --yes" in listed.out
    assert server.client.count(name).count == 3
    assert run("memory", "drop", "--yes", "--json").json == {
        "dropped": ["older"],
        "orphans": {parts[0]["digest"]: 1},
        "deleted": True,
    }
    assert server.client.count(name).count == 2
    assert [c.name for c in server.client.get_collections().collections if "older" in c.name] == []
    kept = run("memory", "drop", "--yes", "--digest", parts[0]["digest"])
    assert kept.code == 1
    assert "expected a sidecar that is not in use" in kept.err


def test_a_half_built_memory_is_not_put_in_use(run: Run, shop: Path, server: Stub) -> None:
    server.client.set_payload("shop", {"picture": "gone.png"}, points=[0])
    built = run("memory", "build")
    assert built.code == 0
    assert "card-0: image" in built.out
    refused = run("memory", "switch")
    assert refused.code == 1
    assert "expected 3 documents, got 2 of them" in refused.err
    assert run("memory", "switch", "--force").code == 0


def test_an_index_on_this_disk(run: Run, workplace: Path) -> None:
    run("index", "items")
    built = run("memory", "build")
    assert "4 written" in built.out, built.err
    switched = run("memory", "switch")
    assert "4 of 4 documents" in switched.out
    assert run("search", "--text", "which card", "--json").json["status"] != "fallback"
    assert (workplace / "retrv-index" / "memory.json").exists()


def test_lazy_memory_is_written_before_the_command_ends(run: Run, shop: Path, server: Stub) -> None:
    text = (shop / "retrv.toml").read_text()
    (shop / "retrv.toml").write_text(text + "memory = 'lazy'\n")
    first = run("search", "--text", "card", "--json").json
    assert [note for note in first["trace"]["notes"] if "3 candidates was recomputed" in note]
    second = run("search", "--text", "card", "--json").json
    assert not [note for note in second["trace"]["notes"] if "recomputed" in note]
    server.client.update_collection_aliases(
        [models.DeleteAliasOperation(delete_alias=models.DeleteAlias(alias_name="shop__retrv"))]
    )
    mark = {"retrv": {"memory_of": "shop"}}
    server.client.create_collection("shop__retrv_other", vectors_config={}, metadata=mark)
    server.client.update_collection_aliases(
        [models.CreateAliasOperation(
            create_alias=models.CreateAlias(collection_name="shop__retrv_other", alias_name="shop__retrv"))]
    )  # fmt: skip
    refused = run("search", "--text", "card")
    assert refused.code == 1
    assert "got memory other in use" in refused.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("build", "--shard", "3/2"), "shard: expected i/n"),
        (("build", "--batch-size", "0"), "--batch-size: expected a whole number of at least 1, got '0'"),
        (("drop", "--digest", "nope"), "--digest: expected memory beside this collection, got nope"),
    ],
)
def test_wrong_arguments(run: Run, shop: Path, arguments: tuple[str, ...], message: str) -> None:
    failed = run("memory", *arguments)
    assert failed.code != 0
    assert message in failed.err


def test_read_only_stores(run: Run, shop: Path) -> None:
    text = (shop / "retrv.toml").read_text()
    (shop / "retrv.toml").write_text(text + "read_only = true\n")
    for action in ("build", "switch", "drop"):
        refused = run("memory", action)
        assert refused.code == 2
        assert "expected a store that may be written to, got read_only = true" in refused.err
    (shop / "retrv.toml").write_text(text + "read_only = true\nmemory = 'lazy'\n")
    assert 'memory = "lazy": expected a store that may be written to' in run("search", "--text", "x").err


def test_a_config_is_drafted(run: Run, workplace: Path, server: Stub) -> None:
    written = run("doctor", "--write-config", server.url, "shop", "--config", "shop.toml")
    assert written.code == 0, written.err
    assert "vector 'clip' of size 16" in written.out
    for i in range(3):
        assert f"card-{i}: " in written.out
        assert f"card number {i}" in written.out
    store = read_config(workplace / "shop.toml").store
    assert (store.url, store.collection, store.text) == (server.url, "shop", "title")
    assert (store.image, store.id, store.vector) == ("picture", "sku", "clip")
    assert server.log == []
    again = run("doctor", "--write-config", server.url, "shop", "--config", "shop.toml")
    assert again.code == 2
    assert "expected no such file yet, got one" in again.err
    described = run("doctor", "--write-config", server.url, "shop", "--config", "b.toml", "--json").json
    assert (described["shape"], described["vector_size"], len(described["samples"])) == ("plain", 16, 3)


@pytest.mark.parametrize(
    ("where", "code", "message"),
    [
        (("{url}", "nope"), 1, "collection 'nope': expected one at http"),
        (("http://127.0.0.1:9", "shop"), 1, "Check the url, the name and the api key"),
        (("{url}", "empty"), 2, "collection 'empty': expected points, got none"),
        (
            ("{url}", "shop", "--api-key-env", "NO_SUCH_KEY"),
            2,
            "environment variable NO_SUCH_KEY: expected the API key",
        ),
    ],
)
def test_no_draft(run: Run, workplace: Path, server: Stub, where: tuple[str, ...], code: int, message: str) -> None:
    server.client.create_collection("empty", vectors_config=models.VectorParams(size=4, distance=models.Distance.DOT))
    failed = run("doctor", "--config", "x.toml", "--write-config", *(part.format(url=server.url) for part in where))
    assert failed.code == code
    assert message in failed.err
    assert not (workplace / "x.toml").exists()


def test_hosts_of_pictures(tmp_path: Path) -> None:
    from retrv_r1_retriever.config import open_images
    from retrv_r1_retriever.images import LocalImages
    from retrv_r1_retriever.remote_images import HttpImages

    (tmp_path / "retrv.toml").write_text('[images]\nhosts = ["img.example.com"]\n')
    config = read_config(tmp_path / "retrv.toml")
    assert config.images.hosts == ("img.example.com",)
    assert isinstance(open_images(config), HttpImages)
    (tmp_path / "retrv.toml").write_text("[images]\nhosts = []\n")
    assert isinstance(open_images(read_config(tmp_path / "retrv.toml")), LocalImages)
    for wrong in ('"img.example.com"', "[1]", "[true]"):
        (tmp_path / "retrv.toml").write_text(f"[images]\nhosts = {wrong}\n")
        with pytest.raises(OptionsError, match=r"\[images\] hosts: expected tuple"):
            read_config(tmp_path / "retrv.toml")
