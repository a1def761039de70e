"""ControlNets of a call: what it says of them, what they are given, and when they act."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tests.commands import invoke
from tests.references import recordings
from tests.references.cases import mask, picture
from zimgkit.engines.errors import UsageError
from zimgkit.runtime import Pipeline
from zimgkit.runtime.commands.cli import main
from zimgkit.runtime.commands.control_options import with_controls
from zimgkit.runtime.controls import ControlInput
from zimgkit.runtime.diffusion.latents import pack
from zimgkit.runtime.job import Conditions, Schedule
from zimgkit.runtime.request import check

CALL = {"prompt": "a red cup", "negative_prompt": "blurry", "width": 48, "height": 64, "num_inference_steps": 4}
EDGES = picture(48, 64, 1)
pytestmark = pytest.mark.filterwarnings("ignore:guidance is off")


@pytest.fixture(scope="module")
def pipeline(recorded_bundle_of):
    with Pipeline.open(recorded_bundle_of("qwen-image-control")) as opened:
        yield opened


def draw(pipeline, **call):
    return pipeline(**CALL, seed=3, output_type="np", **call).images[0]


def read(pipeline, **call):
    return check(pipeline.bundle.manifest, pipeline.session.family, **CALL, **call).controls


@pytest.mark.parametrize("name", recordings.names("qwen-image-control"))
def test_what_the_denoiser_takes_in_and_gives(name, pipeline):
    recorded, session = recordings.read(name), pipeline.session
    arrays = {key: pack(value, "c ph pw") for key, value in recorded.arrays.items() if value.ndim == 4}
    call = {**recorded.call, "cfg_scale": 1.0, "prompt_embeds": recorded.arrays["prompt_embeds"][None]}
    del call["prompt"]
    request = check(pipeline.bundle.manifest, session.family, **call, latents=arrays["latents"])
    (job,) = session.begin(request)
    made = job.controls.conditions._make()
    exact = {f"control.{one.name}": arrays[f"condition.{index}"] for index, one in enumerate(request.controls)}
    for key, expected in exact.items():
        np.testing.assert_allclose(made[key], expected, atol=5e-5)  # What the VAEs differ by.
    conditions = Conditions(lambda: made | exact, job.controls.conditions.component)
    job.controls = replace(job.controls, conditions=conditions)
    sigmas = recorded.arrays["sigmas"]  # One bit of the first is an angle of 6e-5.
    job.schedule = Schedule(sigmas, session.family.schedule_inputs(pipeline.bundle, sigmas[:-1]))
    session.step([job])
    job.release()
    expected = arrays["velocity"]
    assert np.linalg.norm(job.velocity - expected) < 1e-5 * np.linalg.norm(expected)


class TestWindows:
    def steps(self, count, **said):
        one = ControlInput("edges", **said)
        return [step for step in range(count) if one.acts(step, count)]

    def test_shares_of_the_steps_as_in_diffusers(self):
        assert self.steps(4) == [0, 1, 2, 3]
        assert self.steps(4, end=0.5) == [0, 1]
        assert self.steps(4, start=0.3, end=0.9) == [2]
        for count in (1, 3, 7):
            for start, end in ((0.0, 0.4), (0.2, 1.0), (0.1, 0.75)):
                kept = [1.0 - float(i / count < start or (i + 1) / count > end) for i in range(count)]
                assert self.steps(count, start=start, end=end) == [i for i, keep in enumerate(kept) if keep]

    def test_a_count_down_as_in_diffsynth(self):
        assert self.steps(5, start=0.9, end=0.3, counts_down=True) == [1, 2]
        assert self.steps(5, start=1.0, end=0.0, counts_down=True) == [0, 1, 2, 3, 4]
        assert self.steps(1, start=1.0, end=0.0, counts_down=True) == [0]

    def test_a_scale_of_0_never_acts(self):
        assert self.steps(4, scale=0.0) == []


def test_a_scale_of_0_is_the_plain_picture_of_the_plain_denoiser(pipeline):
    plain = draw(pipeline)
    pipeline.close()
    assert (draw(pipeline, controls=[{"name": "canny", "image": EDGES, "scale": 0}]) == plain).all()
    assert "denoiser.control.canny" not in pipeline.session.engines.opened


def test_outside_of_its_window_the_plain_denoiser_runs(pipeline):
    half = {"name": "canny", "image": EDGES, "end": 0.5}
    pipeline.close()
    both = draw(pipeline, controls=[half])
    assert {"denoiser", "denoiser.control.canny"} <= {*pipeline.session.engines.opened}
    # Where memory is short for two, the one with the net gives the same at 0.
    root = pipeline.bundle.root
    with Pipeline.open(root, memory_budget=0, verify=False) as least:
        peak = least.plan(**CALL, controls=[half]).peak
    with Pipeline.open(root, memory=peak - 1, verify=False) as short:
        assert not short.plan(**CALL, controls=[half]).alternates
        np.testing.assert_allclose(draw(short, controls=[half]), both, atol=1e-6)
        assert "denoiser" not in short.session.engines.opened


def test_memory_counts_the_weights_of_nets(pipeline):
    plain, one = (pipeline.plan(**CALL, **more).peak for more in ({}, {"controls": {"name": "canny", "image": EDGES}}))
    everything = [{"name": "canny", "image": EDGES}, {"name": "depth", "image": EDGES}]
    weights = pipeline.bundle.component("denoiser.control.canny").weight_bytes
    assert one - plain >= weights - pipeline.bundle.component("denoiser").weight_bytes > 0
    assert pipeline.plan(**CALL, controls=everything).peak > one


def test_nets_act_together_alone_and_in_any_order(pipeline):
    canny, depth = {"name": "canny", "image": EDGES}, {"name": "depth", "image": picture(48, 64, 2), "scale": 0.5}
    both = draw(pipeline, controls=[canny, depth])
    np.testing.assert_allclose(draw(pipeline, controls=[depth, canny]), both, atol=1e-6)
    alone = draw(pipeline, controls=[canny])
    assert np.abs(both - alone).max() > 0.01
    # One of several that does not act changes nothing.
    np.testing.assert_allclose(draw(pipeline, controls=[canny, depth | {"scale": 0}]), alone, atol=1e-6)
    in_turn = draw(pipeline, controls=[canny | {"end": 0.5}, depth | {"start": 0.5}])
    assert np.abs(in_turn - both).max() > 0.01


def test_one_call_in_three_ways_of_saying_it(pipeline):
    expected = draw(pipeline, controls=[{"name": "canny", "image": EDGES, "scale": 0.7, "end": 0.5}])
    found = draw(
        pipeline, control_image=EDGES, controlnet_conditioning_scale=0.7, control_guidance_start=0.0,
        control_guidance_end=0.5,
    )  # fmt: skip
    assert (found == expected).all()
    said = {"image": EDGES, "scale": 0.7, "start": 1.0, "end": 0.5, "processor_id": "canny"}
    assert (draw(pipeline, blockwise_controlnet_inputs=[said]) == expected).all()
    assert (draw(pipeline, controlnet_inputs=[SimpleNamespace(controlnet_id=0, **said)]) == expected).all()


def test_pictures_of_nets_by_their_order_or_by_their_names(pipeline):
    scales = {"controlnet_conditioning_scale": [0.5, 0.25], "control_guidance_end": [1.0, 0.5]}
    for given in ([EDGES, EDGES], {"canny": EDGES, "depth": EDGES}):
        first, second = read(pipeline, control_images=given, **scales)
        assert (first.name, first.scale, first.end, second.name, second.scale, second.end) == (
            "canny", 0.5, 1.0, "depth", 0.25, 0.5,
        )  # fmt: skip
    (only,) = read(pipeline, control_image=[None, None, EDGES], control_mask={"inpaint": mask(9, 9, (0, 0, 1, 1))})
    assert only.name == "inpaint" and only.mask.size == (9, 9)


def test_a_picture_is_resized_in_other_words_than_diffsynths(pipeline):
    large = picture(96, 128, 1)
    small = Image.fromarray(np.asarray(large.resize((48, 64), Image.Resampling.LANCZOS)))
    found, expected = (draw(pipeline, controls={"name": "canny", "image": one}) for one in (large, small))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    with pytest.raises(UsageError, match="is 96x128, and what is drawn 48x64; give control_image, which is resized"):
        draw(pipeline, blockwise_controlnet_inputs=[{"image": large}])


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([{"name": "pose", "image": EDGES}], "has no ControlNet 'pose'; it has canny, depth, inpaint"),
        ([{"image": EDGES}], "given without its name; this bundle has canny, depth, inpaint"),
        ([{"name": "canny"}], "canny is given no image; it takes an image"),
        ([{"name": "canny", "image": "none.png"}], "none.png does not exist"),
        ([{"name": "canny", "image": EDGES, "mask": EDGES}], "canny is given a mask; it takes an image"),
        ([{"name": "inpaint", "image": EDGES}], "inpaint is given no mask; it takes an image and a mask"),
        ([{"name": "canny", "image": EDGES, "scale": float("nan")}], "scale of the ControlNet canny is nan; give a"),
        ([{"name": "canny", "image": EDGES, "scale": "strong"}], "scale of the ControlNet canny is 'strong'"),
        ([{"name": "canny", "image": EDGES, "start": 0.8, "end": 0.2}], "starts at 0.8 and ends at 0.2; start comes"),
        ([{"name": "canny", "image": EDGES, "end": 1.5}], "end of the ControlNet canny is 1.5; give a number"),
        ([{"name": "canny", "image": EDGES, "weight": 1}], "given 'weight'; give of name, image, mask"),
        ([{"name": "canny", "image": EDGES}] * 2, "canny is given twice; give each net once"),
        (["canny"], "controls has 'canny'; give mappings"),
    ],
)
def test_what_a_net_cannot_be_told(entries, message, pipeline):
    with pytest.raises(UsageError, match=message) as caught:
        draw(pipeline, controls=entries)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"controls": [], "control_image": EDGES}, "controls and control_image are both given"),
        ({"control_mask": EDGES}, "control_mask is given, and no control_image"),
        ({"controls": {"name": "canny", "image": EDGES}, "control_guidance_end": 0.5}, "say it in controls"),
        ({"control_image": [EDGES] * 4}, "4 pictures, more than this bundle has ControlNets; it has canny, depth, inp"),
        ({"control_image": EDGES, "controlnet_conditioning_scale": [1.0, 2.0]}, "has 2 numbers for 1 pictures"),
        ({"control_image": {"pose": EDGES}}, "has no ControlNet 'pose'"),
        ({"control_image": EDGES, "control_mask": {"depth": EDGES}}, "a mask for depth, and control_image no picture"),
        ({"controlnet_inputs": [{"image": EDGES, "controlnet_id": 3}]}, "controlnet_id is 3; this bundle has canny"),
        (
            {"controlnet_inputs": [{"image": EDGES, "start": 0.2, "end": 0.8}]},
            "starts at 0.2 and ends at 0.8",
        ),
        ({"controlnet_inputs": [3]}, "controlnet_inputs has 3; give mappings, or objects"),
    ],
)
def test_what_contradicts_itself(call, message, pipeline):
    with pytest.raises(UsageError, match=message):
        draw(pipeline, **call)


def test_a_bundle_without_nets_says_how_to_get_one(bundle_of):
    with (
        Pipeline.open(bundle_of("qwen-image")) as plain,
        pytest.raises(UsageError, match=r"this bundle has no ControlNet; .*--controlnet.*add-controlnet"),
    ):
        plain("a cup", control_image=EDGES)


class TestCommandLine:
    def test_what_the_options_say(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for name in ("a=b.png", "c:1"):
            EDGES.save(tmp_path / name, "PNG")

        def said(*control, masks=(), inpaint_images=()):
            options = {"control_images": control, "control_masks": masks, "control_inpaint_images": inpaint_images}
            found = with_controls(options).get("controls")
            return json.loads(json.dumps(found, default=str))

        assert said() is None
        assert said("edges=p.png:0.5:0.1:0.9", "q.png") == [
            {"name": "edges", "image": "p.png", "scale": 0.5, "start": 0.1, "end": 0.9},
            {"image": "q.png"},
        ]
        assert said("a=b.png") == [{"image": "a=b.png"}]
        assert said("c:1", "n=c:1:2") == [{"image": "c:1"}, {"name": "n", "image": "c:1", "scale": 2.0}]
        assert said("e=C:\\p.png:1") == [{"name": "e", "image": "C:\\p.png", "scale": 1.0}]
        assert said("e=p.png:1:0:1:5") == [{"name": "e", "image": "p.png:1", "scale": 0.0, "start": 1.0, "end": 5.0}]
        assert said("e=p.png", masks=["m.png"]) == [{"name": "e", "image": "p.png", "mask": "m.png"}]
        assert said("e=p.png", masks=["f=m.png"], inpaint_images=["f=q.png"]) == [
            {"name": "e", "image": "p.png"},
            {"name": "f", "mask": "m.png", "inpaint_image": "q.png"},
        ]
        with pytest.raises(UsageError, match=r"--control-mask m.png names none of 2 ControlNets; give .* NAME=m.png"):
            said("e=p.png", "f=q.png", masks=["m.png"])

    def test_a_picture_says_what_made_it_and_is_drawn_again(self, pipeline, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        EDGES.save("edges.png")
        mask(48, 64, (0.2, 0.2, 0.7, 0.7)).save("mask.png")
        common = ("--bundle", str(pipeline.bundle.root), "--quiet")
        size = ("--width", "48", "--height", "64", "--num-inference-steps", "2", "--seed", "1")
        nets = ("--control", "canny=edges.png:0.8:0:0.5", "--control", "inpaint=edges.png", "--control-mask")
        first = invoke(main, "generate", "a cup", *common, *size, *nets, "inpaint=mask.png", "-o", "1.png")
        assert first.code == 0, first
        text = Image.open("1.png").text["parameters"]
        assert "canny 0.8 from 0 to 0.5: edges.png (" in text and "inpaint 1: edges.png (" in text
        second = invoke(main, "generate", *common, "--from-image", "1.png", "-o", "2.png")
        assert second.code == 0, second
        assert (tmp_path / "1.png").read_bytes() == (tmp_path / "2.png").read_bytes()
        (tmp_path / "edges.png").unlink()
        third = invoke(main, "generate", *common, "--from-image", "1.png", "-o", "3.png")
        third.assert_refused("edges.png", code=2)
        assert "--control NAME=" in third.err
