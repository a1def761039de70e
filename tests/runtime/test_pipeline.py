"""From text to pixels against diffusers' pipelines with the same weights, prompt and seed."""

from __future__ import annotations

import sys
from dataclasses import replace

import msgspec
import numpy as np
import pytest
import torch

from tests import reference
from zimgkit.engines.bundle import CompiledEngine
from zimgkit.engines.errors import BackendError, UsageError
from zimgkit.runtime import Pipeline

BOUND = 1e-3
"""On pixels from 0 to 1."""

WIDER = {
    "z-image": {
        "transformer": {
            "dim": 128, "n_heads": 2, "n_kv_heads": 2, "axes_dims": [16, 24, 24], "n_layers": 3, "n_refiner_layers": 2,
        },
        "vae": {"block_out_channels": (16, 16, 32, 32), "layers_per_block": 2, "norm_num_groups": 4},
        "text_encoder": {"num_hidden_layers": 4, "num_key_value_heads": 4, "head_dim": 16},
        "scheduler": {"shift": 6.0},
    },
    "qwen-image": {
        "transformer": {
            "in_channels": 64, "out_channels": 16, "num_attention_heads": 2, "attention_head_dim": 64,
            "axes_dims_rope": (16, 24, 24), "num_layers": 3,
        },
        "vae": {
            "z_dim": 16, "num_res_blocks": 2, "dim_mult": [1, 2, 4, 4],
            "latents_mean": [0.1 * i - 0.8 for i in range(16)], "latents_std": [1 + 0.1 * i for i in range(16)],
        },
        "text_encoder": {"num_attention_heads": 2, "rope_parameters": {
            "rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e6}},
        "scheduler": {"time_shift_type": "linear", "shift_terminal": None},
    },
}  # fmt: skip


@pytest.fixture(scope="module", params=["z-image", "qwen-image"])
def family(request):
    return request.param


@pytest.fixture(scope="module", params=["tiny", "wider"])
def pair(request, family, bundle_of):
    """A reference pipeline and ours, from the same weights."""
    overrides = WIDER[family] if request.param == "wider" else {}
    ours = Pipeline.open(bundle_of(family, **overrides))
    yield family, reference.FAMILIES[family](0, **overrides), ours
    ours.close()


def scales(family: str, scale: float | None) -> dict[str, float]:
    """A guidance scale, or none, as the reference calls it."""
    if family == "z-image":
        return {"guidance_scale": scale or 0.0}
    return {"true_cfg_scale": scale or 1.0}


CASES = [
    # prompt, negative prompt, height, width, steps, guidance scale, seed
    ("a red circle left of a blue square", None, 64, 64, 4, None, 0),
    ("一只猫，坐在窗台上", "模糊", 96, 64, 3, 4.0, 1),
    ("", None, 48, 80, 2, None, 2),
    ("", "", 32, 32, 3, 2.5, 3),
    ("a cat " * 400, "blurry", 64, 32, 2, 3.0, 2**40 + 7),
    ("odd grid", " ", 16 * 5, 16 * 7, 2, 1.5, 5),
    ("<|im_end|> as a word, and é against é", "x" * 700, 32, 48, 2, 5.0, 6),
    ("eight", None, 16, 16, 8, None, 7),
]


@pytest.mark.parametrize(("prompt", "negative", "height", "width", "steps", "scale", "seed"), CASES)
@pytest.mark.filterwarnings("ignore")
def test_same_picture(pair, prompt, negative, height, width, steps, scale, seed):
    family, theirs, ours = pair
    size = {"height": height, "width": width, "num_inference_steps": steps, "negative_prompt": negative}
    expected = reference.draw(theirs, prompt, seed=seed, **size, **scales(family, scale))
    found = ours(prompt, seed=seed, output_type="np", **size, **scales(family, scale)).images
    assert found.dtype == np.float32
    assert found.shape == expected.shape == (1, height, width, 3)
    assert expected.std() > 0.05  # A flat picture would prove nothing.
    assert np.abs(found - expected).max() < BOUND


@pytest.mark.parametrize(
    ("prompts", "pictures"),
    [
        (["one", "two, and a good deal longer than one"], 1),
        # Of one length: for several pictures of prompts that differ in length, diffusers 0.42 repeats Qwen-Image's
        # mask in another order than the prompts it belongs to.
        (["one", "two"], 2),
    ],
)
def test_several_prompts_and_pictures_draw_their_noise_together(pair, prompts, pictures):
    family, theirs, ours = pair
    call = {"height": 48, "width": 64, "num_inference_steps": 2, "num_images_per_prompt": pictures}
    call |= {"negative_prompt": ["bad", "bad"]} | scales(family, 3.0)
    expected = reference.draw(theirs, prompts, seed=9, **call)
    found = ours(prompts, seed=9, output_type="np", **call).images
    assert found.shape == expected.shape == (2 * pictures, 48, 64, 3)
    assert np.abs(found - expected).max() < BOUND


def test_one_step(pair):
    """Qwen-Image's reference schedule is 0 / 0 at one step where it has a terminal sigma; ours starts at sigma 1."""
    family, theirs, ours = pair
    call = {"height": 32, "width": 32, "num_inference_steps": 1}
    found = ours("one step", seed=0, output_type="np", **call, **scales(family, None)).images
    assert np.isfinite(found).all()
    if theirs.scheduler.config.shift_terminal:
        assert found.std() > 0.01
        return
    expected = reference.draw(theirs, "one step", seed=0, **call, **scales(family, None))
    assert np.abs(found - expected).max() < BOUND


def test_given_latents_and_latents_out(pair):
    family, theirs, ours = pair
    call = {"height": 32, "width": 64, "num_inference_steps": 2} | scales(family, None)
    shape = (2, 16, 4, 8) if family == "z-image" else (2, 8, theirs.transformer.config.in_channels)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    expected = theirs(
        "a", latents=latents.clone(), num_images_per_prompt=2, output_type="latent", **call
    ).images.numpy()
    found = ours("a", latents=latents.numpy(), num_images_per_prompt=2, output_type="latent", **call).images
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


def test_one_seed_per_picture(pair):
    family, theirs, ours = pair
    call = {"height": 32, "width": 32, "num_inference_steps": 2, "num_images_per_prompt": 2} | scales(family, None)
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in (3, 11)]
    expected = theirs("a", generator=generators, output_type="np", **call).images
    found = ours("a", seed=[3, 11], output_type="np", **call).images
    assert np.abs(found - expected).max() < BOUND


def test_custom_sigmas_and_short_sequences(pair):
    family, theirs, ours = pair
    call = {"height": 32, "width": 32, "sigmas": [1.0, 0.6, 0.3], "max_sequence_length": 12} | scales(family, None)
    expected = reference.draw(theirs, "many more than twelve tokens", num_inference_steps=3, **call)
    with pytest.warns(UserWarning, match="12 tokens"):
        found = ours("many more than twelve tokens", seed=0, output_type="np", **call).images
    assert np.abs(found - expected).max() < BOUND


@pytest.mark.parametrize(("normalization", "truncation"), [(0.9, 1.0), (0.0, 0.2), (1.1, 0.5)])
def test_z_image_guidance_options(bundle_of, normalization, truncation):
    theirs, ours = reference.z_image(), Pipeline.open(bundle_of("z-image"))
    call = {
        "height": 32, "width": 48, "num_inference_steps": 4, "guidance_scale": 4.0,
        "cfg_normalization": normalization, "cfg_truncation": truncation,
    }  # fmt: skip
    expected = reference.draw(theirs, "a", seed=1, **call)
    found = ours("a", seed=1, output_type="np", **call).images
    assert np.abs(found - expected).max() < BOUND


def test_guidance_within_an_interval_of_noise_levels(family, bundle_of, monkeypatch):
    """A reference whose network gives the prompt's prediction for the negative one outside of it: what guides none."""
    theirs, ours = reference.FAMILIES[family](), Pipeline.open(bundle_of(family))
    network, within, last = theirs.transformer.forward, [], []

    def forward(*args, **more):
        result = network(*args, **more)
        time = float((args[1] if family == "z-image" else more["timestep"])[0])
        sigma = 1 - time if family == "z-image" else time
        if 0.35 < sigma < 0.95:
            within.append(sigma)
        elif family == "z-image":  # Both branches are one batch.
            half = len(result[0]) // 2
            return (result[0][:half] * 2,)
        elif last and last[-1][0] == sigma:
            return last[-1][1]
        last.append((sigma, result))
        return result

    monkeypatch.setattr(theirs.transformer, "forward", forward)
    call = {"height": 32, "width": 48, "sigmas": [1.0, 0.7, 0.4, 0.1], "negative_prompt": "bad", **scales(family, 4.0)}
    expected = reference.draw(theirs, "a", seed=1, num_inference_steps=4, **call)
    found = ours("a", seed=1, output_type="np", guidance_low=0.35, guidance_high=0.95, **call).images
    assert 0 < len(set(within)) < 4
    assert np.abs(found - expected).max() < BOUND
    truncated = ours("a", seed=1, output_type="np", cfg_truncation=0.65, guidance_high=0.95, **call).images
    assert np.array_equal(found, truncated)


def test_torch_backend_draws_the_same_picture(pair, bundle_of):
    family, theirs, ours = pair
    call = {"height": 48, "width": 64, "num_inference_steps": 2, "negative_prompt": "bad"} | scales(family, 3.0)
    with Pipeline.open(ours.bundle.root, backend="torch", device="cpu") as other:
        found = other("a cat", seed=4, output_type="np", **call).images
    expected = reference.draw(theirs, "a cat", seed=4, **call)
    assert np.abs(found - expected).max() < BOUND
    assert np.abs(found - ours("a cat", seed=4, output_type="np", **call).images).max() < BOUND


def test_bfloat16_bundle(family, bundle_of):
    """Weights rounded to bfloat16, computed in float32 on the CPU: the picture of a reference with such weights."""
    theirs = reference.FAMILIES[family]()
    for part in (theirs.text_encoder, theirs.transformer, theirs.vae):
        for parameter in part.parameters():
            parameter.data = parameter.data.bfloat16().float()
    call = {"height": 48, "width": 48, "num_inference_steps": 2} | scales(family, None)
    with Pipeline.open(bundle_of(family, "bf16")) as ours:
        latents = ours.draw_noise(1, 5, 48, 48)
        found = ours("a cat", latents=latents, output_type="np", **call).images
    expected = theirs("a cat", latents=torch.from_numpy(latents), output_type="np", **call).images
    # The modulation table is kept in bfloat16, as the reference in bfloat16 would compute it.
    assert np.abs(found - expected).max() < (BOUND if family == "z-image" else 0.05)


def test_noise_of_a_bfloat16_bundle_is_drawn_as_the_reference_draws_it(bundle_of):
    generator = torch.Generator("cpu").manual_seed(7)
    expected = torch.randn((1, 1, 4, 8, 8), generator=generator, dtype=torch.bfloat16).float()
    with Pipeline.open(bundle_of("qwen-image", "bf16")) as ours:
        found = ours.draw_noise(1, 7, 64, 64)
    assert sorted(found.reshape(-1)) == sorted(expected.numpy().reshape(-1))


def test_callback_sees_and_changes_the_latents(family, bundle_of):
    with Pipeline.open(bundle_of(family)) as ours:
        seen = []

        def look(pipeline, step, timestep, tensors):
            seen.append((step, timestep, tensors))

        call = {"height": 32, "width": 32, "num_inference_steps": 3, "seed": 0, "output_type": "latent"}
        plain = ours(
            "a", callback_on_step_end=look, callback_on_step_end_tensor_inputs=["latents", "denoised"], **call
        ).images
        assert [step for step, _, _ in seen] == [0, 1, 2]
        assert seen[0][1] == 1000.0
        assert np.array_equal(seen[-1][2]["latents"], plain)
        # The last step goes all the way to what it takes for clean.
        assert np.allclose(seen[-1][2]["denoised"], plain, atol=1e-5)
        assert ours.preview(seen[0][2]["denoised"], 32, 32)[0].size == (32, 32)
        zeros = ours("a", callback_on_step_end=lambda p, i, t, k: {"latents": np.zeros_like(k["latents"])}, **call)
        assert not zeros.images.any()


def test_pil_is_np_rounded(family, bundle_of):
    with Pipeline.open(bundle_of(family)) as ours:
        call = {"height": 32, "width": 48, "num_inference_steps": 2, "seed": 1}
        pixels = ours("a", output_type="np", **call).images
        pictures = ours("a", **call).images
    assert pictures[0].size == (48, 32)
    assert np.array_equal(np.asarray(pictures[0]), (pixels[0] * 255).round().astype(np.uint8))


def test_a_random_seed_is_told_and_repeats_the_picture(family, bundle_of):
    with Pipeline.open(bundle_of(family)) as ours:
        call = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "np"}
        first = ours("a", **call)
        again = ours("a", seed=first.request.seed, **call)
    assert np.array_equal(first.images, again.images)


