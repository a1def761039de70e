"""The loop: encode the prompt, draw the noise, denoise, decode. The one page to read first."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from zimgkit.engines.base import Engine, Feeds
from zimgkit.engines.bundle import Bundle
from zimgkit.engines.errors import UsageError
from zimgkit.engines.tensors.dtypes import round_to
from zimgkit.runtime import demo_models
from zimgkit.runtime import request as requests
from zimgkit.runtime.diffusion.modulation import modulation_table
from zimgkit.runtime.diffusion.noise import randn_tensor
from zimgkit.runtime.diffusion.positions import text_encoder_tables
from zimgkit.runtime.diffusion.schedule import calculate_mu, euler_step, flow_match_sigmas
from zimgkit.runtime.engine_pool import EnginePool
from zimgkit.runtime.families import family as family_named
from zimgkit.runtime.pictures import saving as images
from zimgkit.runtime.progress import Report, silent
from zimgkit.runtime.request import Request
from zimgkit.runtime.served import check_served, largest_batch
from zimgkit.runtime.text.tokenizer import PromptTokenizer, keep_rows

if TYPE_CHECKING:
    from PIL.Image import Image

Array = NDArray[np.float32]
Callback = Callable[["Pipeline", int, float, dict[str, Array]], "dict[str, Array] | None"]


@dataclass(frozen=True)
class Output:
    """What a call gives."""

    images: Any
    """A list of PIL images, a float32 array (N, H, W, 3) in 0 ... 1, or latents as the reference pipeline has them."""
    request: Request
    """The call, with all that was left open filled in, the seed among it."""


@dataclass(frozen=True)
class _Prompt:
    """A prompt, encoded: what the denoiser takes of it."""

    conditioning: Array
    tokens: int


class Pipeline:
    """Text to picture from one bundle. Open it with :meth:`open`, then call it.

    Engines are opened when they are first needed, and kept for the next call as far as ``memory_budget`` allows.
    A pipeline is also a context manager, which closes them.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        backend: str = "onnxruntime",
        device: str | None = None,
        memory_budget: int | None = None,
        report: Report = silent,
        warn: Callable[[str], None] = warnings.warn,
        opener: Callable[[Bundle, str, str, str | None], Engine] | None = None,
    ) -> None:
        self.bundle = bundle
        self.backend = backend
        self.report = report
        self.warn = warn
        self._family = family_named(bundle.manifest.family)
        self._config = bundle.manifest.config
        self._pool = EnginePool(bundle, backend, device, memory_budget, opener)
        self._tokenizer = PromptTokenizer(bundle.file("tokenizer/tokenizer.json"), bundle.manifest.text)

    @classmethod
    def open(
        cls,
        bundle: str | os.PathLike[str] = demo_models.DEFAULT,
        *,
        backend: str = "onnxruntime",
        device: str | None = None,
        memory_budget: int | None = None,
        verify: bool = True,
        report: Report = silent,
        warn: Callable[[str], None] = warnings.warn,
    ) -> Pipeline:
        """Open a bundle.

        Args:
            bundle: its folder, or the name of one that zimgkit carries: ``"zimg-tiny-z"`` or ``"zimg-tiny-qwen"``.
            backend: ``"onnxruntime"``, ``"torch"``, ``"tensorrt"`` or ``"tensorrt-rtx"``.
            device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``; by default the best one the backend finds.
            memory_budget: bytes of engines that may stay open between their parts of a call and between calls. With 0
                memory holds one component at a time, and every call loads them anew; by default all stay that fit.
            verify: check the files against the manifest's hashes (once per file; see :meth:`Bundle.verify`).
            report: called with (stage, done, total) while a call runs.
            warn: called with what the caller should know, such as a prompt that was cut.

        Raises:
            BundleError: it is no bundle, or was changed, or is of a newer zimgkit.
            UsageError: no such backend.
        """
        return cls(
            Bundle.open(demo_models.locate(bundle), verify=verify),
            backend=backend,
            device=device,
            memory_budget=memory_budget,
            report=report,
            warn=warn,
        )

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float | None = None,
        true_cfg_scale: float | None = None,
        cfg_scale: float | None = None,
        cfg_normalization: float = 0.0,
        cfg_truncation: float = 1.0,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] | None = None,
        latents: Array | None = None,
        max_sequence_length: int | None = None,
        output_type: str = "pil",
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> Output:
        """Generate pictures, as diffusers' ``ZImagePipeline`` and ``QwenImagePipeline`` would from the same weights.

        Args:
            prompt: a text, or several.
            negative_prompt: what to guide away from; one for all prompts, or one each. Without it Z-Image guides away
                from the empty prompt, and Qwen-Image does not guide at all.
            height: in pixels, a multiple of 16. This and what follows come from the checkpoint's recommendation
                (``pipeline.bundle.manifest.defaults``) where they are not given.
            width: as ``height``.
            num_inference_steps: one or more. With a single step, where Qwen-Image's reference schedule is 0 / 0,
                the one sigma is 1.
            sigmas: noise levels before the schedule's shift, instead of equal steps.
            guidance_scale: in the family's own convention: Z-Image ``pos + g (pos - neg)``, off at 0;
                Qwen-Image ``neg + s (pos - neg)`` with the norm of ``pos``, off at 1.
            true_cfg_scale: another name for it, which diffusers uses with Qwen-Image.
            cfg_scale: DiffSynth's form of it, ``neg + s (pos - neg)`` in both families, off at 1.
            cfg_normalization: Z-Image: a bound on the guided velocity's norm, in norms of the unguided; 0 for none.
            cfg_truncation: Z-Image: guidance is off once 1 - sigma exceeds this.
            num_images_per_prompt: pictures of each prompt.
            seed: of the noise, drawn as ``torch.Generator("cpu").manual_seed(seed)`` would for the whole batch; or a
                list, one for each picture. A random one where it is not given; the output tells.
            latents: noise to start from instead, float32 in the reference pipeline's own form: (N, 16, H/8, W/8)
                for Z-Image, (N, H/16 * W/16, 64) for Qwen-Image.
            max_sequence_length: prompt tokens kept, 512 in the reference.
            output_type: ``"pil"``, ``"np"`` or ``"latent"``.
            callback_on_step_end: called after each step with (pipeline, step, timestep in thousandths, tensors); may
                return ``{"latents": …}`` to go on from other latents. :meth:`preview` makes a picture of them.
            callback_on_step_end_tensor_inputs: which tensors it is given: ``"latents"`` after the step,
                ``"denoised"``, the clean latents the step aims at, ``"velocity"``.

        Raises:
            UsageError: an argument is out of its range.
            BackendError: the backend failed.
        """
        # 1. Check the call and fill in what it leaves open.
        request = requests.check(
            self.bundle.manifest,
            self._family,
            prompt=prompt,
            negative_prompt=negative_prompt,
            num_images_per_prompt=num_images_per_prompt,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            sigmas=sigmas,
            guidance_scale=guidance_scale,
            true_cfg_scale=true_cfg_scale,
            cfg_scale=cfg_scale,
            cfg_normalization=cfg_normalization,
            cfg_truncation=cfg_truncation,
            seed=seed,
            max_sequence_length=max_sequence_length,
            output_type=output_type,
        )
        if latents is None:
            noisy = self.draw_noise(request.batch, request.seed, request.height, request.width)
        else:
            noisy = self._check_latents(latents, request)
        if request.negative_prompts is None and self._family.is_guided(request.guidance_scale, 1.0, 1.0):
            self.warn(
                "guidance is off, for there is no negative prompt; "
                "give one (the models' authors use ' '), or a guidance_scale of 1"
            )
        # 2. Read the prompts.
        prompts = self._encode(self._tokenize(request), request.max_sequence_length)
        # 3. Lay out the schedule, and compute all that depends on it alone.
        schedule = self._sigmas(request)
        # 4. Denoise and 5. decode, one picture at a time.
        clean = self._denoise(
            request, noisy, prompts, schedule, callback_on_step_end, tuple(callback_on_step_end_tensor_inputs)
        )
        if output_type == "latent":
            return Output(clean, request)
        pixels = self._decode(clean, request.height, request.width)
        return Output(images.to_pil(pixels) if output_type == "pil" else pixels, request)

    def draw_noise(self, pictures: int, seed: int | Sequence[int], height: int, width: int) -> Array:
        """The noise a call starts from, in the form its ``latents`` have, float32 (pictures, ...).

        Args:
            pictures: how many are drawn together.
            seed: one for all of them, or one each.
            height: of the pictures, in pixels.
            width: as ``height``.
        """
        noise = randn_tensor((pictures, *self._family.noise_shape(self._config, height, width)), seed)
        return self._family.from_noise(round_to(noise, self._family.noise_dtype(self.bundle.manifest.precision)))

    def cfg_scale(self, guidance_scale: float) -> float:
        """This family's ``guidance_scale`` as DiffSynth's ``cfg_scale``."""
        return self._family.cfg_scale(guidance_scale)

    def preview(self, latents: Array, height: int, width: int) -> list[Image]:
        """Decode latents, such as a callback's ``"denoised"``, of pictures of this size in pixels."""
        return images.to_pil(self._decode(latents, height, width))

    def close(self) -> None:
        """Close all engines and free their memory."""
        self._pool.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _check_latents(self, latents: Array, request: Request) -> Array:
        shape = (request.batch, *self._family.latents_shape(self._config, request.height, request.width))
        given = np.asarray(latents)
        if given.shape != shape:
            raise UsageError(f"latents have the shape {given.shape}", f"this call takes {shape}")
        if not np.issubdtype(given.dtype, np.floating) or not np.isfinite(given).all():
            raise UsageError("latents must be finite floating-point numbers")
        return given.astype(np.float32)

    def _tokenize(self, request: Request) -> dict[str, NDArray[np.int64]]:
        """The token ids of each different prompt of a call, positive or negative; what is past the limit is cut."""
        text = self.bundle.manifest.text
        most = min(text.drop + request.max_sequence_length, text.max_tokens)
        tokens = {}
        for prompt in dict.fromkeys((*request.prompts, *(request.negative_prompts or ()))):
            ids = self._tokenizer.encode(prompt)
            if ids.shape[1] > most:
                self.warn(f"the prompt has more than {most - text.drop} tokens; the rest is not read")
            # The encoder is causal: no row that is kept depends on what is cut here.
            tokens[prompt] = ids[:, :most]
            sides = self._family.graph_sides(request.height, request.width, tokens[prompt].shape[1])
            check_served(self.bundle, self.backend, sides, request.width, request.height)
        return tokens

    def _encode(self, tokens: dict[str, NDArray[np.int64]], max_sequence_length: int) -> dict[str, _Prompt]:
        """Each prompt's conditioning, which all its pictures share."""
        rows: dict[str, Array] = {}
        with self._pool.engine("text_encoder") as engine:
            for index, (text, ids) in enumerate(tokens.items()):
                self.report("encode", index, len(tokens))
                cos, sin = text_encoder_tables(ids.shape[1], self._config["text_encoder"])
                hidden = engine.run({"input_ids": ids, "cos": cos, "sin": sin})["prompt_embeds"][0]
                rows[text] = keep_rows(hidden, self.bundle.manifest.text, max_sequence_length)
        with self._pool.engine("conditioner") as engine:
            encoded = {}
            for text, prompt_embeds in rows.items():
                (conditioning,) = engine.run(self._family.conditioner_inputs(prompt_embeds, self._config)).values()
                encoded[text] = _Prompt(conditioning, len(prompt_embeds))
        self.report("encode", len(tokens), len(tokens))
        return encoded

    def _sigmas(self, request: Request) -> Array:
        scheduler = self.bundle.manifest.scheduler
        mu = calculate_mu((request.height // 16) * (request.width // 16), scheduler)
        base = request.sigmas or self._family.base_sigmas(request.num_inference_steps)
        return flow_match_sigmas(request.num_inference_steps, scheduler, mu=mu, sigmas=base)

    def _denoise(
        self,
        request: Request,
        noisy: Array,
        prompts: dict[str, _Prompt],
        sigmas: Array,
        callback: Callback | None,
        wanted: tuple[str, ...],
    ) -> Array:
        family = self._family
        table = None
        if family.HAS_MODULATION_TABLE:
            table = modulation_table(
                self.bundle, sigmas[:-1], progress=lambda done, total: self.report("modulation", done, total)
            )
        steps = list(pairwise(sigmas))
        clean = np.empty_like(noisy)
        with self._pool.engine("denoiser") as engine:
            bound: dict[str, Feeds] = {}

            def bind(text: str) -> Feeds:
                """What stays the same over all steps, on the device once for all pictures of a prompt."""
                if text not in bound:
                    prompt, size = prompts[text], (request.height, request.width)
                    constants = family.denoiser_constants(prompt.conditioning, prompt.tokens, self._config, *size)
                    bound[text] = engine.upload(constants)
                return bound[text]

            for chunk in _chunks(request, largest_batch(self.bundle, "denoiser", self.backend)):
                index = chunk.start // request.num_images_per_prompt
                positive = bind(request.prompts[index])
                negative = bind(request.negative_prompts[index]) if request.negative_prompts else None
                latents = noisy[chunk]
                for step, (sigma, sigma_next) in enumerate(steps):
                    self.report("denoise", chunk.start * len(steps) + step * len(latents), request.batch * len(steps))
                    inputs = family.denoiser_inputs(latents, sigma, table[step] if table else None, self._config)
                    velocity = family.velocity(engine.run({**positive, **inputs})["velocity"], latents)
                    if negative and family.is_guided(request.guidance_scale, sigma, request.cfg_truncation):
                        away = family.velocity(engine.run({**negative, **inputs})["velocity"], latents)
                        velocity = family.guide(velocity, away, request.guidance_scale, request.cfg_normalization)
                    denoised = latents - sigma * velocity
                    latents = euler_step(latents, velocity, sigma, sigma_next)
                    if callback:
                        known = {"latents": latents, "denoised": denoised, "velocity": velocity}
                        changed = callback(self, step, float(sigma) * 1000, {name: known[name] for name in wanted})
                        latents = (changed or {}).get("latents", latents)
                clean[chunk] = latents
        self.report("denoise", request.batch * len(steps), request.batch * len(steps))
        return clean

    def _decode(self, latents: Array, height: int, width: int) -> Array:
        raw = self._family.to_vae(latents, self._config, height, width)
        with self._pool.engine("vae_decoder") as engine:
            decoded = []
            for index in range(len(raw)):
                self.report("decode", index, len(raw))
                decoded.append(engine.run({"latents": raw[index : index + 1]})["image"])
        self.report("decode", len(raw), len(raw))
        return images.from_vae(np.concatenate(decoded))


def _chunks(request: Request, largest: int) -> list[slice]:
    """The pictures that are denoised together: of one prompt, and no more than an engine takes."""
    per_prompt = request.num_images_per_prompt
    return [
        slice(start, min(start + largest, first + per_prompt))
        for first in range(0, request.batch, per_prompt)
        for start in range(first, first + per_prompt, largest)
    ]
