"""Imitations of ONNX Runtime's CUDA provider and of its TensorRT for RTX plugin, for machines that have no GPU.

Sessions run on the CPU, and the memory of the device is the host's.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import onnxruntime
import pytest

from zimgkit.engines.onnxruntime import tensorrt_rtx

OFFLINE = ["AzureExecutionProvider", "CPUExecutionProvider"]
NAME = "NvTensorRTRTXExecutionProvider"


def resident() -> int:
    """Bytes of the process in memory, without what glibc keeps of what was freed."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class FakeCuda:
    """The CUDA provider, imitated: sessions are on the CPU, and so is the device's memory."""

    PROVIDER = "CUDAExecutionProvider"

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.options: list[Any] = []
        self.places: list[tuple[Any, ...]] = []
        session, value = onnxruntime.InferenceSession, onnxruntime.OrtValue

        def open_session(
            path: str, options: Any, *, providers: Any, enable_fallback: int, disabled_optimizers: Any
        ) -> Any:
            (name, given), rest = providers
            assert (name, rest, enable_fallback) == (self.PROVIDER, "CPUExecutionProvider", 0)
            assert disabled_optimizers == []
            self.options.append(given)
            made = session(path, options, providers=["CPUExecutionProvider"])
            made.get_providers = lambda: [name, rest]
            return made

        def on_cpu(create: Any) -> Any:
            def create_there(*given: Any) -> Any:
                self.places.append(given[-2:])
                return create(*given[:-2])

            return create_there

        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [self.PROVIDER, *OFFLINE])
        monkeypatch.setattr(onnxruntime, "InferenceSession", open_session)
        monkeypatch.setattr(value, "ortvalue_from_shape_and_type", on_cpu(value.ortvalue_from_shape_and_type))


class FakeCann(FakeCuda):
    """The CANN provider of Huawei's NPUs, likewise."""

    PROVIDER = "CANNExecutionProvider"


def gpu(**metadata: str) -> Any:
    known = {"device_id": "0", "target_architecture": "sm89", "version": "0.5.0"} | metadata
    return SimpleNamespace(ep_name=NAME, ep_metadata=known, ep_options={})


class FakePlugin:
    """The plugin, imitated: it accepts the GPUs it is told to, and its sessions run on the CPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gpus = [gpu()]
        self.hardware: list[Any] = []
        self.fails: Exception | None = None
        self.opened: list[Any] = []
        """Of each session: the path, the device, the provider's options, and the dimensions that were fixed."""
        self.places: list[Any] = []
        self.profiles: list[str] = []
        module = ModuleType(tensorrt_rtx.PLUGIN)
        module.__dict__.update(
            __version__="0.5.0", __file__="/nowhere/__init__.py",
            get_ep_name=lambda: NAME, get_library_path=lambda: "/nowhere/libplugin.so",
        )  # fmt: skip
        monkeypatch.setitem(sys.modules, tensorrt_rtx.PLUGIN, module)
        monkeypatch.setattr(onnxruntime, "register_execution_provider_library", self._register)
        cpu = SimpleNamespace(ep_name="CPUExecutionProvider", ep_metadata={}, ep_options={})
        monkeypatch.setattr(onnxruntime, "get_ep_devices", lambda: [cpu, *self.gpus])
        binding = onnxruntime.capi._pybind_state
        monkeypatch.setattr(binding, "get_hardware_devices", lambda: self.hardware)
        monkeypatch.setattr(
            binding, "get_hardware_device_ep_incompatibility_details", lambda name, gpu: {"notes": gpu.notes}
        )
        monkeypatch.setattr(onnxruntime, "SessionOptions", self._options())
        session = onnxruntime.InferenceSession
        monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *given, **more: self._open(session, *given, **more))
        value = onnxruntime.OrtValue
        create = value.ortvalue_from_shape_and_type
        monkeypatch.setattr(value, "ortvalue_from_shape_and_type", self._on_cpu(create))

    def _register(self, name: str, path: str) -> None:
        assert (name, path) == (NAME, "/nowhere/libplugin.so")
        if self.fails:
            raise self.fails

    def _options(self) -> type:
        class Options(onnxruntime.SessionOptions):
            def __init__(self) -> None:
                super().__init__()
                self.fixed: dict[str, int] = {}

            def add_session_config_entry(self, key: str, value: str) -> None:
                assert (key, value) == ("session.disable_cpu_ep_fallback", "1")

            def add_free_dimension_override_by_name(self, name: str, size: int) -> None:
                self.fixed[name] = size
                super().add_free_dimension_override_by_name(name, size)

            def add_provider_for_devices(self, devices: Any, options: dict[str, str]) -> None:
                assert all(isinstance(value, str) for value in options.values())
                self.devices, self.given = devices, options

        return Options

    def _open(self, session: Any, path: str, options: Any, *, enable_fallback: int) -> Any:
        assert enable_fallback == 0
        self.opened.append((Path(path).name, options.devices, options.given, options.fixed))
        made = session(path, options)
        run = made.run_with_iobinding

        def record(binding: Any, run_options: Any) -> Any:
            with_index = "nv_profile_index" in (known := _entries(run_options))
            self.profiles.append(known["nv_profile_index"] if with_index else "")
            return run(binding, run_options)

        made.run_with_iobinding = record
        return made

    def _on_cpu(self, create: Any) -> Any:
        def create_there(*given: Any) -> Any:
            self.places.append(given[-2:])
            return create(*given[:-2])

        return create_there


def _entries(run_options: Any) -> dict[str, str]:
    try:
        return {"nv_profile_index": run_options.get_run_config_entry("nv_profile_index")}
    except Exception:
        return {}
