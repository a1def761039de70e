"""The layer over CUDA's runtime, against an imitation of it; and the calls it makes, against the real bindings."""

from __future__ import annotations

import re
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from tests import fake_tensorrt
from tests.fake_tensorrt import Machine, Misuse
from zimgkit.engines.errors import BackendError, OutOfMemoryError, install
from zimgkit.engines.tensorrt import cuda


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return fake_tensorrt.install(monkeypatch, gpus=2)


def test_the_calls_exist_in_the_real_bindings():
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
    text = Path(cuda.__file__).read_text()
    called = set(re.findall(r'_call\(\s*"(\w+)"', text)) | set(re.findall(r"\bruntime\(?\)?\.(cuda\w+)", text))
    assert len(called) > 20
    for name in called:
        assert hasattr(runtime, name), name
    for kind, member in re.findall(r"runtime\(?\)?\.(cuda\w+)\.(cuda\w+)", text):
        assert hasattr(getattr(runtime, kind), member), member
    for member in re.findall(r"kinds\.(\w+)", text):
        assert hasattr(runtime.cudaDeviceAttr, member)
    assert runtime.cudaStreamNonBlocking == 1
    # What the imitation numbers is numbered so there.
    for error in fake_tensorrt.Error:
        assert getattr(runtime.cudaError_t, error.name).value == error


def test_on_a_machine_without_a_driver_the_real_bindings_say_so():
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
    if runtime.cudaDriverGetVersion()[1]:
        pytest.skip("there is a driver")
    with pytest.raises(BackendError, match="there is no NVIDIA driver; install one, or use --backend onnxruntime"):
        cuda.open_device()


class TestDevices:
    @pytest.mark.parametrize("index", [0, 1])
    def test_found(self, machine, index):
        assert cuda.open_device(index) == cuda.Device(index, "sm90", "Imitation GPU")
        assert machine.current == index

    @pytest.mark.parametrize(("capability", "name"), [((8, 9), "sm89"), ((12, 0), "sm120")])
    def test_architecture(self, machine, capability, name):
        machine.capability = capability
        assert cuda.open_device().architecture == name

    @pytest.mark.parametrize(
        ("lack", "message"),
        [
            ({"driver": 0}, "there is no NVIDIA driver; install one, or use --backend onnxruntime --device cpu"),
            (
                {"driver": 12040},
                "the NVIDIA driver serves CUDA up to 12.4, and cuda-bindings is of 13.0; "
                "update the driver, or install TensorRT and cuda-bindings for CUDA 12",
            ),
            (
                {"gpus": 0},
                "there is no NVIDIA GPU; "
                "check nvidia-smi and CUDA_VISIBLE_DEVICES, or use --backend onnxruntime --device cpu",
            ),
            (
                {"fail": {"cudaGetDeviceCount": 999}},
                "CUDA does not start: cudaErrorUnknown; check nvidia-smi, or use --backend onnxruntime --device cpu",
            ),
            ({}, "there is no device cuda:2; choose one of cuda:0, cuda:1"),
        ],
    )
    def test_missing(self, machine, lack, message):
        for name, value in lack.items():
            setattr(machine, name, value)
        with pytest.raises(BackendError) as caught:
            cuda.open_device(2)
        assert str(caught.value) == message

    def test_without_the_bindings(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "cuda", None)
        monkeypatch.setitem(sys.modules, "cuda.bindings", None)
        with pytest.raises(BackendError, match=rf"bindings are not installed; {re.escape(install('tensorrt'))}"):
            cuda.open_device()

    def test_memory(self, machine):
        cuda.open_device()
        before, total = cuda.memory()
        buffer = cuda.DeviceBuffer(1000)
        assert cuda.memory() == (before - 1000, total)
        buffer.free()
        buffer.free()
        assert cuda.memory() == (before, total)


class TestMemory:
    @pytest.fixture(autouse=True)
    def _device(self, machine):
        cuda.open_device()

    def test_there_and_back(self, machine):
        stream, size = cuda.Stream(), 24
        host, device, back = cuda.PinnedBuffer(size), cuda.DeviceBuffer(size), cuda.PinnedBuffer(size + 8)
        values = np.arange(6, dtype=np.float32).reshape(2, 3)
        host.view((2, 3), values.dtype)[...] = values
        stream.to_device(device.address, host.address, size)
        stream.to_host(back.address, device.address, size)
        found = back.view((2, 3), values.dtype)
        assert not np.array_equal(found, values)
        stream.synchronize()
        np.testing.assert_array_equal(found, values)
        for buffer in (host, device, back):
            buffer.free()
            buffer.free()
        stream.close()
        stream.close()
        assert not machine.leaks

    def test_on_the_device_and_read(self, machine):
        stream, values = cuda.Stream(), np.arange(6, dtype=np.float32)
        host, first, second = cuda.PinnedBuffer(24), cuda.DeviceBuffer(24), cuda.DeviceBuffer(24)
        host.view((6,), values.dtype)[...] = values
        stream.to_device(first.address, host.address, 24)
        stream.on_device(second.address, first.address, 24)
        stream.synchronize()
        found = np.zeros((2, 3), np.float32)
        cuda.read(second.address, found)
        np.testing.assert_array_equal(found, values.reshape(2, 3))

    @pytest.mark.parametrize(("shape", "kind"), [((), np.int64), ((3,), np.bool_), ((2, 0, 3), np.float32)])
    def test_views(self, shape, kind):
        view = cuda.PinnedBuffer(64).view(shape, np.dtype(kind))
        assert (view.shape, view.dtype) == (shape, kind)
        view[...] = 1
        assert (view == 1).all()

    def test_out_of_device_memory(self, machine):
        machine.memory = 3 << 30
        with pytest.raises(OutOfMemoryError) as caught:
            cuda.DeviceBuffer(5 << 30)
        assert str(caught.value) == (
            "the GPU is out of memory: 5.00 GiB more are needed, 3.00 of 3.00 are free; ask for a smaller picture, "
            "free the device's memory, compile with a --weight-streaming-budget and run with --memory, "
            "or use a bundle of lower precision"
        )

    def test_out_of_pinned_memory(self, machine):
        machine.fail["cudaMallocHost"] = 2
        with pytest.raises(OutOfMemoryError, match="cudaMallocHost: cudaErrorMemoryAllocation; ask for a smaller"):
            cuda.PinnedBuffer(100)

    def test_a_failure_on_the_device(self, machine):
        stream = cuda.Stream()
        machine.fail["cudaStreamSynchronize"] = 700
        with pytest.raises(BackendError, match="cudaStreamSynchronize failed: cudaErrorIllegalAddress; start"):
            stream.synchronize()

    def test_freeing_after_a_failure_says_nothing(self, machine):
        device, host, stream = cuda.DeviceBuffer(8), cuda.PinnedBuffer(8), cuda.Stream()
        machine.fail |= dict.fromkeys(["cudaFree", "cudaFreeHost", "cudaStreamDestroy"], 700)
        device.free()
        host.free()
        stream.close()


