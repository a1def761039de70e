"""The networks that make a LoRA of pictures, known by the keys and shapes of their files; no weight is read here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from zimgkit.engines.decoding import read_json
from zimgkit.engines.errors import CheckpointError
from zimgkit.engines.tensors.safetensors import SafetensorsError, TensorInfo, read_header
from zimgkit.export.checkpoints.checkpoint import check_tensors
from zimgkit.export.checkpoints.named_files import SUFFIX, address_of, fetch_file, is_within, refuse_pickle
from zimgkit.export.networks import dinov3, siglip, siglip_pooled
from zimgkit.export.networks.parts import Part, Shapes

HEADS = {1152: 16, 1536: 16, 384: 6, 768: 12, 1024: 16, 1280: 20, 4096: 32}
"""Width of an encoder -> its attention heads, which no shape tells: of the releases of SigLIP2 and DINOv3."""
HINT = "name a file, a folder of safetensors files, or a hub's owner/name/file.safetensors"


@dataclass(frozen=True)
class Model:
    """One of the networks, and where its weights lie."""

    name: str
    """What messages call it: where its files are."""
    part: Part
    tensors: Mapping[str, TensorInfo]
    """Parameter -> its place."""
    config: Any
    """Of its network."""


def read_siglip(argument: str, hub: str) -> Model:
    """SigLIP2 of one size, with its pooling head. Arguments and errors are those of :func:`read_generator`."""
    files = _Files.find(argument, hub, "SigLIP2")
    tensors = files.tensors("vision_model.")
    patches = files.need(tensors, "embeddings.patch_embedding.weight", 4)
    hidden = files.need(tensors, "encoder.layers.0.mlp.fc1.weight", 2)[0]
    positions = files.need(tensors, "embeddings.position_embedding.weight", 2)[0]
    config = siglip.Config(
        hidden_size=patches[0],
        intermediate_size=hidden,
        num_hidden_layers=_depth(tensors, "encoder.layers."),
        num_attention_heads=files.heads(patches[0]),
        num_channels=patches[1],
        num_patches=positions,
        patch_size=patches[2],
    )
    return files.model(siglip_pooled.part(config), tensors, config, ("text_model.", "logit_"))


def read_dinov3(argument: str, hub: str) -> Model:
    """DINOv3's vision transformer. Arguments and errors are those of :func:`read_generator`."""
    files = _Files.find(argument, hub, "DINOv3")
    tensors = files.tensors("model.")
    patches = files.need(tensors, "embeddings.patch_embeddings.weight", 4)
    hidden = files.need(tensors, "layer.0.mlp.gate_proj.weight", 2)[0]
    registers = files.need(tensors, "embeddings.register_tokens", 3)[1]
    config = dinov3.Config(
        hidden_size=patches[0],
        intermediate_size=hidden,
        num_hidden_layers=_depth(tensors, "layer."),
        num_attention_heads=files.heads(patches[0]),
        num_register_tokens=registers,
        num_channels=patches[1],
        patch_size=patches[2],
        **{f"{name}_bias": f"layer.0.attention.{name[0]}_proj.bias" in tensors for name in ("query", "key", "value")},
    )
    return files.model(dinov3.part(config), tensors, config, ("embeddings.mask_token",))


def read_generator(argument: str, hub: str, network: str, transformer: Shapes, embedding: int) -> Model:
    """The generator of a family's LoRAs.

    Args:
        argument: a file, a folder, or a file on a hub.
        hub: of one that names none, ``"huggingface"`` or ``"modelscope"``.
        network: the module that has it.
        transformer: the tensors of the transformer that its LoRAs are for.
        embedding: how many numbers the encoders give for a picture.

    Raises:
        CheckpointError: there is no such file, or it is none of this network or not for this transformer.
        DownloadError: it cannot be fetched.
    """
    files = _Files.find(argument, hub, "the generator")
    tensors, module = files.tensors(), import_module(network)
    try:
        config = module.read_config({name: info.shape for name, info in tensors.items()}, transformer)
    except CheckpointError as error:
        raise CheckpointError(f"{files.name} {error.message}", error.hint) from None
    if config.embedding != embedding:
        raise CheckpointError(
            f"{files.name} takes {config.embedding} numbers of a picture, and the encoders give {embedding}",
            "name the encoders that it was trained with: SigLIP2-G384 and DINOv3-7B",
        )
    return files.model(module.part(config), tensors, config)


