"""Control pictures: edges against OpenCV, and ONNX files of every shape against what they compute."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image

from tests.commands import invoke
from zimgkit.engines.errors import UsageError
from zimgkit.runtime.commands import preprocess
from zimgkit.runtime.commands.cli import main
from zimgkit.runtime.pictures import control_maps
from zimgkit.runtime.pictures.control_maps import KINDS, LEVELS, NAMES, SCALINGS, Way, canny, mapped

RNG = np.random.default_rng(0)


def picture(width=50, height=40):
    """Slopes, so that resizing shows, with an edge."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 255 // width, y * 255 // height, (x + y) * 255 // (width + height)], axis=2)
    pixels[10:20, 10:30] = 255
    return Image.fromarray(pixels.astype(np.uint8))


def network(file, shape, nodes, gives, kind=TensorProto.FLOAT):
    """An ONNX file of one picture in and what nodes, from ``x`` to ``y``, make of it out."""
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info("y", kind, gives)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, file)
    return file


def same(file, shape, kind=TensorProto.FLOAT):
    return network(file, shape, [helper.make_node("Identity", ["x"], ["y"])], shape, kind)


def mean(file, shape, axis, *, keepdims):
    node = helper.make_node("ReduceMean", ["x"], ["y"], axes=[axis], keepdims=int(keepdims))
    return network(file, shape, [node], None)


class TestCanny:
    @pytest.mark.parametrize("thresholds", [(100, 200), (20, 60), (0, 0), (50.5, 50.5)])
    def test_as_opencv_finds_them(self, thresholds):
        cv2 = pytest.importorskip("cv2", reason="opencv-python-headless is not installed")
        photo = Image.fromarray(RNG.integers(0, 256, (12, 15, 3), dtype=np.uint8)).resize((150, 120))
        found = np.asarray(canny(photo, *thresholds))
        expected = cv2.Canny(np.asarray(photo), *thresholds)
        assert expected.any()
        assert np.array_equal(found, np.stack([expected] * 3, axis=2))

    def test_command(self, tmp_path):
        pytest.importorskip("cv2", reason="opencv-python-headless is not installed")
        picture().save(tmp_path / "in.png")
        out = tmp_path / "out.png"
        result = invoke(main, "preprocess", "canny", tmp_path / "in.png", out, "--high", 150, "--json")
        assert json.loads(result.out) == {"path": str(out), "width": 50, "height": 40}
        assert np.array_equal(np.asarray(Image.open(out)), np.asarray(canny(picture(), 100, 150)))

    def test_without_opencv(self, monkeypatch, tmp_path):
        monkeypatch.setattr(control_maps, "find_spec", lambda name: None)
        picture().save(tmp_path / "in.png")
        result = invoke(main, "preprocess", "canny", tmp_path / "in.png", tmp_path / "out.png")
        result.assert_refused("canny needs opencv-python-headless; in a clone of zimgkit: pip install '.[control]'", 1)

    @pytest.mark.parametrize("thresholds", [(200, 100), (-1, 5), (float("nan"), 5), (5, float("inf"))])
    def test_thresholds(self, thresholds):
        with pytest.raises(UsageError, match="the thresholds are"):
            canny(picture(), *thresholds)


class TestFiles:
    @pytest.mark.parametrize(
        ("shape", "layout"),
        [([1, 3, 40, 50], "nchw"), ([1, 40, 50, 3], "nhwc"), (["n", 3, "h", "w"], "nchw"), ([1, "h", "w", 3], "nhwc")],
    )
    def test_layouts(self, tmp_path, shape, layout):
        """Told by the 3; what comes out as it went in is the picture."""
        size = None if isinstance(shape[-1 if layout == "nchw" else 2], int) else (50, 40)
        made = mapped(picture(), "lineart", same(tmp_path / "net.onnx", shape), Way(size=size))
        assert np.array_equal(np.asarray(made), np.asarray(picture()))
        again = mapped(picture(), "lineart", tmp_path / "net.onnx", Way(layout=layout, size=(50, 40), invert=True))
        assert np.array_equal(np.asarray(again), 255 - np.asarray(picture()))

    @pytest.mark.parametrize(("axis", "keepdims"), [(1, True), (1, False)])
    def test_maps(self, tmp_path, axis, keepdims):
        """One channel, from its least to its greatest value, grey, at the picture's size."""
        file = mean(tmp_path / "net.onnx", [1, 3, 40, 50], axis, keepdims=keepdims)
        grey = np.asarray(picture(), np.float32).mean(axis=2)
        expected = (grey - grey.min()) / (grey.max() - grey.min()) * 255
        made = np.asarray(mapped(picture(), "depth", file, Way(scaling="bytes")))
        assert np.abs(made - expected[:, :, None]).max() <= 0.51

    def test_size(self, tmp_path):
        file = same(tmp_path / "net.onnx", ["n", 3, "h", "w"])
        near = picture().resize((64, 32), Image.Resampling.BICUBIC).resize((50, 40), Image.Resampling.BICUBIC)
        assert np.array_equal(np.asarray(mapped(picture(), "pose", file)), np.asarray(near))
        assert mapped(picture(), "pose", file, Way(size=(20, 24))).size == (50, 40)

    @pytest.mark.parametrize("scaling", SCALINGS)
    def test_scalings(self, tmp_path, scaling):
        """As they go in they come out, but for ImageNet's, whose least and greatest value are of all channels."""
        file = same(tmp_path / "net.onnx", [1, 3, 40, 50])
        made = np.asarray(
            mapped(picture(), "depth", file, Way(scaling=scaling, levels=scaling.replace("imagenet", "range")))
        )
        pixels = np.asarray(picture(), np.float32)
        if scaling == "imagenet":
            pixels = (pixels / 255 - control_maps.MEAN) / control_maps.DEVIATION
            pixels = (pixels - pixels.min()) / (pixels.max() - pixels.min()) * 255
        assert np.abs(made - pixels).max() <= 0.51

    @pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.UINT8])
    def test_types(self, tmp_path, kind):
        way = Way(levels="bytes") if kind == TensorProto.UINT8 else None
        made = mapped(picture(), "lineart", same(tmp_path / "net.onnx", [1, 3, 40, 50], kind), way)
        assert np.abs(np.asarray(made).astype(int) - np.asarray(picture())).max() <= 1

    def test_a_flat_map_is_black(self, tmp_path):
        grey, file = Image.new("RGB", (50, 40), (9, 9, 9)), same(tmp_path / "net.onnx", [1, 3, 40, 50])
        assert not np.asarray(mapped(grey, "depth", file, Way(scaling="unit"))).any()


