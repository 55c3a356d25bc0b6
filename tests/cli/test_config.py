"""`retrv.toml`: every mistake names the key, the file and what is known."""

from __future__ import annotations

import time
from dataclasses import fields
from pathlib import Path

import pytest

from retrv_r1_retriever import config as settings
from retrv_r1_retriever.config import Config, ImagesConfig, ModelConfig, StoreConfig, read_config
from retrv_r1_retriever.errors import CheckpointError, EngineError, OptionsError, StoreError
from retrv_r1_retriever.options import RerankOptions
from retrv_r1_retriever.reranker import RetrvR1Reranker
from retrv_r1_retriever.retriever import RetrvR1Retriever
from retrv_r1_retriever.types import Content, Document
from tests.cli.conftest import Run
from tests.serving.openai_stub import MODEL, openai_stub


def write(folder: Path, text: str) -> Path:
    path = folder / "retrv.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_empty_file_is_the_defaults(tmp_path: Path) -> None:
    assert read_config(write(tmp_path, "")) == Config(folder=tmp_path)


def test_all_sections(tmp_path: Path) -> None:
    config = read_config(
        write(
            tmp_path,
            """
            [store]
            kind = "qdrant"
            url = "http://q:6333"
            collection = "c"
            text = "{title}"
            tenant_field = "team"
            tenant_value = 7
            [model]
            checkpoint = "ckpt"
            [images]
            timeout_s = 3          # an integer will do for a float
            [rerank]
            top_k = 20
            think = "always"
            timeout_s = 1.5
            """,
        )
    )
    assert config.store.tenant == ("team", 7)
    assert config.images == ImagesConfig(timeout_s=3)
    assert config.rerank == RerankOptions(top_k=20, think="always", timeout_s=1.5)
    assert config.path("ckpt") == tmp_path / "ckpt"
    with pytest.raises(
        CheckpointError, match=r"checkpoint 'ckpt': expected a folder or a hub id, got no folder .*ckpt"
    ):
        settings.checkpoint_path(config)
    (tmp_path / "ckpt").mkdir()
    assert settings.checkpoint_path(config) == str(tmp_path / "ckpt")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[stroe]\n",
            r"retrv\.toml: stroe: expected one of store, model, images, engine, rerank, serve, mcp, cache, observe, got an unknown key",
        ),
        ("[store]\npaht = 'x'\n", r"retrv\.toml: \[store\] paht: expected one of kind, path, url, .*read_only"),
        ("[rerank]\ntop_n_ = 3\n", r"retrv\.toml: \[rerank\] top_n_: expected one of top_k, top_n, think"),
        ("[store]\nread_only = 1\n", r"retrv\.toml: \[store\] read_only: expected bool, got 1"),
        ("[store]\nkind = 'chroma'\n", r"\[store\] kind: expected Literal\['edge', 'qdrant'\], got 'chroma'"),
        ("[images]\nmax_bytes = true\n", r"\[images\] max_bytes: expected int, got True"),
        ("[rerank]\ntop_k = 128\n", r"retrv\.toml: \[rerank\] top_k: expected an integer from 1 to 127, got 128"),
        ("[rerank]\ntimeout_s = 'long'\n", r"\[rerank\] timeout_s: expected float \| None, got 'long'"),
        ("store = 3\n", r"retrv\.toml: store: expected a table \[store\], got 3"),
        ("[store\n", r"retrv\.toml: expected TOML, got .*line 1"),
    ],
)
def test_mistakes(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(OptionsError, match=message):
        read_config(write(tmp_path, text))


def test_half_a_tenant_is_an_error(tmp_path: Path) -> None:
    config = read_config(write(tmp_path, "[store]\ntenant_field = 'team'\n"))
    with pytest.raises(
        OptionsError, match=r"\[store\] tenant: expected tenant_field and tenant_value, got one of them"
    ):
        settings.open_store(config)


def test_secrets_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config(store=StoreConfig("qdrant", url="http://q", collection="c", api_key_env="RETRV_TEST_KEY"))
    monkeypatch.delenv("RETRV_TEST_KEY", raising=False)
    with pytest.raises(OptionsError, match="environment variable RETRV_TEST_KEY: expected the API key, got nothing"):
        settings.open_store(config)


def test_qdrant_needs_url_and_collection() -> None:
    with pytest.raises(OptionsError, match="expected url and collection, got not both"):
        settings.open_store(Config(store=StoreConfig("qdrant")))


@pytest.mark.parametrize(
    ("store", "message"),
    [
        (StoreConfig(text="{title}"), r"\[store\] text: expected none with kind = 'edge', got '{title}'"),
        (StoreConfig(url="http://q"), r"\[store\] url: expected none with kind = 'edge'"),
        (StoreConfig("qdrant", url="http://q", collection="c", id="sku"), r"\[store\] id: expected none without text"),
    ],
)
def test_keys_that_would_be_passed_over(store: StoreConfig, message: str) -> None:
    with pytest.raises(OptionsError, match=message):
        settings.open_store(Config(store=store))


def test_opening_a_store_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="expected an index made by this package, got none there"):
        settings.open_store(Config(folder=tmp_path))


def test_a_hub_id_is_downloaded_and_its_errors_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str) -> str:
        if name == "team/there":
            return str(tmp_path)
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert settings.checkpoint_path(Config(model=ModelConfig("team/there"))) == str(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"'team/gone': expected a folder or a hub id, got .*no network.*\[model\]"
    ):
        settings.checkpoint_path(Config(model=ModelConfig("team/gone")))


def test_closing_closes_the_connections_that_a_config_opened(workplace: Path, run: Run) -> None:
    with openai_stub() as (server, _), (workplace / "retrv.toml").open("a") as file:
        file.write(f'[engine]\nkind = "chat"\nbase_url = "{server.url}"\nmodel = "{MODEL}"\n')
        file.flush()
        assert run("index", "items").code == 0
        retriever = RetrvR1Retriever.from_config()
        assert retriever.retrieve("which card").status == "reranked"
        assert server.connections
        retriever.close()
        end = time.monotonic() + 5
        while server.connections and time.monotonic() < end:
            time.sleep(0.01)
        assert not server.connections


def test_closing_ends_the_model_that_a_config_opened_but_none_that_was_handed_in(workplace: Path, run: Run) -> None:
    assert run("index", "items").code == 0
    retriever = RetrvR1Retriever.from_config()
    engine = retriever.reranker.engine  # type: ignore[attr-defined]
    RetrvR1Retriever(first_stage=retriever.first_stage.store.search, engine=engine).close()  # type: ignore[attr-defined]
    assert retriever.retrieve("which card").status != "fallback"
    retriever.close()
    with pytest.raises(EngineError, match="local engine: expected an open one, got a closed one"):
        RetrvR1Reranker(engine).rerank("q", [Document("a", Content("b"))], options=RerankOptions(on_failure="raise"))


def test_documentation_names_every_key() -> None:
    """docs/config.md is the reference: a new field without a line there is a mistake."""
    text = (Path(__file__).parents[2] / "docs" / "config.md").read_text(encoding="utf-8")
    for kind in (StoreConfig, ModelConfig, ImagesConfig, RerankOptions):
        for field in fields(kind):
            assert f"`{field.name}`" in text, f"docs/config.md does not explain {kind.__name__}.{field.name}"
