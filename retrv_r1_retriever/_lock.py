"""A lock on a folder that the operating system gives back when its process ends, however it ends."""

from __future__ import annotations

import os
import sys
from pathlib import Path

if sys.platform == "win32":
    import msvcrt

    def _take(file: int) -> None:
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)

    def _give_back(file: int) -> None:
        msvcrt.locking(file, msvcrt.LK_UNLCK, 1)

else:
    import fcntl

    def _take(file: int) -> None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _give_back(file: int) -> None:
        fcntl.flock(file, fcntl.LOCK_UN)  # closing alone would leave it with a forked child


class FolderLock:
    """Held from here to `release`, by one object in one process. Raises `BlockingIOError` where another one has it."""

    def __init__(self, folder: Path) -> None:
        self._file: int | None = None
        file = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _take(file)
        except OSError as error:
            os.close(file)
            if isinstance(error, PermissionError):  # what Windows says of a lock that is held
                raise BlockingIOError(str(error)) from error
            raise
        self._file = file

    def release(self) -> None:
        """Harmless where it was given back already."""
        file, self._file = self._file, None
        if file is not None:
            _give_back(file)
            os.close(file)

    def __del__(self) -> None:
        self.release()
