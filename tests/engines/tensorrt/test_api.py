"""Which TensorRT is found, and what is kept of what it says."""

from __future__ import annotations

import importlib
import re
import sys
from types import ModuleType, SimpleNamespace

import pytest

from tests import fake_tensorrt
from zimgkit.engines.errors import BackendError, install
from zimgkit.engines.tensorrt import api as tensorrt_api


@pytest.fixture
def missing(monkeypatch):
    """Neither is installed."""
    for name in tensorrt_api.MODULES:
        monkeypatch.setitem(sys.modules, name, None)


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """``modules(name=source)``: packages of these names, and no others of TensorRT's."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), *(path for path in sys.path if "trt" not in path)])
    monkeypatch.setattr(sys, "path_importer_cache", {})

    def make(**sources: str) -> None:
        for name in tensorrt_api.MODULES:
            monkeypatch.delitem(sys.modules, name, raising=False)
            if name not in sources:
                monkeypatch.setitem(sys.modules, name, None)
        for name, source in sources.items():
            (tmp_path / f"{name}.py").write_text(source)
        importlib.invalidate_caches()

    yield make
    for name in tensorrt_api.MODULES:
        sys.modules.pop(name, None)


def test_the_first_one_is_used(modules):
    modules(tensorrt="__version__ = '11.4.0.106'", tensorrt_rtx="__version__ = '1.7'")
    module = tensorrt_api.load()
    assert (tensorrt_api.name(module), tensorrt_api.version(module)) == ("tensorrt", "11.4.0.106")


def test_the_other_one_serves_as_well(modules):
    modules(tensorrt_rtx="__version__ = '1.7'")
    module = tensorrt_api.load()
    assert (tensorrt_api.name(module), tensorrt_api.version(module)) == ("tensorrt_rtx", "1.7")


def test_neither_is_installed(missing):
    with pytest.raises(BackendError) as caught:
        tensorrt_api.load()
    assert str(caught.value).startswith(f"TensorRT is not installed; {install('tensorrt')}, or for a GeForce")


def test_something_it_needs_is_missing(modules):
    modules(tensorrt="import tensorrt_libs_of_nowhere", tensorrt_rtx="")
    with pytest.raises(BackendError, match=rf"needs tensorrt_libs_of_nowhere; {re.escape(install('tensorrt'))}"):
        tensorrt_api.load()


@pytest.mark.parametrize("kind", ["ImportError", "OSError"])
def test_its_libraries_do_not_load(modules, kind):
    modules(tensorrt=f"raise {kind}('libnvinfer.so.11: cannot open\\n  shared object file')")
    with pytest.raises(BackendError) as caught:
        tensorrt_api.load()
    said = "does not load: libnvinfer.so.11: cannot open shared object file; install it again"
    assert str(caught.value) == f"tensorrt is installed, and {said}"


def severities() -> ModuleType:
    module = ModuleType("tensorrt")
    levels = SimpleNamespace(INTERNAL_ERROR=0, ERROR=1, WARNING=2, INFO=3, VERBOSE=4)
    module.ILogger = type("ILogger", (), vars(levels))  # type: ignore[attr-defined]
    return module


def check_log(module: ModuleType) -> None:
    levels = module.ILogger
    log = tensorrt_api.make_logger(module)
    log.log(levels.ERROR, "no\n  kernel")
    log.log(levels.INTERNAL_ERROR, "broken")
    log.log(levels.WARNING, "slow\tlayer")
    log.log(levels.WARNING, "CUDA lazy loading is not enabled. Enabling it can …")
    log.log(levels.WARNING, "Make sure input x has Int64 binding.")
    log.log(levels.INFO, "Name: a, LayerType: kgen, …")
    log.log(levels.VERBOSE, "Layers:\nName: b, LayerType: gemm, …\n\nBindings:\nName: c, LayerType: kgen\n")
    log.log(levels.VERBOSE, "Building took 3 s")
    assert log.errors == ["no kernel", "broken"]
    assert log.warnings == ["slow layer"]
    assert log.layers == ["Name: a, LayerType: kgen, …", "Name: b, LayerType: gemm, …", "Name: c, LayerType: kgen"]


def test_what_it_says_is_kept(capfd):
    check_log(severities())
    assert capfd.readouterr() == ("", "")


def test_each_logger_has_its_own_lines():
    module = severities()
    first, second = tensorrt_api.make_logger(module), tensorrt_api.make_logger(module)
    first.log(module.ILogger.ERROR, "x")
    assert (first.errors, second.errors) == (["x"], [])


def test_the_real_logger(compiler, capfd):
    check_log(compiler)
    module = tensorrt_api.load()
    assert tensorrt_api.name(module) == "tensorrt_rtx"
    assert tensorrt_api.version(module)[0].isdigit()
    assert capfd.readouterr() == ("", "")


def test_the_imitation_is_found(monkeypatch):
    """The tests of the backends put it in the place of the real one."""
    fake_tensorrt.install(monkeypatch, compiler="tensorrt_rtx")
    assert tensorrt_api.version(tensorrt_api.load()) == fake_tensorrt.VERSION
