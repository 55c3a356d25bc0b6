"""Recipes with overrides: YAML, then `--set a.b=value`, into frozen dataclasses, and back.

Every key is checked: an unknown one, or a value of the wrong type, is an error that names the key.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from retrv_r1_retriever.errors import OptionsError, explain
from retrv_r1_training.recipe import build

T = TypeVar("T")


def load(kind: type[T], path: Path, overrides: Sequence[str] = ()) -> T:
    """The recipe in `path` with `overrides` ("a.b=value", values as in YAML) applied in order."""
    return build(kind, _typed(kind, override(read_yaml(path), overrides), str(path)), str(path))


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise OptionsError(explain(str(path), expected="a recipe", got="no such file", fix="Check the path.")) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise OptionsError(explain(str(path), expected="YAML", got=error, fix="Fix the file.")) from error
    if not isinstance(data, dict):
        raise OptionsError(explain(str(path), expected="keys and values", got=type(data).__name__, fix="Fix the file."))
    return data


class _Loader(yaml.SafeLoader):
    """YAML's own takes the last of two equal keys and says nothing."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, f"a {key.id} for a key", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} a second time", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def override(data: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    out = dict(data)
    for text in overrides:
        name, found, value = text.partition("=")
        if not found or not name:
            raise OptionsError(explain("--set", expected="key=value", got=repr(text), fix="Write --set optim.lr=1e-5."))
        try:
            read = yaml.safe_load(value)
        except yaml.YAMLError:
            raise OptionsError(explain(f"--set {name}", expected="YAML", got=repr(value), fix="Quote it.")) from None
        _put(out, name.split("."), read, text)
    return out


def _put(data: dict[str, Any], path: list[str], value: object, text: str) -> None:
    *parents, last = path
    for parent in parents:
        inner = data.get(parent)
        if inner is not None and not isinstance(inner, dict):
            raise OptionsError(
                explain(f"--set {text}", expected=f"keys below {parent}", got=repr(inner), fix="Fix the key.")
            )
        data[parent] = data = dict(inner or {})  # a copy: the caller's recipe stays as it is
    data[last] = value


def dump(recipe: Any) -> str:
    """The whole recipe, defaults and overrides resolved, as YAML that `load` reads back to an equal value."""
    return yaml.safe_dump(_plain(asdict(recipe)), sort_keys=False, allow_unicode=True)


def same_as_before(file: Path, text: str, expected: str, fix: str, aside: Collection[str] = ()) -> None:
    """Write `text` (YAML or JSON), or raise `OptionsError` if something else is there. aside: top-level keys that may differ"""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    elif (old := file.read_text(encoding="utf-8")) != text:
        found = _differences(old, text, aside)
        if found or not aside:
            raise OptionsError(explain(str(file), expected=expected, got=f"another one: {found}", fix=fix))


def _differences(old: str, new: str, aside: Collection[str]) -> str:
    """The first few keys that differ."""
    try:
        was, now = (dict(_flat(yaml.safe_load(text))) for text in (old, new))
    except yaml.YAMLError:
        return "it cannot be read"
    said = [f"{key} was {was.get(key, 'absent')}, is {now.get(key, 'absent')}"
            for key in {**was, **now} if key.partition(".")[0] not in aside
            and (key not in was or key not in now or was[key] != now[key])]  # fmt: skip
    return "; ".join([*said[:5], *([f"and {len(said) - 5} more"] if said[5:] else [])])


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """a.b.0 -> value"""
    if not isinstance(value, (dict, list)):
        yield name, value
        return
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield from _flat(inner, f"{name}.{key}" if name else str(key))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def _typed(kind: Any, data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Values as their fields want them: lists as tuples, `1e-5` (text to YAML) as a number. Unknown keys are left to `build`."""
    hints = get_type_hints(kind)
    known = {f.name for f in fields(kind)}
    return {k: _value(hints[k], v, f"{where}: {k}") if k in known else v for k, v in data.items()}


def _value(hint: Any, value: Any, where: str) -> Any:
    if get_origin(hint) in (Union, UnionType) and value is not None:  # a block that may be left out
        hint = next((option for option in get_args(hint) if is_dataclass(option)), hint)
    if is_dataclass(hint):
        if not isinstance(value, dict):
            raise OptionsError(explain(where, expected="keys and values", got=repr(value), fix="Fix the value."))
        return _typed(hint, value, where)
    if get_origin(hint) is tuple and isinstance(value, list):
        return tuple(_value(get_args(hint)[0], v, where) for v in value)
    if hint is float and isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            pass
    if not _fits(value, hint):
        expected = str(hint).replace("typing.", "") if get_args(hint) else hint.__name__
        raise OptionsError(explain(where, expected=expected, got=repr(value), fix="Fix the value."))
    return value


def _fits(value: object, hint: Any) -> bool:
    """Whether a YAML value may stand for a field of this type; an int may stand for a float, a bool for nothing else."""
    if get_origin(hint) in (Union, UnionType):
        return any(value is None if option is NoneType else _fits(value, option) for option in get_args(hint))
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if isinstance(value, bool) or hint is bool:
        return isinstance(value, bool) and hint is bool
    return isinstance(value, (int, float) if hint is float else get_origin(hint) or hint)