def test_cfg_scale_is_diffsynths(bundle_of):
    """In DiffSynth's form both families are ``neg + s (pos - neg)``; for Z-Image that is diffusers' scale plus one."""
    with Pipeline.open(bundle_of("z-image")) as ours:
        call = {"height": 32, "width": 32, "num_inference_steps": 2, "seed": 0, "output_type": "latent"}
        assert np.array_equal(ours("a", cfg_scale=4.0, **call).images, ours("a", guidance_scale=3.0, **call).images)
        assert np.array_equal(ours("a", cfg_scale=1.0, **call).images, ours("a", guidance_scale=0.0, **call).images)


def test_guidance_without_a_negative_prompt_is_off_in_qwen_image_and_said(bundle_of):
    call = {"height": 32, "width": 32, "num_inference_steps": 2, "seed": 0, "output_type": "latent"}
    with Pipeline.open(bundle_of("qwen-image")) as ours:
        with pytest.warns(UserWarning, match="guidance is off, for there is no negative prompt"):
            silent = ours("a", guidance_scale=4.0, **call).images
        assert np.array_equal(silent, ours("a", guidance_scale=1.0, **call).images)
        assert not np.array_equal(silent, ours("a", guidance_scale=4.0, negative_prompt=" ", **call).images)


def test_pictures_of_a_prompt_are_denoised_together_where_an_engine_takes_them(family, bundle_of):
    call = {"height": 32, "width": 48, "num_inference_steps": 2, "seed": 0, "output_type": "np"}
    call |= {"negative_prompt": "b", "guidance_scale": 3.0, "num_images_per_prompt": 5}
    with Pipeline.open(bundle_of(family)) as ours:
        apart = ours(["a", "a longer one"], **call).images
        sizes = []
        # ONNX Runtime takes any batch; only what the manifest says of compiled engines makes the pipeline use it.
        engine = CompiledEngine("denoiser", "", "onnxruntime", "", "", "", "", ({"batch": (1, 1, 3)},))
        ours.session.bundle = replace(
            ours.bundle, manifest=msgspec.structs.replace(ours.bundle.manifest, engines=(engine,))
        )
        together = ours(
            ["a", "a longer one"],
            **call,
            callback_on_step_end=lambda pipe, step, timestep, tensors: sizes.append(len(tensors["latents"])),
        ).images
    assert sizes == [3, 3, 2, 2] * 2
    assert np.abs(together - apart).max() < 1e-4


