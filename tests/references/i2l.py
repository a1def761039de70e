"""DiffSynth-Studio's way from pictures to a LoRA, at the size of tiny networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffsynth.models import z_image_image2lora
from diffsynth.models.dinov3_image_encoder import DINOv3ImageEncoder, DINOv3ViTModel
from diffsynth.models.siglip2_image_encoder import Siglip2ImageEncoder, SiglipVisionModel
from diffsynth.pipelines.z_image import ZImagePipeline, ZImageUnit_Image2LoRADecode, ZImageUnit_Image2LoRAEncode
from diffsynth.utils.state_dict_converters.dino_v3 import DINOv3StateDictConverter
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import DINOv3ViTConfig, DINOv3ViTImageProcessor, SiglipImageProcessor, SiglipVisionConfig

from tests.references import checkpoints
from tests.references.diffsynth_pipelines import config_of

PROCESSING = {"do_resize": True, "do_rescale": True, "do_normalize": True, "resample": 2, "rescale_factor": 1 / 255}


def made_of(
    pictures: list[Image.Image], checkpoint: Path, folder: Path
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """A LoRA of pictures.

    Args:
        pictures: RGB.
        checkpoint: the folder of what the LoRA is for.
        folder: of the networks that make it, written where it is not there.

    Returns:
        What is kept: ``picture_embeds`` (pictures, widths of both encoders) and ``lora.KEY``; and the LoRA.
    """
    if not folder.exists():
        checkpoints.write_i2l(checkpoint, folder)
    pipe = ZImagePipeline(device="cpu", torch_dtype=torch.float32)
    pipe.siglip2_image_encoder, pipe.dinov3_image_encoder = siglip(folder), dinov3(folder)
    pipe.image2lora_style = generator(folder, config_of(checkpoint / "transformer"))
    with torch.no_grad():
        embeds = ZImageUnit_Image2LoRAEncode().process(pipe, pictures)["image2lora_x"]
        lora = ZImageUnit_Image2LoRADecode().process(pipe, embeds)["lora"]
    arrays = {"picture_embeds": embeds.reshape(len(pictures), -1).numpy()}
    return arrays | {f"lora.{key}": value.numpy() for key, value in lora.items()}, lora


def siglip(folder: Path) -> nn.Module:
    """The encoder, whose class has its sizes written into it."""
    model = Siglip2ImageEncoder.__new__(Siglip2ImageEncoder)
    SiglipVisionModel.__init__(model, SiglipVisionConfig(**checkpoints.SIGLIP))
    half = [0.5] * 3
    size = {"height": 384, "width": 384}
    model.processor = SiglipImageProcessor(image_mean=half, image_std=half, size=size, **PROCESSING)
    return _in_float32(model, load_file(folder / "siglip/model.safetensors"))


def dinov3(folder: Path) -> nn.Module:
    """Likewise."""
    model = DINOv3ImageEncoder.__new__(DINOv3ImageEncoder)
    DINOv3ViTModel.__init__(model, DINOv3ViTConfig(**checkpoints.DINOV3))
    size = {"height": 224, "width": 224}
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    model.processor = DINOv3ViTImageProcessor(image_mean=mean, image_std=std, size=size, **PROCESSING)
    return _in_float32(model, DINOv3StateDictConverter(load_file(folder / "dinov3/model.safetensors")))


def _in_float32(model: nn.Module, weights: dict[str, torch.Tensor]) -> nn.Module:
    """Its weights, and float32 where it computes in bfloat16 unless it is told otherwise."""
    model.load_state_dict(weights)
    forward = model.eval().forward
    model.forward = lambda image: forward(image, torch_dtype=torch.float32, device="cpu")
    return model


def generator(folder: Path, config: dict[str, Any]) -> nn.Module:
    """What makes the matrices; its class has the widths of the release written into it."""
    dim, hidden = config["dim"], int(config["dim"] / 3 * 8)
    names = ("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0")
    patterns = [
        [(name, dim, dim) for name in names],
        [("feed_forward.w1", dim, hidden), ("feed_forward.w2", hidden, dim), ("feed_forward.w3", dim, hidden)],
    ]
    width, block = sum(checkpoints.I2L.values()), z_image_image2lora.LoRATrainerBlock
    model = z_image_image2lora.ZImageImage2LoRAModel.__new__(z_image_image2lora.ZImageImage2LoRAModel)
    nn.Module.__init__(model)
    z_image_image2lora.LoRATrainerBlock = lambda *given, **more: block(*given, in_dim=width, **more)
    try:
        for group, key in (
            ("layers", "n_layers"),
            ("context_refiner", "n_refiner_layers"),
            ("noise_refiner", "n_refiner_layers"),
        ):
            component = z_image_image2lora.ZImageImage2LoRAComponent(
                patterns,
                prefix=group,
                num_blocks=config[key],
                use_residual=False,
                compress_dim=checkpoints.I2L_COMPRESSED,
                rank=checkpoints.I2L_RANK,
            )
            setattr(model, f"{group}_lora", component)
    finally:
        z_image_image2lora.LoRATrainerBlock = block
    model.load_state_dict(load_file(folder / "i2l/model.safetensors"))
    return model.eval()
