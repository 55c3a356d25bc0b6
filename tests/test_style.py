"""The script that checks the limits is code too."""

from __future__ import annotations

from pathlib import Path

from tests.style import check_file, p90

LIBRARY = Path("retrv_r1_retriever/x.py")


def test_limits_are_found() -> None:
    long = "def f():\n" + "    x = 1\n" * 80
    assert "f has 81 lines, at most 80" in check_file(LIBRARY, long)[0][0]
    assert "class C has 251 lines" in check_file(LIBRARY, "class C:\n" + "    x = 1\n" * 250)[0][0]
    assert "401 lines, at most 400" in check_file(LIBRARY, "x = 1\n" * 401)[0][0]
    assert check_file(LIBRARY, "def f():\n" + "    x = 1\n" * 79) == ([], [80])


def test_print_and_kwargs() -> None:
    assert "print in library code" in check_file(LIBRARY, "print(1)\n")[0][0]
    assert check_file(Path("retrv_r1_retriever/cli/show.py"), "print(1)\n")[0] == []
    assert "f takes **kwargs" in check_file(LIBRARY, "async def f(**kwargs): ...\n")[0][0]
    assert check_file(LIBRARY, "def f(\n    **kwargs,  # the framework's signature\n): ...\n")[0] == []
    assert check_file(LIBRARY, "def with_options(self, **changes): ...\n")[0] == []


def test_p90() -> None:
    assert p90(list(range(1, 102))) == 91
    assert p90([]) == 0
