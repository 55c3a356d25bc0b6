"""Every error this package raises on purpose: one small tree with stable names.

A message says what was expected, what was found and what to do next, in that order. Errors double-inherit from the closest
built-in, so `except ValueError` in existing code keeps working.
"""

from __future__ import annotations


class RetrvR1Error(Exception):
    """Base of all errors raised on purpose by this package."""


class OptionsError(RetrvR1Error, ValueError):
    """An option, argument or configuration value is out of its range or unknown."""


class InputError(RetrvR1Error, ValueError):
    """A query, document or candidate list cannot be used as given."""


class ImageError(InputError):
    """An image cannot be fetched, is not allowed, is too large, or is not an image."""


class SchemaError(RetrvR1Error, ValueError):
    """A collection's vectors or payload do not look as configured."""


class StoreError(RetrvR1Error, RuntimeError):
    """The vector store cannot be opened, is locked, or did not answer."""


class NotIndexedError(StoreError):
    """There is no collection of that name or in that folder, or it is empty: nothing was indexed yet, or elsewhere.

    found: the message without its advice, for a caller whose users have another way to index
    """

    def __init__(self, message: str, *, found: str = "") -> None:
        super().__init__(message)
        self.found = found


def not_indexed(where: str, *, expected: str, got: str, fix: str) -> NotIndexedError:
    return NotIndexedError(
        explain(where, expected=expected, got=got, fix=fix), found=f"{where}: expected {expected}, got {got}"
    )


class StaleMemoryError(RetrvR1Error, RuntimeError):
    """Stored candidate memory does not fit the model or the candidate's present content, and `on_stale="raise"`."""


class CheckpointError(RetrvR1Error, RuntimeError):
    """A checkpoint directory is incomplete, or was made for another prompt or memory version."""


class EngineError(RetrvR1Error, RuntimeError):
    """The engine that runs the model failed or did not answer."""


class ServerError(EngineError):
    """A model server could not be reached, refused a request, or answered with something that cannot be used.

    status: HTTP status, None if there was no complete answer; detail: the server's own words; retry_after_s: as it asked
    unsent: it cannot have seen the request; cut: the connection broke while it worked
    """

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        detail: str = "",
        retry_after_s: float | None = None,
        unsent: bool = False,
        cut: bool = False,
    ) -> None:
        super().__init__(message)
        self.status, self.detail, self.retry_after_s = status, detail, retry_after_s
        self.unsent, self.cut = unsent, cut


class RerankTimeout(EngineError, TimeoutError):
    """The whole call ran past `timeout_s` before the model had decided anything."""


class MissingExtraError(RetrvR1Error, ImportError):
    """An optional dependency is not installed; the message names the pip line."""


def explain(what: str, *, expected: object, got: object, fix: str) -> str:
    """The message format shared by all errors: `what: expected ..., got .... fix.`"""
    return f"{what}: expected {expected}, got {got}. {fix}"


def missing_extra(package: str, extra: str) -> MissingExtraError:
    return MissingExtraError(f"{package} is not installed. Run: pip install 'retrv-r1-retriever[{extra}]'")
