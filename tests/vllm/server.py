"""A real vLLM server of the shipped miniature, on a free port of this machine, from an environment of its own (`make vllm-env`)."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from retrv_r1_retriever.config import Config, checkpoint_path
from retrv_r1_retriever.engines.vllm import TEMPLATE

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("RETRV_VLLM_PYTHON", ROOT / ".venv-vllm" / "bin" / "python"))
MODEL = "miniature"
START_S = 900  # minutes, on two busy cores
#: The served flags of docs/serving.md, then what makes it small and exact on a CPU.
FLAGS = (
    "--enable-prompt-embeds", "--enable-prompt-tokens-details", "--chat-template", TEMPLATE,
    "--limit-mm-per-prompt", '{"image":8,"video":0}',
    "--dtype", "float32", "--enforce-eager", "--max-model-len", "2048", "--max-num-seqs", "16", "--block-size", "32",
)  # fmt: skip
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}


@dataclass(frozen=True)
class Running:
    """base_url: up to the version, as an engine takes it"""

    base_url: str
    checkpoint: str
    log: Path


@contextmanager
def vllm_server(folder: Path, flags: Sequence[str] = FLAGS) -> Iterator[Running]:
    checkpoint, port, log = checkpoint_path(Config()), _free_port(), folder / "vllm.log"
    # `vllm serve` looks for the version of a distribution "vllm", which the CPU build is not called.
    command = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", checkpoint, "--host", "127.0.0.1"]
    command += ["--served-model-name", MODEL, "--port", str(port), *flags]
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, env={**os.environ, **SETTINGS}, cwd=folder, start_new_session=True
        )
        try:
            _wait(process, f"http://127.0.0.1:{port}", log)
            yield Running(f"http://127.0.0.1:{port}/v1", checkpoint, log)
        finally:
            _stop(process)


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    until = time.monotonic() + START_S
    while time.monotonic() < until:
        if process.poll() is not None:
            break
        with suppress(urllib.error.URLError, OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
            return
        time.sleep(1)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-30:])
    raise RuntimeError(f"vLLM did not start within {START_S} s, or ended with {process.poll()}:\n{tail}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """The server and the processes it started, which are one group."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(60)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(10)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
