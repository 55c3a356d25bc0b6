"""The wheel as users get it: complete, light, and clear about what is missing. Builds and installs, so it is slow."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)])
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Path:
    """A bare environment with the base install only."""
    folder = tmp_path_factory.mktemp("venv")
    run([sys.executable, "-m", "venv", str(folder)])
    python = folder / "bin" / "python"
    run([str(python), "-m", "pip", "install", "--quiet", str(wheel)])
    return python


def run(argv: list[str]) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True, cwd=Path(argv[0]).parent).stdout


def test_everything_is_in_the_wheel(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for needed in (
        "retrv_r1_retriever/py.typed",
        "retrv_r1_retriever/report/report.css",
        "retrv_r1_retriever/demo/checkpoint/model.safetensors",
        "retrv_r1_retriever/demo/checkpoint/retrv/manifest.json",
        "retrv_r1_retriever/demo/checkpoint/retrv/icm.safetensors",
        "retrv_r1_retriever/demo/checkpoint/README.md",
        "retrv_r1_training/py.typed",
        "retrv_r1_training/recipes/miniature.yaml",
        "langchain_retrv_r1/py.typed",
        "llama_index_retrv_r1/py.typed",
        "retrv_r1_mcp/py.typed",
    ):
        assert needed in names
    assert not [n for n in names if n.startswith("tests/")]
    checkpoint = [i for i in zipfile.ZipFile(wheel).infolist() if "/demo/checkpoint/" in i.filename]
    assert sum(i.file_size for i in checkpoint) <= 8_000_000


def test_base_install_is_light(python):
    code = "import time; import retrv_r1_retriever; print(time.process_time())"
    assert float(run([str(python), "-c", code])) < 0.5
    installed = run([str(python), "-m", "pip", "list", "--format", "freeze"]).lower()
    assert {line.split("==")[0] for line in installed.split()} <= {
        "numpy", "pillow", "pip", "setuptools", "retrv-r1-retriever", "retrv_r1_retriever",
    }  # fmt: skip


def test_the_command_line_names_the_missing_extra(python):
    command = str(python.parent / "retrv-r1")
    assert "search" in run([command, "--help"])
    done = subprocess.run([command, "demo"], capture_output=True, text=True, cwd=python.parent, check=False)
    assert done.returncode != 0
    assert "pip install 'retrv-r1-retriever[" in done.stderr
    assert "Traceback" not in done.stderr


def bare(wheel: Path, extra: str, folder: Path) -> str:
    """The Python of an environment with this extra and nothing else."""
    run([sys.executable, "-m", "venv", str(folder)])
    python = str(folder / "bin" / "python")
    run(
        [python, "-m", "pip", "install", "--quiet", os.environ.get("TORCH", "torch==2.13.0")]
    )  # a CPU build, first and alone
    run([python, "-m", "pip", "install", "--quiet", f"{wheel}[{extra}]"])
    return python


@pytest.mark.parametrize(("extra", "page"), [("langchain", "langchain.md"), ("llamaindex", "llama-index.md")])
def test_an_extra_alone_runs_the_first_example_of_its_page(wheel, tmp_path, extra, page):
    python = bare(wheel, extra, tmp_path / "venv")
    code = re.search(r"^```python\n(.*?)^```", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.S | re.M)
    assert code
    (tmp_path / "first.py").write_text(code[1])
    assert subprocess.run([python, "first.py"], check=True, capture_output=True, text=True, cwd=tmp_path).stdout.strip()


AGENT = """
import asyncio, sys
from mcp import Client, StdioServerParameters

async def main(command, config):
    async with Client(StdioServerParameters(command=command, args=["mcp", "--config", config])) as client:
        answer = await client.call_tool("search", {"query": "a red ring"})
        print(answer.structured_content["status"], len(answer.structured_content["results"]))

asyncio.run(main(*sys.argv[1:]))
"""


def test_the_mcp_extra_alone_serves_an_agent(wheel, tmp_path):
    """What `uvx --from 'retrv-r1-retriever[mcp]' retrv-r1 mcp` makes of it."""
    python = bare(wheel, "mcp", tmp_path / "venv")
    command = str(Path(python).with_name("retrv-r1"))
    (tmp_path / "items").mkdir()
    for name in ("two red ring", "one blue square"):
        (tmp_path / "items" / f"{name}.txt").write_text(name)
    subprocess.run([command, "index", "items"], check=True, capture_output=True, cwd=tmp_path)
    argv = [python, "-c", AGENT, command, str(tmp_path / "retrv.toml")]
    done = subprocess.run(argv, check=True, capture_output=True, text=True, cwd=tmp_path.parent)
    assert done.stdout == "reranked 2\n"
