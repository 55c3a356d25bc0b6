"""`retrv-r1 search` and `retrv-r1 rerank`: ask, and see what the model read, opened and decided."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import get_args

from retrv_r1_retriever import config as settings
from retrv_r1_retriever._sync import run
from retrv_r1_retriever.cli.show import print_results
from retrv_r1_retriever.cli.terminal import print_json
from retrv_r1_retriever.config import Config
from retrv_r1_retriever.errors import ImageError, InputError, explain
from retrv_r1_retriever.filters import check_value
from retrv_r1_retriever.images import ImageSource
from retrv_r1_retriever.options import Ranking, RerankOptions, Think
from retrv_r1_retriever.plain import results_json
from retrv_r1_retriever.retriever import RetrvR1Retriever
from retrv_r1_retriever.store import Condition, Equals, Filter, FirstStage, Range, VectorFirstStage
from retrv_r1_retriever.types import Content, Document, Query, RankedResults, Status

ROWS_SHOWN = 20


def add_search(parser: argparse.ArgumentParser) -> None:
    _add_query(parser)
    parser.add_argument("--top-k", type=int, metavar="K", help="candidates from the first stage")
    add_filter(parser)
    add_options(parser)
    parser.set_defaults(run=search)


def add_rerank(parser: argparse.ArgumentParser) -> None:
    _add_query(parser)
    parser.add_argument(
        "sources", nargs="+", type=Path, metavar="FILE", help="pictures, .txt files or a JSONL of documents"
    )
    add_options(parser)
    parser.set_defaults(run=rerank)


def add_filter(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--filter", action="append", default=[], metavar="FIELD=VALUE", help="only documents with it; repeatable"
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--top-n", type=int, metavar="N", help="results shown")
    parser.add_argument("--think", choices=get_args(Think), help="whether to reason and open candidates")
    parser.add_argument("--ranking", choices=get_args(Ranking))
    parser.add_argument("--max-inspections", type=int, metavar="N", help="candidates opened in full, at most")
    parser.add_argument("--timeout", type=float, metavar="SECONDS", dest="timeout_s")
    parser.add_argument("--report", type=Path, metavar="PAGE.html", help="write a self-contained HTML page")
    parser.add_argument(
        "--traces", type=Path, metavar="FILE.jsonl", help="append every call's trace, for retrv-r1 view"
    )


def _add_query(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text", help="the query in words")
    parser.add_argument("--image", type=Path, metavar="FILE", help="the query's picture; with --text, both")
    parser.add_argument("--instruction", help='the task in words, e.g. "Find the product after this change."')


def options_of(args: argparse.Namespace, options: RerankOptions) -> RerankOptions:
    """The config's options with what the command line says."""
    names = ("top_k", "top_n", "think", "ranking", "max_inspections", "timeout_s")
    given = {name: getattr(args, name, None) for name in names}
    return options.with_options(**{name: value for name, value in given.items() if value is not None})


def search(args: argparse.Namespace) -> int:
    config = load_config(args)
    query, options = _query(args, settings.open_images(config)), options_of(args, config.rerank)
    only = filter_of(args.filter)
    check_output(args.report, inputs=(args.image, Path(args.config)))
    with opened_retriever(config) as retriever:
        results = retriever.retrieve(query, filter=only, options=options)
        unmatched = only is not None and not results.results
        if unmatched:
            results = replace(results, reason=no_match(args.filter, retriever.first_stage))
    code = finish(args, results, retriever.images)
    return 0 if unmatched else code  # nothing failed: that is what was asked for


def no_match(conditions: Sequence[str], first_stage: FirstStage) -> str:
    assert isinstance(first_stage, VectorFirstStage)  # what a config makes
    return f"0 of {run(first_stage.store.count()):,} documents match the filter {' and '.join(conditions)}"


def rerank(args: argparse.Namespace) -> int:
    from retrv_r1_retriever.reranker import RetrvR1Reranker

    config = load_config(args)
    images = settings.open_images(config)
    query, options = _query(args, images), options_of(args, config.rerank)
    check_output(args.report, inputs=(args.image, *args.sources, Path(args.config)))
    documents = [document for source in args.sources for document in _documents(source)]
    # All of them are misses: nothing was indexed, and the caller has named every file.
    options = options.with_options(on_stale="recompute", max_recompute=min(len(documents), 127))
    engine = settings.open_reader(config)
    try:
        reranker = RetrvR1Reranker(engine, images=images, observers=config.observers())
        results = reranker.rerank(query, documents, options=options)
    finally:
        run(engine.aclose())
    return finish(args, results, images)


@contextmanager
def opened_retriever(config: Config) -> Iterator[RetrvR1Retriever]:
    """The config's retriever; at the end what is written in the background is finished and the store's lock given back."""
    retriever = settings.open_retriever(config)
    try:
        yield retriever
    finally:
        retriever.close()


