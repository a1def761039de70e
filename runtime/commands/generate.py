"""``zimg-run generate``: a bundle, a prompt and a file name to pictures that carry what made them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from zimgkit.engines.bundle import Manifest
from zimgkit.engines.choice import AUTO
from zimgkit.engines.errors import UsageError
from zimgkit.runtime import demo_models
from zimgkit.runtime.commands.memory import told
from zimgkit.runtime.controls import PICTURES
from zimgkit.runtime.inputs import InputPicture, read_input
from zimgkit.runtime.parameters import BY_NAME, checked
from zimgkit.runtime.pictures import saving as images
from zimgkit.runtime.pictures.metadata import ControlRecord, InputFile, Record, read
from zimgkit.runtime.pipeline import Pipeline
from zimgkit.runtime.progress import Report, silent
from zimgkit.runtime.recording import FROM_A_PICTURE, merged_loras, record
from zimgkit.runtime.request import check

SCALES = ("guidance_scale", "true_cfg_scale", "cfg_scale")
"""Names of one thing, of which a call takes one."""
STRENGTHS = ("strength", "denoising_strength")
"""Likewise."""


STARTS = (*STRENGTHS, "mask_image", "inpaint_mask", "input_image", "control_image")
"""What says that a picture is to start from, and not to edit."""


def generate(
    bundle: Path | None,
    output: Path,
    call: Mapping[str, Any],
    *,
    from_image: Path | None = None,
    backend: str = AUTO,
    device: str | None = None,
    memory: str = "auto",
    vae_tiling: str = "auto",
    report: Report = silent,
    warn: Callable[[str], None] = lambda message: None,
    note: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Generate pictures and save them.

    Args:
        bundle: the bundle's folder, or the name of one that zimgkit carries; :func:`carried_for` what is to be drawn
            where None.
        output: the file; several pictures get numbers before its ending.
        call: parameters of the call by name, None where one was not given.
        from_image: a picture whose parameters fill in what is not given.
        backend: as for :meth:`Pipeline.open`.
        device: as for :meth:`Pipeline.open`.
        memory: as for :meth:`Pipeline.open`.
        vae_tiling: as for :meth:`Pipeline.open`; ``"auto"`` also decodes in tiles where the picture of ``from_image``
            was.
        report: called with (stage, done, total).
        warn: called with what the user should know.
        note: called with what is worth a line: the backend that was chosen, and how the picture fits the memory.

    Returns:
        ``images``: path, seed and index of each; ``parameters`` of the first; the ``backend`` and why; ``memory``: how
        it fitted; ``seconds``.

    Raises:
        ZimgError: whatever went wrong, in one line; no picture is half-written.
    """
    given = {name: value for name, value in call.items() if value is not None}
    count = checked(BY_NAME["num_images_per_prompt"], given.pop("num_images_per_prompt", 1))
    template = read(from_image, warn) if from_image else None
    if template and from_image:
        given = filled(given, template, from_image, warn)
    given = keeping(given)
    if not given.get("prompt"):
        raise UsageError("there is nothing to draw", "give --prompt TEXT, or --from-image PICTURE")
    paths = _numbered(output, count)
    for path in paths:
        images.check_target(path)
    started = time.perf_counter()
    if vae_tiling == "auto" and template and template.vae_tiling:
        vae_tiling = "on"
    with Pipeline.open(
        bundle or carried_for(given, template),
        backend=backend,
        device=device,
        memory=memory,
        memory_budget=0,
        vae_tiling=vae_tiling,
        verify=False,
        report=report,
        warn=warn,
    ) as pipeline:
        given |= completed(pipeline, given, template, count)
        if template:
            warn_of_others(template, f"{from_image}", pipeline.bundle.manifest, warn)
        # Before the weights are read to check them, or for anything else.
        plan = told(pipeline, pipeline.plan(**given, num_images_per_prompt=count), note)
        choice = pipeline.session.choice
        layered = pipeline.bundle.manifest.layers
        layers = given.get("layers", layered.layers) if layered else 1
        paths = [path for picture in paths for path in _numbered(picture, layers)]
        for path in paths:
            images.check_target(path, transparent=layered is not None)
        pipeline.bundle.verify()
        index, drawn = (template.image_index, template.num_images) if template and count == 1 else (0, count)
        result = pipeline(**given, num_images_per_prompt=count)
    seconds = time.perf_counter() - started
    made = [record(pipeline.session, result.request, index + i, drawn) for i in range(count) for _ in range(layers)]
    pictures = [layer for taken in result.images for layer in taken] if layered else result.images
    for picture, path, parameters in zip(pictures, paths, made, strict=True):
        images.save(picture, path, parameters)
    return {
        "images": [
            {"path": str(path), "seed": entry.call().get("seed"), "index": entry.image_index}
            for path, entry in zip(paths, made, strict=True)
        ],
        "parameters": made[0].call() | msgspec.to_builtins(made[0]),
        "backend": {"name": choice.backend, "reason": choice.reason or "it was asked for"},
        "memory": plan,
        "seconds": round(seconds, 3),
    }


