"""`retrv-r1-train synthesize`: arguments in, files and a summary out."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from retrv_r1_retriever._arguments import at_least_one
from retrv_r1_retriever.errors import OptionsError, explain
from retrv_r1_retriever.evaluation.mbeir import Limits
from retrv_r1_retriever.evaluation.offsets import MAX_BAD_SHARE
from retrv_r1_retriever.images import LocalImages
from retrv_r1_retriever.options import RerankOptions
from retrv_r1_training.chat_teacher import ChatOptions, ChatTeacher
from retrv_r1_training.endpoint import ChatEndpoint, EndpointOptions
from retrv_r1_training.journal import Journal
from retrv_r1_training.labelled import ListOptions, ListSource, MbeirLists
from retrv_r1_training.synthesize import (
    Report,
    RunOptions,
    Teacher,
    describe,
    plan,
    save_traces,
    summarise,
    synthesize,
)
from retrv_r1_training.teacher import TeacherStyle
from retrv_r1_training.waiting import every
from retrv_r1_training.words_teacher import Wording, WordsTeacher


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command; its `main` takes the parsed arguments and returns the exit code."""
    parser = commands.add_parser(
        "synthesize",
        help="write thoughts to train on, by a teacher model or from captions",
        description="A teacher writes a thought about every query; what a session replays to a right answer goes to OUT/traces.jsonl.",
    )
    parser.set_defaults(main=run)
    data = parser.add_argument_group("data (M-BEIR files)")
    data.add_argument("--queries", type=_file, nargs="+", required=True, metavar="FILE")
    data.add_argument("--pool", type=_file, nargs="+", required=True, metavar="FILE", help="candidate pools")
    data.add_argument("--lists", type=_file, required=True, metavar="RUN", help="the first stage's lists, a TREC run")
    data.add_argument("--qrels", type=_file, metavar="FILE", help="instead of the query rows' pos_cand_list")
    data.add_argument("--captions", type=_file, metavar="FILE", help='JSONL {"id", "caption"}')
    data.add_argument("--images", type=_folder, metavar="FOLDER",
                      help="the data folder: root of the picture paths, and of the table of instructions")  # fmt: skip
    data.add_argument(
        "--instruction", metavar="TEXT", help="the task in words, for every query, in place of the data's own"
    )
    data.add_argument("--top-k", type=int, default=20, metavar="K")
    data.add_argument("--min-k", type=int, default=0, metavar="N",
                      help="cut half of the lists to a random length from N to K: a model for lists of many lengths")  # fmt: skip
    data.add_argument("--shuffle", type=float, default=0.5, metavar="SHARE", help="of lists in random order")
    data.add_argument("--missing", choices=("none", "inject", "drop"), default="none",
                      help="what a list without a right answer trains")  # fmt: skip
    data.add_argument("--limit", type=at_least_one, metavar="N", help="the first N lists only")
    data.add_argument("--seed", type=int, default=0)
    data.add_argument("--max-bad-share", type=float, default=MAX_BAD_SHARE, metavar="SHARE", help="of rows in any file")
    data.add_argument("--index-dir", type=Path, help="where to keep line indexes (default: .retrv beside each file)")
    teacher = parser.add_argument_group("teacher")
    teacher.add_argument("--teacher", choices=("words", "chat"), required=True,
                         help="words: from captions, offline; chat: a model behind an OpenAI-compatible endpoint")  # fmt: skip
    teacher.add_argument("--endpoint", metavar="URL", help="up to and including /v1")
    teacher.add_argument("--model", metavar="NAME")
    teacher.add_argument("--key-env", default="OPENAI_API_KEY", metavar="NAME", help="variable that holds the key")
    teacher.add_argument("--licence", default="", metavar="NAME", help="of the teacher's output, kept in every trace")
    teacher.add_argument("--body", type=json.loads, default={}, metavar="JSON", help="more fields of every request")
    teacher.add_argument("--temperature", type=float, default=0.7)
    teacher.add_argument("--max-tokens", type=int, default=4096, help="of one answer")
    teacher.add_argument("--max-pixels", type=int, default=200_704, help="of one picture")
    teacher.add_argument("--hint", action="store_true", help="tell the teacher the right answer")
    _add_run_arguments(parser.add_argument_group("run"))


def _add_run_arguments(run: argparse._ArgumentGroup) -> None:
    run.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="resumable: run the same command again")
    run.add_argument("--dry-run", action="store_true", help="print what it will cost, ask nothing")
    run.add_argument("--yes", action="store_true", help="go on after the estimate without a question")
    run.add_argument("--price-in", type=_price, metavar="P", help="per million tokens sent")
    run.add_argument("--price-out", type=_price, metavar="P", help="per million tokens received")
    run.add_argument("--attempts", type=int, default=2, help="answers per query until one is admitted")
    run.add_argument("--concurrency", type=int, default=8, help="requests at a time")
    run.add_argument("--timeout", type=float, default=180.0, metavar="SECONDS", help="for one answer")
    run.add_argument("--retries", type=int, default=6, help="after a failed request")
    run.add_argument("--give-up-after", type=int, default=20, metavar="N", help="queries in a row without an answer")
    run.add_argument("--max-inspections", type=int, default=4, help="of one thought, as the model will be served")
    run.add_argument("--max-new-tokens", type=int, default=512, help="of one thought, as the model will be served")