def load_config(args: argparse.Namespace) -> Config:
    """The named file; without one, the defaults."""
    named = Path(args.config).exists() or args.config != settings.FILE_NAME
    config = settings.read_config(args.config) if named else Config()
    if traces := getattr(args, "traces", None):
        config = replace(config, observe=replace(config.observe, traces=str(traces.absolute())))
    if config.model.checkpoint == settings.MINIATURE or config.path(config.model.checkpoint).exists():
        os.environ.setdefault("TQDM_DISABLE", "1")  # loading from disk takes seconds; a download keeps its bars
    return config


def finish(args: argparse.Namespace, results: RankedResults, images: ImageSource) -> int:
    """1 for a fallback: a script that looks only at the exit code must not take it for a reranking."""
    if args.report:
        from retrv_r1_retriever.report import ReportEntry, write_report

        write_report(args.report, [ReportEntry(results)], images=images)
    if args.json:
        print_json(results_json(results))
    else:
        print_results(results, limit=ROWS_SHOWN)
        if args.report:
            print(f"\nreport: {args.report}")
    return 1 if results.status is Status.FALLBACK else 0


def check_output(*paths: Path | None, inputs: Iterable[Path | None] = ()) -> None:
    """Before the work, so that no result is lost to a wrong path, and nothing that is read is written over. Raises `InputError`."""
    taken = [path for path in inputs if path is not None]
    for path in filter(None, paths):
        if any(_same(path, other) for other in taken):
            fix = "Name another file: this one would be written over."
            raise InputError(
                explain(str(path), expected="a file of its own for what is written", got="one in use", fix=fix)
            )
        taken.append(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir() or not os.access(path.parent, os.W_OK):
                raise PermissionError("a folder" if path.is_dir() else "a folder without write permission")
        except OSError as error:
            raise InputError(
                explain(str(path), expected="a file that can be written", got=error, fix="Fix the path.")
            ) from None


def _same(one: Path, other: Path) -> bool:
    """Through links too."""
    try:
        return one.samefile(other)
    except OSError:  # one of them is not there
        return one.resolve() == other.resolve()


def _query(args: argparse.Namespace, images: ImageSource) -> Query:
    """Its picture is decoded once here: a broken one should not wait for a model."""
    if not (args.text and args.text.strip()) and args.image is None:
        raise InputError(
            explain("query", expected="--text, --image or both", got="neither", fix="Say what to look for.")
        )
    picture = read_picture(args.image) if args.image else None
    if picture is not None:
        try:
            run(images.load(picture))
        except ImageError as error:
            raise ImageError(f"{args.image}: {error}") from None
    return Query.of(args.text, picture, args.instruction)


def read_picture(path: Path) -> bytes:
    """A file the caller named: not bound to the images' root, unlike a path out of a payload."""
    if path.parts and path.parts[0] in ("http:", "https:"):
        raise InputError(
            explain(
                str(path).replace(":/", "://", 1),
                expected="a file",
                got="a URL",
                fix="Download the picture and name the file.",
            )
        )
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(explain(str(path), expected="a readable picture", got=error, fix="Fix the path.")) from None


def filter_of(conditions: Sequence[str]) -> Filter | None:
    """`field=value`: numbers and true/false are taken as such, quotes make them text."""
    must = []
    for condition in conditions:
        field, equals, value = condition.partition("=")
        if not (field and equals):
            raise InputError(
                explain("--filter", expected="field=value", got=repr(condition), fix='E.g. modality="image".')
            )
        must.append(_condition(field, value))
    return Filter(must=tuple(must)) if must else None


def _condition(field: str, text: str) -> Condition:
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    if isinstance(value, float) and math.isfinite(value):
        return Range(field, gte=value, lte=value)
    value = value if isinstance(value, str | int | bool) else text
    check_value(field, value)
    return Equals(field, value)


def _documents(source: Path) -> Iterator[Document]:
    from retrv_r1_retriever.readers import IMAGE_SUFFIXES, read_jsonl

    suffix = source.suffix.lower()
    if suffix in IMAGE_SUFFIXES:
        yield Document(str(source), Content(image=read_picture(source)))
    elif suffix == ".txt":
        try:
            yield Document(str(source), Content(source.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise InputError(explain(str(source), expected="a text", got=error, fix="Fix the file.")) from None
    elif suffix in (".jsonl", ".json"):
        for row in read_jsonl(source):
            if not isinstance(row, Document):
                raise InputError(row.reason)
            yield row
    else:
        known = ", ".join(sorted({".txt", ".jsonl", *IMAGE_SUFFIXES}))
        raise InputError(explain(str(source), expected=f"one of {known}", got=suffix or "no suffix", fix="Convert it."))
