"""The parts that calls are answered with: one model, and per tenant a view of the collection."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from retrv_r1_retriever import config as settings
from retrv_r1_retriever.config import Config
from retrv_r1_retriever.edge import EdgeStore
from retrv_r1_retriever.engines.base import Engine
from retrv_r1_retriever.errors import InputError, OptionsError, explain
from retrv_r1_retriever.observe import Observers
from retrv_r1_retriever.options import RerankOptions
from retrv_r1_retriever.progress import ProgressFn
from retrv_r1_retriever.reranker import RetrvR1Reranker
from retrv_r1_retriever.retriever import RetrvR1Retriever
from retrv_r1_retriever.serving.requests import Asked, with_room
from retrv_r1_retriever.store import Filter, Store, VectorFirstStage
from retrv_r1_retriever.types import Candidate, Query, RankedResults


@dataclass(frozen=True, slots=True)
class Collection:
    """What one tenant may search, and the documents it may name by id."""

    retriever: RetrvR1Retriever
    store: Store


@dataclass(frozen=True, slots=True)
class Service:
    """reranker: of documents that come with a call; whole: the collection, None = this server has none; tenants: views of it"""

    reranker: RetrvR1Reranker
    options: RerankOptions
    whole: Collection | None = None
    tenants: Mapping[str, Collection] = field(default_factory=dict)

    def collection(self, tenant: str | None) -> Collection:
        """Raises `InputError` where this server has none."""
        found = self.tenants.get(tenant or "") if self.tenants else self.whole
        if found is None:
            fix = "Send the documents themselves, or serve with search = true."
            raise InputError(explain("collection", expected="one", got="a server without", fix=fix))
        return found

    async def search(
        self,
        tenant: str | None,
        query: Query,
        options: RerankOptions,
        *,
        filter: Filter | None = None,
        progress: ProgressFn | None = None,
    ) -> RankedResults:
        retriever = self.collection(tenant).retriever
        return await retriever.aretrieve(query, filter=filter, options=options, progress=progress)

    async def rerank(
        self,
        tenant: str | None,
        query: Query,
        asked: Asked,
        options: RerankOptions,
        *,
        progress: ProgressFn | None = None,
    ) -> RankedResults:
        """Raises `InputError` for an id that the tenant's collection does not have."""
        candidates = asked.candidates(await self.stored(tenant, asked.stored.values()))
        # Memory made for documents of the collection may be kept, as after a search; for others there is no place.
        lazy = bool(asked.stored) and not asked.inline
        reranker = self.collection(tenant).retriever.reranker if lazy else self.reranker
        room = with_room(options, len(asked.inline))
        return await reranker.arerank(query, candidates, options=room, progress=progress)

    async def stored(self, tenant: str | None, ids: Iterable[str]) -> list[Candidate]:
        wanted = list(dict.fromkeys(ids))
        return await self.collection(tenant).store.get(wanted) if wanted else []

    async def check(self) -> None:
        """Whether the collection answers. Raises `StoreError`."""
        if self.whole is not None:
            await self.whole.store.count()

    async def close(self) -> None:
        for collection in filter(None, (*self.tenants.values(), self.whole)):
            await collection.retriever.aclose()


def open_service(config: Config) -> Service:
    """Loads the model and opens the collection. Raises what these raise."""
    if not config.serve.search:
        return Service(_stand_alone(settings.open_reader(config), config, config.observers()), config.rerank)
    if config.serve.tenants and config.store.tenant is not None:
        fix = "Leave it out, or serve that tenant alone."
        raise OptionsError(explain("[store] tenant_value", expected="none beside [serve] tenants", got="one", fix=fix))
    retriever = settings.open_retriever(config)
    assert isinstance(retriever.reranker, RetrvR1Reranker)  # what a config makes
    reranker = _stand_alone(retriever.reranker.engine, config, retriever.observers)
    tenants = {tenant: _limited(retriever, config, tenant) for tenant in config.serve.tenants}
    return Service(reranker, config.rerank, _collection(retriever), tenants)


def _stand_alone(engine: Engine, config: Config, observers: Observers) -> RetrvR1Reranker:
    """For documents that come with a call. Which tenant's they are it does not know: then nothing is remembered."""
    cache = None if config.serve.tenants else config.cache.make()
    return RetrvR1Reranker(engine, images=settings.open_images(config), cache=cache, observers=observers)


def _collection(retriever: RetrvR1Retriever) -> Collection:
    assert isinstance(retriever.first_stage, VectorFirstStage)  # what a config makes
    return Collection(retriever, retriever.first_stage.store)


def _limited(whole: RetrvR1Retriever, config: Config, tenant: str) -> Collection:
    """One tenant's view, on the same model."""
    field = config.serve.tenant_field
    assert isinstance(whole.first_stage, VectorFirstStage)  # what a config makes
    assert isinstance(whole.reranker, RetrvR1Reranker)
    assert field is not None
    store: Store
    if isinstance(whole.first_stage.store, EdgeStore):
        store = whole.first_stage.store.for_tenant(field, tenant)
    else:
        store = settings.open_store(
            replace(config, store=replace(config.store, tenant_field=field, tenant_value=tenant))
        )
    retriever = RetrvR1Retriever(
        store=store,
        embedder=whole.first_stage.embedder,
        engine=whole.reranker.engine,
        images=whole.images,
        memory=config.store.memory,
        options=config.rerank,
        cache=whole.reranker.cache and whole.reranker.cache.for_tenant((field, tenant)),
        observers=whole.observers,
    )
    return Collection(retriever, store)
