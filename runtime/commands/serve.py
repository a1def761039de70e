"""``zimg-run serve``: bundles, an address, and who may ask."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import socket
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from zimgkit.engines.errors import BackendError, UsageError, install
from zimgkit.runtime.session import Session

try:
    import fastapi  # noqa: F401
    import prometheus_client  # noqa: F401
    import python_multipart  # noqa: F401
    import uvicorn
except ImportError as missing:
    raise BackendError(f"zimg-run serve needs {missing.name}", install("serve")) from None

from zimgkit.runtime.commands.console import ended_by_interruption
from zimgkit.runtime.serve.app import LOOPBACK, Access, create_app
from zimgkit.runtime.serve.catalog import Catalog, Model, open_models
from zimgkit.runtime.serve.fetching import Fetcher
from zimgkit.runtime.serve.local import LocalService
from zimgkit.runtime.serve.service import Limits

CONNECTIONS = 1000
"""At once; more are refused with 503."""


def serve(
    bundles: Sequence[str],
    *,
    aliases: Sequence[str] = (),
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key_file: Path | None = None,
    no_auth: bool = False,
    allow_origins: Sequence[str] = (),
    allow_hosts: Sequence[str] = (),
    allow_url_prefixes: Sequence[str] = (),
    max_queue_seconds: float = 600.0,
    max_body_bytes: int = 64 << 20,
    grace_seconds: float = 30.0,
    backend: str = "auto",
    devices: Sequence[str] = (),
    memory: str = "auto",
    vae_tiling: str = "auto",
    warm_up: bool = True,
    access_log: bool = True,
    note: Callable[[str], None] = lambda message: None,
) -> None:
    """Serve bundles until the process is told to end; what was asked for by then is drawn within the grace time.

    Args:
        bundles: folders or names, see :func:`.serve.catalog.open_models`.
        aliases: ``NAME=MODEL``: more names of models.
        host: the address to listen on.
        port: 0 takes any that is free, which is told.
        api_key_file: a key in each line, one of which a client must have.
        no_auth: whether clients need none although other machines can reach the server.
        allow_origins: pages of other hosts that may ask, ``*`` for any.
        allow_hosts: more names that the server may be called by.
        allow_url_prefixes: below which pictures are fetched that clients send as addresses.
        max_queue_seconds: how much work may wait.
        max_body_bytes: of a request.
        grace_seconds: how long what was asked for may take once the server is told to end.
        backend: as for :meth:`Session`.
        devices: as for :meth:`Session`; with several, each has the models and draws.
        memory: as for :meth:`Session`.
        vae_tiling: as for :meth:`Session`.
        warm_up: whether each model draws a picture before the first request.
        access_log: whether each request is logged, as a line of JSON on stderr.
        note: called with what is worth a line.

    Raises:
        UsageError: an argument is wrong, or the address cannot be listened on.
        ZimgError: a bundle cannot be opened.
    """
    keys = _keys(api_key_file) if api_key_file else ()
    if not keys and not no_auth and not _is_loopback(host):
        hint = "give --api-key-file FILE, or --no-auth to let everybody in"
        raise UsageError(f"{host} can be reached from other machines, and no key is asked for", hint)
    fetcher = Fetcher(tuple(allow_url_prefixes), max_body_bytes)
    catalog = Catalog(open_models(bundles), dict(map(_alias, aliases)))
    _log(note)

    def open_session(device: str | None, model: Model) -> Session:
        return Session(
            model.bundle,
            backend=backend,
            device=device,
            memory=memory,
            vae_tiling=vae_tiling,
            warn=partial(_warned, model.name),
        )

    limits = Limits(max_queue_seconds, max_body_bytes)
    opens = [partial(open_session, device) for device in devices or (None,)]
    service = LocalService(catalog, opens, limits, fetcher, warm_up=warm_up)
    hosts = (*LOOPBACK, host, *allow_hosts) if _is_loopback(host) else ()
    app = create_app(service, Access(keys, tuple(allow_origins), hosts, access_log))
    with _listening(host, port) as listener:
        config = uvicorn.Config(
            app,
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            limit_concurrency=CONNECTIONS,
            timeout_graceful_shutdown=max(1, round(grace_seconds)),
        )
        asyncio.run(_run(uvicorn.Server(config), service, listener, note))
    if service.failure:
        raise service.failure


async def _run(
    server: uvicorn.Server, service: LocalService, listener: socket.socket, note: Callable[[str], None]
) -> None:
    """Run until a signal comes, or no model can be opened."""
    address = listener.getsockname()
    where = f"[{address[0]}]:{address[1]}" if ":" in address[0] else f"{address[0]}:{address[1]}"

    async def watch() -> None:
        note(f"listening on http://{where}; loading {', '.join(service.catalog.models)}")
        while not service.ready:
            if service.failure:
                server.should_exit = True
                return
            await asyncio.sleep(0.05)
        note(f"ready: http://{where} is the page, http://{where}/v1 OpenAI's API, http://{where}/sdapi/v1 the web UI's")

    watching = asyncio.create_task(watch())
    with ended_by_interruption():  # The server raises the signal that ended it again.
        await server.serve(sockets=[listener])
    watching.cancel()


@contextlib.contextmanager
def _listening(host: str, port: int):  # type: ignore[no-untyped-def]
    """A socket that listens."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, OverflowError, UnicodeError) as error:
        told = getattr(error, "strerror", None) or error
        raise UsageError(f"{host}:{port} cannot be listened on ({told})", "give another --host or --port") from None
    with listener:
        yield listener


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _keys(path: Path) -> tuple[str, ...]:
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        told = getattr(error, "strerror", None) or "it is no text"
        raise UsageError(f"{path} cannot be read ({told})", "give a text file with a key in each line") from None
    keys = tuple(line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#"))
    if not keys:
        raise UsageError(f"{path} has no key", "write one in each line")
    return keys


def _alias(text: str) -> tuple[str, str]:
    alias, equals, name = text.partition("=")
    if not (alias and equals and name):
        raise UsageError(f"--alias {text!r} is no alias", "give NAME=MODEL")
    return alias, name


def _warned(name: str, message: str) -> None:
    logging.getLogger("zimgkit.serve").warning("%s: %s", name, message)


def _log(note: Callable[[str], None]) -> None:
    """The server's log on stderr: what is wrong in words, each request as a line of JSON."""
    for name, form in (("zimgkit.serve", "%(levelname)s: %(message)s"), ("zimgkit.serve.access", "%(message)s")):
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter(form))
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)
