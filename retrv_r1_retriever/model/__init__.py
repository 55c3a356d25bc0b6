"""Where torch lives. Importing anything from here without the `local` extra is one clear error."""

from importlib.util import find_spec

from retrv_r1_retriever.errors import missing_extra

for _package in ("torch", "transformers", "safetensors"):
    if find_spec(_package) is None:
        raise missing_extra(_package, "local")
