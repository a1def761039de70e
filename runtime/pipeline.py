"""Text to pictures under diffusers' names: a thin adapter of :class:`zimgkit.runtime.session.Session`."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from zimgkit.engines.bundle import Bundle
from zimgkit.engines.choice import AUTO
from zimgkit.engines.errors import BackendError, UsageError
from zimgkit.runtime import demo_models
from zimgkit.runtime.bundles import open_bundle
from zimgkit.runtime.engine_pool import Opener
from zimgkit.runtime.job import Job
from zimgkit.runtime.memory.plan import Plan
from zimgkit.runtime.parameters import document, refuse_unknown
from zimgkit.runtime.pictures.saving import to_pil
from zimgkit.runtime.progress import Report, silent
from zimgkit.runtime.request import KNOWN, Request, check, check_latents
from zimgkit.runtime.session import Device, Session

if TYPE_CHECKING:
    from PIL.Image import Image

Array = NDArray[np.float32]
Callback = Callable[["Pipeline", int, float, dict[str, Array]], "Mapping[str, Array] | None"]
CALLBACK_TENSORS = ("latents", "denoised", "velocity")
"""What a callback may ask for: the latents after the step, the clean ones it aims at, what it moves along."""
OPTIONS = ("backend", "device", "memory", "memory_budget", "vae_tiling", "verify", "report", "warn")
"""Of :meth:`Pipeline.open`."""
CALLBACK_ARGUMENTS = ("callback_on_step_end", "callback_on_step_end_tensor_inputs", "return_dict")


@dataclass(frozen=True)
class Output:
    """What a call gives."""

    images: Any
    """A list of PIL images; pixels from 0 to 1, as a float32 array (N, H, W, 3) or a torch tensor (N, 3, H, W); or
    latents as the reference pipeline has them. Where a picture is taken apart: for each a list of RGBA images, or one
    more dimension after N."""
    request: Request
    """The call, with all that was left open filled in, the seed among it."""

    def __iter__(self) -> Iterator[Any]:
        """So that ``(images,) = output`` works, as with the tuples of diffusers."""
        return iter((self.images,))

    def __getitem__(self, index: int) -> Any:
        return (self.images,)[index]


class Pipeline:
    """Text to picture from one bundle. Open it with :meth:`open`, then call it; threads may call it at once.

    Engines are opened when they are first needed, and stay open for the next call as far as memory allows.
    A pipeline is also a context manager, which closes them.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        backend: str = AUTO,
        device: Device = None,
        memory: str | int | None = "auto",
        memory_budget: int | None = None,
        vae_tiling: str = "auto",
        report: Report = silent,
        warn: Callable[[str], None] = warnings.warn,
        opener: Opener | None = None,
    ) -> None:
        self.session = Session(
            bundle,
            backend=backend,
            device=device,
            memory=memory,
            memory_budget=memory_budget,
            vae_tiling=vae_tiling,
            report=report,
            warn=warn,
            opener=opener,
        )

    @classmethod
    def open(
        cls,
        bundle: str | os.PathLike[str] = demo_models.DEFAULT,
        *,
        backend: str = AUTO,
        device: Device = None,
        memory: str | int | None = "auto",
        memory_budget: int | None = None,
        vae_tiling: str = "auto",
        verify: bool = True,
        report: Report = silent,
        warn: Callable[[str], None] = warnings.warn,
    ) -> Pipeline:
        """Open a bundle.

        Args:
            bundle: its folder, the name of one that zimgkit carries (``"zimg-tiny-z"``, ``"zimg-tiny-qwen"``), or its
                place on a hub: ``"owner/name"``, ``"owner/name@revision"`` or ``"modelscope:owner/name"``.
            backend: ``"onnxruntime"``, ``"openvino"``, ``"torch"``, ``"torch-compiled"``, ``"tensorrt"`` or
                ``"tensorrt-rtx"``; ``"auto"`` takes the best one installed for the bundle and this machine, and
                ``session.choice`` says why.
            device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, of OpenVINO ``"gpu"`` or ``"npu"``, or such a device for each
                component by its name; by default the best one the backend finds, of OpenVINO the CPU.
            memory: how much a call may take: bytes, a text such as ``"8GB"`` or ``"50%"`` of what is free, or
                ``"auto"`` for what is free of the machine, the control group and the process's limits. Where not all
                fits, engines are opened in turn, and then the VAE takes large pictures in tiles; what cannot fit is
                refused before anything is opened.
            memory_budget: bytes of engines that may stay open between their parts of a call and between calls. With 0
                memory holds one component at a time, and every call loads them anew; by default all stay that fit.
            vae_tiling: ``"auto"`` encodes and decodes in tiles where memory is short for the whole, ``"on"`` always,
                and ``"off"`` never.
            verify: check the files against the manifest's hashes (once per file; see :meth:`Bundle.verify`).
            report: called with (stage, done, total) while a call runs.
            warn: called with what the caller should know, such as a prompt that was cut.

        Raises:
            BundleError: it is no bundle, or was changed, or is of a newer zimgkit.
            DownloadError: it can neither be fetched nor is it in the cache.
            UsageError: no such backend.
        """
        return cls(
            open_bundle(bundle, verify=verify, backend=backend, device=device),
            backend=backend,
            device=device,
            memory=memory,
            memory_budget=memory_budget,
            vae_tiling=vae_tiling,
            report=report,
            warn=warn,
        )

    @classmethod
    def from_pretrained(cls, bundle: str | os.PathLike[str], **options: Any) -> Pipeline:
        """:meth:`open` under diffusers' name, with its options.

        Raises:
            UsageError: there is no such option, for one because it was settled when the bundle was built.
            BundleError: see :meth:`open`.
        """
        refuse_unknown(options, OPTIONS)
        return cls.open(bundle, **options)

    @property
    def bundle(self) -> Bundle:
        """What it draws from."""
        return self.session.bundle

    @property
    def backend(self) -> str:
        """What runs the networks."""
        return self.session.backend

    def to(self, device: Device) -> Pipeline:
        """Run on another device from now on, as diffusers' pipelines do; engines are opened there when needed."""
        self.session.move_to(device)
        return self

    def plan(self, prompt: str | Sequence[str] | None = None, **call: Any) -> Plan:
        """How a call with these arguments would be drawn within the memory there is now; nothing is opened for it.

        Raises:
            OutOfMemoryError: it does not fit; naming what would.
            UsageError: an argument is not known or out of its range.
        """
        return self.session.plan(check(self.bundle.manifest, self.session.family, prompt=prompt, **call))

    def enable_vae_tiling(self) -> None:
        """Encode and decode in tiles from now on, as diffusers' pipelines do."""
        self.session.tiling.set("on")

    def disable_vae_tiling(self) -> None:
        """Decode the whole from now on."""
        self.session.tiling.set("off")

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float | None = None,
        true_cfg_scale: float | None = None,
        cfg_scale: float | None = None,
        cfg_normalization: float | None = None,
        cfg_truncation: float | None = None,
        guidance_low: float | None = None,
        guidance_high: float | None = None,
        cache: str | None = None,
        cache_negative: str | None = None,
        cache_order: int | None = None,
        cache_reuse: str | None = None,
        num_images_per_prompt: int | None = None,
        seed: int | Sequence[int] | None = None,
        generator: Any = None,
        latents: Any = None,
        prompt_embeds: Any = None,
        negative_prompt_embeds: Any = None,
        max_sequence_length: int | None = None,
        image: Any = None,
        input_image: Any = None,
        edit_image: Any = None,
        strength: float | None = None,
        denoising_strength: float | None = None,
        mask_image: Any = None,
        inpaint_mask: Any = None,
        mask_blur: float | None = None,
        inpaint_blur_size: int | None = None,
        inpaint_blur_sigma: float | None = None,
        keep_unmasked: bool | None = None,
        edit_image_auto_resize: bool | None = None,
        edit_image_area: int | None = None,
        edit_rope_interpolation: bool | None = None,
        context_image: Any = None,
        eligen_entity_prompts: Sequence[str] | None = None,
        eligen_entity_masks: Any = None,
        eligen_enable_on_negative: bool | None = None,
        controls: Any = None,
        control_image: Any = None,
        control_images: Any = None,
        control_mask: Any = None,
        controlnet_conditioning_scale: float | Sequence[float] | None = None,
        control_guidance_start: float | Sequence[float] | None = None,
        control_guidance_end: float | Sequence[float] | None = None,
        controlnet_inputs: Any = None,
        blockwise_controlnet_inputs: Any = None,
        layers: int | None = None,
        layer_num: int | None = None,
        layer_input_image: Any = None,
        resolution: int | None = None,
        cfg_normalize: bool | None = None,
        output_type: str | None = None,
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **others: Any,
    ) -> Output:
        """Generate pictures; the full text is made from the list of parameters, below."""
        given = {
            "prompt": prompt,
            "negative_prompt": negative_prompt,
            "height": height,
            "width": width,
            "num_inference_steps": num_inference_steps,
            "sigmas": sigmas,
            "guidance_scale": guidance_scale,
            "true_cfg_scale": true_cfg_scale,
            "cfg_scale": cfg_scale,
            "cfg_normalization": cfg_normalization,
            "cfg_truncation": cfg_truncation,
            "guidance_low": guidance_low,
            "guidance_high": guidance_high,
            "cache": cache,
            "cache_negative": cache_negative,
            "cache_order": cache_order,
            "cache_reuse": cache_reuse,
            "num_images_per_prompt": num_images_per_prompt,
            "seed": seed,
            "generator": generator,
            "latents": latents,
            "prompt_embeds": prompt_embeds,
            "negative_prompt_embeds": negative_prompt_embeds,
            "max_sequence_length": max_sequence_length,
            "image": image,
            "input_image": input_image,
            "edit_image": edit_image,
            "strength": strength,
            "denoising_strength": denoising_strength,
            "mask_image": mask_image,
            "inpaint_mask": inpaint_mask,
            "mask_blur": mask_blur,
            "inpaint_blur_size": inpaint_blur_size,
            "inpaint_blur_sigma": inpaint_blur_sigma,
            "keep_unmasked": keep_unmasked,
            "edit_image_auto_resize": edit_image_auto_resize,
            "edit_image_area": edit_image_area,
            "edit_rope_interpolation": edit_rope_interpolation,
            "context_image": context_image,
            "eligen_entity_prompts": eligen_entity_prompts,
            "eligen_entity_masks": eligen_entity_masks,
            "eligen_enable_on_negative": eligen_enable_on_negative,
            "controls": controls,
            "control_image": control_image,
            "control_images": control_images,
            "control_mask": control_mask,
            "controlnet_conditioning_scale": controlnet_conditioning_scale,
            "control_guidance_start": control_guidance_start,
            "control_guidance_end": control_guidance_end,
            "controlnet_inputs": controlnet_inputs,
            "blockwise_controlnet_inputs": blockwise_controlnet_inputs,
            "layers": layers,
            "layer_num": layer_num,
            "layer_input_image": layer_input_image,
            "resolution": resolution,
            "cfg_normalize": cfg_normalize,
            "output_type": output_type,
        }
        request = check(self.bundle.manifest, self.session.family, **given, **others)
        wanted = _wanted_tensors(callback_on_step_end_tensor_inputs)
        if request.output_type == "pt":
            _torch()  # Better missed now than after the last step.
        jobs = self.session.begin(request)
        try:
            for group in list(self.session.groups(jobs)):
                self._denoise(group, callback_on_step_end, wanted)
            steps = request.batch * len(jobs[0].schedule)
            self.session.report("denoise", steps, steps)
            images = self._images(jobs, request)
        finally:
            for job in jobs:
                job.release()
        # What a type checker knows of an output serves for the tuple as well: both are unpacked and indexed alike.
        return Output(images, request) if return_dict else cast("Output", (images,))

    def draw_noise(
        self, pictures: int, seed: int | Sequence[int], height: int, width: int, *, frames: int = 1
    ) -> Array:
        """The noise a call starts from; see :meth:`zimgkit.runtime.session.Session.draw_noise`."""
        return self.session.draw_noise(pictures, seed, height, width, frames=frames)

    def encode_prompt(self, prompt: str | Sequence[str], max_sequence_length: int | None = None) -> list[Array]:
        """Rows of the text encoder as a call takes them for ``prompt_embeds``, float32 (tokens, hidden) of each prompt.

        Raises:
            UsageError: a prompt is no text.
            BackendError: the backend failed.
        """
        call = {"prompt": prompt, "max_sequence_length": max_sequence_length}
        return self.session.conditioner.prompt_embeds(check(self.bundle.manifest, self.session.family, **call))

    def cfg_scale(self, guidance_scale: float) -> float:
        """This family's ``guidance_scale`` as DiffSynth's ``cfg_scale``."""
        return self.session.family.cfg_scale(guidance_scale)

    def preview(self, latents: Array, height: int, width: int, *, frames: int = 1) -> list[Image]:
        """Decode latents, such as a callback's ``"denoised"``, of pictures of this size in pixels.

        Where these are taken apart, ``frames`` is how many layers there are and 1 more, and all layers are given.

        Raises:
            UsageError: they are not the latents of such pictures.
        """
        given = np.asarray(latents)
        shape = (len(given) if given.ndim else 0, *self.session.family.latents_shape(height, width, frames))
        return to_pil(self.session.decode(check_latents(given, shape), height, width))

    def close(self) -> None:
        """Close all engines and free their memory."""
        self.session.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        manifest = self.bundle.manifest
        precision = manifest.quantized or manifest.precision
        device = self.session.device or "the best device"
        return f"Pipeline({manifest.name}, {manifest.family}, {precision}, {self.backend} on {device})"

    def _denoise(self, group: Sequence[Job], callback: Callback | None, wanted: Sequence[str]) -> None:
        """Take jobs that go together through all their steps."""
        first = group[0]
        steps, batch = len(first.schedule), first.request.batch
        for step in range(steps):
            self.session.report("denoise", first.index * steps + step * len(group), batch * steps)
            timestep = first.sigma * 1000
            self.session.step(group)
            if callback is None:
                continue
            tensors = {name: np.concatenate([getattr(job, name) for job in group]) for name in wanted}
            changed = callback(self, step, timestep, tensors)
            if changed:
                shape = (len(group), *first.latents.shape[1:])
                latents = check_latents(_changed_latents(changed), shape, "the latents a callback returns")
                for index, job in enumerate(group):
                    job.latents = latents[index : index + 1]

    def _images(self, jobs: Sequence[Job], request: Request) -> Any:
        """Finished jobs in the form that was asked for."""
        if request.output_type == "latent":
            return np.concatenate([job.latents for job in jobs])
        pictures = []
        for index, job in enumerate(jobs):
            self.session.report("decode", index, len(jobs))
            pictures.append(self.session.finish(job, partial(self._tile_done, index, len(jobs))))
        self.session.report("decode", len(jobs), len(jobs))
        pixels = np.stack(pictures)
        if request.output_type == "pil":
            return [to_pil(layers) for layers in pixels] if request.layers else to_pil(pixels)
        if request.output_type == "pt":
            return _torch().from_numpy(np.ascontiguousarray(np.moveaxis(pixels, -1, -3)))
        return pixels

    def _tile_done(self, picture: int, pictures: int, done: int, tiles: int) -> None:
        """Report how far decoding is, by tile."""
        if tiles > 1:
            self.session.report("decode", picture * tiles + done, pictures * tiles)


