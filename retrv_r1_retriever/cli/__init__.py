"""The command line `retrv-r1`. The only place in this package that prints."""

from retrv_r1_retriever.cli.app import main

__all__ = ["main"]
