"""A model folder for Triton: its configuration, and its code with a stand-in for what Triton gives it."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tests.commands import invoke
from zimgkit.export.cli.main import main
from zimgkit.export.serving.triton import config
from zimgkit.runtime import Pipeline, demo_models
from zimgkit.runtime.parameters import PARAMETERS
from zimgkit.runtime.pictures.metadata import from_text

NUMPY = {"TYPE_STRING": np.object_, "TYPE_INT64": np.int64, "TYPE_FP64": np.float64, "TYPE_BOOL": np.bool_}
PROMPT = "a red circle left of a blue square"


class Request(dict):
    """Tensors by name; cancelled after some looks."""

    looks = 1 << 30

    def is_cancelled(self):
        self.looks -= 1
        return self.looks < 0


class TritonError(Exception):
    INTERNAL, INVALID_ARG, CANCELLED = 1, 3, 8

    def __init__(self, message, code=0):
        self.message, self.code = message, code


@pytest.fixture
def triton(monkeypatch):
    """The part of Triton's module that the code uses."""
    module = ModuleType("triton_python_backend_utils")
    module.Tensor = lambda name, array: SimpleNamespace(name=name, as_numpy=lambda: array)
    module.InferenceResponse = lambda tensors, error=None: SimpleNamespace(
        outputs={tensor.name: tensor.as_numpy() for tensor in tensors}, error=error
    )
    module.get_input_tensor_by_name = lambda request, name: request.get(name)
    module.TritonError, module.TritonModelException = TritonError, type("TritonModelException", (Exception,), {})
    module.Logger = SimpleNamespace(log_warn=lambda message: None)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def parse(text):
    """A configuration as another library reads protobuf's text: into messages of the fields that Triton has."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

    file = descriptor_pb2.FileDescriptorProto(name="model_config.proto", package="inference")
    of = descriptor_pb2.FieldDescriptorProto

    def message(name, fields):
        made = file.message_type.add(name=name)
        for number, (field, kind, label) in enumerate(fields, 1):
            added = made.field.add(name=field, number=number, label=label)
            if isinstance(kind, str):
                added.type, added.type_name = of.TYPE_MESSAGE, f".inference.{kind}"
            else:
                added.type = kind
        return made

    one, many, text_, number, flag = (
        *(of.LABEL_OPTIONAL, of.LABEL_REPEATED),
        *(of.TYPE_STRING, of.TYPE_INT64, of.TYPE_BOOL),
    )
    types = file.enum_type.add(name="DataType")
    kinds = file.enum_type.add(name="Kind")
    for enum, names in ((types, ("TYPE_INVALID", *NUMPY)), (kinds, ("KIND_AUTO", "KIND_GPU", "KIND_CPU"))):
        for index, name in enumerate(names):
            enum.value.add(name=name, number=index)
    tensor = (("name", text_, one), ("data_type", of.TYPE_ENUM, one), ("dims", number, many), ("optional", flag, one))
    for name, fields in (("Input", tensor), ("Output", tensor[:3])):
        message(name, fields).field[1].type_name = ".inference.DataType"
    message("Group", (("kind", of.TYPE_ENUM, one), ("count", number, one))).field[0].type_name = ".inference.Kind"
    message("Value", (("string_value", text_, one),))
    message("Entry", (("key", text_, one), ("value", "Value", one)))
    message(
        "ModelConfig",
        (
            *(("backend", text_, one), ("max_batch_size", number, one), ("input", "Input", many)),
            *(("output", "Output", many), ("instance_group", "Group", many), ("parameters", "Entry", many)),
        ),
    )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    found = message_factory.GetMessageClass(pool.FindMessageTypeByName("inference.ModelConfig"))()
    text_format.Parse(text, found)
    return found, [value.name for value in types.value]


@pytest.fixture
def model(triton, tmp_path):
    """``model(bundle, *options)``: an instance, and ``ask(**values)``, which asks it."""
    opened = []

    def open_model(bundle, *options, kind="CPU"):
        folder = tmp_path / "repository" / "pictures"
        result = invoke(main, "triton", bundle, "--out", folder, "--overwrite", "--kind", kind.lower(), *options)
        assert (result.code, result.out) == (0, f"{folder}\n"), result
        parsed, types = parse((folder / "config.pbtxt").read_text("utf-8"))
        assert (parsed.backend, parsed.max_batch_size) == ("python", 0)
        settings = {entry.key: {"string_value": entry.value.string_value} for entry in parsed.parameters}
        inputs = {entry.name: entry for entry in parsed.input}
        spec = importlib.util.spec_from_file_location("model", folder / "1" / "model.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        instance = module.TritonPythonModel()
        told = {"parameters": settings, "input": [{"name": name} for name in inputs]}
        instance.initialize(
            {"model_config": json.dumps(told), "model_instance_kind": kind, "model_instance_device_id": "0"}
        )
        opened.append(instance)

        def tensor(name, value):
            assert inputs[name].optional and list(inputs[name].dims) in ([1], [-1])
            values = np.array(value if isinstance(value, list) else [value], NUMPY[types[inputs[name].data_type]])
            assert -1 in inputs[name].dims or values.shape == (1,)
            return triton.Tensor(name, values)

        def ask(*requests, looks=1 << 30):
            made = [Request((name, tensor(name, value)) for name, value in one.items()) for one in requests]
            for one in made:
                one.looks = looks
            return instance.execute(made)

        return ask

    yield open_model
    for instance in opened:
        instance.finalize()


def opened(data):
    return np.asarray(Image.open(io.BytesIO(data)))


def png(seed):
    data = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (64, 64, 3), np.uint8)).save(data, "PNG")
    return data.getvalue()


def test_it_draws_what_a_pipeline_draws(model):
    ask = model("zimg-tiny-z", "--backend", "onnxruntime")
    calls = [
        {"prompt": PROMPT, "seed": 7, "num_inference_steps": 2, "height": 64, "width": 96},
        {
            "prompt": PROMPT,
            "negative_prompt": "noise é",
            "seed": 8,
            "guidance_scale": 2.7,
            "cfg_truncation": 0.9,
            "num_images_per_prompt": 2,
            "height": 64,
            "width": 64,
            "sigmas": [1.0, 0.6, 0.3],
        },
        {
            "prompt": PROMPT,
            "seed": 9,
            "image": [png(0)],
            "strength": 0.6,
            "num_inference_steps": 3,
            "height": 64,
            "width": 64,
        },
        {
            "prompt": PROMPT,
            "seed": 9,
            "num_inference_steps": 3,
            "image": [png(0)],
            "mask_image": png(1),
            "keep_unmasked": True,
            "height": 64,
            "width": 64,
        },
    ]
    sent = [{n: v.encode() if isinstance(v, str) else v for n, v in call.items()} for call in calls]
    answers = ask(*sent)
    with Pipeline.open("zimg-tiny-z", backend="onnxruntime") as pipeline:
        for call, answer in zip(calls, answers, strict=True):
            assert answer.error is None, answer.error.message
            expected = pipeline(**call).images
            assert len(answer.outputs["images"]) == len(answer.outputs["parameters"]) == len(expected)
            for data, image in zip(answer.outputs["images"], expected, strict=True):
                assert np.array_equal(opened(data), np.asarray(image))
            made = from_text(answer.outputs["parameters"][-1].decode())
            assert (made.prompt, made.seed, made.image_index) == (PROMPT, call["seed"], len(expected) - 1)


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        ({}, "prompt"),
        ({"prompt": b"\xff"}, "prompt is no text; send it in UTF-8"),
        ({"prompt": b"a", "height": 63}, "height"),
        ({"prompt": b"a", "guidance_scale": float("nan")}, "guidance_scale"),
        ({"prompt": b"a", "num_inference_steps": 0}, "num_inference_steps"),
        ({"prompt": b"a", "image": [b"/etc/hostname"]}, "image"),
        ({"prompt": b"a", "image": [b""]}, "image"),
        ({"prompt": b"a", "mask_image": png(0)}, "mask_image"),
        ({"prompt": b"a", "layers": 2}, "layers"),
        ({"prompt": b"a", "controls": b"["}, "controls is no JSON object"),
        ({"prompt": b"a", "controls": b'{"image": "%%%"}'}, "controls is no JSON object"),
        ({"prompt": b"a", "controls": b'{"image": "aaaa"}'}, "ControlNet"),
    ],
)
def test_bad_input_is_one_line_and_the_next_request_is_drawn(model, request_, says):
    fine = {"prompt": b"a", "num_inference_steps": 1, "height": 32, "width": 32, "image": []}
    bad, good = model("zimg-tiny-z", "--backend", "onnxruntime")(request_, fine)
    assert bad.error.code == TritonError.INVALID_ARG
    assert says in bad.error.message and "\n" not in bad.error.message
    assert good.error is None and opened(good.outputs["images"][0]).shape == (32, 32, 3)


def test_a_request_that_is_cancelled_is_drawn_no_further(model):
    ask = model("zimg-tiny-z", "--backend", "onnxruntime")
    call = {"prompt": b"a", "num_inference_steps": 3, "height": 32, "width": 32}
    codes = [(answer := ask(call, looks=looks)[0]).error and answer.error.code for looks in (0, 2, 3)]
    assert codes == [TritonError.CANCELLED, TritonError.CANCELLED, None]


def test_a_bundle_that_is_not_there_is_told_when_it_is_loaded(model, triton):
    with pytest.raises(triton.TritonModelException, match="bundle"):
        model("zimg-tiny-z", "--bundle-on-server", "bundle")


def test_the_bundle_may_lie_beside_the_model(model, tmp_path):
    (tmp_path / "bundle").symlink_to(demo_models.locate("zimg-tiny-z"))
    ask = model("zimg-tiny-z", "--backend", "onnxruntime", "--bundle-on-server", "../../bundle")
    (answer,) = ask({"prompt": b"a", "num_inference_steps": 1, "height": 32, "width": 32})
    assert answer.error is None


@pytest.mark.parametrize("kind", ["gpu", "cpu"])
def test_the_configuration_has_every_parameter_of_a_call(kind):
    settings = {"bundle": 'a "b" \\ 模型', "backend": "auto", "memory": "8GB"}
    parsed, _ = parse(config(settings, kind))
    assert {entry.name for entry in parsed.input} == {p.name for p in PARAMETERS} - {"output_type"}
    assert [entry.name for entry in parsed.output] == ["images", "parameters"]
    assert {entry.key: entry.value.string_value for entry in parsed.parameters} == settings
    assert (len(parsed.instance_group), parsed.instance_group[0].count) == (1, 1)
    assert f"KIND_{kind.upper()}" in config(settings, kind)


def test_what_cannot_be_written_is_refused_in_one_line(tmp_path):
    out = tmp_path / "pictures"
    invoke(main, "triton", tmp_path, "--out", out).assert_refused("bundle", 1)
    invoke(main, "triton", "zimg-tiny-z", "--out", out, "--bundle-on-server", "a\nb").assert_refused("printable", 2)
    assert list(tmp_path.iterdir()) == []
    assert invoke(main, "triton", "zimg-tiny-z", "--out", out, "--json").code == 0
    invoke(main, "triton", "zimg-tiny-z", "--out", out).assert_refused("--overwrite", 1)
    other = tmp_path / "other"
    other.mkdir()
    Path(other, "mine").touch()
    invoke(main, "triton", "zimg-tiny-z", "--out", other, "--overwrite").assert_refused("no config.pbtxt", 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "pictures"]