def _file(text: str) -> Path:
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"no such file: {text}")
    return Path(text)


def _price(text: str) -> float:
    try:
        if 0 <= float(text) < math.inf:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"expected 0 or more, got {text!r}")


def _folder(text: str) -> Path:
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"no such folder: {text}")
    return Path(text)


def run(args: argparse.Namespace) -> int:
    """0: every query has an answer; 1: some have none, or the run was not confirmed."""
    return asyncio.run(_run(args))


async def _run(args: argparse.Namespace) -> int:
    images = LocalImages(args.images)
    source = MbeirLists(
        args.queries, args.pool, args.lists,
        ListOptions(args.top_k, args.min_k, args.shuffle, args.missing, args.seed, args.instruction), args.qrels, args.captions,
        args.images, Limits(args.index_dir, args.max_bad_share),
    )  # fmt: skip
    if args.teacher == "words":
        wording = Wording.of(_all_captions(source))
        return await _teach(args, _words_teacher(args, wording), source, images, {})
    async with ChatEndpoint(_endpoint_options(args), concurrency=args.concurrency) as endpoint:
        options = ChatOptions(args.max_inspections, args.max_tokens, args.temperature, args.max_pixels, hint=args.hint)
        teacher = ChatTeacher(endpoint, images, options, args.licence)
        return await _teach(args, teacher, source, images, endpoint.retries)


async def _teach(
    args: argparse.Namespace, teacher: Teacher, source: ListSource, images: LocalImages, retries: Mapping[str, int]
) -> int:
    replay = RerankOptions(think="always", timeout_s=None, max_inspections=args.max_inspections,
                           max_new_tokens=args.max_new_tokens)  # fmt: skip
    options = RunOptions(
        attempts=args.attempts if teacher.pays else 1, concurrency=args.concurrency if teacher.pays else 1,
        limit=args.limit, give_up_after=args.give_up_after, replay=replay,
    )  # fmt: skip
    prices = None if None in (args.price_in, args.price_out) else (args.price_in, args.price_out)
    with Journal(args.out / "journal.jsonl", sync=teacher.pays) as journal:
        planned = plan(teacher, source, journal, options)
        sys.stdout.write(describe(planned, teacher, options, prices) + "\n")
        sys.stdout.flush()
        if args.dry_run:
            return 0
        if teacher.pays and planned.open and not (args.yes or _confirmed()):
            sys.stderr.write("nothing was asked; pass --yes to go on\n")
            return 1
        report = Report()
        try:
            await synthesize(teacher, source, journal, images, options, report, _progress(planned.open))
        finally:
            count = save_traces(args.out, journal)
            summary = summarise(report, journal, source, retries)
            text = json.dumps(summary, indent=2)
            (args.out / "summary.json").write_text(text + "\n", encoding="utf-8")
            sys.stdout.write(f"{text}\n{count} traces in {args.out / 'traces.jsonl'}\n")
    return 1 if report.failed else 0


def _words_teacher(args: argparse.Namespace, wording: Wording) -> WordsTeacher:
    return WordsTeacher(wording, TeacherStyle(max_inspections=args.max_inspections), args.seed, licence=args.licence)


def _all_captions(source: ListSource) -> Iterator[str]:
    """Each candidate's caption once."""
    seen: set[str] = set()
    for task in source:
        for id, caption in zip(task.ids, task.captions, strict=True):
            if id not in seen:
                seen.add(id)
                yield caption


def _endpoint_options(args: argparse.Namespace) -> EndpointOptions:
    for name in ("endpoint", "model"):
        if getattr(args, name) is None:
            raise OptionsError(explain(f"--{name}", expected="a value with --teacher chat", got="none", fix="Pass it."))
    if not isinstance(args.body, dict):
        raise OptionsError(explain("--body", expected="a JSON object", got=repr(args.body), fix='Pass {"field": ...}.'))
    key = os.environ.get(args.key_env)
    return EndpointOptions(args.endpoint, args.model, key, args.body, timeout_s=args.timeout, retries=args.retries)


def _confirmed() -> bool:
    if not sys.stdin.isatty():
        return False
    sys.stdout.write("go on? [y/N] ")
    sys.stdout.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _progress(total: int) -> Callable[[Report], None]:
    """A line on standard error every few seconds."""
    due = every()

    def show(now: Report) -> None:
        if due():
            failed = sum(now.failed.values())
            sys.stderr.write(f"{now.admitted} of {total} admitted, {now.answers} answers, {failed} failed\n")

    return show
