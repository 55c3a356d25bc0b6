"""`retrv-r1-train export`: a checkpoint to hand on, verified, with a model card that says under which licences."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from retrv_r1_retriever.errors import CheckpointError, OptionsError, explain
from retrv_r1_retriever.model.checkpoint import Manifest, load_checkpoint, read_manifest
from retrv_r1_training.stage_checkpoint import save_whole, stored_dtype

#: Identifiers that model hubs know; any other licence is `other` with its name.
_KNOWN = ("apache-2.0", "mit", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0")
#: The teacher of `synthesize` that is no model: its words are those of the data.
_RULES = "words"


@dataclass(frozen=True, slots=True)
class Card:
    """What the model card says beyond the manifest. recipes: run -> YAML; notes: Markdown, put at the end."""

    name: str
    recipes: Mapping[str, str]
    notes: str = ""


def add_parser(commands: Any) -> None:
    text = "write a checkpoint to hand on: verified, with a model card and its licences"
    parser: argparse.ArgumentParser = commands.add_parser("export", help=text, description=text)
    parser.set_defaults(main=main)
    parser.add_argument("checkpoint", type=Path, help="the folder that a stage left, RUN/checkpoint")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="must not exist yet")
    parser.add_argument("--name", metavar="NAME", help="of the model (default: the name of FOLDER)")
    parser.add_argument("--base-licence", metavar="NAME", help="of the backbone, where the checkpoint does not know it")
    parser.add_argument("--teacher-licence", metavar="TEACHER=NAME", action="append", default=[],
                        help="of a teacher's output, where the thoughts do not name it")  # fmt: skip
    parser.add_argument("--run", type=Path, action="append", default=[], metavar="RUN",
                        help="a stage's folder: its recipe goes into the card; in order, as often as you like")  # fmt: skip
    parser.add_argument(
        "--notes", type=Path, metavar="FILE", help="Markdown for the end of the card: data, results, limits"
    )


def main(args: argparse.Namespace) -> int:
    manifest = read_manifest(args.checkpoint)
    licensed = with_licences(manifest, args.base_licence, args.teacher_licence)
    notes = args.notes.read_text(encoding="utf-8") if args.notes else ""
    saved = export(args.checkpoint, args.out, licensed, Card(args.name or args.out.name, _recipes_of(args.run), notes))
    size = sum(f.stat().st_size for f in args.out.rglob("*") if f.is_file())
    sys.stdout.write(f"wrote {args.out}, {size / 1e6:,.1f} MB, checkpoint {saved.checkpoint_digest}\n")
    for name in _unknown_teachers(saved):
        sys.stdout.write(
            f"  the licence of what {name} wrote is unknown, and the card says so: --teacher-licence {name}=NAME\n"
        )
    return 0


def with_licences(manifest: Manifest, base: str | None, teachers: Sequence[str]) -> Manifest:
    """Raises `OptionsError` without a licence of the backbone, or for a teacher that wrote nothing."""
    named = dict(manifest.teachers)
    for text in teachers:
        name, found, licence = text.partition("=")
        if not found or name not in named:
            expected = f"TEACHER=NAME, a teacher of {', '.join(named) or 'none'}"
            raise OptionsError(explain("--teacher-licence", expected=expected, got=text, fix="Fix the name."))
        named[name] = licence
    licence = base or manifest.licence
    if not licence:
        fix = "Look at its model card and pass --base-licence NAME."
        raise OptionsError(explain(f"licence of {manifest.base}", expected="a name", got="nothing", fix=fix))
    return replace(manifest, licence=licence, teachers=named)


def export(source: Path, out: Path, manifest: Manifest, card: Card) -> Manifest:
    """Write `source` with this manifest to `out`. Raises `CheckpointError` if its weights are not those its manifest names."""
    if out.exists():
        fix = "Choose another folder, or remove it."
        raise OptionsError(explain(f"--out {out}", expected="a folder that does not exist yet", got="one", fix=fix))
    dtype = str(stored_dtype(source)).removeprefix("torch.")
    loaded = load_checkpoint(source, device="cpu", dtype=dtype)
    saved = save_whole(source, out, replace(loaded, manifest=manifest))
    if saved.checkpoint_digest != manifest.checkpoint_digest:
        raise CheckpointError(
            explain(f"weights of {source}", expected=manifest.checkpoint_digest, got=saved.checkpoint_digest,
                    fix="They were changed after the stage wrote them: copy them again, or run the stage.")
        )  # fmt: skip
    (out / "README.md").write_text(model_card(saved, card, dtype), encoding="utf-8")
    return saved


def model_card(manifest: Manifest, card: Card, dtype: str) -> str:
    return "\n".join(
        [*_front_matter(manifest), f"# {card.name}", "", *_inside(manifest, dtype), *_licences(manifest), *_use(),
         *_recipes(card.recipes), card.notes.strip()]
    ).rstrip() + "\n"  # fmt: skip


def _front_matter(manifest: Manifest) -> list[str]:
    licence = manifest.licence.lower()
    lines = [f"license: {licence}"] if licence in _KNOWN else ["license: other", f"license_name: {manifest.licence}"]
    hub = [f"base_model: {manifest.base}"] if manifest.base.count("/") == 1 and not Path(manifest.base).exists() else []
    return [
        "---",
        *lines,
        *hub,
        "library_name: retrv-r1-retriever",
        "tags: [reranking, retrieval, multimodal]",
        "---",
        "",
    ]


def _inside(manifest: Manifest, dtype: str) -> list[str]:
    rows, width = manifest.icm["memory_rows"], manifest.icm["width"]
    memory = f"{rows} rows x {width}, {rows * width * 2:,} bytes" if rows else f"every row x {width}"
    think = (
        "not calibrated: `auto` always thinks" if manifest.think_margin is None else f"{manifest.think_margin:.4g} nats"
    )
    none = (
        "not calibrated: any lead of none counts"
        if manifest.none_margin is None
        else f"{manifest.none_margin:.4g} nats"
    )
    lengths = f"{manifest.trained_min_k or manifest.trained_top_k} to {manifest.trained_top_k}"
    if not manifest.trained_top_k:
        lengths = "unknown length"
    return [
        "A Retrv-R1 reranker (arXiv 2510.02745): it reads each candidate as two compressed tokens, reasons, opens the few it is",
        "unsure of, and answers with one of them or with none. No official weights exist; this is an independent implementation.",
        "", "| | |", "| --- | --- |",
        f"| backbone | {manifest.base}{f', revision {manifest.base_revision}' if manifest.base_revision else ''} |",
        f"| weights | {dtype} |",
        f"| trained on | lists of {lengths} |",
        f"| memory of a candidate | at most {memory} |",
        f"| embedder inside | {f'{manifest.embedder_dim} dimensions' if manifest.embedder_dim else 'no'} |",
        f"| thinks below a margin of | {think} |",
        f"| answers none from a lead of | {none} |",
        f"| direct read (`think=\"never\"`) | {'trained' if manifest.direct_read else 'not trained'} |",
        f"| digests | checkpoint `{manifest.checkpoint_digest}`, memory `{manifest.memory_digest}` |",
        "",
    ]  # fmt: skip


def _licences(manifest: Manifest) -> list[str]:
    rows = [f"| backbone | {manifest.base} | {manifest.licence} |"]
    for name, licence in manifest.teachers.items():
        shown = licence or ("that of the data: rules, no model" if name == _RULES else "**unknown**")
        rows.append(f"| thoughts it was trained on | {name} | {shown} |")
    return [
        "## Licences", "", "| part | from | licence |", "| --- | --- | --- |", *rows, "",
        "The backbone's licence binds everyone who uses these weights. A teacher's may bind what is trained on its output.", "",
    ]  # fmt: skip


def _use() -> list[str]:
    return [
        "## Use", "", "```python",
        "from retrv_r1_retriever import RetrvR1Reranker",
        "from retrv_r1_retriever.engines.local import LocalEngine",
        "",
        'reranker = RetrvR1Reranker(LocalEngine.from_pretrained("path/to/this/folder"))',
        "```", "",
    ]  # fmt: skip


def _recipes(recipes: Mapping[str, str]) -> list[str]:
    if not recipes:
        return []
    parts = [
        line for name, text in recipes.items() for line in (f"### {name}", "", "```yaml", text.rstrip(), "```", "")
    ]
    return ["## Training", "", *parts]


def _unknown_teachers(manifest: Manifest) -> list[str]:
    return [name for name, licence in manifest.teachers.items() if not licence and name != _RULES]


def _recipes_of(runs: Sequence[Path]) -> dict[str, str]:
    """By the folder's name; where two have the same, by their paths below the folder that has them all."""
    paths = [run.resolve() for run in runs]
    names = [path.name for path in paths]
    if len(set(names)) < len(names):
        shared = os.path.commonpath([path.parent for path in paths])
        names = [path.relative_to(shared).as_posix() for path in paths]
    return {name: _recipe(run) for name, run in zip(names, runs, strict=True)}


def _recipe(run: Path) -> str:
    file = run / "recipe.yaml"
    if not file.is_file():
        raise OptionsError(
            explain(f"--run {run}", expected="a folder with recipe.yaml", got="none", fix="Fix the path.")
        )
    return file.read_text(encoding="utf-8")