def test_released_engines_draw_the_same(family, bundle_of):
    call = {"height": 32, "width": 32, "num_inference_steps": 2, "seed": 0, "output_type": "np"}
    with Pipeline.open(bundle_of(family), memory_budget=0) as ours:
        first, second = ours("a", **call).images, ours("a", **call).images
    assert np.array_equal(first, second)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"height": 100}, "height is 100, not a multiple of 16; the nearest that is: 96"),
        ({"width": 0}, "width is 0"),
        ({"height": 8208}, "height is 8208"),
        ({"height": 64.5}, "whole number"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"num_inference_steps": -3}, "num_inference_steps is -3"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"guidance_scale": "much"}, "give a number"),
        ({"guidance_scale": 1.0, "cfg_scale": 2.0}, "names for one thing"),
        ({"output_type": "tensor"}, "output_type is 'tensor'"),
        ({"seed": 2**64}, "seed is"),
        ({"seed": [1, 2, 3]}, "3 seeds for 1 pictures"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt is 0"),
        ({"latents": np.zeros((1, 2, 3), np.float32)}, "latents have the shape"),
        ({"sigmas": []}, "sigmas"),
        ({"sigmas": [1.0, 2.0]}, "sigmas is 2.0"),
        ({"max_sequence_length": 5000}, "max_sequence_length is 5000"),
        ({"prompt": 7}, "prompt must be"),
        ({"prompt": []}, "prompt must be"),
        ({"prompt": "x" * 100_001}, "100,001 characters"),
        ({"prompt": ["a", "b"], "negative_prompt": ["a", "b", "c"], "cfg_scale": 3.0}, "3 negative prompts"),
    ],
)
def test_bad_arguments(family, bundle_of, call, message):
    with Pipeline.open(bundle_of(family)) as ours, pytest.raises(UsageError, match=message):
        ours(**({"prompt": "a", "height": 32, "width": 32, "num_inference_steps": 1} | call))