class TestGraphs:
    @pytest.fixture(autouse=True)
    def _device(self, machine):
        cuda.open_device()

    @pytest.fixture
    def stream(self):
        return cuda.Stream()

    def test_replay(self, stream, machine):
        """What was recorded is done once for each launch, and not when it is recorded."""
        host, device = cuda.PinnedBuffer(8), cuda.DeviceBuffer(8)
        view = host.view((2,), np.dtype(np.float32))
        view[...] = 1, 2
        graph = stream.capture(lambda: stream.to_device(device.address, host.address, 8))
        back = cuda.PinnedBuffer(8)
        for values in ([1, 2], [3, 4]):
            view[...] = values
            stream.launch(graph)
            stream.to_host(back.address, device.address, 8)
            stream.synchronize()
            np.testing.assert_array_equal(back.view((2,), np.dtype(np.float32)), values)
        graph.close()
        graph.close()
        assert not machine.executables
        assert not machine.graphs

    def test_what_fails_while_it_is_recorded_ends_the_recording(self, stream, machine):
        with pytest.raises(KeyboardInterrupt):
            stream.capture(lambda: (_ for _ in ()).throw(KeyboardInterrupt))
        stream.synchronize()
        assert not machine.graphs

    @pytest.mark.parametrize("name", ["cudaStreamEndCapture", "cudaGraphInstantiate", "cudaStreamBeginCapture"])
    def test_what_cannot_be_recorded(self, stream, machine, name):
        machine.fail[name] = 900
        with pytest.raises(BackendError, match=f"{name} failed: cudaErrorStreamCaptureUnsupported"):
            stream.capture(lambda: None)
        assert not machine.graphs


class TestTheImitation:
    """It notices what a GPU would answer with a wrong picture or a crash."""

    @pytest.fixture(autouse=True)
    def _device(self, machine):
        cuda.open_device()

    def test_use_after_free(self):
        stream, host, device = cuda.Stream(), cuda.PinnedBuffer(8), cuda.DeviceBuffer(8)
        address = device.address
        device.free()
        with pytest.raises(Misuse, match="was freed"):
            stream.to_device(address, host.address, 8)

    def test_a_copy_that_leaves_its_buffer(self):
        stream, host, device = cuda.Stream(), cuda.PinnedBuffer(16), cuda.DeviceBuffer(8)
        with pytest.raises(Misuse, match=r"16 bytes at .* leave their buffer"):
            stream.to_device(device.address, host.address, 16)

    def test_an_address_of_the_host(self):
        stream, host = cuda.Stream(), cuda.PinnedBuffer(8)
        with pytest.raises(Misuse, match="not on the device"):
            stream.to_device(host.address, host.address, 8)

    def test_freeing_what_is_in_use(self):
        stream, host, device, other = cuda.Stream(), cuda.PinnedBuffer(8), cuda.DeviceBuffer(8), cuda.DeviceBuffer(8)
        stream.to_device(device.address, host.address, 8)
        other.free()
        for buffer in (device, host):
            with pytest.raises(Misuse, match="freed while work is under way"):
                buffer.free()

    def test_memory_in_the_midst_of_a_recording(self):
        """Of the thread that records; others go on."""
        stream, device = cuda.Stream(), cuda.DeviceBuffer(8)

        def elsewhere() -> None:
            cuda.use(0)
            cuda.DeviceBuffer(8).free()

        def enqueue() -> None:
            thread = threading.Thread(target=elsewhere)
            thread.start()
            thread.join()
            with pytest.raises(Misuse, match="memory is allocated while a stream captures"):
                cuda.DeviceBuffer(8)
            with pytest.raises(Misuse, match="memory is freed while a stream captures"):
                device.free()

        assert stream.capture(enqueue).executable is not None

    def test_a_graph_of_freed_memory(self):
        stream, host, device = cuda.Stream(), cuda.PinnedBuffer(8), cuda.DeviceBuffer(8)
        graph = stream.capture(lambda: stream.to_device(device.address, host.address, 8))
        device.free()
        stream.launch(graph)
        with pytest.raises(Misuse, match="was freed"):
            stream.synchronize()

    def test_before_a_device_is_chosen(self, monkeypatch):
        fake_tensorrt.install(monkeypatch)
        with pytest.raises(Misuse, match="before a device was chosen"):
            cuda.DeviceBuffer(8)
