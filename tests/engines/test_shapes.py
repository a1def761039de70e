"""Dynamic dimensions and shape profiles."""

from __future__ import annotations

import pytest

from zimgkit.engines.bundle import TensorSpec
from zimgkit.engines.errors import BackendError
from zimgkit.engines.shapes import choose_profile, dimension_sizes, output_shape

INPUTS = {
    "text": TensorSpec("float32", (1, "tokens")),
    "image": TensorSpec("float32", ("batch", "height", "width")),
    "scale": TensorSpec("float32", ()),
}


class TestSizes:
    def test_of_dynamic_dimensions(self):
        shapes = {"text": (1, 7), "image": (2, 3, 4), "scale": ()}
        assert dimension_sizes("net", INPUTS, shapes) == {"tokens": 7, "batch": 2, "height": 3, "width": 4}

    @pytest.mark.parametrize("shape", [(2, 7), (7,), (1, 7, 1), ()])
    def test_another_shape_than_declared(self, shape):
        with pytest.raises(BackendError) as caught:
            dimension_sizes("net", INPUTS, {"text": shape, "image": (2, 3, 4), "scale": ()})
        assert str(caught.value) == f"net takes 'text' in the shape (1, 'tokens'), not {shape}"

    def test_two_of_one_dimension(self):
        inputs = {"a": TensorSpec("float32", ("n",)), "b": TensorSpec("float32", (3, "n"))}
        with pytest.raises(BackendError, match="net got 'b' of 5 n, and another input of 4"):
            dimension_sizes("net", inputs, {"a": (4,), "b": (3, 5)})


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((1, 3), (1, 3)),
        (("batch", "8*height", "8*width"), (2, 40, 56)),
        (("batch", "height+1"), None),
        (("batch", "x*height"), None),
        (("batch", "unknown"), None),
        (("batch", "2*unknown"), None),
        ((), ()),
    ],
)
def test_shapes_of_outputs(shape, expected):
    assert output_shape(TensorSpec("float32", shape), {"batch": 2, "height": 5, "width": 7}) == expected


class TestProfiles:
    PROFILES = (
        {"tokens": (1, 2, 9), "batch": (1, 1, 1), "height": (8, 8, 8), "width": (8, 8, 8)},
        {"tokens": (1, 2, 9), "batch": (1, 1, 1), "height": (4, 4, 8), "width": (2, 2, 2)},
    )

    def choose(self, text: tuple[int, ...], image: tuple[int, ...]) -> int:
        sizes = dimension_sizes("net", INPUTS, {"text": text, "image": image, "scale": ()})
        return choose_profile("net", INPUTS, self.PROFILES, sizes, "hint")

    def test_one_that_serves(self):
        assert self.choose((1, 5), (1, 8, 8)) == 0
        assert self.choose((1, 5), (1, 8, 2)) == 1

    @pytest.mark.parametrize(("tokens", "index"), [(1, 0), (4, 1), (3, 2), (8, 2), (9, 0)])
    def test_the_narrowest_of_several(self, tokens, index):
        profiles = ({"tokens": (1, 8, 16)}, {"tokens": (4, 4, 4)}, {"tokens": (2, 4, 8)})
        inputs = {"text": INPUTS["text"]}
        assert choose_profile("net", inputs, profiles, {"tokens": tokens}, "") == index

    def test_without_any(self):
        assert choose_profile("net", INPUTS, (), {"tokens": 10**6, "batch": 1, "height": 1, "width": 1}, "") == 0

    def test_the_message_names_the_input_that_none_serves(self):
        with pytest.raises(BackendError) as caught:
            self.choose((1, 5), (1, 8, 4))
        assert str(caught.value) == (
            "net was compiled for 1 to 9 tokens and 1 batch and 8 height and 8 width, or "
            "1 to 9 tokens and 1 batch and 4 to 8 height and 2 width, not for 'image' of shape (1, 8, 4); hint"
        )
        with pytest.raises(BackendError, match=r"not for 'text' of shape \(1, 10\)"):
            self.choose((1, 10), (1, 8, 8))

    def test_each_input_alone_would_do(self):
        inputs = {"a": TensorSpec("float32", ("m",)), "b": TensorSpec("float32", ("n",))}
        profiles = [{"m": (1, 1, 1), "n": (1, 1, 1)}, {"m": (2, 2, 2), "n": (2, 2, 2)}]
        with pytest.raises(
            BackendError, match=r"compiled for 1 m and 1 n, or 2 m and 2 n, not for 'a' of shape \(1,\)"
        ):
            choose_profile("net", inputs, profiles, {"m": 1, "n": 2}, "")
