"""Pictures that cannot be read, met in the middle of a training or a measurement: named, counted; too many of them end it.

What is trained on is replaced by the next. What is measured is left out: another in its place would count twice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from retrv_r1_retriever.errors import InputError, explain
from retrv_r1_retriever.evaluation.offsets import MAX_BAD_SHARE

log = logging.getLogger(__name__)
K = TypeVar("K", bound=Hashable)
T = TypeVar("T")
FEW = 20  #: that are always let pass while the share is of those asked for so far


class UnreadablePicture(InputError):
    """Names the picture."""


class Unreadable:
    """max_share: of `total` items, None = of those asked for so far; count: of unreadable items, each counted once"""

    def __init__(self, max_share: float = MAX_BAD_SHARE, total: int | None = None) -> None:
        self._max_share, self._total, self._asked = max_share, total, 0
        self._known: set[Hashable] = set()

    @property
    def count(self) -> int:
        return len(self._known)

    def first(self, keys: Iterable[K], make: Callable[[K], T]) -> T:
        """`make` of the first key whose pictures can be read. Which one it is depends on the data alone, so a resumed run agrees."""
        self.asked()
        for key in keys:
            if key not in self._known:
                try:
                    return make(key)
                except UnreadablePicture as error:
                    self.note(key, error)
        raise _none()

    def each(self, keys: Iterable[K], make: Callable[[K], T]) -> Iterator[tuple[K, T]]:
        """`make` of every key whose pictures can be read, once. Raises `InputError` if that is none of them."""
        found = False
        for key in keys:
            try:
                made = make(key)
            except UnreadablePicture as error:
                self.note(key, error)
            else:
                found = True
                yield key, made
        if self.count and not found:
            raise _none()

    def asked(self) -> None:
        """One more was."""
        self._asked += 1

    def note(self, key: Hashable, error: Exception) -> None:
        """Raises `InputError` above the share."""
        if key in self._known:
            return
        self._known.add(key)
        log.warning("passed over: %s", error)
        total = self._asked if self._total is None else self._total
        if self.count > max(FEW if self._total is None else 0, self._max_share * total):
            raise InputError(
                explain("pictures", expected=f"at most {self._max_share:.0%} unreadable ones", got=f"{self.count} of {total}, "
                        f"last: {str(error).rstrip('.')}", fix="`retrv-r1-train check DATA --pictures all` lists them.")
            ) from error  # fmt: skip


@dataclass(frozen=True)
class Chosen(Generic[T]):
    """Of what `make` makes of a number, that of these, made when it is asked for."""

    numbers: Sequence[int]
    make: Callable[[int], T]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: int) -> T:
        return self.make(self.numbers[place])


def _none() -> InputError:
    return InputError(explain("pictures", expected="some that can be read", got="none", fix="Check the data folder."))
