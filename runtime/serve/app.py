"""The HTTP application: routers, middlewares, and an error object for everything that goes wrong."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect

import zimgkit
from zimgkit.engines.errors import CancelledError, ZimgError
from zimgkit.runtime.serve import bodies, images_api, sdapi
from zimgkit.runtime.serve.access import Access
from zimgkit.runtime.serve.errors import ApiError, told
from zimgkit.runtime.serve.http import Door, RequestIds
from zimgkit.runtime.serve.service import Service

LOG = logging.getLogger("zimgkit.serve")


def create_app(service: Service, access: Access | None = None) -> Any:
    """Make the application, which starts the service and closes it.

    Args:
        service: what draws.
        access: who may ask; by default everybody who gets here.

    Returns:
        An ASGI application.
    """
    access = access or Access()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await asyncio.to_thread(service.close)

    # No pages of documentation: theirs load scripts from elsewhere. The schema is at /openapi.json.
    app = FastAPI(title="zimgkit", version=zimgkit.__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.include_router(images_api.router(service))
    app.include_router(sdapi.router(service))
    _add_health(app, service)
    for kind in (ApiError, ZimgError, HTTPException, RequestValidationError, ClientDisconnect, Exception):
        app.add_exception_handler(kind, _handler(service))
    if access.origins:
        app.add_middleware(CORSMiddleware, allow_origins=list(access.origins), allow_methods=["*"], allow_headers=["*"])
    limits = service.limits
    door = Door(app, access.keys, access.origins, access.hosts, limits.max_body_bytes, limits.body_seconds)
    return RequestIds(door, access.log)


def _add_health(app: FastAPI, service: Service) -> None:
    """What orchestrators and dashboards ask, and the page."""

    @app.get("/health/live", include_in_schema=False)
    @app.get("/health", include_in_schema=False)
    async def live() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/health/ready", include_in_schema=False)
    async def ready() -> dict[str, str]:
        service.check_ready()
        return {"status": "ready"}

    @app.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        text = resources.files("zimgkit.runtime.serve").joinpath("page.html").read_text("utf-8")
        policy = (
            "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
            "img-src 'self' data: blob:; connect-src 'self'; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        return HTMLResponse(text, headers={"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"})


def _handler(service: Service) -> Any:
    """Answers an exception with an error object."""

    async def answer(request: Request, error: Exception) -> Response:
        if isinstance(error, CancelledError | ClientDisconnect):
            return Response(status_code=499)  # Nobody reads it; the log does.
        if isinstance(error, RequestValidationError):
            error = bodies.invalid(error.errors())
        elif isinstance(error, HTTPException):
            code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
            error = ApiError(error.status_code, str(error.detail), code=code)
        elif not isinstance(error, ApiError | ZimgError):
            LOG.error("%s: internal error", getattr(request.state, "request_id", ""), exc_info=error)
        found = told(error, bodies.NAMES)
        service.metrics.refused(found.code or str(found.status))
        more = {"detail": found.message} if request.url.path.startswith(sdapi.PREFIX) else {}
        return JSONResponse(found.body() | more, found.status, headers=found.headers)

    return answer
