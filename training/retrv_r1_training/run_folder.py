"""A run's folder: one run at a time, one recipe, states to go on from, and a checkpoint that says that it is finished."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import yaml

from retrv_r1_retriever._lock import FolderLock
from retrv_r1_retriever.errors import OptionsError, RetrvR1Error, explain
from retrv_r1_retriever.model.checkpoint import Manifest
from retrv_r1_training.estimate import AnyRecipe, only_estimated
from retrv_r1_training.inputs import inputs_of
from retrv_r1_training.overrides import dump, load, same_as_before
from retrv_r1_training.processes import is_first

log = logging.getLogger(__name__)
_LAST_WRITTEN = "trainer_state.json"  # by transformers, of all files of a state


@contextmanager
def open_run(recipe: AnyRecipe, run: Path, out: Path | None = None) -> Iterator[bool]:
    """Whether there is anything left to do in folder `run`. Every process of a launch calls this, around all of its work.

    out: where the checkpoint goes, None = RUN/checkpoint
    """
    with locked(run) if is_first() else nullcontext():
        if is_first():
            _keep(recipe, run)
        _say(logging.INFO, "%s", dump(recipe))
        out = out or run / "checkpoint"
        done = _is_finished(run, out)
        if done:
            text = "%s is finished, its checkpoint is %s: nothing is done. To train again, choose another --run folder"
            _say(logging.INFO, text, run, out)
        yield not done


@contextmanager
def locked(folder: Path, name: str = ".lock") -> Iterator[None]:
    """Two runs in one folder would write into each other's files. The lock goes with the process, so a kill leaves none behind.

    name: of the lock's file, for one output among others in the folder
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = None
    try:
        lock = FolderLock(folder, name)
    except BlockingIOError as holder:
        fix = "Wait for it or stop it, or choose another place."
        what, expected = f"lock {folder / name}", "no other run at work here"
        raise RetrvR1Error(explain(what, expected=expected, got=holder, fix=fix)) from None
    except OSError as error:  # a file system without locks
        log.warning("%s cannot be locked (%s): start no other run there", folder, error)
    try:
        yield
    finally:
        if lock:
            lock.release()


def finish(out: Path, export: Callable[[Path], Manifest]) -> None:
    """Write the checkpoint aside and move it into place when it is whole: that it is there says that the run is finished."""
    aside = out.with_name(f"{out.name}.part")
    shutil.rmtree(aside, ignore_errors=True)  # what a kill left
    saved = export(aside)
    aside.rename(out)
    digests = f"memory {saved.memory_digest}" + (f", embedder {saved.embedder_digest}" if saved.embedder_dim else "")
    log.info("checkpoint %s in %s, %s", saved.checkpoint_digest, out, digests)


def _is_finished(run: Path, out: Path) -> bool:
    if not out.exists():
        return False
    if (out / "retrv" / "manifest.json").is_file() and (out.parent == run or _has_results(run)):
        return True
    fix = "Move it away, or choose another folder."
    raise OptionsError(
        explain(str(out), expected="nothing yet, or this run's checkpoint", got="something else", fix=fix)
    )


def _keep(recipe: AnyRecipe, run: Path) -> None:
    """RUN/recipe.yaml and RUN/inputs.yaml: what this folder was started with. Once it has results, others are refused."""
    inputs = yaml.safe_dump(inputs_of(recipe), sort_keys=False, allow_unicode=True, width=1000)
    fresh = not _has_results(run)
    if fresh:
        _refuse_foreign(run / "recipe.yaml", type(recipe))
    aside = only_estimated(recipe)
    for name, text, what in (("recipe.yaml", dump(recipe), "recipe"), ("inputs.yaml", inputs, "data")):
        if fresh:
            (run / name).unlink(missing_ok=True)
        same_as_before(run / name, text, f"the {what} this folder was started with",
                       f"Go on with that {what}, choose another --run folder, or remove this one.",
                       aside if what == "recipe" else ())  # fmt: skip


def _refuse_foreign(file: Path, kind: type[AnyRecipe]) -> None:
    """A file that a person wrote, with comments and defaults left out, is not written over: it may be the only one."""
    if not file.exists():
        return
    try:
        ours = file.read_text(encoding="utf-8") == dump(load(kind, file))
    except (OptionsError, UnicodeDecodeError):
        ours = False
    if not ours:
        expected = "none, or the resolved recipe that this stage keeps there"
        fix = "Move it out of the --run folder, or choose another one."
        raise OptionsError(explain(str(file), expected=expected, got="another file", fix=fix))


def _has_results(run: Path) -> bool:
    """Whether there is anything in this folder that depends on its recipe: a state, a checkpoint, a start, thoughts."""
    made = (run / "start").exists() or any(file.stat().st_size for file in run.glob("thoughts-*.jsonl"))
    return made or any(run.rglob("checkpoint*"))


def last_state(folder: Path) -> str | None:
    """The last whole state below `folder`, None = start from the beginning. A kill while one is written leaves it without its end."""
    states = [s for s in folder.glob("checkpoint-*") if s.name.removeprefix("checkpoint-").isdigit()]
    for state in sorted(states, key=lambda s: int(s.name.removeprefix("checkpoint-")), reverse=True):
        try:
            json.loads((state / _LAST_WRITTEN).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            _say(logging.WARNING, "%s is not whole (a kill while it was saved?) and is passed over: %s", state, error)
            continue
        _say(logging.INFO, "going on from %s", state)
        return str(state)
    if states:
        _say(logging.WARNING, "no state below %s is whole: starting from the beginning", folder)
    return None


def _say(level: int, text: str, *values: object) -> None:
    """Once per launch."""
    if is_first():
        log.log(level, text, *values)