class TestBadInput:
    def refuse(self, message, file, way=None):
        with pytest.raises(UsageError, match=message):
            mapped(picture(), "depth", file, way)

    def test_files(self, tmp_path, capfd):
        self.refuse("there is no file", tmp_path / "missing.onnx")
        (tmp_path / "text.onnx").write_text("none")
        self.refuse("is none that ONNX Runtime runs", tmp_path / "text.onnx")
        data = same(tmp_path / "net.onnx", [1, 3, 40, 50]).read_bytes()
        (tmp_path / "net.onnx").write_bytes(data.replace(b"Identity", b"Ideotity"))
        self.refuse("is none that ONNX Runtime runs", tmp_path / "net.onnx")
        assert capfd.readouterr() == ("", "")

    def test_what_goes_in(self, tmp_path):
        self.refuse("which is no picture", same(tmp_path / "net.onnx", [1, 4, 40, 50]))
        self.refuse("which is no picture", same(tmp_path / "net.onnx", [3, 40, 50]))
        self.refuse("which is no picture", same(tmp_path / "net.onnx", [2, 3, 40, 50]))
        self.refuse("takes tensor\\(int64\\)", same(tmp_path / "net.onnx", [1, 3, 40, 50], TensorProto.INT64))
        file = same(tmp_path / "net.onnx", [1, 3, 40, 50])
        self.refuse("which is not nhwc", file, Way(layout="nhwc"))
        self.refuse("takes 50x40 alone, not 20x20", file, Way(size=(20, 20)))
        self.refuse("0x0 cannot be taken in", same(tmp_path / "net.onnx", [1, 3, "h", "w"]), Way(size=(0, 0)))

    def test_what_comes_out(self, tmp_path):
        node = helper.make_node("Log", ["x"], ["y"])
        self.refuse(
            "NaN or Inf", network(tmp_path / "net.onnx", [1, 3, 40, 50], [node], [1, 3, 40, 50]), Way(scaling="signed")
        )
        node = helper.make_node("GlobalAveragePool", ["x"], ["p"]), helper.make_node("Flatten", ["p"], ["y"])
        self.refuse("which is no map", network(tmp_path / "net.onnx", [1, 3, 40, 50], [*node], ["n", "c"]))
        node = helper.make_node("Concat", ["x", "x"], ["y"], axis=1)
        self.refuse("which is no map", network(tmp_path / "net.onnx", [1, 3, 40, 50], [node], [1, 6, 40, 50]))

    @pytest.mark.parametrize(
        ("words", "message", "code"),
        [
            (["depth"], "nothing makes depth without an ONNX file", 2),
            (["canny", "--onnx", "net.onnx"], "canny takes no ONNX file", 2),
            (["canny", "--invert"], "canny takes no ONNX file", 2),
            (["depth", "--onnx", "net.onnx", "--low", "5"], "--low and --high are canny's", 2),
            (["depth", "--onnx", "net.onnx", "--size", "big"], "is no size such as 518x518", 2),
            (["depth", "--onnx", "net.onnx"], "there is no file net.onnx", 2),
            (["sketch"], "sketch", 2),
        ],
    )
    def test_commands(self, words, message, code, tmp_path):
        picture().save(tmp_path / "in.png")
        name, *options = words
        result = invoke(main, "preprocess", name, tmp_path / "in.png", tmp_path / "out.png", *options)
        result.assert_refused(message, code)
        assert not (tmp_path / "out.png").exists()

    def test_no_picture(self, tmp_path):
        (tmp_path / "in.png").write_text("none")
        invoke(main, "preprocess", "canny", tmp_path / "in.png", tmp_path / "out.png").assert_refused("in.png", 2)
        result = invoke(main, "preprocess", "canny", tmp_path / "in.png", tmp_path / "missing/out.png")
        result.assert_refused("does not exist", 1)


def test_the_command_knows_what_there_is():
    """It names them without an import of what makes them."""
    source = Path(preprocess.__file__).with_name("cli.py").read_text()
    assert all(f'"{name}"' in source for name in (*NAMES, *SCALINGS, *LEVELS))
    assert set(NAMES) == {"canny", *KINDS}
