"""Which engines stay open, with a backend that only keeps count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests import handmade
from zimgkit.engines.bundle import Bundle, Component
from zimgkit.engines.errors import BackendError, BundleError, OutOfMemoryError
from zimgkit.runtime import engine_pool
from zimgkit.runtime.engine_pool import EnginePool

SIZES = {"text_encoder": 40, "conditioner": 5, "denoiser": 100, "vae_decoder": 10}


class Device:
    """Opens engines that hold as much memory as their weights have bytes."""

    def __init__(self, capacity: int = 10**9, working: dict[str, int] | None = None) -> None:
        self.capacity = capacity
        self.working = working or {}
        """Component -> the memory it needs to run, besides its weights."""
        self.open: list[str] = []
        self.opened: list[str] = []

    def take(self, more: int) -> None:
        """Take memory for a moment, beside that of the engines which are open."""
        if sum(SIZES[name] for name in self.open) + more > self.capacity:
            raise OutOfMemoryError("the device is full")

    def open_engine(self, bundle: Bundle, component: str, backend: str, device: str | None) -> Any:
        bundle.component(component)
        self.take(SIZES[component])
        self.open.append(component)
        self.opened.append(component)
        outer = self

        class Engine:
            device = "fake"

            def upload(self, feeds: Any) -> Any:
                outer.take(1)
                return feeds

            def run(self, feeds: Any, keep: Any = ()) -> Any:
                outer.take(outer.working.get(component, 0))
                return {"component": component}

            def close(self) -> None:
                outer.open.remove(component)

        return Engine()


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    components = {name: Component((), weight_bytes=size) for name, size in SIZES.items()}
    return Bundle(tmp_path, handmade.manifest(components=components))


def use(pool: EnginePool, *components: str) -> None:
    for component in components:
        with pool.engine(component) as engine:
            assert engine.run({}) == {"component": component}


def pool_on(device: Device, bundle: Bundle, monkeypatch: pytest.MonkeyPatch, budget: int | None) -> EnginePool:
    monkeypatch.setattr(engine_pool, "open_engine", device.open_engine)
    return EnginePool(bundle, "onnxruntime", budget)


def test_all_stay_open_without_a_budget(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device()
    pool = pool_on(device, bundle, monkeypatch, None)
    use(pool, *SIZES, *SIZES)
    assert device.opened == list(SIZES)
    pool.close()
    assert device.open == []
    pool.close()


def test_a_budget_of_nothing_holds_one_at_a_time(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device()
    pool = pool_on(device, bundle, monkeypatch, 0)
    with pool.engine("denoiser"):
        assert device.open == ["denoiser"]
    assert device.open == []
    use(pool, "text_encoder", "denoiser", "text_encoder")
    assert device.opened == ["denoiser", "text_encoder", "denoiser", "text_encoder"]


@pytest.mark.parametrize(
    ("budget", "left"),
    [
        (155, ["text_encoder", "conditioner", "denoiser", "vae_decoder"]),
        (154, ["conditioner", "denoiser", "vae_decoder"]),
        (110, ["denoiser", "vae_decoder"]),
        (15, ["vae_decoder"]),
        (9, []),
    ],
)
def test_a_budget_closes_what_was_used_longest_ago(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, budget: int, left: list[str]
) -> None:
    device = Device()
    pool = pool_on(device, bundle, monkeypatch, budget)
    use(pool, *SIZES)
    assert device.open == left


def test_use_makes_an_engine_young_again(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device()
    pool = pool_on(device, bundle, monkeypatch, 55)
    use(pool, "text_encoder", "conditioner", "text_encoder", "vae_decoder")
    assert device.open == ["text_encoder", "conditioner", "vae_decoder"]
    with pool.engine("denoiser"):
        assert device.open == ["denoiser"]


def test_room_is_made_before_an_engine_is_opened(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(capacity=110)
    pool = pool_on(device, bundle, monkeypatch, 110)
    use(pool, "text_encoder", "denoiser", "vae_decoder")
    assert device.open == ["denoiser", "vae_decoder"]


def test_a_full_device_closes_the_others(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(capacity=110)
    pool = pool_on(device, bundle, monkeypatch, None)
    use(pool, "text_encoder", "conditioner", "denoiser", "vae_decoder")
    assert device.open == ["denoiser", "vae_decoder"]


def test_an_engine_without_room_to_run_closes_the_others(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(capacity=160, working={"denoiser": 30, "vae_decoder": 155})
    pool = pool_on(device, bundle, monkeypatch, None)
    use(pool, "text_encoder", "conditioner")
    with pool.engine("denoiser") as engine:
        assert device.open == ["text_encoder", "conditioner", "denoiser"]
        handles = engine.upload({})
        assert engine.run(handles) == {"component": "denoiser"}
        assert device.open == ["denoiser"]
    with pytest.raises(OutOfMemoryError, match="full"):
        use(pool, "vae_decoder")
    assert device.open == ["vae_decoder"]


def test_an_engine_too_large_for_the_device(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(capacity=90)
    pool = pool_on(device, bundle, monkeypatch, None)
    use(pool, "text_encoder")
    with pytest.raises(OutOfMemoryError, match="full"):
        use(pool, "denoiser")
    assert device.open == []
    use(pool, "vae_decoder")


def test_what_goes_wrong_in_an_engine_leaves_the_pool_usable(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device()
    pool = pool_on(device, bundle, monkeypatch, 0)
    with pytest.raises(BackendError, match="broke"), pool.engine("denoiser"):
        raise BackendError("it broke")
    assert device.open == []
    with pytest.raises(BundleError, match="no component 'controlnet'"):
        use(pool, "controlnet")
    use(pool, "denoiser")


def test_what_is_idle_is_closed_when_asked(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device()
    pool = pool_on(device, bundle, monkeypatch, None)
    use(pool, *SIZES)
    pool.keep("conditioner")
    with pool.engine("denoiser"):
        assert pool.close_idle(lambda name: name != "vae_decoder")
    assert set(device.open) == {"conditioner", "vae_decoder", "denoiser"}
    assert not pool.close_idle(lambda name: name == "text_encoder")
