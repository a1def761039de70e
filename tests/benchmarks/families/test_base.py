from __future__ import annotations

from inspect import signature

import diffusers
import families
import pytest

from zimgkit.export.networks.registry import FAMILIES, sources


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_that_is_exported_can_be_measured(name):
    family, row = families.family(name), FAMILIES[name]
    assert (family.pipeline, family.configs["transformer"]["_class_name"]) == row.classes[:2]
    assert family.shards.keys() == {*sources(name)} == family.mid_size.keys()
    assert family.configs.keys() == {*sources(name), "scheduler"}
    transformer = family.configs["transformer"]
    assert {family.depth, family.text_width} <= transformer.keys() & family.tiny.keys()
    assert family.tiny.keys() <= transformer.keys()
    vae = getattr(diffusers, family.configs["vae"]["_class_name"])
    assert family.mid_size["vae"].keys() <= signature(vae).parameters.keys()
