"""A model folder for NVIDIA Triton's Python backend.

Source: https://docs.nvidia.com/deeplearning/triton-inference-server/user-guide/docs/user_guide/model_configuration.html.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

from zimgkit.engines.bundle import Bundle, atomic_folder
from zimgkit.engines.errors import UsageError
from zimgkit.runtime.parameters import PARAMETERS, ControlPicture, Parameter, Picture

CONFIG = "config.pbtxt"
KINDS = ("gpu", "cpu")
"""An instance on each GPU, or one on the CPU."""
TYPES: dict[type, str] = {
    str: "TYPE_STRING",
    Picture: "TYPE_STRING",
    ControlPicture: "TYPE_STRING",
    int: "TYPE_INT64",
    float: "TYPE_FP64",
    tuple: "TYPE_FP64",
    bool: "TYPE_BOOL",
}
"""A parameter's type -> that of its tensor. Doubles, so that a request says the number that Python would."""
OUTPUTS = ("images", "parameters")


def write_model(
    bundle: Path,
    out: Path,
    *,
    kind: str = KINDS[0],
    backend: str = "auto",
    memory: str = "auto",
    bundle_on_server: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write the folder of one model: its configuration and the code that draws.

    Args:
        bundle: the bundle, which is not copied.
        out: the folder, called as clients call the model; what it lies in is the model repository.
        kind: ``"gpu"`` or ``"cpu"``.
        backend: as for :meth:`zimgkit.runtime.Pipeline.open`.
        memory: likewise, of each instance.
        bundle_on_server: where the bundle lies there, a relative path within ``out``; by default where it lies here.
        overwrite: replace a model that is there.

    Raises:
        BundleError: it is no bundle.
        UsageError: a path cannot be written into the configuration.
        OutputError: the folder exists or cannot be written.
    """
    Bundle.open(bundle, verify=False)
    place = bundle_on_server or str(bundle.expanduser().absolute())
    if not place.isprintable():
        raise UsageError(f"{place!r} cannot be written into {CONFIG}", "name a path of printable characters")
    text = config({"bundle": place, "backend": backend, "memory": memory}, kind)
    code = resources.files("zimgkit.export.serving").joinpath("triton_model.py").read_text("utf-8")
    with atomic_folder(out.expanduser().absolute(), overwrite=overwrite, known_by=CONFIG) as folder:
        (folder / CONFIG).write_text(text, "utf-8")
        (folder / "1").mkdir()
        (folder / "1" / "model.py").write_text(code, "utf-8")


def config(settings: dict[str, str], kind: str) -> str:
    """A model's configuration, in protobuf's text form. It has no name: the folder's is taken.

    Args:
        settings: what the model's code is told.
        kind: ``"gpu"`` or ``"cpu"``.
    """
    lines = ['backend: "python"', "max_batch_size: 0  # One request after the other."]
    for parameter in PARAMETERS:
        if parameter.name != "output_type":
            lines.append("input { " + " ".join(_input(parameter)) + " }")
    lines += [f'output {{ name: "{name}" data_type: TYPE_STRING dims: -1 }}' for name in OUTPUTS]
    lines.append(f"instance_group {{ kind: KIND_{kind.upper()} count: 1 }}")
    for key, value in settings.items():
        text = json.dumps(value, ensure_ascii=False)
        lines.append(f'parameters {{ key: "{key}" value {{ string_value: {text} }} }}')
    return "\n".join(lines) + "\n"


def _input(parameter: Parameter) -> Iterator[str]:
    many = parameter.several or parameter.type is tuple
    yield f'name: "{parameter.name}"'
    yield f"data_type: {TYPES[parameter.type]}"
    yield f"dims: {-1 if many else 1}"
    yield "optional: true"
