"""A call's arguments: checked, and filled in from a manifest of either family."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from tests import handmade
from zimgkit.engines.bundle import Defaults
from zimgkit.engines.bundle.manifest import read_manifest
from zimgkit.engines.errors import BundleError, UsageError
from zimgkit.runtime import demo_models, families
from zimgkit.runtime.parameters import MAX_CHARACTERS
from zimgkit.runtime.request import Request, check

BOTH = pytest.mark.parametrize("family", ["z-image", "qwen-image"])


CARRIED = [read_manifest(demo_models.locate(name)) for name in demo_models.NAMES]
CONFIGS = {
    found.family: found.config | {"transformer": found.config["transformer"] | {"in_channels": 16}} for found in CARRIED
}


def ask(family: str = "z-image", **call: Any) -> Request:
    manifest = handmade.manifest(family, config=CONFIGS[family])
    return check(manifest, families.family_of(manifest), **({"prompt": "a cat", "seed": 0} | call))


def refused(family: str = "z-image", **call: Any) -> str:
    with pytest.raises(UsageError) as caught:
        ask(family, **call)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class TestDefaults:
    def test_z_image(self):
        assert ask() == Request(
            prompts=("a cat",),
            negative_prompts=("",),
            num_images_per_prompt=1,
            height=1024,
            width=768,
            num_inference_steps=9,
            sigmas=None,
            guidance_scale=3.5,
            cfg_normalization=0.0,
            cfg_truncation=1.0,
            seed=0,
            max_sequence_length=512,
            output_type="pil",
        )

    def test_qwen_image(self):
        assert ask("qwen-image") == Request(
            prompts=("a cat",),
            negative_prompts=None,
            num_images_per_prompt=1,
            height=1328,
            width=1664,
            num_inference_steps=20,
            sigmas=None,
            guidance_scale=4.0,
            cfg_normalization=0.0,
            cfg_truncation=1.0,
            seed=0,
            max_sequence_length=512,
            output_type="pil",
        )

    @BOTH
    def test_every_one_can_be_given(self, family):
        found = ask(family, height=64, width=80, num_inference_steps=3, guidance_scale=2, max_sequence_length=7)
        sizes = (found.height, found.width, found.num_inference_steps, found.guidance_scale, found.max_sequence_length)
        assert sizes == (64, 80, 3, 2.0, 7)

    def test_defaults_are_checked_like_arguments(self):
        manifest = handmade.manifest(defaults=Defaults(9, 3.5, 1000, 768), config=CONFIGS["z-image"])
        with pytest.raises(UsageError, match="height is 1000, not a multiple of 16"):
            check(manifest, families.family_of(manifest), prompt="a cat")

    def test_a_seed_is_drawn(self):
        seeds = {ask(seed=None).seed for _ in range(20)}
        assert len(seeds) > 15
        assert all(0 <= seed < 2**32 for seed in seeds)


class TestPrompts:
    @pytest.mark.parametrize("prompt", ["", "一只猫", "a\nb", "x" * MAX_CHARACTERS])
    def test_one(self, prompt):
        assert ask(prompt=prompt).prompts == (prompt,)

    @pytest.mark.parametrize("prompts", [["a"], ("a", "b"), ["a", "a", ""]])
    def test_several(self, prompts):
        found = ask(prompt=prompts, num_images_per_prompt=3)
        assert found.prompts == tuple(prompts)
        assert found.batch == 3 * len(prompts)

    @pytest.mark.parametrize("prompt", [None, 7, b"a cat", [], [None], ["a", 7], {"a": 1}, {"a"}, [["a"]], [b"a"]])
    def test_what_is_no_text(self, prompt):
        assert refused(prompt=prompt) == "prompt must be a text, or a list of texts"

    @pytest.mark.parametrize("prompt", ["x" * (MAX_CHARACTERS + 1), ["a", "x" * (MAX_CHARACTERS + 1)]])
    def test_too_long(self, prompt):
        assert refused(prompt=prompt) == "prompt has 100,001 characters; give at most 100,000"


class TestNegativePrompts:
    @BOTH
    @pytest.mark.parametrize(
        ("given", "found"), [("bad", ("bad", "bad")), (["bad"], ("bad", "bad")), (("x", "y"), ("x", "y"))]
    )
    def test_one_for_all_or_one_each(self, family, given, found):
        assert ask(family, prompt=["a", "b"], negative_prompt=given).negative_prompts == found

    def test_without_one(self):
        """ZImagePipeline guides away from the empty prompt then; QwenImagePipeline does not guide."""
        assert ask("z-image", prompt=["a", "b"], guidance_scale=1.0).negative_prompts == ("", "")
        assert ask("qwen-image", guidance_scale=7.0).negative_prompts is None

    @pytest.mark.parametrize(
        ("family", "scale", "guided"),
        [
            ("z-image", 0, False), ("z-image", -1, False), ("z-image", 0.1, True), ("z-image", 1, True),
            ("qwen-image", 0, False), ("qwen-image", 1, False), ("qwen-image", 1.1, True), ("qwen-image", 4, True),
        ],
    )  # fmt: skip
    def test_it_is_dropped_where_guidance_is_off(self, family, scale, guided):
        found = ask(family, negative_prompt="bad", guidance_scale=scale).negative_prompts
        assert found == (("bad",) if guided else None)

    @pytest.mark.parametrize("truncation", [0.0, 0.5, 1.0, 2.0])
    def test_truncated_guidance_is_guidance(self, truncation):
        assert ask(cfg_truncation=truncation, negative_prompt="bad").negative_prompts == ("bad",)

    @BOTH
    def test_guidance_within_an_interval(self, family):
        found = ask(family, negative_prompt="bad", guidance_low=0.25, guidance_high=0.75, cfg_truncation=0.5)
        assert [found.guides_at(sigma) for sigma in (1, 0.75, 0.5, 0.4, 0)] == [False, True, True, False, False]
        assert not ask(family, negative_prompt="bad", guidance_scale=-1).guides_at(0.5)
        message = refused(family, guidance_low=0.5, guidance_high=0.4)
        assert message == "guidance_low is 0.5, above guidance_high, 0.4; no step would be guided"
        assert refused(family, guidance_low=1.5) == "guidance_low is 1.5; give a number from 0 to 1"

    @BOTH
    @pytest.mark.parametrize("scale", [0, 5])
    @pytest.mark.parametrize("negative", [7, [], [None], b"bad"])
    def test_what_is_no_text(self, family, scale, negative):
        """Also where it would not be used."""
        message = "negative_prompt must be a text, or a list of texts"
        assert refused(family, negative_prompt=negative, guidance_scale=scale) == message

    @BOTH
    @pytest.mark.parametrize("count", [2, 4])
    def test_another_number_than_of_prompts(self, family, count):
        message = refused(family, prompt=["a", "b", "c"], negative_prompt=["bad"] * count)
        assert message == f"there are {count} negative prompts for 3 prompts; give one, or one for each"


class TestGuidance:
    @BOTH
    @pytest.mark.parametrize("name", ["guidance_scale", "true_cfg_scale"])
    def test_names_of_diffusers(self, family, name):
        assert ask(family, **{name: 2.5}).guidance_scale == 2.5

    def test_name_of_diffsynth(self):
        """``neg + s (pos - neg)`` in both; Z-Image's own scale is one less."""
        assert ask("z-image", cfg_scale=4.5).guidance_scale == 3.5
        assert ask("z-image", cfg_scale=1).guidance_scale == 0.0
        assert ask("qwen-image", cfg_scale=4.5).guidance_scale == 4.5

    @pytest.mark.parametrize(
        "names",
        [("guidance_scale", "cfg_scale"), ("true_cfg_scale", "cfg_scale"), ("guidance_scale", "true_cfg_scale")],
    )
    def test_only_one_of_them(self, names):
        message = refused(**dict.fromkeys(names, 2.0))
        assert message == "guidance_scale, true_cfg_scale and cfg_scale are names for one thing; give only one of them"

    @pytest.mark.parametrize("name", ["guidance_scale", "true_cfg_scale", "cfg_scale"])
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1000.5, -1001, "1e400"])
    def test_out_of_range(self, name, value):
        assert refused(**{name: value}) == f"{name} is {float(value)}; give a number from -1000 to 1000"

    @pytest.mark.parametrize(
        "name", ["guidance_scale", "true_cfg_scale", "cfg_scale", "cfg_normalization", "cfg_truncation"]
    )
    @pytest.mark.parametrize("value", ["much", "", [1.0], 1j, 10**400, np.array([1.0, 2.0])])
    def test_no_number(self, name, value):
        message = refused(**{name: value})
        assert message.startswith(f"{name} is ")
        assert message.endswith("; give a number")

    @pytest.mark.parametrize("value", [2, 2.0, np.float32(2), np.int64(2), Fraction(2), np.array(2.0)])
    def test_numbers_of_any_kind(self, value):
        found = ask(guidance_scale=value, cfg_normalization=value, cfg_truncation=value)
        numbers = (found.guidance_scale, found.cfg_normalization, found.cfg_truncation)
        assert numbers == (2.0, 2.0, 2.0)
        assert {type(number) for number in numbers} == {float}

    def test_normalization_may_be_true(self):
        """As in ZImagePipeline, where it is a bool as often as a number."""
        assert ask(cfg_normalization=True).cfg_normalization == 1.0
        assert ask(cfg_normalization=False).cfg_normalization == 0.0

    @pytest.mark.parametrize("name", ["cfg_normalization", "cfg_truncation"])
    @pytest.mark.parametrize("value", [-0.1, 2e6, float("nan")])
    def test_options_out_of_range(self, name, value):
        assert refused(**{name: value}) == f"{name} is {value}; give a number from 0 to 1e+06"


