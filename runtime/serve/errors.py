"""What a client is told where something is wrong: OpenAI's error object, and which status.

Clients of OpenAI's retry 408, 409, 429 and all of 500 and above, so what would fail again is never one of these, or
says ``x-should-retry: false``: https://github.com/openai/openai-python, ``_base_client.py``.
"""

from __future__ import annotations

import math
import re
from typing import Any

from zimgkit.engines.errors import BackendError, OutOfMemoryError, UsageError, ZimgError

ELSEWHERE = re.compile(r"(?<![\w:/])/(?:[^\s/:;,()'\"]+/)+[^\s:;,()'\"]*")
"""A path on this machine, of which a client is told no more than the last part."""


class ApiError(Exception):
    """What ends a request with an error object.

    Args:
        status: of HTTP.
        message: one line.
        param: the field that is wrong, where there is one.
        code: a word for programs.
        kind: OpenAI's ``type``.
        retry_after: seconds until another try is worth while.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str = "invalid_request_error",
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.kind = status, message, param, code, kind
        self.retry_after = retry_after

    @property
    def headers(self) -> dict[str, str]:
        """What tells clients whether to try again."""
        if self.retry_after is not None:
            return {"Retry-After": str(max(1, math.ceil(self.retry_after)))}
        return {"x-should-retry": "false"} if self.status >= 500 else {}

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def loading() -> ApiError:
    """No picture can be drawn yet."""
    message = "the models are still being loaded; try again in a moment"
    return ApiError(503, message, code="loading", kind="server_error", retry_after=5)


def closing() -> ApiError:
    """No picture is begun any more."""
    message = "the server is shutting down; try another replica"
    return ApiError(503, message, code="shutting_down", kind="server_error", retry_after=5)


def queue_full(seconds: float, retry_after: float) -> ApiError:
    """More waits than may."""
    message = f"{seconds:.0f} seconds of work are waiting; try again later"
    return ApiError(429, message, code="queue_full", kind="rate_limit_error", retry_after=retry_after)


def too_long(seconds: float, most: float) -> ApiError:
    """It alone takes longer than all that wait may."""
    message = f"this takes about {seconds:.0f} seconds, and {most:.0f} is the most here"
    return ApiError(400, f"{message}; ask for fewer pictures, fewer steps or a smaller size", code="takes_too_long")


def unknown_model(name: str, known: list[str]) -> ApiError:
    """No such model is served."""
    message = f"there is no model {name[:100]!r}; served: {', '.join(known)}"
    return ApiError(404, message, param="model", code="model_not_found")


def told(error: BaseException, names: dict[str, str]) -> ApiError:
    """What a client is told of an error that was raised while its request was read or drawn.

    Args:
        error: what was raised.
        names: what messages call a field -> what the client calls it.
    """
    if isinstance(error, ApiError):
        return error
    if not isinstance(error, ZimgError):
        return ApiError(
            500, "something went wrong here; the server's log has more", code="internal", kind="server_error"
        )
    message = ELSEWHERE.sub(lambda path: path[0].rpartition("/")[2], " ".join(str(error).split()))
    if isinstance(error, UsageError):
        named = [names[word] for word in re.findall(r"\w+", error.message) if word in names]
        param = "controls" if "controls" in named else next(iter(named), None)  # Its image is no field of the body.
        return ApiError(400, message, param=param, code="invalid_value")
    if isinstance(error, OutOfMemoryError):
        return ApiError(400, message, code="out_of_memory")
    code = "backend" if isinstance(error, BackendError) else "bundle"
    return ApiError(500, message, code=code, kind="server_error")
