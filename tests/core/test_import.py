"""What `import retrv_r1_retriever` costs, in a fresh interpreter."""

from __future__ import annotations

import subprocess
import sys

import retrv_r1_retriever

HEAVY = (
    "torch",
    "transformers",
    "qdrant_client",
    "qdrant_edge",
    "vllm",
    "trl",
    "peft",
    "langchain_core",
    "llama_index",
    "mcp",
    "opentelemetry",
)
LIMIT_S = 0.5


def fresh(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_importing_is_cheap() -> None:
    # CPU time, because other processes may hold the cores; the interpreter's own start does not count.
    code = "import time; t = time.process_time(); import retrv_r1_retriever; print(time.process_time() - t)"
    assert min(float(fresh(code)) for _ in range(3)) < LIMIT_S


def test_no_name_at_the_top_level_loads_a_heavy_dependency() -> None:
    code = (
        "import sys, retrv_r1_retriever as r; [getattr(r, name) for name in r.__all__];"
        f"print([m for m in {HEAVY} if m in sys.modules])"
    )
    assert fresh(code) == "[]"


def test_using_the_main_path_loads_no_heavy_dependency() -> None:
    code = (
        "import sys; from retrv_r1_retriever import *; from retrv_r1_retriever.engines.scripted import ScriptedEngine;"
        "r = RetrvR1Reranker(ScriptedEngine(slots=[0, 1, 0]));"
        "r.rerank('q', [Document(str(i), Content(str(i))) for i in range(2)]);"
        f"print([m for m in {HEAVY} if m in sys.modules])"
    )
    assert fresh(code) == "[]"


def test_all_names_are_listed_and_others_are_attribute_errors() -> None:
    assert set(retrv_r1_retriever.__all__) <= set(dir(retrv_r1_retriever))
    assert not hasattr(retrv_r1_retriever, "no_such_name")
