"""The table [engine] of `retrv.toml`, and the engine it names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from retrv_r1_retriever.errors import OptionsError, explain

if TYPE_CHECKING:
    from retrv_r1_retriever.engines.chat import ChatEngine
    from retrv_r1_retriever.engines.vllm import VllmEngine


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """kind: "local" runs the checkpoint of [model] in this process; "vllm" a vLLM server of that checkpoint.

    "chat" asks any model behind an OpenAI-compatible server.
    base_url, model, api_key_env: of the server; timeout_s: for one request to it; max_images: chat only, see `Display`
    """

    kind: Literal["local", "chat", "vllm"] = "local"
    base_url: str | None = None
    model: str | None = None
    api_key_env: str | None = None
    max_images: int | None = None
    timeout_s: float = 120.0

    def __post_init__(self) -> None:
        given = [name for name in ("base_url", "model") if getattr(self, name) is not None]
        if self.kind != "local" and len(given) < 2:
            raise OptionsError(
                explain(f"kind = {self.kind!r}", expected="base_url and model", got=given, fix="Name both.")
            )
        idle = [name for name in ("base_url", "model", "api_key_env", "max_images") if getattr(self, name) is not None]
        if self.kind == "local" and idle:
            fix = "Set kind = 'chat' or 'vllm', or leave them out; a checkpoint is named in [model]."
            raise OptionsError(explain("kind = 'local'", expected="none of the keys of 'chat'", got=idle, fix=fix))
        if self.kind == "vllm" and self.max_images is not None:
            fix = "Leave it out: only opened candidates are sent as pictures."
            raise OptionsError(explain("max_images", expected="none with kind = 'vllm'", got=self.max_images, fix=fix))
        if not self.timeout_s > 0:
            raise OptionsError(explain("timeout_s", expected="seconds > 0", got=self.timeout_s, fix="Raise it."))

    def chat(self, api_key: str | None) -> ChatEngine:
        """Connects to nothing yet."""
        from retrv_r1_retriever.engines.chat import ChatEngine, Display
        from retrv_r1_retriever.http import HttpLimits

        assert self.model is not None  # checked above
        display, limits = Display(max_images=self.max_images), HttpLimits(answer_s=self.timeout_s)
        return ChatEngine(self.model, base_url=self.base_url, api_key=api_key, display=display, limits=limits)

    def vllm(self, checkpoint: str, api_key: str | None, *, check: bool = True) -> VllmEngine:
        """Asks the server with a tiny request, unless told not to. Raises what `VllmEngine` raises."""
        from retrv_r1_retriever.engines.vllm import VllmEngine
        from retrv_r1_retriever.http import HttpLimits

        assert self.base_url is not None  # checked above
        assert self.model is not None
        limits = HttpLimits(answer_s=self.timeout_s)
        return VllmEngine(
            checkpoint, base_url=self.base_url, model=self.model, api_key=api_key, limits=limits, check=check
        )
