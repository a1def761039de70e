from __future__ import annotations

import pytest

from zimgkit.engines.errors import CheckpointError
from zimgkit.export.networks.registry import FAMILIES, sources
from zimgkit.training import families


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_that_is_exported_can_be_trained(name: str) -> None:
    family = families.family(name)
    assert family.name == name
    for component in ("pipeline", *sources(name)):
        assert family.reference_class(component).__name__ == family.classes[component].partition(".")[2]
    assert {family.reference_class(component).__name__ for component in ("pipeline", "transformer")} <= set(
        FAMILIES[name].classes
    )
    # Other runs than that of the carried model fall towards their own end alone.
    assert family.diffusion_settings.restart == 0
    assert 0 <= family.demo_restart < family.diffusion_settings.steps
    assert sum(family.crops.values()) == pytest.approx(1)


def test_another_family() -> None:
    with pytest.raises(CheckpointError, match="no family is called 'flux'"):
        families.family("flux")
