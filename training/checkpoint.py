"""Checkpoints in the diffusers layout, made from nothing or from another with some components replaced."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zimgkit.engines.bundle import atomic_folder
from zimgkit.engines.errors import CheckpointError
from zimgkit.export.checkpoints.checkpoint import Checkpoint
from zimgkit.training import families
from zimgkit.training.families import Configs, TrainingFamily

MARK = "model_index.json"
LOG_VARIANCE = -6.0
"""Of an autoencoder's latents, at first."""


def start_checkpoint(
    folder: Path,
    family: TrainingFamily,
    tokenizer: Any,
    configs: Configs,
    *,
    seed: int = 0,
    overwrite: bool = False,
) -> None:
    """Write an untrained checkpoint.

    Args:
        folder: where.
        family: which architecture.
        tokenizer: of transformers, as ``train_tokenizer`` makes it.
        configs: of scheduler, transformer, text_encoder and vae; ids and the size of the vocabulary are filled in.
        seed: of the weights.
        overwrite: replace a checkpoint that is there.

    Raises:
        OutputError: the folder exists or cannot be written.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = family.start(tokenizer, configs)
        for part in (pipeline.transformer, pipeline.text_encoder):
            initialize(part)
        family.initialize_text(pipeline.text_encoder)
        _initialize_autoencoder(pipeline.vae)
    with atomic_folder(folder.expanduser().absolute(), overwrite=overwrite, known_by=MARK) as work:
        pipeline.save_pretrained(work)


def initialize(network: nn.Module) -> None:
    """Weights to begin with: linears by their fan-in, and every block of the transformer begins as the identity.

    The identity comes from modulations of zero, so that gates are closed ("adaLN-Zero", Peebles and Xie, 2022,
    https://arxiv.org/abs/2212.09748), and so does a prediction of zero from the last projection.
    """
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
            last = name == "proj_out" or (name.startswith("all_final_layer") and name.endswith(".linear"))
            if last or "_mod." in name or "adaLN_modulation" in name or name == "norm_out.linear":
                nn.init.zeros_(module.weight)
    for name, parameter in network.named_parameters():
        if name.endswith("pad_token") or "embed_tokens" in name:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)


def _initialize_autoencoder(vae: nn.Module) -> None:
    """Convolutions by their fan-in on a still image, no biases, and latents with little noise.

    So colours get through, which are learned last: most of what pictures differ in is how light they are.
    """
    for name, module in vae.named_modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            _, channels, *kernel = module.weight.shape
            nn.init.normal_(module.weight, std=(channels * kernel[-2] * kernel[-1]) ** -0.5)
            if module.bias is None:
                continue
            nn.init.zeros_(module.bias)
            if name == "quant_conv" or (name == "encoder.conv_out" and getattr(vae, "quant_conv", None) is None):
                module.bias.data[len(module.bias) // 2 :] = LOG_VARIANCE


def derive_checkpoint(
    source: Path,
    target: Path,
    components: Mapping[str, Any],
    *,
    configs: Mapping[str, Mapping[str, Any]] | None = None,
    precision: str = "bfloat16",
    overwrite: bool = False,
) -> None:
    """Write a checkpoint that is another one but for some components.

    What lies beside the components stays behind: a bundle's graphs in the same folder are those of the old weights, and
    a model card tells of them.

    Args:
        source: a checkpoint's folder.
        target: where.
        components: what is replaced, by name: models of diffusers or transformers.
        configs: other configs, by component: of the scheduler.
        precision: the element type they are stored in.
        overwrite: replace a checkpoint that is there.

    Raises:
        OutputError: the folder exists or cannot be written.
    """
    with atomic_folder(target.expanduser().absolute(), overwrite=overwrite, known_by=MARK) as work:
        for name in {*component_folders(source)} - {*components}:
            shutil.copytree(source / name, work / name)
        shutil.copyfile(source / MARK, work / MARK)
        for name, model in components.items():
            save_component(model, work / name, precision)
        for name, config in (configs or {}).items():
            file = work / name / f"{name}_config.json"
            file.write_text(json.dumps(config, indent=2) + "\n")


def component_folders(root: Path) -> list[str]:
    """The folders of a checkpoint that its index names."""
    return [name for name in json.loads((root / MARK).read_text()) if (root / name).is_dir()]


def save_component(model: Any, folder: Path, precision: str) -> None:
    """Write a model of diffusers or transformers, without the place on this machine it was loaded from.

    Args:
        model: it has the element type after.
        folder: where.
        precision: the element type.
    """
    model.to(getattr(torch, precision)).save_pretrained(folder)
    config = folder / "config.json"
    values = json.loads(config.read_text())
    values.pop("_name_or_path", None)
    config.write_text(json.dumps(values, indent=2) + "\n")
    for weights in folder.glob("*.safetensors"):
        shutil.copymode(config, weights)  # There are versions of safetensors that let none but their owner read them.


def load_component(checkpoint: Checkpoint, name: str, dtype: torch.dtype = torch.float32) -> Any:
    """One component of a checkpoint as the reference's own model, in the given element type.

    Raises:
        CheckpointError: it cannot be loaded.
    """
    kind = families.family(checkpoint.family).reference_class(name)
    folder = checkpoint.root / name
    try:
        model = kind.from_pretrained(folder, torch_dtype=dtype, use_safetensors=True, local_files_only=True)
    except Exception as error:  # both libraries raise whatever their parsers raise
        raise CheckpointError(f"{folder} cannot be loaded ({' '.join(str(error).split())[:200]})") from None
    return model


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """A checkpoint's tokenizer.

    Raises:
        CheckpointError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    folder = checkpoint.root / "tokenizer"
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever its parsers raise
        raise CheckpointError(f"{folder} cannot be loaded ({' '.join(str(error).split())[:200]})") from None
