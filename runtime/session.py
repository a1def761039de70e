"""A bundle's engines at work on jobs: encode a prompt, take steps, decode. Any number of threads may share a session.

``begin`` turns a request into jobs, one for each picture; ``step`` takes some of them one step further; ``finish``
gives a picture. Between two steps jobs may be cancelled, previewed, or left lying while others go on.
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain, groupby
from operator import itemgetter

import numpy as np

from zimgkit.engines.base import Feeds
from zimgkit.engines.bundle import MANIFEST, Bundle
from zimgkit.engines.choice import AUTO, Choice, choose_backend
from zimgkit.engines.errors import BackendError, OutOfMemoryError, UsageError
from zimgkit.engines.tensors.dtypes import round_to
from zimgkit.runtime.caching import CachedStep, most_residuals, notes, pieces
from zimgkit.runtime.cautions import cautions
from zimgkit.runtime.conditioning import Conditioner
from zimgkit.runtime.control_conditions import acting, component_of
from zimgkit.runtime.decoding import Decoder
from zimgkit.runtime.diffusion.blending import Kept
from zimgkit.runtime.diffusion.noise import Generator, generator, randn_sample, randn_tensor
from zimgkit.runtime.diffusion.schedule import add_noise, euler_step, read_scheduler
from zimgkit.runtime.encoding import Encoder
from zimgkit.runtime.engine_pool import Borrowed, EnginePool, Opener
from zimgkit.runtime.families import family_of
from zimgkit.runtime.families.base import (
    Progress,
)
from zimgkit.runtime.inpainting import keep_unmasked, latents_drawn_anew
from zimgkit.runtime.job import Array, Conditions, Job, Schedule
from zimgkit.runtime.memory.amounts import parse_budget
from zimgkit.runtime.memory.fitting import (
    Picture,
    Setting,
    budget_of,
    choices_that_take_less,
    fit,
    needs_in,
    setting,
    try_to_fit,
)
from zimgkit.runtime.memory.machine import UNLIMITED
from zimgkit.runtime.memory.plan import Plan
from zimgkit.runtime.memory.streaming import within
from zimgkit.runtime.pictures.tiles import ignored
from zimgkit.runtime.progress import Report, silent
from zimgkit.runtime.request import Request
from zimgkit.runtime.served import largest_batch
from zimgkit.runtime.sigmas import as_read, sigmas_of
from zimgkit.runtime.vae_tiling import VaeTiling

Device = str | Mapping[str, str] | None
"""Of all components, or component -> its device; None and what is not named take the best one present."""

Call = tuple[str, Callable[[Borrowed], Feeds]]
"""A denoiser, and what makes its inputs on the device of its engine."""


class Session:
    """The engines of one bundle, and the jobs that run on them.

    Args:
        bundle: an open bundle.
        backend: as for :func:`zimgkit.engines.base.open_engine`, or ``"auto"``: see
            :func:`zimgkit.engines.choice.choose_backend`.
        device: likewise, of all components or of each by its name.
        memory: how much it may take: bytes, a text such as ``"8GB"`` or ``"50%"`` of what is free, or ``"auto"`` for
            what is free. What cannot fit is refused before anything is opened.
        memory_budget: see :class:`zimgkit.runtime.engine_pool.EnginePool`.
        vae_tiling: ``"auto"`` decodes and encodes in tiles where memory is short, ``"on"`` always, ``"off"`` never.
        report: called with (stage, done, total) while something long runs.
        warn: called with what the caller should know, such as a prompt that was cut.
        opener: opens an engine.
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
        total = parse_budget(memory, UNLIMITED)  # Better missed now than at the first picture.
        self.bundle = bundle
        self._named = backend
        self.memory = memory
        self._device = self._known(device)
        self.choice = self._choose()
        """The backend, and why it was chosen where it was not named."""
        if total is not None:
            self.bundle = bundle = within(bundle, self.backend, self._device, total)
        self.report = report
        self.warn = warn
        where = str(bundle.root / MANIFEST)
        self.family = family_of(bundle.manifest, where)
        self.scheduler = read_scheduler(bundle.manifest.scheduler, f"{where}: scheduler")
        self.engines = EnginePool(bundle, self.backend, memory_budget, opener)
        self.tiling = VaeTiling(self.engines, self.family, vae_tiling, warn)
        self.decoder = Decoder(self.engines, self.family, self.tiling)
        self.encoder = Encoder(self.engines, self.family, self.tiling)
        self.conditioner = Conditioner(self.engines, self.family, self.encoder, self.device_of, report, warn)

    def begin(self, request: Request) -> list[Job]:
        """Read a request's prompts, draw its noise and lay out its schedule.

        Returns:
            A job for each picture, those of the first prompt first.

        Raises:
            UsageError: a prompt is no text, or what was compiled does not serve the size.
            OutOfMemoryError: it does not fit the memory; naming what would.
            BackendError: an engine failed.
            BundleError: a component is missing or broken.
        """
        plan = self.plan(request)
        sigmas = sigmas_of(request, self.family, self.scheduler)
        if self.engines.memory_budget is None:
            self.engines.in_turn = plan.in_turn
        for size in self._vae_sizes(request):
            self.tiling.tiled[size] = plan.tiled
        for said in (*cautions(request, self.family, sigmas), *notes(self.bundle, request, self.backend)):
            self.warn(said)
        noise, posterior = self._noise(request)
        with self._advising(request):
            clean = self._clean(request, posterior)
            positive, negative, controls = self.conditioner.read(as_read(request, sigmas), clean)
        progress = partial(self.report, "modulation")
        schedule = Schedule(sigmas, self.family.schedule_inputs(self.bundle, sigmas[:-1], progress))
        mask = self._mask(request)
        jobs = []
        for index in range(request.batch):
            prompt = index // request.num_images_per_prompt
            away = negative[prompt] if negative else None
            latents, kept = noise[index : index + 1], None
            if clean is not None:
                if mask is not None:
                    kept = Kept(clean, latents, mask, request.inputs.blends_velocity)
                latents = add_noise(clean, latents, schedule.sigmas[0])
            control = replace(controls[prompt], alternates=plan.alternates) if controls else None
            job = Job(request, index, latents, schedule, positive[prompt], away, control, kept)
            kept_open = [(component, self.device_of(component)) for component in self._components(job)]
            for where in kept_open:
                self.engines.keep(*where)
            # Once: when the job is denoised or cancelled, or when nobody refers to it any more.
            release = weakref.finalize(job, self._let_go, kept_open)
            release.atexit = False
            job.on_release = release
            jobs.append(job)
        return jobs

    def _let_go(self, engines: Iterable[tuple[str, str | None]]) -> None:
        for component, device in engines:
            self.engines.let_go(component, device)

    def step(self, jobs: Sequence[Job]) -> None:
        """Take jobs one step further.

        Those that share their prompts, size and noise level go through the denoiser together, as many as it takes.

        Raises:
            CancelledError: one of them was cancelled; no other has taken a step then.
            ValueError: one of them has no step left.
            BackendError: an engine failed, or gave NaN or Inf; jobs it had not reached are as they were.
        """
        for job in jobs:
            job.check()
            if job.is_denoised:
                raise ValueError(f"{job} has no step left")
        for group in self.groups(jobs):
            with self._advising(group[0].request):
                self._step(group)

    def groups(self, jobs: Iterable[Job]) -> Iterator[list[Job]]:
        """Jobs that can take a step together, in the order given, no more at once than the denoiser takes."""
        groups: dict[tuple[int, ...], list[Job]] = {}
        for job in jobs:
            # Where the change decides which steps are full, no picture shall depend on others.
            own = id(job) if job.request.caching and job.request.caching.threshold is not None else 0
            key = (id(job.positive), id(job.negative), id(job.schedule), job.step, own)
            groups.setdefault(key, []).append(job)
        for group in groups.values():
            names = self._components(group[0])
            most = min((largest_batch(self.bundle, name, self.backend) for name in names), default=1)
            for start in range(0, len(group), most):
                yield group[start : start + most]

    def _components(self, job: Job) -> list[str]:
        """The denoisers that a job takes steps with, or their pieces."""
        of_each = (pieces(self.bundle, name, self.backend, job.request.caching) or (name,) for name in job.components)
        return [*chain.from_iterable(of_each)]

    def finish(self, job: Job, progress: Progress = ignored) -> Array:
        """Decode a job's latents; all steps must be done.

        Args:
            job: a picture.
            progress: called with how many of its tiles are done, and how many there are.

        Returns:
            The picture, float32 (H, W, 3) from 0 to 1; where one was taken apart, the layers, (layers, H, W, 4).

        Raises:
            CancelledError: it was cancelled.
            ValueError: it has steps left.
            BackendError: an engine failed.
        """
        job.check()
        if not job.is_denoised:
            raise ValueError(f"{job} has steps left")
        with self._advising(job.request):
            pictures = self.decode(job.latents, job.request.height, job.request.width, progress)
        return pictures if job.request.layers else keep_unmasked(pictures[0], job.request.inputs)

    def decode(self, latents: Array, height: int, width: int, progress: Progress = ignored) -> Array:
        """Latents of pictures of this size in pixels as pixels, float32 (N, H, W, 3 or 4) from 0 to 1.

        See :meth:`.decoding.Decoder.decode`, where memory does not suffice for the whole.
        """
        return self.decoder.decode(latents, height, width, self.device_of("vae_decoder"), progress)

    def plan(self, request: Request) -> Plan:
        """How a request would be drawn within the memory there is now; nothing is opened for that.

        Where the backend was not named and nothing is open yet, one that fits takes the place of one that does not.
        Where copies of weights that ONNX Runtime makes do not fit, engines make none from now on.

        Raises:
            OutOfMemoryError: it does not fit; naming what would.
            UsageError: the VAE has to take tiles, and was compiled for other sizes.
        """
        request = as_read(request, sigmas_of(request, self.family, self.scheduler))
        try:
            return self._plan(request)
        except OutOfMemoryError:
            # A denoiser and its pieces are open beside each other only where there is room.
            if self.engines.close_idle(partial(self._is_other, is_cut=bool(self._pieces(request)))):
                return self.plan(request)
            first = self.choice
            if self._named != AUTO or first.backend != "openvino" or self.engines.opened:
                raise
            try:
                self._take(Choice("onnxruntime", f"the memory is short for {first.backend}"))
                return self._plan(request)
            except OutOfMemoryError:
                self._take(first)
            raise

    def _plan(self, request: Request) -> Plan:
        where = self._setting(request)
        needs = needs_in(where, picture := self._picture(request))
        is_cut = bool(self._pieces(request))
        names = {name.partition(".")[0] for name in self.engines.opened if not self._is_other(name, is_cut=is_cut)}
        opened = [needs[name] for name in names if name in needs]
        held = sum(need.held for need in opened)
        addresses = sum(need.addresses for need in opened)
        budget = budget_of(self.memory, host=where.host, addresses=addresses, held=held)
        if picture.alternates:
            # A second denoiser is worth nothing else: with its nets at 0 the first one gives the same.
            both = try_to_fit(where, picture, budget) if where.host else None
            fits = isinstance(both, Plan) and not both.tiled and not both.in_place
            picture = replace(picture, alternates=fits)
        found = replace(fit(where, picture, budget), alternates=picture.alternates)
        if found.in_place and not self.bundle.in_place:
            self.engines.close()
            self.bundle = self.engines.bundle = replace(self.bundle, in_place=True)
        return found

    def _pieces(self, request: Request) -> tuple[str, ...]:
        return pieces(self.bundle, component_of(self.bundle, request), self.backend, request.caching)

    def _is_other(self, component: str, *, is_cut: bool) -> bool:
        """Whether it is a denoiser of the other kind, in pieces or whole."""
        return component.startswith("denoiser") and self.bundle.manifest.is_piece(component) != is_cut

    def tiles(self, request: Request) -> str | None:
        """The tiles that a request's pictures are encoded or decoded in; None where none is."""
        return next(filter(None, (self.tiling.tiles(*size) for size in self._vae_sizes(request))), None)

    def _vae_sizes(self, request: Request) -> list[tuple[int, int]]:
        """Height and width of what is drawn, which is decoded, and of the pictures that are encoded for it."""
        return [request.size, *self.conditioner.encoded_sizes(request)]

    def _setting(self, request: Request) -> Setting:
        drawn, *encoded = self._vae_sizes(request)
        served = [self.tiling.are_served("vae_decoder", *drawn)]
        served += [self.tiling.are_served("vae_encoder", *size) for size in encoded]
        return setting(
            self.bundle,
            self.family,
            self.backend,
            self.device_of("denoiser"),
            vae_tiling=self.tiling.mode,
            tiles_are_served=all(served),
            in_turn=self.engines.memory_budget is not None,
        )

    def _picture(self, request: Request) -> Picture:
        denoiser, nets = component_of(self.bundle, request), acting(request)
        batch = min(request.batch, largest_batch(self.bundle, denoiser, self.backend))
        found, found_pieces = self.conditioner.layouts(request), self._pieces(request)
        return Picture(
            request.height,
            request.width,
            self.conditioner.longest(request),
            batch,
            encoded=max(self.conditioner.encoded_sizes(request), key=math.prod, default=None),
            patches=max((math.prod(layout.patches) for layout in found), default=0),
            conditions=self.conditioner.condition_tokens(request),
            frames=request.frames,
            denoiser=denoiser,
            alternates=any(one.is_windowed for one in nets),
            pieces=found_pieces,
            residuals=most_residuals(request) if found_pieces else 0,
        )

    @contextmanager
    def _advising(self, request: Request) -> Iterator[None]:
        """Where memory runs out, name what takes less."""
        try:
            yield
        except OutOfMemoryError as error:
            where = self._setting(request)
            choices = choices_that_take_less(where, self._picture(request))
            raise OutOfMemoryError(error.message, f"less is taken by {choices}" if choices else error.hint) from None

    def draw_noise(
        self,
        pictures: int,
        seed: int | Sequence[int],
        height: int,
        width: int,
        index: int | None = None,
        *,
        after_posterior: bool = False,
        frames: int = 1,
    ) -> Array:
        """The noise that pictures start from, float32 (pictures, ...), in the form their latents have.

        Args:
            pictures: how many are drawn together.
            seed: one for all of them, or one each.
            height: of the pictures, in pixels.
            width: as ``height``.
            index: where one seed is given, of this picture alone.
            after_posterior: whether the latents of a picture to start from are drawn from the first seed before.
            frames: of each; layers and 1 more where a picture is taken apart.
        """
        return self._draw(pictures, seed, height, width, index, after_posterior=after_posterior, frames=frames)[0]

    def _draw(
        self,
        pictures: int,
        seed: int | Sequence[int],
        height: int,
        width: int,
        index: int | None = None,
        *,
        after_posterior: bool,
        frames: int,
    ) -> tuple[Array, Array | None]:
        """Noise as :meth:`draw_noise` gives it, and that of a picture's posterior, in the family's noise shape."""
        shape = self.family.noise_shape(height, width, frames)
        dtype = self.family.noise_dtype(self.bundle.manifest.precision)
        sources = generator(seed) if isinstance(seed, int) else [generator(one) for one in seed]
        posterior = None
        if after_posterior:
            first = sources if isinstance(sources, Generator) else sources[0]
            posterior = round_to(first.randn((1, *shape)), dtype)
        if index is not None and isinstance(sources, Generator):
            noise = randn_sample((pictures, *shape), sources, index)
        else:
            noise = randn_tensor((pictures, *shape), sources)
        return self.family.from_noise(round_to(noise, dtype)), posterior

    def _noise(self, request: Request) -> tuple[Array, Array | None]:
        """What all pictures of a request start from, and what the latents of its own picture are drawn with."""
        sampled = request.inputs.samples_latents
        if request.latents is not None and not sampled:
            return request.latents, None
        noise, posterior = self._draw(
            request.batch, request.seed, *request.size, after_posterior=sampled, frames=request.frames
        )
        return noise if request.latents is None else request.latents, posterior

    def _clean(self, request: Request, posterior: Array | None) -> Array | None:
        """The latents of the picture that a request starts from."""
        image = request.inputs.image
        if image is None:
            return None
        return self.encoder.encode(image, request.height, request.width, self.device_of("vae_encoder"), posterior)

    def _mask(self, request: Request) -> Array | None:
        """Where it is drawn anew, in the form of the latents: 1, and 0 where it is kept."""
        mask = latents_drawn_anew(request.inputs, request.height, request.width)
        if mask is None:
            return None
        return self.family.from_noise(np.broadcast_to(mask, (1, *self.family.noise_shape(*request.size))))

    @property
    def device(self) -> Device:
        """Where its components run."""
        return self._device

    def move_to(self, device: Device) -> None:
        """Run on other devices from now on; engines are opened there when they are needed.

        Raises:
            UsageError: a component is named that the bundle has not.
        """
        self._device = self._known(device)
        self.close()
        self._take(self._choose())

    @property
    def backend(self) -> str:
        """What runs the networks."""
        return self.choice.backend

    def _take(self, choice: Choice) -> None:
        self.choice = choice
        self.engines.backend = choice.backend

    def _choose(self) -> Choice:
        return choose_backend(self.bundle.manifest, self._device) if self._named == AUTO else Choice(self._named)

    def _known(self, device: Device) -> Device:
        """Check that devices are given to components that there are."""
        components = self.bundle.manifest.components
        for name in device if isinstance(device, Mapping) else ():
            if name not in components:
                raise UsageError(f"device names the component {name!r}", f"choose of {', '.join(components)}")
        return device

    def device_of(self, component: str) -> str | None:
        """Where a component runs; None for the best device present."""
        name = component.partition(".")[0]  # A variant runs where its component does.
        return self.device.get(name) if isinstance(self.device, Mapping) else self.device

    def close(self) -> None:
        """Close all engines; those in use when they are given back. The session can go on, and opens them anew."""
        self.engines.close()

    def _step(self, group: Sequence[Job]) -> None:
        """One step of jobs that share everything but their latents."""
        first, family = group[0], self.family
        schedule, request = first.schedule, first.request
        positive, negative, controls = first.positive, first.negative, first.controls
        sigma, sigma_next = schedule.sigmas[first.step : first.step + 2]
        latents = np.concatenate([job.latents for job in group])
        inputs = {**schedule.inputs(first.step), **family.denoiser_inputs(latents)}
        if positive is None:
            return  # It was cancelled meanwhile.

        scales = controls.at(first.step, len(schedule)) if controls else None
        control = controls.conditions if controls and scales else None

        timed = controls.timed(family, float(sigma)) if controls and control else {}

        def feeds(conditions: Conditions, engine: Borrowed) -> Feeds:
            more = {**control.on(engine), **timed, **(scales or {})} if control else {}
            return {**conditions.on(engine), **more, **inputs}

        branches = [positive, negative] if negative and request.guides_at(float(sigma)) else [positive]
        outputs = self._velocities(group, [((control or each).component, partial(feeds, each)) for each in branches])
        if not all(np.isfinite(output).all() for output in outputs):
            hint = "a broken checkpoint or LoRA, or float16, may overflow: zimg-export verify checks the bundle"
            raise BackendError(f"step {first.step + 1} of {len(schedule)} gave NaN or Inf", hint)
        velocity, *away = (family.velocity(output, latents) for output in outputs)
        if away:
            velocity = family.guide(velocity, away[0], request.guidance_scale, request.cfg_normalization)
        for index, job in enumerate(group):
            own, kept = slice(index, index + 1), job.kept
            before, along = latents[own], velocity[own]
            if kept is not None:
                along = kept.blend_velocity(along, before, sigma)
            moved = euler_step(before, along, sigma, sigma_next)
            if kept is not None:
                moved = kept.blend_latents(moved, sigma_next)
            job.latents, job.denoised, job.velocity = moved, before - sigma * along, along
            job.step += 1
            if job.is_denoised or job.cancelled:  # By another thread, which did not see what this step left.
                job.release()

    def _velocities(self, group: Sequence[Job], calls: Sequence[Call]) -> list[Array]:
        """What the denoiser gives in each branch of guidance, that of the prompt first."""
        caching = group[0].request.caching
        if caching is not None and caching.saves:
            cached = CachedStep(self.engines, self.device_of, group, caching)
            return [cached.run(*call, positive=index == 0) for index, call in enumerate(calls)]
        outputs: list[dict[str, Array]] = []
        for component, same in groupby(calls, itemgetter(0)):
            with self.engines.engine(component, self.device_of(component)) as engine:
                outputs += engine.run_together([feeds(engine) for _, feeds in same])
        return [output["velocity"] for output in outputs]