class TestSizes:
    @BOTH
    @pytest.mark.parametrize("name", ["height", "width"])
    @pytest.mark.parametrize("value", [16, 32, 1328, 8192, np.int32(64)])
    def test_multiples_of_16(self, family, name, value):
        assert getattr(ask(family, **{name: value}), name) == value

    @BOTH
    @pytest.mark.parametrize("name", ["height", "width"])
    @pytest.mark.parametrize(("value", "near"), [(17, 16), (100, 96), (1000, 992), (1080, 1088), (8191, 8192)])
    def test_other_numbers(self, family, name, value, near):
        message = f"{name} is {value}, not a multiple of 16; the nearest that is: {near}"
        assert refused(family, **{name: value}) == message

    @BOTH
    @pytest.mark.parametrize("name", ["height", "width"])
    @pytest.mark.parametrize("value", [0, -16, 8, 15, 8193, 8208, 2**40, True])
    def test_out_of_range(self, family, name, value):
        assert refused(family, **{name: value}) == f"{name} is {int(value)}; give a number from 16 to 8192"

    @pytest.mark.parametrize(
        "name", ["height", "width", "num_inference_steps", "num_images_per_prompt", "max_sequence_length"]
    )
    @pytest.mark.parametrize("value", [64.0, "64", [64], float("nan"), 1j])
    def test_no_whole_number(self, name, value):
        assert refused(**{name: value}) == f"{name} is {value!r}; give a whole number"

    @pytest.mark.parametrize("name", ["num_inference_steps", "num_images_per_prompt"])
    @pytest.mark.parametrize("value", [0, -1, 1001])
    def test_counts_out_of_range(self, name, value):
        assert refused(**{name: value}) == f"{name} is {value}; give a number from 1 to 1000"

    @pytest.mark.parametrize(("family", "longest"), [("z-image", 1024), ("qwen-image", 1024)])
    def test_sequence_length(self, family, longest):
        """The template's rows that are dropped do not count: 1058 tokens of Qwen-Image hold 1024 of a prompt."""
        for value in (1, longest):
            assert ask(family, max_sequence_length=value).max_sequence_length == value
        for value in (0, longest + 1):
            message = f"max_sequence_length is {value}; give a number from 1 to {longest}"
            assert refused(family, max_sequence_length=value) == message