@dataclass(frozen=True)
class _Files:
    """The weight files of one network."""

    name: str
    what: str
    files: tuple[Path, ...]

    @classmethod
    def find(cls, argument: str, hub: str, what: str) -> _Files:
        """The files that an argument names, fetched where they are on a hub."""
        path = Path(argument).expanduser()
        if path.is_dir():
            files = tuple(sorted(path.glob(f"*{SUFFIX}")))
            if not files:
                raise CheckpointError(f"{argument} holds no safetensors file of {what}", HINT)
            return cls(argument, what, files)
        refuse_pickle(argument, CheckpointError)
        if path.is_file():
            return cls(argument, what, (path,))
        found = address_of(argument, hub)
        if found is None or not is_within(found[0]):
            raise CheckpointError(f"there is no file {argument!r} of {what}", HINT)
        if (file := fetch_file(found[0])) is None:
            raise CheckpointError(f"{found[0].model_id} has no file {found[0].path!r}", "check the name of both")
        return cls(argument, what, (file,))

    def tensors(self, prefix: str = "") -> dict[str, TensorInfo]:
        """Where all tensors lie, by their names without a prefix."""
        found: dict[str, TensorInfo] = {}
        for file in self.files:
            try:
                header = read_header(file)
            except SafetensorsError as error:
                raise CheckpointError(error.message, error.hint) from None
            for stored, info in header.items():
                name = stored.removeprefix(prefix)
                if name in found:
                    raise CheckpointError(f"{file} and {found[name].file} both have {name!r}", "name one of the files")
                found[name] = info
        return found

    def need(self, tensors: Mapping[str, TensorInfo], name: str, axes: int) -> tuple[int, ...]:
        """The shape of a tensor that tells a size."""
        if name not in tensors or len(tensors[name].shape) != axes or not all(tensors[name].shape):
            has = f"it has {next(iter(tensors))!r} and" if tensors else "it has"
            raise CheckpointError(f"{self.name} is not {self.what}: {has} no {name!r} of {axes} axes", "check the file")
        return tensors[name].shape

    def heads(self, width: int) -> int:
        """How many attention heads there are, which a config beside the files tells, or the release."""
        config = self.files[0].parent / "config.json"
        found: Any = HEADS.get(width)
        if config.is_file():
            told = read_json(config, CheckpointError)
            own = told.get("vision_config") if isinstance(told.get("vision_config"), dict) else told
            if isinstance(own, dict) and own.get("hidden_size") == width:
                found = own.get("num_attention_heads", found)
        if not isinstance(found, int) or found < 1 or width % (2 * found):
            raise CheckpointError(
                f"{self.name} is {self.what} {width} wide, and nothing tells its attention heads",
                "lay its config.json beside it",
            )
        return found

    def model(self, part: Part, tensors: Mapping[str, TensorInfo], config: Any, unused: tuple[str, ...] = ()) -> Model:
        """The network with its weights, after checking that they are all there and no others."""
        shapes = part.parameters()
        ignore: Callable[[str], bool] = lambda name: name.startswith(unused) if unused else False  # noqa: E731
        check_tensors(tensors, shapes, self.what, ignore=ignore)
        return Model(self.name, part, {name: tensors[name] for name in shapes}, config)


def _depth(tensors: Mapping[str, TensorInfo], prefix: str) -> int:
    """How many blocks there are."""
    numbers = {name.removeprefix(prefix).partition(".")[0] for name in tensors if name.startswith(prefix)}
    return len([number for number in numbers if number.isdecimal()])
