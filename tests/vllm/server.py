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
    "--dtype", "float32", "--enforce-eager", "--max-model-len", "4096", "--max-num-seqs", "16", "--block-size", "32",
    # or the miniature, no chat model, writes tabs for ever
    "--structured-outputs-config", '{"backend":"xgrammar","disable_any_whitespace":true}',
)  # fmt: skip
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}


@dataclass
class Running:
    """base_url: up to the version, as an engine takes it; process: None if it was not started here"""

    base_url: str
    checkpoint: str
    log: Path
    process: subprocess.Popen[bytes] | None = None

    def start(self, flags: Sequence[str] = FLAGS) -> None:
        """Returns when it answers."""
        # `vllm serve` looks for the version of a distribution "vllm", which the CPU build is not called.
        command = [
            str(PYTHON),
            "-m",
            "vllm.entrypoints.openai.api_server",
            "--model",
            self.checkpoint,
            "--host",
            "127.0.0.1",
        ]
        root, port = self.base_url.removesuffix("/v1"), self.base_url.removesuffix("/v1").rpartition(":")[2]
        command += ["--served-model-name", MODEL, "--port", port, *flags]
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                command,
                stdout=out,
                stderr=out,
                env={**os.environ, **SETTINGS},
                cwd=self.log.parent,
                start_new_session=True,
            )
        _wait(self.process, root, self.log)

    def stop(self, by: signal.Signals = signal.SIGTERM) -> None:
        """The server and the processes it started, which are one group."""
        assert self.process is not None
        for one in (by, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, one)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(60)


@contextmanager
def vllm_server(folder: Path, flags: Sequence[str] = FLAGS) -> Iterator[Running]:
    running = Running(f"http://127.0.0.1:{_free_port()}/v1", checkpoint_path(Config()), folder / "vllm.log")
    try:
        running.start(flags)
        yield running
    finally:
        running.stop()


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


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