class TestSigmas:
    @pytest.mark.parametrize("sigmas", [[1.0], [1.0, 0.5], (1, 0.75, 0), np.linspace(1, 0.25, 4), ["1", "0.5"]])
    def test_their_number_is_the_number_of_steps(self, sigmas):
        found = ask(sigmas=sigmas, num_inference_steps=30)
        assert found.sigmas == tuple(float(sigma) for sigma in sigmas)
        assert found.num_inference_steps == len(sigmas)

    @pytest.mark.parametrize("sigmas", [[], (), 0.5, np.array([]), np.array(0.5)])
    def test_no_list(self, sigmas):
        message = refused(sigmas=sigmas)
        assert message.endswith("; give a list of one or more numbers from 0 to 1, or leave it out")

    @pytest.mark.parametrize("sigmas", [[1.0, 2.0], [-0.1], [1, float("nan")], [float("inf")]])
    def test_out_of_range(self, sigmas):
        assert refused(sigmas=sigmas).endswith("; give a number from 0 to 1")

    @pytest.mark.parametrize("sigmas", ["half", [None], [[1.0]], np.ones((2, 2))])
    def test_no_numbers(self, sigmas):
        assert refused(sigmas=sigmas).endswith("; give a number")


class TestSeeds:
    @pytest.mark.parametrize("seed", [0, 1, -1, 2**32, 2**64 - 1, -(2**63), np.int64(5), True])
    def test_one(self, seed):
        """What ``torch.Generator.manual_seed`` takes."""
        found = ask(seed=seed).seed
        assert found == seed
        assert type(found) in (int, bool)

    @pytest.mark.parametrize("seeds", [[1, 2, 3, 4], (4, 3, 2, 2**64 - 1)])
    def test_one_for_each_picture(self, seeds):
        assert ask(prompt=["a", "b"], num_images_per_prompt=2, seed=seeds).seed == tuple(seeds)

    @pytest.mark.parametrize("seed", [2**64, -(2**63) - 1, [2**64]])
    def test_out_of_range(self, seed):
        expected = f"seed is {seed if isinstance(seed, int) else seed[0]}; give a number from {-(2**63)} to {2**64 - 1}"
        assert refused(seed=seed) == expected

    @pytest.mark.parametrize("seed", [1.0, "5", "12345", b"5", [1.5], ["5"], [None], {"a"}])
    def test_no_whole_number(self, seed):
        assert refused(seed=seed).startswith("seed is ")

    @pytest.mark.parametrize("seeds", [[], [1], [1, 2, 3]])
    def test_another_number_than_of_pictures(self, seeds):
        message = f"there are {len(seeds)} seeds for 2 pictures; give one, or one for each"
        assert refused(num_images_per_prompt=2, seed=seeds) == message


class TestOutputType:
    @pytest.mark.parametrize("value", ["pil", "np", "pt", "latent"])
    def test_known(self, value):
        assert ask(output_type=value).output_type == value

    @pytest.mark.parametrize("value", ["PIL", "", 5, ["pil"]])
    def test_unknown(self, value):
        assert refused(output_type=value) == f"output_type is {value!r}; choose one of pil, np, pt, latent"


def test_a_family_this_version_does_not_know():
    with pytest.raises(
        BundleError, match="of family 'flux', and this zimgkit knows z-image, qwen-image; upgrade zimgkit"
    ):
        families.family("flux")