Pipeline.__call__.__doc__ = f"""Generate pictures, as diffusers' pipelines would from the same weights.

Args:
{document(KNOWN)}
    return_dict: whether to give an :class:`Output`; else a tuple of the images alone.
    callback_on_step_end: called after each step with (pipeline, step, timestep in thousandths, tensors); may
        return ``{{"latents": ...}}`` to go on from other latents. :meth:`preview` makes a picture of them.
    callback_on_step_end_tensor_inputs: which tensors it is given, of {", ".join(CALLBACK_TENSORS)}.

Texts, seeds, embeddings and negative prompts may be lists, one for each prompt or picture. The same seed gives the
picture that the reference pipeline gives with a generator on the CPU.

Raises:
    UsageError: an argument is not known or out of its range; the message names what serves instead.
    BackendError: the backend failed.
"""


def _wanted_tensors(names: Sequence[str]) -> tuple[str, ...]:
    for name in names:
        if name not in CALLBACK_TENSORS:
            hint = f"choose of {', '.join(CALLBACK_TENSORS)}"
            raise UsageError(f"callback_on_step_end_tensor_inputs has {name!r}", hint)
    return tuple(names)


def _changed_latents(changed: Any) -> Any:
    if not isinstance(changed, Mapping):
        message = f"callback_on_step_end returned {type(changed).__name__}"
        raise UsageError(message, 'return {"latents": latents}, or nothing')
    for name in changed:
        if name != "latents":
            raise UsageError(f"callback_on_step_end returned {name!r}", "only latents can be changed")
    return changed["latents"]


def _torch() -> Any:
    """Torch, where it is installed: nothing else of the runtime needs it."""
    try:
        return import_module("torch")
    except ImportError:
        raise BackendError('output_type "pt" needs torch', 'install it, or ask for "np"') from None
