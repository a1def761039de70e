"""What a manifest says of denoisers in pieces."""

from __future__ import annotations

import pytest

from tests import handmade
from zimgkit.engines.bundle import CacheMask, Component, Manifest


def manifest(*names: str, **changes: object) -> Manifest:
    return handmade.manifest(components={name: Component(()) for name in names}, **changes)


def test_pieces() -> None:
    whole = ("denoiser", "denoiser.masked", "denoiser.positive")
    pieces = [f"{name}.{piece}" for name in whole[:2] for piece in ("head", "body", "tail")]
    found = manifest(*whole, *pieces, "denoiser.body.positive")
    assert found.pieces("denoiser") == ("denoiser.head", "denoiser.body", "denoiser.tail")
    assert found.pieces("denoiser.masked") == ("denoiser.masked.head", "denoiser.masked.body", "denoiser.masked.tail")
    # What LoRAs for the branch of the prompt do not touch is there once.
    assert found.pieces("denoiser.positive") == ("denoiser.head", "denoiser.body.positive", "denoiser.tail")
    assert [name for name in found.components if found.is_piece(name)] == [*pieces, "denoiser.body.positive"]
    assert manifest("denoiser", "denoiser.head").pieces("denoiser") == ()


@pytest.mark.parametrize("name", ["off", "dynamic", "101", "", "A", "x" * 65, "a b"])
def test_names_that_a_mask_cannot_have(name: str) -> None:
    with pytest.raises(ValueError, match="a cache is called"):
        manifest(caches={name: CacheMask("1")})


def test_a_mask_of_two_lengths() -> None:
    with pytest.raises(ValueError, match="of other lengths"):
        CacheMask("101", "11")
    assert CacheMask("101", "111").num_inference_steps == 3
