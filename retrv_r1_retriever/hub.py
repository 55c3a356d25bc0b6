"""Checkpoints on the hub."""

from __future__ import annotations

import re
from pathlib import Path

from retrv_r1_retriever.errors import CheckpointError, explain

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def downloaded(hub_id: str, local: Path) -> str:
    """The folder of a checkpoint on the hub, fetched once and kept in its cache."""
    got, cause = f"no folder {local}", None
    if _HUB_ID.fullmatch(hub_id):
        from huggingface_hub import snapshot_download

        try:
            return snapshot_download(hub_id)
        except Exception as error:  # no network, no such repository, no rights
            got, cause = f"{got}, and from the hub {type(error).__name__}: {str(error).partition(chr(10))[0]}", error
    raise CheckpointError(
        explain(f"checkpoint {hub_id!r}", expected="a folder or a hub id", got=got, fix="Fix checkpoint in [model].")
    ) from cause
