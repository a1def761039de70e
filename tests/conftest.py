"""Checkpoints and bundles that several test files use, made once for all workers."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from filelock import FileLock

# One thread each for torch and numpy: the workers share the cores. Read when those are first imported.
for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A folder all workers of this run see."""
    base = tmp_path_factory.getbasetemp()
    return base if worker_id == "master" else base.parent


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, shared_folder: Path) -> None:
    """Keep the tests out of the user's cache, and off the network; each network is traced once for all workers."""
    cache = tmp_path_factory.mktemp("cache")
    (cache / "zimgkit").mkdir()
    (cache / "zimgkit" / "traces").symlink_to(shared_folder / "traces", target_is_directory=True)
    (shared_folder / "traces").mkdir(exist_ok=True)
    os.environ["XDG_CACHE_HOME"] = str(cache)
    os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def checkpoint_of(shared_folder: Path) -> Callable[..., Path]:
    """``checkpoint_of(family, seed=0, **overrides)``: the folder of a tiny reference pipeline, saved once."""

    def make(family: str, seed: int = 0, **overrides: Any) -> Path:
        from tests import reference

        folder = shared_folder / f"checkpoint-{_key(family, seed, overrides)}"
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                reference.save(reference.FAMILIES[family](seed, **overrides), folder)
        return folder

    return make


@pytest.fixture(scope="session")
def bundle_of(shared_folder: Path, checkpoint_of: Callable[..., Path]) -> Callable[..., Path]:
    """``bundle_of(family, precision="fp32", seed=0, tasks=(), cut=False, **overrides)``: its bundle, built once."""

    def make(
        family: str,
        precision: str = "fp32",
        seed: int = 0,
        tasks: tuple[str, ...] = (),
        *,
        cut: bool = False,
        **overrides: Any,
    ) -> Path:
        from zimgkit.export.build import build

        name = "-".join(["cut" if cut else "bundle", precision, *tasks, _key(family, seed, overrides)])
        folder = shared_folder / name
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                checkpoint = str(checkpoint_of(family, seed, **overrides))
                build(checkpoint, folder, precision=precision, tasks=tasks, cut_denoiser=cut)
        return folder

    return make


@pytest.fixture(scope="session")
def recorded_checkpoint_of(shared_folder: Path) -> Callable[[str], Path]:
    """``recorded_checkpoint_of(name)``: the checkpoint of that name in ``tests/references``, written once."""

    def make(name: str) -> Path:
        from tests.references import checkpoints

        folder = shared_folder / f"recorded-{name}"
        with FileLock(f"{folder}.lock"):
            return folder if folder.exists() else checkpoints.write(name, folder)

    return make


@pytest.fixture(scope="session")
def recorded_i2l_of(shared_folder: Path, recorded_checkpoint_of: Callable[[str], Path]) -> Callable[[str], Path]:
    """``recorded_i2l_of(name)``: the folder of what makes LoRAs of pictures for that checkpoint, written once."""

    def make(name: str) -> Path:
        from tests.references import checkpoints

        folder = shared_folder / f"recorded-{name}-i2l"
        with FileLock(f"{folder}.lock"):
            return folder if folder.exists() else checkpoints.write_i2l(recorded_checkpoint_of(name), folder)

    return make


@pytest.fixture(scope="session")
def recorded_bundle_of(shared_folder: Path, recorded_checkpoint_of: Callable[[str], Path]) -> Callable[..., Path]:
    """``recorded_bundle_of(name, tasks=(), lora="")``: that checkpoint's bundle in float32, built once."""

    def make(name: str, tasks: tuple[str, ...] = (), lora: str = "") -> Path:
        from tests.references import checkpoints
        from zimgkit.export.build import build

        checkpoint = recorded_checkpoint_of(name)
        folder = shared_folder / "-".join(["recorded-bundle", name, *tasks, lora]).rstrip("-").replace(" ", "-")
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                file = folder.with_suffix(".safetensors")
                loras = [str(checkpoints.write_lora(lora, checkpoint, file))] if lora else []
                nets = [*map(str, sorted((checkpoint / "controlnet").glob("*.safetensors")))]
                build(str(checkpoint), folder, precision="fp32", tasks=tasks, loras=loras, controlnets=nets)
        return folder

    return make


@pytest.fixture(scope="session")
def quantized_of(
    shared_folder: Path, checkpoint_of: Callable[..., Path], bundle_of: Callable[..., Path]
) -> Callable[[str, str], Path]:
    """``quantized_of(family, precision)``: a quantized bundle of that checkpoint; all precisions are built together.

    Every linear that a rule for deep networks does not keep is quantized; the calibration lies beside.
    """

    def make(family: str, precision: str) -> Path:
        from tests import quantized
        from zimgkit.engines.bundle import Bundle
        from zimgkit.export import build
        from zimgkit.export.quantization.calibrate import calibrate

        folder = shared_folder / f"quantized-{family}"
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                part = shared_folder / f"quantized-{family}.part"
                store = part / "statistics.calibration.safetensors"
                part.mkdir()
                statistics = calibrate(Bundle.open(bundle_of(family, "bf16")), quantized.PLAN, store, device="cpu")
                for name in quantized.PRECISIONS:
                    quantizing = build.Quantizing(calibration=statistics)
                    build.build(str(checkpoint_of(family)), part / name, precision=name, quantization=quantizing)
                part.rename(folder)
        return folder / precision

    return make


@pytest.fixture
def torch_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """The PyTorch fallback as on a CPU that does not multiply bfloat16: with the numbers of others in float32."""
    from zimgkit.engines.torch import layers

    monkeypatch.setattr(layers, "PRODUCTS_IN_BFLOAT16", False)


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A real TensorRT compiler, which needs no GPU; the one that is used, where there is another as well."""
    from zimgkit.engines.tensorrt import api as tensorrt_api

    reason = "no TensorRT compiler here: run make test-tensorrt"
    module: ModuleType = pytest.importorskip("tensorrt_rtx", reason=reason, exc_type=ImportError)
    monkeypatch.setattr(tensorrt_api, "MODULES", ("tensorrt_rtx",))
    return module


def _key(family: str, seed: int, overrides: dict[str, Any]) -> str:
    import hashlib

    digest = hashlib.sha256(json.dumps(overrides, sort_keys=True).encode()).hexdigest()[:8]
    return f"{family}-{seed}-{digest}"
