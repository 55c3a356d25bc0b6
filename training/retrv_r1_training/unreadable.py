"""Pictures that cannot be read, met in the middle of a training: named, counted, passed over; too many of them end it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

from retrv_r1_retriever.errors import InputError, explain
from retrv_r1_retriever.evaluation.offsets import MAX_BAD_SHARE

log = logging.getLogger(__name__)
K = TypeVar("K", bound=Hashable)
T = TypeVar("T")
FEW = 20  #: that are always let pass


class UnreadablePicture(InputError):
    """Names the picture."""


class Unreadable:
    """max_share: of the items asked for; count: of items that were passed over, each counted once"""

    def __init__(self, max_share: float = MAX_BAD_SHARE) -> None:
        self._max_share, self._asked = max_share, 0
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
        raise InputError(
            explain("pictures", expected="some that can be read", got="none", fix="Check the data folder.")
        )

    def asked(self) -> None:
        """One more was."""
        self._asked += 1

    def note(self, key: Hashable, error: Exception) -> None:
        """Raises `InputError` above the share."""
        if key in self._known:
            return
        self._known.add(key)
        log.warning("passed over: %s", error)
        if self.count > max(FEW, self._max_share * self._asked):
            raise InputError(
                explain("pictures", expected=f"at most {self._max_share:.0%} unreadable ones", got=f"{self.count} of {self._asked}, "
                        f"last: {str(error).rstrip('.')}", fix="`retrv-r1-train check DATA --pictures all` lists them.")
            ) from error  # fmt: skip
