"""A drop-in reranking retriever: Qdrant finds candidates, a Retrv-R1 model reads, reasons, inspects and decides."""

__version__ = "0.1.0"
