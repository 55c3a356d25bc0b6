"""A lock on a folder that the operating system gives back when its process ends, however it ends."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

if sys.platform == "win32":
    import msvcrt

    _FAR = 1 << 30  # behind the holder's name: nobody else may read what is locked

    def _take(file: int) -> None:
        os.lseek(file, _FAR, os.SEEK_SET)
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)

    def _give_back(file: int) -> None:
        os.lseek(file, _FAR, os.SEEK_SET)
        msvcrt.locking(file, msvcrt.LK_UNLCK, 1)

else:
    import fcntl

    def _take(file: int) -> None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _give_back(file: int) -> None:
        fcntl.flock(file, fcntl.LOCK_UN)  # closing alone would leave it with a forked child


class FolderLock:
    """Held from here to `release`, by one object in one process. Raises `BlockingIOError`, which names it, where another one has it.

    name: of the lock's file, where there are several in a folder
    """

    def __init__(self, folder: Path, name: str = ".lock") -> None:
        self._file: int | None = None
        file = os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _take(file)
        except OSError as error:
            os.lseek(file, 0, os.SEEK_SET)
            holder = os.read(file, 1000).decode(errors="replace")
            os.close(file)
            if isinstance(
                error, BlockingIOError | PermissionError
            ):  # the latter: what Windows says of a lock that is held
                raise BlockingIOError(holder) from error
            raise
        self._file = file
        os.lseek(file, 0, os.SEEK_SET)
        os.ftruncate(file, 0)
        os.write(file, f"process {os.getpid()} on {platform.node()}".encode())

    def release(self) -> None:
        """Harmless where it was given back already."""
        file, self._file = self._file, None
        if file is not None:
            _give_back(file)
            os.close(file)

    def __del__(self) -> None:
        self.release()
