"""Pictures by address: fetched from where the server's owner allows it, and from nowhere else."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPException, HTTPMessage
from typing import IO
from urllib.error import URLError
from urllib.parse import SplitResult, unquote, urlsplit
from urllib.request import HTTPRedirectHandler, ProxyHandler, Request, build_opener

from zimgkit.engines.errors import UsageError
from zimgkit.runtime.serve.errors import ApiError

SECONDS, SILENT_SECONDS = 30.0, 10.0
"""After which a fetch is given up: in all, and without a byte."""
PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True)
class Fetcher:
    """Fetches what lies below one of some addresses.

    Args:
        prefixes: such as ``https://pictures.example.com/public/``; a client may send what lies below one of them.
        most_bytes: of a picture.

    Raises:
        UsageError: a prefix is no address of http or https.
    """

    prefixes: Sequence[str] = ()
    most_bytes: int = 64 << 20

    def __post_init__(self) -> None:
        for prefix in self.prefixes:
            parts = _parts(prefix)
            if parts is None or parts.query or parts.fragment:
                raise UsageError(f"{prefix!r} is no address", "give one such as https://pictures.example.com/public/")

    def allows(self, url: str) -> bool:
        """Whether an address lies below a prefix: the same scheme, host and port, and a path below it."""
        parts = _parts(url)
        return parts is not None and any(_below(parts, prefix) for prefix in self.prefixes)

    def fetch(self, url: str, name: str) -> bytes:
        """What lies at an address.

        Args:
            url: the address, which may not redirect: what it leads to may lie anywhere.
            name: the field it came in.

        Raises:
            ApiError: it is not allowed, or cannot be had.
        """
        if not self.allows(url):
            told = "no address is fetched" if not self.prefixes else "addresses there are not fetched"
            raise ApiError(400, f"{name} is an address, and {told}; send the picture itself", param=name)
        try:
            with build_opener(ProxyHandler({}), _NoRedirects).open(url, timeout=SILENT_SECONDS) as answer:
                return self._read(answer)
        except (URLError, HTTPException, OSError, ValueError):
            message = f"the picture at the address in {name} cannot be had; send the picture itself"
            raise ApiError(400, message, param=name) from None

    def _read(self, answer: IO[bytes]) -> bytes:
        data, deadline = bytearray(), time.monotonic() + SECONDS
        while chunk := answer.read1(1 << 16):  # type: ignore[attr-defined]
            data += chunk
            if len(data) > self.most_bytes or time.monotonic() > deadline:
                raise ValueError("too large, or too slow")
        return bytes(data)


class _NoRedirects(HTTPRedirectHandler):
    """Follows none."""

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> None:
        """Refuse; the answer is an error then."""
        return


def _parts(url: str) -> SplitResult | None:
    """The parts of an address that can only be read in one way; None of any other."""
    if not url.isascii() or not url.isprintable() or " " in url or "\\" in url:
        return None
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return None
    if parts.scheme not in PORTS or not parts.hostname or port == 0 or "@" in parts.netloc:
        return None
    return parts


def _below(url: SplitResult, prefix: str) -> bool:
    allowed = urlsplit(prefix)
    folder = (allowed.path or "/").rstrip("/") + "/"
    path = url.path or "/"
    steps = unquote(unquote(path)).replace("\\", "/").split("/")
    return _place(url) == _place(allowed) and path.startswith(folder) and not {".", ".."} & set(steps)


def _place(parts: SplitResult) -> tuple[str, str | None, int]:
    return parts.scheme, parts.hostname, parts.port or PORTS[parts.scheme]
