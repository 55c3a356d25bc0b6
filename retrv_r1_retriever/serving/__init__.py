"""`retrv-r1 serve`: the reranker and a collection over HTTP. Needs the extra `serve`; the client is `retrv_r1_retriever.remote`."""