def test_bad_latents(family, bundle_of):
    with Pipeline.open(bundle_of(family)) as ours:
        shape = ours.draw_noise(1, 0, 32, 32).shape
        with pytest.raises(UsageError, match="finite"):
            ours("a", height=32, width=32, latents=np.full(shape, np.nan, np.float32))


class TestPortedCode:
    """What code written for diffusers' pipelines does."""

    CALL = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "np"}  # noqa: RUF012

    def test_from_pretrained(self, family, bundle_of):
        with Pipeline.from_pretrained(bundle_of(family), device="cpu") as ours:
            assert ours.to("cpu") is ours
            assert ours("a", seed=0, **self.CALL).images.shape == (1, 32, 32, 3)
        assert Pipeline.from_pretrained("zimg-tiny-z").bundle.manifest.name == "zimg-tiny-z"
        with pytest.raises(UsageError, match=r"no argument 'torch_dtype'; use .*zimg-export build --precision"):
            Pipeline.from_pretrained(bundle_of(family), torch_dtype=torch.bfloat16)

    def test_generators(self, pair):
        family, theirs, ours = pair
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in (3, 11)]
        call = self.CALL | {"num_images_per_prompt": 2} | scales(family, None)
        expected = theirs("a", generator=generators, **call).images
        again = [torch.Generator("cpu").manual_seed(seed) for seed in (3, 11)]
        assert np.abs(ours("a", generator=again, **call).images - expected).max() < BOUND
        one = ours("a", generator=torch.Generator("cpu").manual_seed(7), **call)
        assert one.request.seed == 7
        assert np.array_equal(one.images, ours("a", seed=7, **call).images)
        assert np.array_equal(one.images, ours("a", generator=7, **call).images)
        with pytest.raises(UsageError, match="seed and generator are both given"):
            ours("a", seed=7, generator=generators[0], **call)
        with pytest.raises(UsageError, match="seed is"):
            ours("a", generator=object(), **call)

    def test_tuples(self, family, bundle_of):
        with Pipeline.open(bundle_of(family)) as ours:
            whole = ours("a", seed=1, **self.CALL)
            (images,) = ours("a", seed=1, return_dict=False, **self.CALL)
        assert np.array_equal(images, whole.images)
        assert np.array_equal(images, whole[0])

    def test_prompt_embeds(self, pair):
        """The rows of the reference's own text encoder give the picture of its prompt."""
        family, theirs, ours = pair
        call = self.CALL | scales(family, 3.0)
        reference_call = {name: value for name, value in call.items() if name != "output_type"}
        expected = reference.draw(theirs, "a cat", seed=2, negative_prompt="bad", **reference_call)
        with torch.no_grad():
            positive, negative = (theirs.encode_prompt(text)[0] for text in ("a cat", "bad"))
        found = ours(seed=2, prompt_embeds=positive, negative_prompt_embeds=negative, **call).images
        assert np.abs(found - expected).max() < BOUND

    @pytest.mark.parametrize(
        "rows", [[], np.zeros((2, 3)), np.full((1, 2, 3), np.nan), "text", [np.zeros((0, 4))], np.zeros((1, 2, 3), int)]
    )
    def test_bad_prompt_embeds(self, family, bundle_of, rows):
        with Pipeline.open(bundle_of(family)) as ours, pytest.raises(UsageError, match="no rows of the text encoder"):
            ours(prompt_embeds=rows, **self.CALL)

    def test_a_prompt_and_its_embeds_are_too_much(self, family, bundle_of):
        rows = np.zeros((1, 2, 3), np.float32)
        with Pipeline.open(bundle_of(family)) as ours:
            with pytest.raises(UsageError, match="prompt and prompt_embeds are both given"):
                ours("a", prompt_embeds=rows, **self.CALL)
            with pytest.raises(UsageError, match="negative_prompt and negative_prompt_embeds are both given"):
                ours("a", negative_prompt="b", negative_prompt_embeds=rows, **self.CALL)

    def test_torch_tensors(self, family, bundle_of, monkeypatch):
        with Pipeline.open(bundle_of(family)) as ours:
            call = {"height": 32, "width": 48, "num_inference_steps": 2, "seed": 1}
            pixels = ours("a", output_type="np", **call).images
            tensors = ours("a", output_type="pt", **call).images
            assert (tensors.shape, tensors.dtype) == ((1, 3, 32, 48), torch.float32)
            assert np.array_equal(tensors.permute(0, 2, 3, 1).numpy(), pixels)
            monkeypatch.setitem(sys.modules, "torch", None)
            with pytest.raises(BackendError, match='"pt" needs torch; install it, or ask for "np"'):
                ours("a", output_type="pt", **call)

    def test_latents_of_torch(self, family, bundle_of):
        with Pipeline.open(bundle_of(family)) as ours:
            noise = ours.draw_noise(1, 4, 32, 32)
            given = ours("a", latents=torch.from_numpy(noise).double(), **self.CALL).images
            assert np.array_equal(given, ours("a", seed=4, **self.CALL).images)

    def test_repr(self, bundle_of):
        with Pipeline.open(bundle_of("z-image", "bf16"), device="cpu") as ours:
            name = ours.bundle.manifest.name
            assert repr(ours) == f"Pipeline({name}, z-image, bfloat16, onnxruntime on cpu)"

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            ({"image": np.zeros((1, 3, 4, 4))}, "built for text-to-image, not for image-to-image; build one with"),
            (
                {"edit_image": np.zeros((1, 3, 4, 4))},
                "edit_image is given, and this bundle edits nothing",
            ),
            ({"joint_attention_kwargs": {"scale": 1}}, "no argument 'joint_attention_kwargs'; use a bundle"),
            ({"clip_skip": 2}, "no argument 'clip_skip'"),
            ({"guidance": 3.0}, "no argument 'guidance'; use guidance_scale"),
            ({"callback": print}, "no argument 'callback'; use callback_on_step_end"),
        ],
    )
    def test_other_arguments(self, family, bundle_of, call, message):
        with Pipeline.open(bundle_of(family)) as ours, pytest.raises(UsageError, match=message):
            ours("a", **self.CALL, **call)

    def test_arguments_that_ask_for_nothing_are_let_pass(self, family, bundle_of):
        with Pipeline.open(bundle_of(family)) as ours:
            plain = ours("a", seed=0, **self.CALL).images
            found = ours("a", seed=0, image=None, joint_attention_kwargs={}, cross_attention_kwargs=None, **self.CALL)
        assert np.array_equal(found.images, plain)


