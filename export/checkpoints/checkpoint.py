"""An open checkpoint in the diffusers layout: its configs, and where each of its tensors lies. No weight is read here.

The layout is ``model_index.json`` and a folder per component with its config and its weights, in one safetensors
file or in shards with an index (https://huggingface.co/docs/diffusers/using-diffusers/other-formats).
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from zimgkit.engines.bundle import CHECKPOINT, Manifest, Source
from zimgkit.engines.decoding import read_json
from zimgkit.engines.errors import CheckpointError, UsageError
from zimgkit.export.checkpoints import catalog
from zimgkit.export.checkpoints.adapters import UNSCALED, merged_adapters
from zimgkit.export.checkpoints.files import read_file
from zimgkit.export.checkpoints.kinds import kind_of
from zimgkit.export.checkpoints.layouts import arrange
from zimgkit.export.checkpoints.quantized import dequantized
from zimgkit.export.checkpoints.single_files import components_in, guess_base, is_file
from zimgkit.export.checkpoints.stored import Decoded, Stored
from zimgkit.export.checkpoints.urls import parse_url
from zimgkit.export.checkpoints.weight_files import weight_files
from zimgkit.export.networks.registry import (
    FAMILIES,
    WEIGHT_FILES,
    family_of_class,
    is_needed,
    is_unused,
    parts,
    sources,
    tasks_of,
)
from zimgkit.runtime import demo_models, hub

PROCESSORS = tuple(dict.fromkeys(family.processor for family in FAMILIES.values()))
"""The folders that say how a vision encoder's pictures are prepared."""
PREPROCESSOR = "preprocessor_config.json"
CONFIGS = (
    "model_index.json",
    "scheduler/scheduler_config.json",
    *(f"{processor}/{PREPROCESSOR}" for processor in PROCESSORS),
    *(f"{component}/*.json" for component in WEIGHT_FILES),
)
"""Patterns of the files that say what a checkpoint is."""

FILES = (
    *CONFIGS,
    *(f"tokenizer/*.{suffix}" for suffix in ("json", "txt", "jinja")),
    *(f"{component}/{stem}{part}.safetensors" for component, stem in WEIGHT_FILES.items() for part in ("", "-*")),
)
"""Patterns of the files that a build needs: no pickles, no second copies in other precisions."""

