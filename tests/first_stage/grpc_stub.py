"""A Qdrant server's gRPC interface over qdrant-client's local mode: real protobuf between client and store, not a real server."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc as grpcio
from qdrant_client import QdrantClient, models
from qdrant_client import grpc as q
from qdrant_client.conversions.conversion import GrpcToRest, RestToGrpc


def _selected(request: Any) -> dict[str, Any]:
    """Arguments that many requests share."""
    chosen = {}
    if request.HasField("with_payload"):
        chosen["with_payload"] = GrpcToRest.convert_with_payload_selector(request.with_payload)
    if request.HasField("with_vectors"):
        chosen["with_vectors"] = GrpcToRest.convert_with_vectors_selector(request.with_vectors)
    return chosen


def _full(point: Any) -> Any:
    """The converters know no point without payload."""
    return point.model_copy(update={"payload": point.payload or {}})


def _record(record: Any) -> Any:
    return RestToGrpc.convert_record(_full(record))


def _filter(request: Any, name: str = "filter") -> Any:
    return GrpcToRest.convert_filter(getattr(request, name)) if request.HasField(name) else None


class Points(q.PointsServicer):
    def __init__(self, client: QdrantClient) -> None:
        self.client = client

    def Get(self, request: Any, context: Any) -> Any:
        ids = [GrpcToRest.convert_point_id(id) for id in request.ids]
        records = self.client.retrieve(request.collection_name, ids, **_selected(request))
        return q.GetResponse(result=map(_record, records))

    def Scroll(self, request: Any, context: Any) -> Any:
        offset = GrpcToRest.convert_point_id(request.offset) if request.HasField("offset") else None
        records, following = self.client.scroll(
            request.collection_name, _filter(request), request.limit, offset=offset, **_selected(request)
        )
        following = None if following is None else RestToGrpc.convert_extended_point_id(following)
        return q.ScrollResponse(result=map(_record, records), next_page_offset=following)

    def Count(self, request: Any, context: Any) -> Any:
        count = self.client.count(request.collection_name, _filter(request)).count
        return q.CountResponse(result=q.CountResult(count=count))

    def Query(self, request: Any, context: Any) -> Any:
        vector = list(request.query.nearest.dense.data)
        using = request.using or None
        answer = self.client.query_points(
            request.collection_name,
            vector,
            using=using,
            query_filter=_filter(request),
            limit=request.limit,
            **_selected(request),
        )
        return q.QueryResponse(result=[RestToGrpc.convert_scored_point(_full(p)) for p in answer.points])

    def Upsert(self, request: Any, context: Any) -> Any:
        points = [
            models.PointStruct(
                id=GrpcToRest.convert_point_id(point.id),
                vector=GrpcToRest.convert_vectors(point.vectors),
                payload=GrpcToRest.convert_payload(point.payload),
            )
            for point in request.points
        ]
        return _done(self.client.upsert(request.collection_name, points))

    def Delete(self, request: Any, context: Any) -> Any:
        ids = [GrpcToRest.convert_point_id(id) for id in request.points.points.ids]
        return _done(self.client.delete(request.collection_name, models.PointIdsList(points=ids)))


def _done(result: Any) -> Any:
    return q.PointsOperationResponse(result=RestToGrpc.convert_update_result(result))


class Collections(q.CollectionsServicer):
    def __init__(self, client: QdrantClient) -> None:
        self.client = client

    def Get(self, request: Any, context: Any) -> Any:
        info = self.client.get_collection(request.collection_name)
        return q.GetCollectionInfoResponse(result=RestToGrpc.convert_collection_info(info))

    def List(self, request: Any, context: Any) -> Any:
        names = [q.CollectionDescription(name=c.name) for c in self.client.get_collections().collections]
        return q.ListCollectionsResponse(collections=names)

    def CollectionExists(self, request: Any, context: Any) -> Any:
        there = request.collection_name in [c.name for c in self.client.get_collections().collections]
        return q.CollectionExistsResponse(result=q.CollectionExists(exists=there))

    def Create(self, request: Any, context: Any) -> Any:
        metadata = GrpcToRest.convert_payload(request.metadata)
        vectors = GrpcToRest.convert_vectors_config(request.vectors_config)
        self.client.create_collection(request.collection_name, vectors_config=vectors, metadata=metadata)
        return q.CollectionOperationResponse(result=True)

    def Delete(self, request: Any, context: Any) -> Any:
        return q.CollectionOperationResponse(result=self.client.delete_collection(request.collection_name))

    def ListAliases(self, request: Any, context: Any) -> Any:
        return q.ListAliasesResponse(
            aliases=[
                q.AliasDescription(alias_name=a.alias_name, collection_name=a.collection_name)
                for a in self.client.get_aliases().aliases
            ]
        )

    def UpdateAliases(self, request: Any, context: Any) -> Any:
        steps = [GrpcToRest.convert_alias_operations(one) for one in request.actions]
        return q.CollectionOperationResponse(result=self.client.update_collection_aliases(steps))


@contextmanager
def grpc_stub() -> Iterator[tuple[int, QdrantClient]]:
    """(port, what the server holds)"""
    client = QdrantClient(":memory:")
    server = grpcio.server(ThreadPoolExecutor(1), options=[("grpc.max_receive_message_length", -1)])
    q.add_PointsServicer_to_server(Points(client), server)
    q.add_CollectionsServicer_to_server(Collections(client), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield port, client
    finally:
        server.stop(None)
