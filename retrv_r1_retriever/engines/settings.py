"""The table [engine] of `retrv.toml`, and the engine it names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from retrv_r1_retriever.errors import OptionsError, explain

if TYPE_CHECKING:
    from retrv_r1_retriever.engines.chat import ChatEngine


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """kind: "local" runs the checkpoint of [model] in this process; "chat" asks a model behind an OpenAI-compatible server.

    base_url, model, api_key_env, max_images: chat only, see `ChatEngine` and `Display`; timeout_s: for one of its requests
    """

    kind: Literal["local", "chat"] = "local"
    base_url: str | None = None
    model: str | None = None
    api_key_env: str | None = None
    max_images: int | None = None
    timeout_s: float = 120.0

    def __post_init__(self) -> None:
        given = [name for name in ("base_url", "model") if getattr(self, name) is not None]
        if self.kind == "chat" and len(given) < 2:
            raise OptionsError(explain("kind = 'chat'", expected="base_url and model", got=given, fix="Name both."))
        idle = [name for name in ("base_url", "model", "api_key_env", "max_images") if getattr(self, name) is not None]
        if self.kind == "local" and idle:
            fix = "Set kind = 'chat', or leave them out; a checkpoint is named in [model]."
            raise OptionsError(explain("kind = 'local'", expected="none of the keys of 'chat'", got=idle, fix=fix))
        if not self.timeout_s > 0:
            raise OptionsError(explain("timeout_s", expected="seconds > 0", got=self.timeout_s, fix="Raise it."))

    def chat(self, api_key: str | None) -> ChatEngine:
        """Connects to nothing yet."""
        from retrv_r1_retriever.engines.chat import ChatEngine, Display
        from retrv_r1_retriever.http import HttpLimits

        assert self.model is not None  # checked above
        display, limits = Display(max_images=self.max_images), HttpLimits(answer_s=self.timeout_s)
        return ChatEngine(self.model, base_url=self.base_url, api_key=api_key, display=display, limits=limits)