class TestCallbacks:
    """What a callback asks for and gives back is checked like the call itself."""

    CALL = {"height": 32, "width": 32, "num_inference_steps": 2, "seed": 0}  # noqa: RUF012

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"latents": np.zeros((1, 2))}, "the latents a callback returns have the shape"),
            ({"latents": "x"}, "the latents a callback returns"),
            ({"prompt_embeds": 1}, "returned 'prompt_embeds'; only latents can be changed"),
            (["latents"], "returned list"),
        ],
    )
    def test_what_it_returns(self, family, bundle_of, given, message):
        with Pipeline.open(bundle_of(family)) as ours, pytest.raises(UsageError, match=message):
            ours("a", callback_on_step_end=lambda *_: given, **self.CALL)

    def test_not_a_number(self, family, bundle_of):
        with Pipeline.open(bundle_of(family)) as ours, pytest.raises(UsageError, match="finite"):
            ours("a", callback_on_step_end=lambda p, i, t, k: {"latents": k["latents"] * np.nan}, **self.CALL)

    def test_what_it_asks_for(self, family, bundle_of):
        with (
            Pipeline.open(bundle_of(family)) as ours,
            pytest.raises(UsageError, match="has 'prompt_embeds'; choose of"),
        ):
            ours("a", callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"], **self.CALL)

    def test_what_it_previews(self, family, bundle_of):
        with Pipeline.open(bundle_of(family)) as ours:
            for bad in (np.zeros((2, 2), np.float32), np.zeros(()), ours.draw_noise(1, 0, 32, 32) * np.nan):
                with pytest.raises(UsageError, match="latents"):
                    ours.preview(bad, 32, 32)

    def test_an_error_in_it_leaves_the_pipeline_usable(self, family, bundle_of):
        with Pipeline.open(bundle_of(family), memory_budget=0) as ours:
            with pytest.raises(ZeroDivisionError):
                ours("a", callback_on_step_end=lambda *_: 1 / 0, **self.CALL)
            assert ours("a", **self.CALL).images[0].size == (32, 32)
