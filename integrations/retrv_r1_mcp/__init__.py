"""`retrv-r1 mcp`: search, rerank and inspect as tools of an agent, over the Model Context Protocol (docs/agents.md).

Everything here converts: tool arguments to the values of `retrv_r1_retriever.serving`, the call, results to content blocks.
"""
