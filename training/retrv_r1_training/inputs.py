"""What a run reads, named by its contents, so that one that goes on notices when they are others."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path

from retrv_r1_retriever.evaluation.mbeir import INSTRUCTIONS
from retrv_r1_retriever.model.checkpoint import read_manifest
from retrv_r1_training.estimate import AnyRecipe
from retrv_r1_training.grpo_config import GrpoRecipe
from retrv_r1_training.mbeir_tasks import checkpoint_folder
from retrv_r1_training.sft_recipe import SftRecipe
from retrv_r1_training.stage_recipe import BaseRecipe

_PIECES, _PIECE = 1024, 1 << 16  # up to 64 MiB a file is read as a whole


def inputs_of(recipe: AnyRecipe) -> dict[str, str]:
    """Every file that the recipe names, the table of instructions and the checkpoint it starts from -> what is in there. Pictures are
    not looked at.
    """
    named = {str(file): fingerprint(file) for file in _files(recipe)}
    if isinstance(recipe, (SftRecipe, GrpoRecipe)):
        folder = checkpoint_folder(recipe.checkpoint)
    elif isinstance(recipe, BaseRecipe) or not (Path(recipe.start.path) / "retrv" / "manifest.json").is_file():
        return named  # a backbone has its revision
    else:
        folder = Path(recipe.start.path)
    manifest = read_manifest(folder)
    return named | {"start": f"checkpoint {manifest.checkpoint_digest}, embedder {manifest.embedder_digest or 'none'}"}


def fingerprint(file: Path) -> str:
    """Size and digest. Of a large file the digest is of pieces all over it, so that millions of lines take no time: a change inside
    that keeps the size may be missed there."""
    if not file.is_file():
        return "no file"  # the stage says so, if it needs it
    size, digest = file.stat().st_size, blake2b(digest_size=8)
    with file.open("rb") as opened:
        for start in range(0, size, max(_PIECE, size // _PIECES)):
            opened.seek(start)
            digest.update(opened.read(_PIECE))
    return f"{size:,} bytes, {digest.hexdigest()}"


def _files(recipe: AnyRecipe) -> Iterator[Path]:
    data, root = recipe.data, Path(recipe.data.root)
    for part in (*data.train, *(data.validation if data.validation_queries else ())):
        yield from (root / name for name in (part.queries, part.pool, part.qrels) if name)
        yield from (Path(name) for name in (part.lists, part.traces) if name)
    yield root / INSTRUCTIONS  # it words the prompts
    if data.captions:
        yield root / data.captions
    if isinstance(recipe, GrpoRecipe) and recipe.hard:
        yield Path(recipe.hard)
