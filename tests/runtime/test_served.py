"""Calls that compiled engines serve, and calls that they do not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import handmade
from zimgkit.engines.bundle import Bundle, CompiledEngine, Component, Range
from zimgkit.engines.errors import UsageError
from zimgkit.runtime.served import check_served, largest_batch


def bundle_with(root: Path, *profiles: dict[str, Range], backend: str = "tensorrt") -> Bundle:
    engine = CompiledEngine("denoiser", "x.plan", backend, "tensorrt", "11", "sm90", "0", profiles)
    components = {"denoiser": Component(("w.safetensors",), {"float32": "d.onnx"}), "vae_decoder": Component(())}
    return Bundle(root, handmade.manifest(components=components, engines=(engine,)))


STATIC: dict[str, Range] = {"batch": (1, 1, 4), "image_tokens": (4096, 4096, 4096), "text_tokens": (1, 128, 512)}
SPAN: dict[str, Range] = {"batch": (1, 1, 2), "image_tokens": (256, 4096, 9216), "text_tokens": (1, 128, 512)}


@pytest.mark.parametrize("image_tokens", [256, 1024, 4096, 9216])
@pytest.mark.parametrize("text_tokens", [1, 77, 512])
def test_what_a_span_holds_is_served(tmp_path: Path, image_tokens: int, text_tokens: int) -> None:
    sides = {"image_tokens": image_tokens, "text_tokens": text_tokens, "height": 128}
    check_served(bundle_with(tmp_path, STATIC, SPAN), "tensorrt", ["denoiser"], sides, 1024, 1024)


@pytest.mark.parametrize(
    ("profiles", "sides"),
    [
        ((STATIC,), {"image_tokens": 4097, "text_tokens": 5}),
        ((STATIC,), {"image_tokens": 1024, "text_tokens": 5}),
        ((STATIC,), {"image_tokens": 4096, "text_tokens": 513}),
        ((STATIC, SPAN), {"image_tokens": 9217, "text_tokens": 5}),
        ((STATIC, SPAN), {"image_tokens": 255, "text_tokens": 5}),
    ],
)
def test_what_no_profile_holds_is_refused(
    tmp_path: Path, profiles: tuple[dict[str, Range], ...], sides: dict[str, int]
) -> None:
    with pytest.raises(UsageError) as caught:
        check_served(bundle_with(tmp_path, *profiles), "tensorrt", ["denoiser"], sides, 1536, 1024)
    message = str(caught.value)
    assert f"image_tokens {sides['image_tokens']}" in message
    assert "image_tokens 4096" in message and "text_tokens 1…512" in message
    assert f"zimg-export compile {tmp_path} --size 1536x1024" in message


def test_other_backends_and_components_without_engines_are_not_asked(tmp_path: Path) -> None:
    check_served(bundle_with(tmp_path, STATIC), "onnxruntime", ["denoiser"], {"image_tokens": 1}, 16, 16)
    check_served(
        bundle_with(tmp_path, STATIC, backend="tensorrt-rtx"), "tensorrt", ["denoiser"], {"image_tokens": 1}, 16, 16
    )


def test_the_batch_is_what_every_profile_takes(tmp_path: Path) -> None:
    assert largest_batch(bundle_with(tmp_path, STATIC), "denoiser", "tensorrt") == 4
    assert largest_batch(bundle_with(tmp_path, STATIC, SPAN), "denoiser", "tensorrt") == 2
    assert largest_batch(bundle_with(tmp_path, STATIC), "denoiser", "onnxruntime") == 1
    assert largest_batch(bundle_with(tmp_path, STATIC), "vae_decoder", "tensorrt") == 1
