"""What a command says where the packages of its extra are missing."""

from __future__ import annotations

import pytest

from zimgkit.engines.errors import ZimgError
from zimgkit.export.cli.extras import need, need_export


def test_packages_that_are_there():
    need_export()


def test_packages_that_are_missing():
    with pytest.raises(ZimgError) as caught:
        need("flying", ("json", "wings_of_nowhere", "tail_of_nowhere"), "plane")
    assert (
        str(caught.value)
        == "flying needs wings_of_nowhere, tail_of_nowhere; in a clone of zimgkit: pip install '.[plane]'"
    )
