"""Tiny reference pipelines of both families with random weights: diffusers', run end to end without a network."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3Model,
)

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer() -> Any:
    """A byte-level tokenizer with Qwen's special tokens: no merges, so a token is a byte."""
    vocab = {char: index for index, char in enumerate(sorted(ByteLevel.alphabet()))}
    vocab |= {token: len(vocab) + index for index, token in enumerate(SPECIAL)}
    result = Qwen2Tokenizer(
        vocab=vocab,
        merges=[],
        unk_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL[1:]),
    )
    result.chat_template = CHAT_TEMPLATE
    result.padding_side = "right"
    return result


def scaled(name: str, noise: Any) -> Any:
    """Normal noise as the weight of that name: activations stay near one, norms and pad tokens among them.

    Args:
        name: of the parameter.
        noise: an array or a tensor.
    """
    if "pad_token" in name:
        return noise
    if noise.ndim >= 2 and "gamma" not in name:
        return noise * math.prod(noise.shape[1:]) ** -0.5
    if name.endswith("bias"):
        return 0.1 * noise
    return 1 + 0.1 * noise


def randomize(module: torch.nn.Module, seed: int) -> None:
    """Random weights, as :func:`scaled` has them."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        parameter.data = scaled(name, torch.randn(parameter.shape, generator=generator))


def z_image(
    seed: int = 0,
    *,
    transformer: dict[str, Any] | None = None,
    vae: dict[str, Any] | None = None,
    text_encoder: dict[str, Any] | None = None,
    scheduler: dict[str, Any] | None = None,
) -> ZImagePipeline:
    """A tiny ``ZImagePipeline``; the dictionaries override parts of its configs."""
    tok = tokenizer()
    text = {
        "vocab_size": len(tok),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
    } | (text_encoder or {})
    network = {
        "all_patch_size": (2,),
        "all_f_patch_size": (1,),
        "in_channels": 16,
        "dim": 48,
        "n_layers": 2,
        "n_refiner_layers": 1,
        "n_heads": 3,
        "n_kv_heads": 3,
        "norm_eps": 1e-5,
        "qk_norm": True,
        "cap_feat_dim": text["hidden_size"],
        "rope_theta": 256.0,
        "t_scale": 1000.0,
        "axes_dims": [8, 4, 4],
        "axes_lens": [1536, 512, 512],
    } | (transformer or {})
    autoencoder = {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (8, 8, 16, 16),
        "layers_per_block": 1,
        "latent_channels": 16,
        "norm_num_groups": 8,
        "sample_size": 64,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    } | (vae or {})
    schedule = {"num_train_timesteps": 1000, "shift": 3.0, "use_dynamic_shifting": False} | (scheduler or {})
    parts = {
        "text_encoder": Qwen3Model(Qwen3Config(**text)),
        "transformer": ZImageTransformer2DModel(**network),
        "vae": AutoencoderKL(**autoencoder),
    }
    for index, part in enumerate(parts.values()):
        randomize(part.eval(), 10 * seed + index)
    return _quiet(ZImagePipeline(FlowMatchEulerDiscreteScheduler(**schedule), tokenizer=tok, **parts))


def qwen_image(
    seed: int = 0,
    *,
    transformer: dict[str, Any] | None = None,
    vae: dict[str, Any] | None = None,
    text_encoder: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    scheduler: dict[str, Any] | None = None,
) -> QwenImagePipeline:
    """A tiny ``QwenImagePipeline``; the dictionaries override parts of its configs."""
    tok = tokenizer()
    text = {
        "vocab_size": len(tok),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e6},
        "bos_token_id": None,
        "eos_token_id": None,
    } | (text_encoder or {})
    tower = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": text["hidden_size"],
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [0],
    } | (vision or {})
    ids = {
        "image_token_id": tok.convert_tokens_to_ids("<|image_pad|>"),
        "video_token_id": tok.convert_tokens_to_ids("<|video_pad|>"),
        "vision_start_token_id": tok.convert_tokens_to_ids("<|vision_start|>"),
        "vision_end_token_id": tok.convert_tokens_to_ids("<|vision_end|>"),
    }
    network = {
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 3,
        "joint_attention_dim": text["hidden_size"],
        "axes_dims_rope": (8, 4, 4),
    } | (transformer or {})
    autoencoder = {
        "base_dim": 8,
        "z_dim": 4,
        "dim_mult": [1, 2, 2, 2],
        "num_res_blocks": 1,
        "temperal_downsample": [False, True, True],
        "latents_mean": [0.1, -0.2, 0.3, 0.0],
        "latents_std": [1.0, 1.5, 2.0, 0.5],
    } | (vae or {})
    schedule = {
        "base_image_seq_len": 256,
        "base_shift": 0.5,
        "max_image_seq_len": 8192,
        "max_shift": 0.9,
        "num_train_timesteps": 1000,
        "shift": 1.0,
        "shift_terminal": 0.02,
        "time_shift_type": "exponential",
        "use_dynamic_shifting": True,
    } | (scheduler or {})
    config = Qwen2_5_VLConfig(text_config=text, vision_config=tower, tie_word_embeddings=False, **ids)
    parts = {
        "text_encoder": Qwen2_5_VLForConditionalGeneration(config),
        "transformer": QwenImageTransformer2DModel(**network),
        "vae": AutoencoderKLQwenImage(**autoencoder),
    }
    for index, part in enumerate(parts.values()):
        randomize(part.eval(), 10 * seed + index)
    return _quiet(QwenImagePipeline(FlowMatchEulerDiscreteScheduler(**schedule), tokenizer=tok, **parts))


FAMILIES = {"z-image": z_image, "qwen-image": qwen_image}


def _quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save(pipeline: Any, folder: Path, **options: Any) -> Path:
    """Save a pipeline in the diffusers layout."""
    parts = dict(pipeline.components)
    processors = {name: parts.pop(name) for name in ("processor", "siglip_processor") if parts.get(name) is not None}
    if not processors:
        pipeline.save_pretrained(folder, **options)
        return folder
    # Without torchvision, transformers' own processors cannot be made, which diffusers would save.
    parts, others = {k: v for k, v in parts.items() if k != "siglip"}, {k: v for k, v in parts.items() if k == "siglip"}
    plain = QwenImagePipeline if "processor" in processors else ZImagePipeline
    plain(**parts).save_pretrained(folder)
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace(plain.__name__, type(pipeline).__name__))
    for name, part in (processors | others).items():
        part.save_pretrained(folder / name)
    return folder


def draw(pipeline: Any, prompt: str | list[str], *, seed: int = 0, **call: Any) -> Any:
    """Run a reference pipeline with a CPU generator: float32 (N, H, W, 3)."""
    generator = torch.Generator("cpu").manual_seed(seed)
    # A copy: ZImagePipeline writes its chat template into the list it is given.
    prompt = list(prompt) if isinstance(prompt, list) else prompt
    if isinstance(call.get("negative_prompt"), list):
        call["negative_prompt"] = list(call["negative_prompt"])
    return pipeline(prompt=prompt, generator=generator, output_type="np", **call).images


def start_from(
    pipeline: Any, image: Any, *, seed: int, strength: float, steps: int, packed: bool, drawn_anew: Any = None
) -> dict[str, Any]:
    """What makes any pipeline start from a picture as DiffSynth does (``denoising_strength``), and keep parts of it.

    Args:
        pipeline: a pipeline of diffusers.
        image: a PIL image of the size to draw.
        seed: of the noise.
        strength: the noise level before the shift.
        steps: how many.
        packed: whether its latents are tokens.
        drawn_anew: (height / 8, width / 8), 1 where latents are drawn anew and 0 where they are kept.
    """
    import numpy as np
    from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift

    pixels = torch.from_numpy(np.asarray(image, np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
    config = pipeline.vae.config
    rows, columns = image.height // 8, image.width // 8

    def pack(latents: torch.Tensor) -> torch.Tensor:
        return pipeline._pack_latents(latents, 1, latents.shape[-3], rows, columns) if packed else latents

    with torch.no_grad():
        if packed:
            normal = (config.latents_mean, config.latents_std)
            mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in normal)
            clean = ((pipeline.vae.encode(pixels[:, :, None]).latent_dist.mode() - mean) / std).transpose(1, 2)
        else:
            clean = (pipeline.vae.encode(pixels).latent_dist.mode() - config.shift_factor) * config.scaling_factor
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))
    sigmas = np.linspace(strength, 0, steps + 1)[:-1].tolist()
    scheduler = pipeline.scheduler
    bounds = (scheduler.config[key] for key in ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift"))
    scheduler.set_timesteps(sigmas=sigmas, mu=calculate_shift(rows * columns // 4, *bounds))
    levels = scheduler.sigmas.clone()

    def noisy(step: int) -> torch.Tensor:
        return levels[step] * noise + (1 - levels[step]) * clean

    def keep(_: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if drawn_anew is None:
            return {}
        mask = pack(torch.as_tensor(drawn_anew, dtype=torch.float32).expand(clean.shape))
        return {"latents": mask * tensors["latents"] + (1 - mask) * pack(noisy(step + 1))}

    start = pack(noisy(0))
    return {"latents": start, "sigmas": sigmas, "num_inference_steps": steps, "callback_on_step_end": keep}


class PictureProcessor:
    """``Qwen2VLProcessor`` as the editing pipelines use it, without torchvision, which it needs in transformers 5.

    It resizes as torchvision does.
    """

    def __init__(self, tokenizer: Any, **options: Any) -> None:
        from transformers import Qwen2VLImageProcessorPil

        self.tokenizer = tokenizer
        self.pictures = Qwen2VLImageProcessorPil(do_resize=False, min_pixels=56 * 56, max_pixels=12845056, **options)
        self.image_token = tokenizer.convert_tokens_to_ids("<|image_pad|>")

    def __call__(self, text: list[str], images: Any, **options: Any) -> Any:
        from transformers import BatchFeature

        given = list(images) if isinstance(images, list | tuple) else [images]
        found = self.pictures([self.resized(picture) for picture in given], return_tensors="pt")
        counts = iter(found["image_grid_thw"].prod(dim=1).div(4).int().tolist())
        pieces = text[0].split("<|image_pad|>")
        whole = "".join([pieces[0], *("<|image_pad|>" * next(counts) + piece for piece in pieces[1:])])
        return BatchFeature({**self.tokenizer([whole], return_tensors="pt"), **found})

    def resized(self, picture: Any) -> Any:
        import numpy as np
        from PIL import Image

        from zimgkit.runtime.pictures.patches import Preprocessor, smart_resize
        from zimgkit.runtime.pictures.resampling import resize_as_torchvision

        height, width = smart_resize(picture.height, picture.width, 28, *Preprocessor().pixels())
        return Image.fromarray(resize_as_torchvision(np.asarray(picture.convert("RGB")), height, width, "bicubic"))

    def save_pretrained(self, folder: Path, **options: Any) -> None:
        self.pictures.save_pretrained(folder)


def qwen_image_edit(seed: int = 0, *, several: bool = False, **overrides: Any) -> Any:
    """A tiny ``QwenImageEditPipeline``, or ``QwenImageEditPlusPipeline``, which takes several pictures.

    It is made to read pictures by :func:`reading_pictures`.
    """
    from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline

    kind = QwenImageEditPlusPipeline if several else QwenImageEditPipeline
    return _quiet(reading_pictures(kind(**qwen_image(seed, **overrides).components, processor=None)))


def reading_pictures(pipeline: Any) -> Any:
    """An editing pipeline with a processor, whose text encoder is told which tokens are pictures.

    Diffusers 0.42 does not tell it (huggingface/diffusers#14194), so that transformers 5 counts their positions as
    those of words, as no checkpoint was trained.
    """
    encoder = pipeline.text_encoder
    forward = encoder.forward

    def with_types(input_ids: Any, **given: Any) -> Any:
        types = (input_ids == encoder.config.image_token_id).int()
        return forward(input_ids=input_ids, mm_token_type_ids=types, **given)

    encoder.forward = with_types
    pipeline.processor = PictureProcessor(pipeline.tokenizer)
    return pipeline


def qwen_image_layered(seed: int = 0, **overrides: Any) -> Any:
    """A tiny ``QwenImageLayeredPipeline``. Its latents have other channels than its pictures: it tells them by that."""
    from diffusers import QwenImageLayeredPipeline

    own: dict[str, dict[str, Any]] = {
        "transformer": {"in_channels": 32, "out_channels": 8, "use_layer3d_rope": True, "use_additional_t_cond": True},
        "vae": {"z_dim": 8, "input_channels": 4, "latents_mean": [0.1, -0.2] * 4, "latents_std": [1.0, 1.5] * 4},
        "scheduler": {"time_shift_type": "linear", "shift_terminal": None},
    }
    parts = qwen_image(seed, **{name: changes | overrides.get(name, {}) for name, changes in own.items()}).components
    return _quiet(QwenImageLayeredPipeline(**parts, processor=None))


FAMILIES |= {
    "qwen-image-layered": qwen_image_layered,
    "qwen-image-edit": qwen_image_edit,
    "qwen-image-edit-plus": lambda *given, **more: qwen_image_edit(*given, several=True, **more),
}


class PatchProcessor:
    """``Siglip2ImageProcessor`` as it is where torchvision is installed: it resizes as torchvision does."""

    def __init__(self, **options: Any) -> None:
        from transformers import Siglip2ImageProcessorPil

        self.pictures = Siglip2ImageProcessorPil(**options)

    def __call__(self, images: list[Any], return_tensors: str) -> Any:
        import numpy as np
        from PIL import Image

        from zimgkit.runtime.pictures.patches import patched_size
        from zimgkit.runtime.pictures.resampling import resize_as_torchvision

        own = self.pictures
        (picture,) = (image.convert("RGB") for image in images)
        size = patched_size(picture.height, picture.width, own.patch_size, own.max_num_patches)
        exact = Image.fromarray(resize_as_torchvision(np.asarray(picture), *size, "bilinear"))
        return own(images=[exact], return_tensors=return_tensors)

    def save_pretrained(self, folder: Path, **options: Any) -> None:
        self.pictures.save_pretrained(folder)


def z_image_omni(seed: int = 0, *, siglip: dict[str, Any] | None = None, **overrides: Any) -> Any:
    """A tiny ``ZImageOmniPipeline``; pictures stay in the VAE's own type, where the real one makes them bfloat16."""
    from diffusers import ZImageOmniPipeline
    from transformers import Siglip2VisionConfig, Siglip2VisionModel

    vision = {
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_channels": 3,
        "num_patches": 64,
        "patch_size": 16,
    } | (siglip or {})
    transformer = {"siglip_feat_dim": vision["hidden_size"]} | overrides.pop("transformer", {})
    parts = z_image(seed, transformer=transformer, **overrides).components
    tower = Siglip2VisionModel(Siglip2VisionConfig(**vision)).eval()
    randomize(tower, 10 * seed + 7)
    pipeline = ZImageOmniPipeline(**parts, siglip=tower, siglip_processor=None)
    pipeline.siglip_processor = PatchProcessor(patch_size=16, max_num_patches=64)
    prepare = pipeline.prepare_image_latents

    def in_its_own_type(*given: Any, **more: Any) -> Any:
        cast, torch.Tensor.bfloat16 = torch.Tensor.bfloat16, torch.Tensor.float
        try:
            return prepare(*given, **more)
        finally:
            torch.Tensor.bfloat16 = cast

    pipeline.prepare_image_latents = in_its_own_type
    return _quiet(pipeline)


FAMILIES["z-image-omni"] = z_image_omni