CONFIG_FILES = {"scheduler": "scheduler_config.json", **dict.fromkeys(PROCESSORS, PREPROCESSOR)}
"""Component -> its config, where that is no ``config.json``."""
FLOATS = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint. Use :func:`open_checkpoint`."""

    root: Path
    name: str
    """Its short name, for people."""
    source: Source
    family: str
    """A name in :data:`zimgkit.export.networks.registry.FAMILIES`."""
    pipeline: str = ""
    """What diffusers calls its pipeline, or its transformer where there is no ``model_index.json``."""
    files: Mapping[str, Path] = field(default_factory=dict)
    """Components whose weights are in files of their own, which stand for those of the folder."""

    @property
    def components(self) -> tuple[str, ...]:
        """Those that it is read for: folders with a config and weights."""
        return sources(self.family, tasks_of(self.family, self.pipeline, ()))

    @property
    def sources(self) -> dict[str, Source]:
        """What its weights come from, as a manifest has it: the folder, and files that stand for components."""
        others = {name: Source(str(file), None, {file.name: file.stat().st_size}) for name, file in self.files.items()}
        return {CHECKPOINT: self.source, **others}

    @cached_property
    def _configs(self) -> dict[str, dict[str, Any]]:
        return {}

    @cached_property
    def _tensors(self) -> dict[str, dict[str, Stored]]:
        return {}

    def config(self, component: str) -> dict[str, Any]:
        """The config of one of its components, of ``"scheduler"``, or of what prepares pictures.

        Raises:
            CheckpointError: it is missing or malformed.
        """
        if component not in self._configs:
            name = CONFIG_FILES.get(component, "config.json")
            self._configs[component] = read_json(_folder(self.root, component) / name, CheckpointError)
        return self._configs[component]

    def tensors(self, component: str) -> Mapping[str, Stored]:
        """Where the tensors of one of its components lie; only headers are read.

        Returns:
            Canonical name -> its place, whose own ``name`` is the stored one. Canonical names are those of diffusers
            for the transformer and the VAE, and those of the bare text model's state dict for the text encoder
            (``layers.0.self_attn.q_proj.weight``), beside ``visual.…`` and ``lm_head.weight``.

        Raises:
            CheckpointError: a file is missing, cut short or no safetensors file, or lacks a tensor of the index.
        """
        if component not in self._tensors:
            own = self.files.get(component)
            files = {own: ()} if own else _weight_files(self.root, component)
            self._tensors[component] = read_component(files, component)
        return self._tensors[component]

    def notes(self, components: Iterable[str]) -> list[str]:
        """What a user should know of components: what nothing in their files tells. The errors are those of tensors."""
        found = []
        for component in components:
            tensors = self.tensors(component).values()
            unscaled = [info for info in tensors if isinstance(info, Decoded) and info.encoding == UNSCALED]
            if unscaled:
                said = f"{unscaled[0].file}: nothing tells lora_alpha of the adapters in the {component}"
                found.append(f"{said}; they are merged at the scale 1. Put its adapter_config.json beside it")
        return found


def open_checkpoint(
    model: str,
    *,
    revision: str | None = None,
    source: str = "huggingface",
    base: str | None = None,
    files: Mapping[str, Path] | None = None,
) -> Checkpoint:
    """Find a checkpoint, fetch what of it is not on this machine, and open it.

    Args:
        model: a folder, a hub id (``owner/name``), its URL, a short name, or the name of a model that comes with
            zimgkit. What exists as a path is a path. A weight file holds some components; the base has the others.
        revision: for a hub: branch, tag or commit.
        source: the hub, ``"huggingface"`` or ``"modelscope"``.
        base: of a weight file, the checkpoint with the configs, the tokenizer and what the file does not hold; the one
            that :func:`zimgkit.export.checkpoints.single_files.guess_base` finds where it is not given.
        files: component -> a weight file that stands for its weights.

    Raises:
        CheckpointError: there is none, or it is incomplete, not in the diffusers layout, or of another family.
        DownloadError: it cannot be fetched.
        UsageError: no such source, or a revision of a local folder.
    """
    model, files = with_base(model, base, files or {})
    wanted = [pattern for pattern in FILES if pattern in CONFIGS or pattern.partition("/")[0] not in files]
    if files:
        # Gigabytes are not fetched only to find that a file is of another size.
        _check_sizes(_open(*_find(model, revision, source, CONFIGS), lambda _: [], files))
    root, model, revision = _find(model, revision, source, tuple(wanted))
    return _open(root, model, revision, lambda component: list(_weight_files(root, component)), files)


def with_base(model: str, base: str | None, files: Mapping[str, Path]) -> tuple[str, dict[str, Path]]:
    """What a weight file stands for.

    Args:
        model: a weight file, or a checkpoint.
        base: the checkpoint that has what the file does not.
        files: component -> a weight file of its own.

    Returns:
        The checkpoint, and component -> file; a checkpoint as it is.

    Raises:
        CheckpointError: a file is none, or holds other components.
        UsageError: a base of what is no weight file.
    """
    found = {component: path.expanduser().absolute() for component, path in files.items()}
    for component, path in found.items():
        if component not in (held := components_in(path)):
            raise CheckpointError(f"{path} holds a {' and a '.join(held)}, and no {component}")
    if not is_file(model):
        if base is not None:
            raise UsageError("--base is of a weight file, and --model is none", "leave --base out")
        return model, found
    path = Path(model).expanduser().absolute()
    held = components_in(path)
    if base is None:
        base = guess_base(path, read_file(path))
    return base, held | found


def open_configs(
    model: str,
    *,
    revision: str | None = None,
    source: str = "huggingface",
    base: str | None = None,
    files: Mapping[str, Path] | None = None,
) -> Checkpoint:
    """Open a checkpoint for its configs alone: from a hub, no weights are fetched.

    The arguments and errors are those of :func:`open_checkpoint`. ``source.files`` has the components' weight files
    that are on this machine, and leaves out a component that lacks one.
    """
    model, files = with_base(model, base, files or {})
    root, model, revision = _find(model, revision, source, CONFIGS)

    def present(component: str) -> list[Path]:
        with contextlib.suppress(CheckpointError):
            return list(_weight_files(root, component))
        return []

    checkpoint = _open(root, model, revision, present, files)
    _check_sizes(checkpoint)
    return checkpoint


def _find(model: str, revision: str | None, source: str, wanted: tuple[str, ...]) -> tuple[Path, str, str | None]:
    """The folder of a checkpoint, after fetching the wanted files of it if it is on a hub; its name and revision."""
    path = Path(model).expanduser() if model.startswith("~/") else demo_models.locate(model)
    if model and os.path.lexists(path):
        if revision is not None:
            raise UsageError(f"{model} is a local folder, which has no revisions", "leave --revision out")
        return path.absolute(), model, None
    name = model
    if address := parse_url(model, source):
        revision, source = address.revision_of_all(revision), address.source
        model, name = address.model_id, address.model
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", model):
        raise CheckpointError(f"{model!r} does not exist", "name a local folder, a hub id (owner/name) or a short name")
    hub_id = catalog.resolve(model)
    if hub_id not in {entry.hub_id for entry in catalog.SERVED}:
        # Gigabytes are not fetched only to find that the model is of another family.
        _family(hub.fetch(hub_id, revision=revision, source=source, allow=CONFIGS[:1]))
    return hub.fetch(hub_id, revision=revision, source=source, allow=wanted), name, revision


def _open(
    root: Path,
    model: str,
    revision: str | None,
    weight_files: Callable[[str], list[Path]],
    replaced: Mapping[str, Path],
) -> Checkpoint:
    # The folder that a hub's client keeps is named by the commit, or by the branch.
    revision = root.name if root.parent.name == "snapshots" else revision
    try:
        family, pipeline = _family(root)
        components = sources(family, tasks_of(family, pipeline, ()))
        files = [file for component in components if component not in replaced for file in weight_files(component)]
        sizes = {file.relative_to(root).as_posix(): file.stat().st_size for file in files}
    except OSError as error:
        raise CheckpointError(f"{root} cannot be read ({error})", "check its rights") from None
    return Checkpoint(root, catalog.short_name(root), Source(model, revision, sizes), family, pipeline, dict(replaced))


def open_origin(
    manifest: Manifest, model: str | None = None, revision: str | None = None, source: str = "huggingface"
) -> Checkpoint:
    """Open the checkpoint that a bundle was built from.

    Args:
        manifest: of the bundle.
        model: where it is now, if not where it was.
        revision: of that, on the hub.
        source: the hub.

    Raises:
        ZimgError: as :func:`open_checkpoint`.
    """
    was = manifest.checkpoint
    files = {name: Path(own.model) for name, own in manifest.sources.items() if name in WEIGHT_FILES}
    if model is not None and is_file(model):
        return open_checkpoint(model, revision=revision, source=source, base=was.model, files=files)
    return open_checkpoint(model or was.model, revision=revision, source=source, files=files)


def origins(found: Mapping[str, Source]) -> dict[str, dict[str, int]]:
    """The weight files among sources: what tells whether two of them are one checkpoint."""
    return {name: own.files for name, own in found.items() if name in (CHECKPOINT, *WEIGHT_FILES)}


def check_tensors(
    infos: Mapping[str, Stored],
    expected: Mapping[str, tuple[int, ...]],
    component: str,
    *,
    ignore: Callable[[str], bool] = lambda name: False,
) -> None:
    """Check that a component has the tensors its network takes, of the right shapes, in float types, and no others.

    Args:
        infos: canonical name -> where it lies, as :meth:`Checkpoint.tensors` gives it.
        expected: canonical name -> shape.
        component: what to call it in messages.
        ignore: whether an unexpected tensor of this name is known to be unused.

    Raises:
        CheckpointError: naming the first offending tensor, and counting the others.
    """
    odd = [name for name in expected if name in infos and infos[name].dtype not in FLOATS]
    if odd:
        info = infos[odd[0]]
        raise CheckpointError(
            f"{info.file}: {info.name!r} of the {component} is stored in {info.dtype}{_others(odd)}",
            f"name a checkpoint in {', '.join(FLOATS)}, or in a form that docs/checkpoints.md lists",
        )
    missing = [name for name in expected if name not in infos]
    unexpected = [name for name in infos if name not in expected and not ignore(name)]
    if missing:
        file = f"{next(iter(infos.values())).file}: " if infos else ""
        hint = "check that its config.json is its own, and that all its files are there"
        if 2 * len(missing) > len(expected):
            hint = "it seems to be a checkpoint of another model"
            if kind := kind_of(infos):
                hint = f"it seems to be {kind}"
        raise CheckpointError(f"{file}the {component} lacks the tensor {missing[0]!r}{_others(missing)}", hint)
    if unexpected:
        file = f"{infos[unexpected[0]].file}: "
        raise CheckpointError(
            f"{file}the {component} has no use for {unexpected[0]!r}{_others(unexpected)}",
            "check that its config.json is its own",
        )
    wrong = [name for name, shape in expected.items() if infos[name].shape != tuple(shape)]
    if wrong:
        info, shape = infos[wrong[0]], tuple(expected[wrong[0]])
        raise CheckpointError(
            f"{info.file}: {info.name!r} of the {component} has shape {info.shape} instead of {shape}{_others(wrong)}",
            "check that its config.json is its own",
        )


def _others(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _family(root: Path) -> tuple[str, str]:
    """The family and the class that a checkpoint's ``model_index.json`` names, else its transformer's config."""
    for file in (root / "model_index.json", root / "transformer" / "config.json"):
        if file.is_file():
            name = read_json(file, CheckpointError).get("_class_name")
            family = family_of_class(name) if isinstance(name, str) else None
            if family is None or not isinstance(name, str):
                raise CheckpointError(
                    f"{file} names the class {name}",
                    f"zimgkit serves checkpoints of {' and '.join(FAMILIES)}",
                )
            return family, name
    raise CheckpointError(f"{root} has no model_index.json", "zimgkit reads checkpoints in the diffusers layout")


def _check_sizes(checkpoint: Checkpoint) -> None:
    """Check that files which stand for components have as wide layers, and as many blocks, as the configs say.

    Raises:
        CheckpointError: one has not; it names both.
    """
    if not checkpoint.files:
        return
    from zimgkit.export.networks.parts import stored_shapes  # With torch, which takes seconds.

    tasks = tasks_of(checkpoint.family, checkpoint.pipeline, ())
    for component, file in checkpoint.files.items():
        own = parts(checkpoint.family, component, checkpoint.config(component), tasks)
        own = {name: part for name, part in own.items() if is_needed(name, tasks)}
        expected, tensors = stored_shapes(own), checkpoint.tensors(component)
        both = [name for name, shape in expected.items() if name in tensors and len(shape) > 1]
        base, hint = checkpoint.source.model, "name the base that it is made from with --base"
        if wrong := next((name for name in both if tensors[name].shape != tuple(expected[name])), None):
            found = f"{wrong!r} has shape {tensors[wrong].shape}, and {tuple(expected[wrong])} there"
            raise CheckpointError(f"{file} is no {component} of the size of {base}'s: {found}", hint)
        config = checkpoint.config(component)
        # Blocks that no picture needs may be there or not.
        used = [name for name in tensors if not is_unused(checkpoint.family, component, config, name)]
        depths = _depths(used)
        for blocks, count in _depths(expected).items():
            if (depth := depths.get(blocks, count)) != count:
                found = f"it has {depth} of {blocks!r}, and {count} are there"
                raise CheckpointError(f"{file} is no {component} of the size of {base}'s: {found}", hint)


def _depths(names: Iterable[str]) -> dict[str, int]:
    """How many blocks there are of each list of blocks, by what their names begin with."""
    counts: dict[str, int] = {}
    for name in names:
        if match := re.match(r"([a-z_.]*?)\.(\d+)\.", name):
            counts[match[1]] = max(counts.get(match[1], 0), int(match[2]) + 1)
    return counts


def _folder(root: Path, component: str) -> Path:
    folder = root / component
    if not folder.is_dir():
        raise CheckpointError(f"{root} has no folder {component}", "fetch the files that are missing")
    return folder


def _weight_files(root: Path, component: str) -> dict[Path, tuple[str, ...]]:
    return weight_files(_folder(root, component), WEIGHT_FILES[component])


def read_component(files: Mapping[Path, Iterable[str]] | Iterable[Path], component: str) -> dict[str, Stored]:
    """Read the headers of a component's files.

    Args:
        files: perhaps with the tensors that an index places in each. What a shard has counts, but where the index says
            that another has it.
        component: its name.

    Returns:
        Canonical name -> tensor.

    Raises:
        CheckpointError: see :meth:`Checkpoint.tensors`.
    """
    places = {name: file for file, names in files.items() for name in names} if isinstance(files, Mapping) else {}
    found: dict[str, Stored] = {}
    for file in files:
        for stored, tensor in read_file(file).items():
            if places.get(stored, file) != file:
                continue
            if stored in found:
                raise CheckpointError(f"{file} and {found[stored].file} both have {stored!r}", "keep one of them")
            found[stored] = tensor
    return arrange(component, merged_adapters(dequantized(found)))
