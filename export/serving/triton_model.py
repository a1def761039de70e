"""Draws pictures in NVIDIA Triton's Python backend; written by ``zimg-export triton``, and needs ``zimgkit`` there.

Inputs are the parameters of a call of ``zimgkit.runtime.Pipeline``, pictures as files' bytes. ``images`` are PNG files,
``parameters`` what made each, as text.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from zimgkit.engines.errors import CancelledError, UsageError, ZimgError
from zimgkit.runtime import Pipeline
from zimgkit.runtime.controls import PICTURES
from zimgkit.runtime.parameters import BY_NAME, ControlPicture, Picture
from zimgkit.runtime.pictures.saving import encoded
from zimgkit.runtime.recording import record


class TritonPythonModel:
    """One instance, on its own device."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the bundle.

        Args:
            args: Triton's: the configuration, and which device is this instance's.

        Raises:
            pb_utils.TritonModelException: it cannot be opened.
        """
        config = json.loads(args["model_config"])
        settings = {key: value["string_value"] for key, value in config["parameters"].items()}
        self.inputs = [entry["name"] for entry in config["input"]]
        on_gpu = args["model_instance_kind"] == "GPU"
        try:
            self.pipeline = Pipeline.open(
                Path(__file__).parent.parent / settings["bundle"],
                backend=settings["backend"],
                device=f"cuda:{args['model_instance_device_id']}" if on_gpu else "cpu",
                memory=settings["memory"],
                warn=pb_utils.Logger.log_warn,
            )
        except ZimgError as error:
            raise pb_utils.TritonModelException(str(error)) from None

    def execute(self, requests: list[Any]) -> list[Any]:
        """Draw one request after the other; what is wrong with one is its own answer."""
        return [self._answer(request) for request in requests]

    def finalize(self) -> None:
        """Free the device."""
        self.pipeline.close()

    def _answer(self, request: Any) -> Any:
        def stop_where_unwanted(*step: Any) -> None:
            if request.is_cancelled():
                raise CancelledError("it was cancelled")

        try:
            files = self._draw(self._call(request), stop_where_unwanted)
        except ZimgError as error:
            codes = {UsageError: pb_utils.TritonError.INVALID_ARG, CancelledError: pb_utils.TritonError.CANCELLED}
            code = next(
                (code for kind, code in codes.items() if isinstance(error, kind)), pb_utils.TritonError.INTERNAL
            )
            return pb_utils.InferenceResponse([], error=pb_utils.TritonError(str(error), code))
        columns = zip(("images", "parameters"), zip(*files, strict=True), strict=True)
        return pb_utils.InferenceResponse(
            [pb_utils.Tensor(name, np.array(column, dtype=np.object_)) for name, column in columns]
        )

    def _call(self, request: Any) -> dict[str, Any]:
        """The parameters that a request gives."""
        given = {name: pb_utils.get_input_tensor_by_name(request, name) for name in self.inputs}
        arrays = {name: tensor.as_numpy() for name, tensor in given.items() if tensor is not None}
        return {name: _value(name, array.ravel().tolist()) for name, array in arrays.items() if array.size}

    def _draw(self, call: dict[str, Any], each_step: Callable[..., None]) -> list[tuple[bytes, bytes]]:
        """Each picture's file, layers one after the other, and what made it."""
        watch: dict[str, Any] = {"callback_on_step_end": each_step, "callback_on_step_end_tensor_inputs": ()}
        output, files = self.pipeline(**call, **watch), []
        for index, image in enumerate(output.images):
            made = record(self.pipeline.session, output.request, index, output.request.batch)
            layers = image if isinstance(image, list) else [image]
            files += [(encoded(layer, "PNG", made), made.to_text().encode()) for layer in layers]
        return files


def _value(name: str, values: list[Any]) -> Any:
    """A tensor's values as a call has them."""
    parameter = BY_NAME[name]
    if parameter.type is str:
        values = [_text(name, value) for value in values]
    if parameter.type is Picture:
        values = [bytes(value) for value in values]  # Never a path.
    if parameter.type is ControlPicture:
        values = [_control(name, value) for value in values]
    return values if parameter.several or parameter.type is tuple else values[0]


def _control(name: str, data: bytes) -> dict[str, Any]:
    """What is said of a ControlNet: a JSON object whose pictures are in base64."""
    try:
        said: dict[str, Any] = json.loads(data)
        return said | {key: base64.b64decode(said[key], validate=True) for key in PICTURES if key in said}
    except (TypeError, ValueError, RecursionError):
        raise UsageError(f"{name} is no JSON object with pictures in base64", "send one for each ControlNet") from None


def _text(name: str, data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise UsageError(f"{name} is no text", "send it in UTF-8") from None
