"""A Chromium, and the server's page in it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DESKTOP = {"width": 1280, "height": 900}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="the extra browser is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium")
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def context(browser) -> Iterator[Any]:
    """A browser without a past, whose requests stay on this machine, and whose console stays empty."""
    found = browser.new_context(viewport=DESKTOP, permissions=["clipboard-read", "clipboard-write"])
    watched = Watched(found)
    yield found
    found.close()
    assert watched.complaints == []
    assert {urlsplit(url).hostname for url in watched.requests if not url.startswith(("data:", "blob:"))} <= {
        "127.0.0.1"
    }


class Watched:
    """What pages of a context ask for, and complain of."""

    def __init__(self, context: Any) -> None:
        self.requests: list[str] = []
        self.complaints: list[str] = []
        context.on("request", lambda request: self.requests.append(request.url))
        context.on("console", self._console)
        context.on("weberror", lambda error: self.complaints.append(str(error.error)))

    def _console(self, message: Any) -> None:
        # That a request was refused is told there in any case.
        if message.type in ("error", "warning") and "Failed to load resource" not in message.text:
            self.complaints.append(message.text)


@pytest.fixture
def page(context, server) -> Any:
    from tests.runtime.serve.page.browsing import opened

    return opened(context, server.url)
