"""``zimg-run preprocess``: a control picture of a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zimgkit.engines.errors import UsageError
from zimgkit.runtime.pictures.control_maps import CANNY, KINDS, Way, canny, mapped
from zimgkit.runtime.pictures.reading import read_picture
from zimgkit.runtime.pictures.saving import check_target, save


def preprocess(
    name: str, source: Path, output: Path, *, low: float | None, high: float | None, onnx: Path | None, way: Way
) -> dict[str, Any]:
    """Make a control picture.

    Args:
        name: :data:`CANNY`, or one of :data:`KINDS`.
        source: the picture.
        output: the file; one that exists is replaced.
        low: of canny's thresholds; 100 when None.
        high: likewise; 200.
        onnx: the file that makes it, of all but canny.
        way: how that is used.

    Returns:
        ``path``, ``width`` and ``height``.

    Raises:
        UsageError: the picture cannot be read, or an option is for another one; see :mod:`.pictures.control_maps`.
        OutputError: the file cannot be written.
    """
    check_target(output)
    if name == CANNY and (onnx is not None or way != Way()):
        raise UsageError("canny takes no ONNX file", f"name what it makes: {', '.join(KINDS)}")
    if name != CANNY and onnx is None:
        raise UsageError(f"nothing makes {name} without an ONNX file", "name yours with --onnx")
    if name != CANNY and (low is not None or high is not None):
        raise UsageError(f"--low and --high are canny's, not {name}'s", "leave them out")
    picture = read_picture(source)
    if onnx is None:
        made = canny(picture, 100 if low is None else low, 200 if high is None else high)
    else:
        made = mapped(picture, name, onnx, way)
    save(made, output)
    return {"path": str(output), "width": made.width, "height": made.height}
