"""The edges of HTTP: who gets in, how large a body may be, ids and the access log, as ASGI middlewares.

Source: https://asgi.readthedocs.io/en/latest/specs/www.html.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from zimgkit.runtime.serve.errors import ApiError
from zimgkit.runtime.serve.tracing import caller

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

ACCESS = logging.getLogger("zimgkit.serve.access")
REQUEST_ID = re.compile(r"[\w.:-]{1,100}", re.ASCII)
OPEN = re.compile(r"/|/health(/live|/ready)?|/v1/images/[\w-]+/content", re.ASCII)
"""Paths that need no key: the page, what orchestrators ask, and pictures whose names nobody can guess."""


class RequestIds:
    """Gives each request an id, or keeps the client's; logs each as a line of JSON when it has ended.

    Args:
        app: what answers.
        log: whether requests are logged.
    """

    def __init__(self, app: App, log: bool = True) -> None:
        self.app, self.log = app, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = _header(scope, b"x-request-id")
        scope.setdefault("state", {})["request_id"] = request_id = (
            given if REQUEST_ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"
        )
        started, status = time.time(), 499

        async def with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            with caller(scope["headers"]):
                await self.app(scope, receive, with_id)
        finally:
            if self.log:
                entry = {
                    "time": round(started, 3),
                    "request_id": request_id,
                    "client": scope["client"][0] if scope.get("client") else None,
                    "method": scope["method"],
                    "path": scope["path"],
                    "status": status,
                    "seconds": round(time.time() - started, 3),
                }
                ACCESS.info("%s", json.dumps({**entry, **scope["state"].get("log", {})}))


class Door:
    """Lets in who has a key and comes from an allowed page, with bodies that are not too large and not too slow.

    Args:
        app: what answers.
        keys: what clients may have, see :func:`_key`; all are let in where there are none.
        origins: pages of other hosts that may ask; ``"*"`` is any.
        hosts: names that the server may be called by, empty for any: on the loopback address no other name is its own.
        most_bytes: of a body.
        seconds: in which a body must be there.
    """

    def __init__(
        self,
        app: App,
        keys: Collection[str] = (),
        origins: Collection[str] = (),
        hosts: Collection[str] = (),
        most_bytes: int = 1 << 26,
        seconds: float = 60.0,
    ) -> None:
        self.app, self.origins, self.hosts = app, origins, hosts
        self.digests = [_digest(key) for key in keys]
        self.most_bytes, self.seconds = most_bytes, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or refuse."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            self._check(scope)
        except ApiError as error:
            await respond(error, send)
            return
        await self.app(scope, self._bounded(scope, receive), send)

    def _check(self, scope: Scope) -> None:
        host = _header(scope, b"host")
        if self.hosts and urlsplit(f"//{host}").hostname not in self.hosts:
            raise ApiError(403, f"this server is not called {host[:100]!r}", code="wrong_host")
        origin = _header(scope, b"origin")
        if origin and urlsplit(origin).netloc != host and not {"*", origin} & set(self.origins):
            raise ApiError(403, f"pages of {origin[:100]!r} may not ask here", code="wrong_origin")
        scope.setdefault("state", {})["client"] = scope["client"][0] if scope.get("client") else ""
        if self.digests and scope["method"] != "OPTIONS" and not OPEN.fullmatch(scope["path"]):
            digest = _digest(_key(_header(scope, b"authorization", "utf-8")))
            # All of them are compared, so that the time tells nothing.
            found = [hmac.compare_digest(digest, known) for known in self.digests]
            if not any(found):
                raise ApiError(
                    401, "the API key is missing or wrong", code="invalid_api_key", kind="authentication_error"
                )
            scope["state"]["client"] = digest.hex()
        length = _header(scope, b"content-length")
        if length.isdigit() and int(length[:20]) > self.most_bytes:
            raise self._too_large()

    def _bounded(self, scope: Scope, receive: Receive) -> Receive:
        """A receive that counts bytes, and does not wait for ever for them."""
        read, ended, deadline = 0, False, time.monotonic() + self.seconds

        async def bounded() -> Message:
            nonlocal read, ended
            if ended:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.001, deadline - time.monotonic()))
            except TimeoutError:
                raise ApiError(408, "the body took too long to arrive", code="timeout") from None
            read += len(message.get("body", b""))
            ended = not message.get("more_body", False)
            if read > self.most_bytes:
                raise self._too_large()
            return message

        return bounded

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body has more than {self.most_bytes >> 20} MiB", code="body_too_large")


def _key(authorization: str) -> str:
    """The key in a header: ``Bearer KEY``, or the password of ``Basic``, which clients of the web UI send."""
    kind, _, text = authorization.partition(" ")
    if kind.lower() != "basic":
        return text.strip() if kind.lower() == "bearer" else ""
    try:
        return base64.b64decode(text, validate=True).decode().partition(":")[2]
    except ValueError:
        return ""


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _header(scope: Scope, name: bytes, encoding: str = "latin-1") -> str:
    """A header's value; empty where there is none."""
    return next((value.decode(encoding, "surrogateescape") for key, value in scope["headers"] if key == name), "")


async def respond(error: ApiError, send: Send) -> None:
    """Send an error object."""
    data = json.dumps(error.body()).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
    headers += [(key.lower().encode(), value.encode()) for key, value in error.headers.items()]
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": data})
