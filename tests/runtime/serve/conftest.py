"""A server on the loopback address, and clients for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from zimgkit.runtime import Pipeline
from zimgkit.runtime.session import Session

uvicorn = pytest.importorskip("uvicorn", reason="the extra serve is not installed")

from zimgkit.runtime.serve.access import Access  # noqa: E402
from zimgkit.runtime.serve.app import create_app  # noqa: E402
from zimgkit.runtime.serve.catalog import Catalog, open_models  # noqa: E402
from zimgkit.runtime.serve.local import LocalService  # noqa: E402
from zimgkit.runtime.serve.service import Limits  # noqa: E402

MODELS = ("zimg-tiny-z", "zimg-tiny-qwen")
SECONDS = 60
"""After which a test gives up waiting."""


def until(holds: Callable[[], Any], what: str) -> None:
    """Wait for something that another thread does."""
    deadline = time.monotonic() + SECONDS
    while not holds():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.002)


def open_session(model: Any) -> Session:
    return Session(model.bundle, backend="onnxruntime", warn=lambda message: None)


def make_service(models: tuple[str, ...] = MODELS[:1], devices: int = 1, **options: Any) -> LocalService:
    limits = Limits(**options.pop("limits", {}))
    return LocalService(Catalog(open_models(models)), [open_session] * devices, limits, **options)


@dataclass(frozen=True)
class Server:
    """A server that listens."""

    url: str
    service: LocalService
    process: Any

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def metric(self, name: str, **labels: str) -> float:
        return self.service.metrics.registry.get_sample_value(name, labels) or 0.0


@contextmanager
def serving(service: LocalService, *, ready: bool = True, **access: Any) -> Iterator[Server]:
    """Serve in a thread of this process."""
    app = create_app(service, Access(log=False, **access))
    config = uvicorn.Config(app, port=0, log_config=None, access_log=False, timeout_graceful_shutdown=SECONDS)
    process = uvicorn.Server(config)
    thread = threading.Thread(target=process.run)
    thread.start()
    try:
        until(lambda: process.started and (service.ready or not ready), "the server is ready")
        host, port = process.servers[0].sockets[0].getsockname()[:2]
        yield Server(f"http://{host}:{port}", service, process)
    finally:
        process.should_exit = True
        thread.join(SECONDS)
        assert not thread.is_alive(), "the server ends"


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """Both carried models on one device."""
    with serving(make_service(MODELS)) as found:
        yield found


@pytest.fixture(scope="session")
def controlled_bundle(recorded_bundle_of: Callable[..., Path]) -> Path:
    """A tiny Qwen-Image with the ControlNets canny, depth and inpaint."""
    return recorded_bundle_of("qwen-image-control", tasks=("image-to-image",))


@pytest.fixture(scope="session")
def controlled(controlled_bundle: Path) -> Iterator[Server]:
    """That bundle, served as ``qwen``."""
    with serving(make_service((f"qwen={controlled_bundle}",), warm_up=False)) as found:
        yield found


@pytest.fixture(scope="session")
def pipelines() -> Iterator[Callable[[str], Pipeline]]:
    """``pipelines(name)``: a carried model without a server."""
    opened: dict[str, Pipeline] = {}

    def get(name: str) -> Pipeline:
        if name not in opened:
            opened[name] = Pipeline.open(name, backend="onnxruntime")
        return opened[name]

    yield get
    for pipeline in opened.values():
        pipeline.close()


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"))


def picture(width: int = 64, height: int = 48, seed: int = 0) -> Image.Image:
    """A smooth picture."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    waves = [np.sin(rng.uniform(2, 9) * x + rng.uniform(2, 9) * y + rng.uniform(0, 6)) for _ in range(3)]
    return Image.fromarray(((np.stack(waves, axis=2) + 1) * 127.5).astype(np.uint8))


__all__ = ["MODELS", "SECONDS", "Server", "make_service", "partial", "picture", "pixels", "serving", "until"]