def carried_for(given: Mapping[str, Any], template: Record | None = None) -> Path:
    """The small model that draws where no bundle is named.

    That of the picture whose parameters are taken; else the one that edits where there is a picture, and nothing that
    says that it is to start from.

    Args:
        given: parameters of the call by name, those that are given.
        template: of the picture whose parameters are taken.
    """
    if template and template.model in demo_models.ALL:
        return demo_models.locate(template.model)
    edits = "image" in given and given.keys().isdisjoint(STARTS)
    return demo_models.locate(demo_models.EDITOR if edits else demo_models.DEFAULT)


def completed(pipeline: Pipeline, given: Mapping[str, Any], template: Record | None, count: int) -> dict[str, Any]:
    """What a call on a bundle takes beside what was given: its negative prompt, or the noise of a picture's batch."""
    manifest = pipeline.bundle.manifest
    if template is None:
        return {"negative_prompt": given.get("negative_prompt", manifest.defaults.negative_prompt)}
    if count > 1 or not template.image_index or "seed" not in given:
        return {}
    # Its noise was drawn together with that of the pictures before it, which need not be made again.
    request = check(manifest, pipeline.session.family, **given)
    size = (request.height, request.width)
    draw = pipeline.session.draw_noise
    sampled, frames = request.inputs.samples_latents, request.frames
    noise = draw(template.num_images, request.seed, *size, template.image_index, after_posterior=sampled, frames=frames)
    return {"latents": noise}


def warn_of_others(template: Record, path: str, manifest: Manifest, warn: Callable[[str], None]) -> None:
    """Warn where a picture was made by another model, or with other LoRAs."""
    if template.model not in (None, manifest.name):
        warn(f"{path} was made by {template.model}, and this bundle is {manifest.name}")
    elif template.model and template.loras != merged_loras(manifest):
        had, has = template.loras or "no LoRA", merged_loras(manifest) or "no LoRA"
        warn(f"{path} was made with {had}, and this bundle has {has}")


def filled(
    given: Mapping[str, Any], template: Record, path: Path, warn: Callable[[str], None] = lambda message: None
) -> dict[str, Any]:
    """What was given, and the rest from a picture.

    Args:
        given: arguments of a call.
        template: what the picture carries.
        path: its file; the pictures that it was drawn from are looked for beside it.
        warn: called where another picture was given than it was drawn from.

    Raises:
        UsageError: a picture that it was drawn from is not there.
    """
    known = template.call()
    # The family's own scale is exact; pictures of other tools have only the other one.
    useless = [*(SCALES if any(name in given for name in SCALES) else SCALES[1:] if SCALES[0] in known else ())]
    if any(name in given for name in STRENGTHS):
        useless += STRENGTHS
    if "resolution" in given:
        useless += ["height", "width"]
    if not any(name in given or name in known for name in ("image", "input_image")):
        useless += FROM_A_PICTURE  # Other tools write a strength without the picture that it is of.
    rest = {name: value for name, value in known.items() if name not in useless} | dict(given)
    for name, recorded in known.items():
        if name in useless or not (files := _files(recorded)):
            continue
        pictures = [read_input(one, name) for one in _each(given[name])] if name in given else []
        if [picture.sha256 for picture in pictures] != [file.sha256 for file in files]:
            if pictures:
                warn(f"{path} was drawn from another {name}: {', '.join(map(str, files))}")
            else:
                pictures = [_beside(file, name, path) for file in files]
        rest[name] = pictures
    if "controls" in known and "controls" not in given:
        rest["controls"] = [_recalled(one, path) for one in known["controls"]]
    return rest


def keeping(given: Mapping[str, Any]) -> dict[str, Any]:
    """What was given, with the picture's own pixels kept under a mask: who inpaints a file expects that."""
    has_mask = given.get("mask_image") is not None
    return {**({"keep_unmasked": True} if has_mask else {}), **given}


def _files(recorded: Any) -> tuple[InputFile, ...]:
    """The pictures that a recorded parameter names; none where it is of another type."""
    files = recorded if isinstance(recorded, tuple) else (recorded,)
    return tuple(file for file in files if isinstance(file, InputFile))


def _each(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else [value]


def _beside(recorded: InputFile, name: str, path: Path) -> InputPicture:
    """A picture that another was drawn from, which lies beside that or here."""
    for folder in dict.fromkeys((path.parent, Path())):
        beside = folder / Path(recorded.name).name
        if recorded.name and beside.is_file() and (found := read_input(beside, name)).sha256 == recorded.sha256:
            return found
    option = BY_NAME[name].option or ("control NAME=" if name == "controls" else "entity PROMPT")
    raise UsageError(f"{path} was drawn from {recorded}, which is not beside it", f"give --{option} PICTURE")


def _recalled(recorded: ControlRecord, path: Path) -> dict[str, Any]:
    """A ControlNet's entry in a call, with its pictures, which lie beside another one or here."""
    pictures = {key: _beside(file, "controls", path) for key in PICTURES if (file := getattr(recorded, key))}
    return msgspec.structs.asdict(recorded) | pictures


def _numbered(output: Path, count: int) -> list[Path]:
    if count == 1:
        return [output]
    return [output.with_name(f"{output.stem}-{number}{output.suffix}") for number in range(1, count + 1)]
