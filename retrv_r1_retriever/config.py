"""`retrv.toml`: one file that says which store, model, pictures and options a command or a service works with.

    [store]                    # where the documents are
    kind = "edge"              # "edge": a folder, in this process. "qdrant": a server
    path = "retrv-index"       # edge; relative to this file
    url = "..."                # qdrant, with collection = "..." and, if needed, api_key_env = "QDRANT_API_KEY"

    [model]
    checkpoint = "miniature"   # the one in the wheel, a folder, or a hub id

    [engine]                   # what judges the candidates
    kind = "local"             # "local": the checkpoint of [model], here. With base_url = "..." and model = "...":
                               # "vllm": on a vLLM server, docs/serving.md; "chat": any vision model, docs/hosted-vlm.md

    [images]
    root = "."                 # the only folder pictures are read from; relative to this file

    [rerank]                   # every field of RerankOptions
    top_k = 50

    [serve]                    # `retrv-r1 serve`, see docs/serving.md
    port = 8080

    [mcp]                      # `retrv-r1 mcp`, see docs/agents.md
    images = "inline"

    [cache]                    # answers of equal calls, for a while; off by default
    max_entries = 1000

    [observe]                  # see docs/observability.md; off by default
    traces = "traces.jsonl"

Every key has a default; an unknown one is an error. Secrets are named, never written: `api_key_env` is the name of an
environment variable. Nothing is opened by reading a config; the functions below build the real parts from it.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from retrv_r1_retriever._sync import run
from retrv_r1_retriever.cache import CacheConfig
from retrv_r1_retriever.engines.base import Compressor
from retrv_r1_retriever.engines.settings import EngineConfig
from retrv_r1_retriever.errors import OptionsError, explain
from retrv_r1_retriever.hub import downloaded
from retrv_r1_retriever.observe import ObserveConfig, Observers, open_observers
from retrv_r1_retriever.options import BALANCED, RerankOptions
from retrv_r1_retriever.serving.settings import McpConfig, ServeConfig
from retrv_r1_retriever.store import Scalar

if TYPE_CHECKING:
    from retrv_r1_retriever.edge import EdgeStore
    from retrv_r1_retriever.engines.chat import ChatEngine
    from retrv_r1_retriever.engines.local import LocalEngine
    from retrv_r1_retriever.engines.vllm import VllmEngine
    from retrv_r1_retriever.images import ImageSource, LocalImages
    from retrv_r1_retriever.model.embedding import BackboneEmbedder
    from retrv_r1_retriever.points import CollectionSpec
    from retrv_r1_retriever.qdrant import QdrantStore
    from retrv_r1_retriever.retriever import RetrvR1Retriever

FILE_NAME = "retrv.toml"
MINIATURE = "miniature"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class StoreConfig:
    """path: edge only; url, collection, api_key_env: qdrant only.

    text, image, id, vector: how a collection of somebody else's is laid out, see `PayloadSchema`; none of them = our own layout
    tenant_field, tenant_value: if given, ANDed into every read and write
    memory: "lazy" writes memory that a query had to make into the sidecar (docs/memory.md)
    """

    kind: Literal["edge", "qdrant"] = "edge"
    path: str = "retrv-index"
    url: str | None = None
    collection: str | None = None
    api_key_env: str | None = None
    text: str | None = None
    image: str | None = None
    id: str | None = None
    vector: str | None = None
    tenant_field: str | None = None
    tenant_value: str | int | bool | None = None
    read_only: bool = False
    grpc: bool | None = None
    memory: Literal["stored", "lazy"] = "stored"

    @property
    def tenant(self) -> tuple[str, Scalar] | None:
        if (self.tenant_field is None) != (self.tenant_value is None):
            raise OptionsError(
                explain("[store] tenant", expected="tenant_field and tenant_value", got="one of them", fix="Give both.")
            )
        return (
            None if self.tenant_field is None or self.tenant_value is None else (self.tenant_field, self.tenant_value)
        )


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """checkpoint: "miniature", a folder, or a hub id; device, dtype: None = CUDA in bfloat16 if there is one, else CPU."""

    checkpoint: str = MINIATURE
    device: str | None = None
    dtype: str | None = None


@dataclass(frozen=True, slots=True)
class ImagesConfig:
    """See `images.LocalImages`; hosts: what pictures may be fetched from, see `remote_images.HttpImages`."""

    root: str = "."
    hosts: tuple[str, ...] = ()
    max_bytes: int = 20_000_000
    max_pixels: int = 50_000_000
    max_frames: int = 1_000
    timeout_s: float = 30.0


@dataclass(frozen=True, slots=True)
class Config:
    """folder: what relative paths start from."""

    store: StoreConfig = StoreConfig()
    model: ModelConfig = ModelConfig()
    images: ImagesConfig = ImagesConfig()
    engine: EngineConfig = field(default_factory=EngineConfig)
    rerank: RerankOptions = BALANCED
    serve: ServeConfig = field(default_factory=ServeConfig)
    mcp: McpConfig = field(default_factory=McpConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    observe: ObserveConfig = field(default_factory=ObserveConfig)
    folder: Path = field(default_factory=Path.cwd)

    def path(self, relative: str) -> Path:
        return self.folder / Path(relative).expanduser()

    def observers(self) -> Observers:
        return open_observers(self.observe, self.folder)


def read_config(path: str | os.PathLike[str]) -> Config:
    """Raises `OptionsError` naming the key, the file and the known keys."""
    path = Path(path)
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise OptionsError(
            explain(str(path), expected="a config file", got="no such file", fix="See docs/config.md.")
        ) from None
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise OptionsError(explain(str(path), expected="TOML", got=error, fix="Fix the file.")) from error
    kinds = {name: kind for name, kind in get_type_hints(Config).items() if name != "folder"}
    _check_keys(data, tuple(kinds), "", path)
    sections = {name: _section(kind, data.get(name, {}), name, path) for name, kind in kinds.items()}
    return Config(**sections, folder=path.parent.resolve())


def _section(kind: type[T], values: object, name: str, path: Path) -> T:
    if not isinstance(values, dict):
        raise OptionsError(
            explain(f"{path}: {name}", expected=f"a table [{name}]", got=repr(values), fix="Fix the file.")
        )
    hints = get_type_hints(kind)
    _check_keys(values, tuple(f.name for f in fields(kind)), f"[{name}] ", path)  # type: ignore[arg-type]
    for key, value in values.items():
        if not _fits(value, hints[key]):
            expected = str(hints[key]).replace("typing.", "") if get_args(hints[key]) else hints[key].__name__
            raise OptionsError(
                explain(f"{path}: [{name}] {key}", expected=expected, got=repr(value), fix="Fix the value.")
            )
    try:
        return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})
    except OptionsError as error:
        raise OptionsError(f"{path}: [{name}] {error}") from None


def _check_keys(values: Mapping[str, object], known: tuple[str, ...], where: str, path: Path) -> None:
    for key in values:
        if key not in known:
            raise OptionsError(
                explain(
                    f"{path}: {where}{key}",
                    expected=f"one of {', '.join(known)}",
                    got="an unknown key",
                    fix="Fix the name.",
                )
            )


def _fits(value: object, hint: Any) -> bool:
    """Whether a TOML value may stand for a field of this type; an int may stand for a float, a bool for nothing else."""
    if get_origin(hint) is UnionType:
        return any(_fits(value, option) for option in get_args(hint) if option is not NoneType)
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) is dict:
        return isinstance(value, dict) and all(_fits(one, get_args(hint)[1]) for one in value.values())
    if get_origin(hint) is tuple:
        return isinstance(value, list) and all(_fits(one, get_args(hint)[0]) for one in value)
    if isinstance(value, bool) or hint is bool:
        return isinstance(value, bool) and hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


# -- the real parts ----------------------------------------------------------------------------------------------------


def checkpoint_path(config: Config) -> str:
    """A folder that exists; a hub id is downloaded. Raises `CheckpointError`."""
    name = config.model.checkpoint
    if name == MINIATURE:
        folder = Path(__file__).parent / "demo" / "checkpoint"
        if not folder.is_dir():
            raise OptionsError(
                explain(
                    "checkpoint 'miniature'", expected=f"the folder {folder}", got="none", fix="Run: make miniature"
                )
            )
        return str(folder)
    local = config.path(name)
    return str(local) if local.exists() else downloaded(name, local)


def open_reader(config: Config) -> LocalEngine | ChatEngine | VllmEngine:
    """What judges candidates, as [engine] says."""
    match config.engine.kind:
        case "chat":
            return open_chat(config)
        case "vllm":
            return open_vllm(config)
        case "local":
            return open_engine(config)


def open_chat(config: Config) -> ChatEngine:
    """Connects to nothing yet."""
    return config.engine.chat(api_key(config.engine.api_key_env))


def open_vllm(config: Config, *, check: bool = True) -> VllmEngine:
    """Asks the server with a tiny request, unless told not to."""
    return config.engine.vllm(checkpoint_path(config), api_key(config.engine.api_key_env), check=check)


def open_engine(config: Config) -> LocalEngine:
    """The checkpoint of [model], whatever judges candidates: it makes memory too."""
    from retrv_r1_retriever.engines.local import LocalEngine

    return LocalEngine.from_pretrained(checkpoint_path(config), device=config.model.device, dtype=config.model.dtype)


def open_embedder(config: Config) -> BackboneEmbedder:
    from retrv_r1_retriever.model.embedding import BackboneEmbedder

    return BackboneEmbedder.from_pretrained(
        checkpoint_path(config), device=config.model.device, dtype=config.model.dtype
    )


def open_images(config: Config) -> ImageSource:
    local = local_images(config, config.path(config.images.root))
    if not config.images.hosts:
        return local
    from retrv_r1_retriever.remote_images import HttpImages

    limits = config.images
    return HttpImages(limits.hosts, then=local, max_bytes=limits.max_bytes, timeout_s=limits.timeout_s)


def local_images(config: Config, root: Path) -> LocalImages:
    """Files below `root`, within the limits of [images]."""
    from retrv_r1_retriever.images import LocalImages

    limits = config.images
    return LocalImages(
        root,
        max_bytes=limits.max_bytes,
        max_pixels=limits.max_pixels,
        max_frames=limits.max_frames,
        timeout_s=limits.timeout_s,
    )


def open_store(config: Config, spec: CollectionSpec | None = None) -> EdgeStore | QdrantStore:
    """`spec` makes the collection if there is none; without it there must be one."""
    _check_store(config.store)
    if config.store.kind == "qdrant":
        return _open_qdrant(config.store, spec)
    from retrv_r1_retriever.edge import EdgeStore

    store = config.store
    return EdgeStore(config.path(store.path), spec=spec, tenant=store.tenant, read_only=store.read_only)


def _check_store(store: StoreConfig) -> None:
    """A key that would be passed over is an error, like an unknown one."""
    edge, foreign = store.kind == "edge", store.text is not None or store.image is not None
    idle: tuple[str, ...] = () if foreign and not edge else ("id", "vector")
    if edge:
        idle = ("url", "collection", "api_key_env", "grpc", "text", "image", *idle)
    reason = "with kind = 'edge'" if edge else "without text or image"
    if store.read_only and store.memory == "lazy":
        raise OptionsError(
            explain('[store] memory = "lazy"', expected="a store that may be written to", got="read_only = true",
                    fix="Leave one of them out; lazy memory goes beside the collection, never into it.")
        )  # fmt: skip
    for name in idle:
        if getattr(store, name) is not None:
            raise OptionsError(
                explain(f"[store] {name}", expected=f"none {reason}", got=repr(getattr(store, name)),
                        fix="Leave it out, or see docs/config.md.")
            )  # fmt: skip


def _open_qdrant(store: StoreConfig, spec: CollectionSpec | None) -> QdrantStore:
    from retrv_r1_retriever.qdrant import QdrantStore
    from retrv_r1_retriever.schema import PayloadSchema

    if store.url is None or store.collection is None:
        raise OptionsError(
            explain("[store] kind = 'qdrant'", expected="url and collection", got="not both", fix="Name both.")
        )
    foreign = store.text is not None or store.image is not None
    vector = "dense" if store.vector is None else store.vector
    return QdrantStore(
        store.collection,
        url=store.url,
        api_key=api_key(store.api_key_env),
        spec=None if foreign else spec,
        schema=PayloadSchema(store.text, store.image, store.id, vector) if foreign else None,
        tenant=store.tenant,
        read_only=store.read_only,
        grpc=store.grpc,
    )


def open_retriever(config: Config) -> RetrvR1Retriever:
    from retrv_r1_retriever.lazy import check_pointer
    from retrv_r1_retriever.retriever import RetrvR1Retriever

    cache, observers = config.cache.make(), config.observers()
    store = open_store(config)  # the quick part first: a wrong path should not wait for a model
    try:
        embedder = open_embedder(config)
        store.spec.check_against(_vectors_of(embedder), "[store]")
        engine = open_reader(config)
        if config.store.memory == "lazy":
            if not isinstance(engine, Compressor):
                raise OptionsError(
                    explain('[store] memory = "lazy"', expected="an engine that reads memory", got="[engine] kind = 'chat'",
                            fix="Leave it out: a chat model reads texts and pictures.")
                )  # fmt: skip
            check_pointer(run(store.sidecars.in_use()), engine.memory_digest)
        return RetrvR1Retriever(
            store=store, embedder=embedder, engine=engine, images=open_images(config), memory=config.store.memory,
            options=config.rerank, closes=[engine], cache=cache and cache.for_tenant(config.store.tenant), observers=observers,
        )  # fmt: skip
    except BaseException:
        run(store.close())  # or its lock would outlive a failed attempt
        raise


def api_key(variable: str | None) -> str | None:
    """The secret that an environment variable of this name holds. Raises `OptionsError` if there is none."""
    if variable is None:
        return None
    key = os.environ.get(variable)
    if key is None:
        raise OptionsError(
            explain(f"environment variable {variable}", expected="the API key", got="nothing", fix="Set it.")
        )
    return key


def collection_spec(engine: Compressor | None, embedder: BackboneEmbedder) -> CollectionSpec:
    """What a collection for this model is made with; without memory for engines that read none (None)."""
    if engine is None:
        return _vectors_of(embedder)
    return replace(_vectors_of(embedder), memory_width=engine.memory_shape[1], memory_digest=engine.memory_digest)


def _vectors_of(embedder: BackboneEmbedder) -> CollectionSpec:
    from retrv_r1_retriever.points import CollectionSpec

    return CollectionSpec(vector_size=embedder.dim, embedder=embedder.digest or None)
