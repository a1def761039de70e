"""What is special about each family on the host side: one file each, found here by the name that manifests have."""

from __future__ import annotations

from zimgkit.engines.bundle import MANIFEST, Manifest
from zimgkit.engines.errors import BundleError
from zimgkit.runtime.families.base import Family
from zimgkit.runtime.families.qwen_image import QwenImage
from zimgkit.runtime.families.z_image import ZImage

__all__ = ["FAMILIES", "Family", "family", "family_of"]

FAMILIES: dict[str, type[Family]] = {family.NAME: family for family in (ZImage, QwenImage)}


def family(name: str) -> type[Family]:
    """The class of a family.

    Raises:
        BundleError: this zimgkit does not know it.
    """
    if name not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise BundleError(f"the bundle is of family {name!r}, and this zimgkit knows {known}", "upgrade zimgkit")
    return FAMILIES[name]


def family_of(manifest: Manifest, where: str = MANIFEST) -> Family:
    """The host side of a bundle's checkpoint.

    Args:
        manifest: the bundle's.
        where: its file, for messages.

    Raises:
        BundleError: this zimgkit does not know its family.
        CheckpointError: its configs are not those of such a checkpoint.
    """
    return family(manifest.family)(manifest.config, where)
