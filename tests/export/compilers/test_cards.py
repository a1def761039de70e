"""Which precision a card gets: by name, and by the GPU that is there."""

from __future__ import annotations

import pytest

from tests.commands import invoke
from zimgkit.engines.errors import BackendError
from zimgkit.engines.tensorrt import cuda
from zimgkit.export import build
from zimgkit.export.cli.main import main
from zimgkit.export.compilers import cards
from zimgkit.export.compilers import compile as compiling
from zimgkit.export.quantization.formats import SCHEMES


@pytest.mark.parametrize(("card", "precision"), [("rtx4090", "int8"), ("h100", "fp8"), ("cpu", "int8-dynamic")])
def test_by_name(card, precision):
    assert cards.precision_for(card) == (precision, card)
    assert precision in SCHEMES


@pytest.mark.parametrize(("architecture", "precision"), [("sm89", "int8"), ("sm90", "fp8"), ("sm80", "bf16")])
def test_by_the_gpu_that_is_there(architecture, precision, monkeypatch):
    monkeypatch.setattr(cuda, "open_device", lambda: cuda.Device(0, architecture, "Some GPU"))
    assert cards.precision_for(None) == (precision, f"Some GPU, {architecture}")


@pytest.mark.parametrize(("multiplies", "precision"), [(True, "int8-dynamic"), (False, "bf16")])
def test_without_a_gpu(multiplies, precision, monkeypatch):
    def refuse():
        raise BackendError("there is no NVIDIA GPU", "check nvidia-smi")

    monkeypatch.setattr(cuda, "open_device", refuse)
    monkeypatch.setattr(cards, "adds_integers_exactly", lambda: multiplies)
    found, reason = cards.precision_for(None)
    assert found == precision and reason.startswith("there is no NVIDIA GPU")
    assert ("this CPU multiplies 8-bit integers" in reason) == multiplies


def test_the_command(monkeypatch, tmp_path):
    """What is resolved is what options are checked against."""
    asked = []
    monkeypatch.setattr(build, "build", lambda *_, **given: asked.append(given["precision"]) or 1 / 0)
    given = ("build", "--model", "x", "--out", tmp_path / "b", "--quiet")
    result = invoke(main, *given, "--precision", "auto", "--card", "rtx4090")
    assert asked == ["int8"] and result.err.startswith("precision int8: rtx4090\n")
    invoke(main, *given, "--card", "h100").assert_refused("--card is for --precision auto", 2)
    result = invoke(main, *given, "--precision", "auto", "--card", "rtx3090")
    assert result.code == 2 and "rtx3090" in result.err


@pytest.mark.parametrize("architecture", ["sm89", "sm90", "sm100", "sm120", "any"])
def test_cards_that_multiply_fp8(architecture):
    cards.check_multiplies("fp8", architecture, "Some GPU")


@pytest.mark.parametrize("precision", [name for name in SCHEMES if name != "fp8"])
def test_older_cards_take_all_else(precision):
    cards.check_multiplies(precision, "sm80", "Some GPU")


def test_a_card_without_fp8(monkeypatch, quantized_of):
    """Said before anything is compiled."""
    target = compiling.Target("tensorrt", "11.4", "sm86", "NVIDIA RTX A6000")
    monkeypatch.setattr(compiling, "find_target", lambda: target)
    with pytest.raises(BackendError, match=r"NVIDIA RTX A6000 \(sm86\) does not multiply FP8") as caught:
        compiling.compile_bundle(quantized_of("z-image", "fp8"))
    assert caught.value.hint == "build the bundle with --precision int8"


def test_a_precision_without_scales_that_stay(quantized_of):
    """Of neither compiler, and said before either is looked for."""
    for backend in ("tensorrt", "tensorrt-rtx"):
        with pytest.raises(BackendError, match="compilers need scales that stay") as caught:
            compiling.compile_bundle(quantized_of("z-image", "int8-dynamic"), backend=backend)
        assert "--precision int8," in caught.value.hint
