"""DiffSynth-Studio's pipelines at the size of tiny checkpoints, and what is seen of a call."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffsynth.diffusion.base_pipeline import ControlNetInput
from diffsynth.models import qwen_image_dit, z_image_dit
from diffsynth.models.flux_vae import FluxVAEDecoder, FluxVAEEncoder
from diffsynth.models.qwen_image_controlnet import QwenImageBlockWiseControlNet
from diffsynth.models.qwen_image_text_encoder import QwenImageTextEncoder
from diffsynth.models.qwen_image_vae import QwenImageVAE
from diffsynth.models.z_image_controlnet import ZImageControlNet, ZImageControlTransformerBlock
from diffsynth.models.z_image_text_encoder import ZImageTextEncoder
from diffsynth.pipelines.qwen_image import QwenImageBlockwiseMultiControlNet, QwenImagePipeline
from diffsynth.pipelines.z_image import ZImagePipeline
from diffsynth.utils.state_dict_converters import flux_vae as flux_keys
from diffsynth.utils.state_dict_converters.qwen_image_text_encoder import QwenImageTextEncoderStateDictConverter
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel, Qwen2Tokenizer, Qwen2VLProcessor, Qwen3Config, Qwen3Model

from tests.references.checkpoints import CONTROLNET
from tests.references.recordings import LEVELS

# Where DiffSynth departs from what the models were trained with, diffusers is followed, as the project does.
qwen_image_dit.ApproximateGELU.forward = lambda self, x: F.gelu(self.proj(x), approximate="tanh")
# As it is, it casts to bfloat16 whatever the weights are.
z_image_dit.TimestepEmbedder.forward = lambda self, t: self.mlp(
    self.timestep_embedding(t, self.frequency_embedding_size)
)


class Transformer(qwen_image_dit.QwenImageDiT):
    """The class has its sizes written into it; here they are those of a config."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        nn.Module.__init__(self)
        heads, head_dim, text = (
            config[key] for key in ("num_attention_heads", "attention_head_dim", "joint_attention_dim")
        )
        dim = heads * head_dim
        self.pos_embed = qwen_image_dit.QwenEmbedRope(10000, list(config["axes_dims_rope"]), scale_rope=True)
        self.time_text_embed = qwen_image_dit.TimestepEmbeddings(
            256, dim, diffusers_compatible_format=True, scale=1000, align_dtype_to_timestep=False
        )
        self.txt_norm = qwen_image_dit.RMSNorm(text, eps=1e-6)
        self.txt_in = nn.Linear(text, dim)
        self.img_in = nn.Linear(config["in_channels"], dim)
        self.transformer_blocks = nn.ModuleList(
            qwen_image_dit.QwenImageTransformerBlock(dim, heads, head_dim) for _ in range(config["num_layers"])
        )
        self.norm_out = qwen_image_dit.AdaLayerNorm(dim, single=True)
        self.proj_out = nn.Linear(dim, config["in_channels"])


class ControlNet(ZImageControlNet):
    """Likewise, on every second layer of the transformer."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        nn.Module.__init__(self)
        sizes = {key: config[key] for key in ("dim", "n_heads", "n_kv_heads", "norm_eps")}
        places = range(0, config["n_layers"], 2)
        self.control_layers_mapping = {place: index for index, place in enumerate(places)}
        self.control_all_x_embedder = nn.ModuleDict({"2-1": nn.Linear(4 * 33, config["dim"])})
        self.control_layers, self.control_noise_refiner = (
            nn.ModuleList(ZImageControlTransformerBlock(block_id=index, **sizes) for index in numbers)
            for numbers in (places, range(config["n_refiner_layers"]))
        )


class TextEncoder(QwenImageTextEncoder):
    """Likewise; and tokens of pictures are told from those of text, as in training.

    Without ``mm_token_type_ids`` transformers 5 gives them positions of text (huggingface/diffusers#14194).
    """

    def __init__(self, config: Qwen2_5_VLConfig) -> None:
        nn.Module.__init__(self)
        self.config = config
        self.model = Qwen2_5_VLModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)

    def forward(self, input_ids: torch.Tensor, **others: Any) -> Any:
        types = (input_ids == self.config.image_token_id).int()
        return super().forward(input_ids=input_ids, mm_token_type_ids=types, **others)


def qwen_image(folder: Path) -> QwenImagePipeline:
    """The pipeline of a checkpoint in ``folder``, in float32."""
    pipe = QwenImagePipeline(device="cpu", torch_dtype=torch.float32)
    pipe.dit = Transformer(config_of(folder / "transformer"))
    pipe.dit.load_state_dict(weights_of(folder / "transformer"))
    pipe.text_encoder = TextEncoder(Qwen2_5_VLConfig.from_pretrained(folder / "text_encoder"))
    weights = QwenImageTextEncoderStateDictConverter(weights_of(folder / "text_encoder"))
    pipe.text_encoder.load_state_dict(weights)
    config = config_of(folder / "vae")
    pipe.vae = QwenImageVAE(config["base_dim"], config["z_dim"], config["dim_mult"], config["num_res_blocks"])
    pipe.vae.load_state_dict(weights_of(folder / "vae"))
    pipe.vae.mean = torch.tensor(config["latents_mean"]).view(1, -1, 1, 1, 1)
    pipe.vae.std = 1 / torch.tensor(config["latents_std"]).view(1, -1, 1, 1, 1)
    pipe.tokenizer = Qwen2Tokenizer.from_pretrained(folder / "tokenizer")
    if (folder / "processor").is_dir():
        pipe.processor = Qwen2VLProcessor.from_pretrained(folder / "processor")
    if files := sorted((folder / "controlnet").glob("*.safetensors")):
        pipe.blockwise_controlnet = QwenImageBlockwiseMultiControlNet([blockwise_controlnet(file) for file in files])
    pipe.cfg_guided_model_fn = norm_preserving_guidance
    return pipe.eval().requires_grad_(False)


def blockwise_controlnet(file: Path) -> QwenImageBlockWiseControlNet:
    """The net in a file, of the file's sizes."""
    weights = load_file(file)
    dim, features = weights["img_in.weight"].shape
    layers = sum(name.endswith(".x_rms.weight") for name in weights)
    net = QwenImageBlockWiseControlNet(layers, 64, features - 64, dim)
    net.load_state_dict(weights)
    return net


def z_image(folder: Path) -> ZImagePipeline:
    """The pipeline of a checkpoint in ``folder``, in float32."""
    pipe = ZImagePipeline(device="cpu", torch_dtype=torch.float32)
    config = config_of(folder / "transformer")
    pipe.dit = z_image_dit.ZImageDiT(**{key: value for key, value in config.items() if not key.startswith("_")})
    pipe.dit.load_state_dict(weights_of(folder / "transformer"))
    pipe.text_encoder = ZImageTextEncoder.__new__(ZImageTextEncoder)
    nn.Module.__init__(pipe.text_encoder)
    pipe.text_encoder.model = Qwen3Model(Qwen3Config.from_pretrained(folder / "text_encoder"))
    pipe.text_encoder.model.load_state_dict(weights_of(folder / "text_encoder"))
    config, weights = config_of(folder / "vae"), weights_of(folder / "vae")
    with torch.device("meta"):
        pipe.vae_encoder, pipe.vae_decoder = FluxVAEEncoder(use_conv_attention=False), FluxVAEDecoder(False)
    shrink(pipe.vae_encoder, flux_keys.FluxVAEEncoderStateDictConverterDiffusers(weights), config)
    shrink(pipe.vae_decoder, flux_keys.FluxVAEDecoderStateDictConverterDiffusers(weights), config)
    pipe.tokenizer = Qwen2Tokenizer.from_pretrained(folder / "tokenizer")
    if (folder / CONTROLNET).exists():
        pipe.controlnet = ControlNet(config_of(folder / "transformer"))
        pipe.controlnet.load_state_dict(load_file(folder / CONTROLNET))
    return pipe.eval().requires_grad_(False)


PIPELINES = {"qwen-image": qwen_image, "z-image": z_image}


def shrink(vae: nn.Module, weights: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> None:
    """Put smaller weights into a VAE: what its layers compute with are the sizes of those."""
    vae.scaling_factor, vae.shift_factor = config["scaling_factor"], config["shift_factor"]
    for name, tensor in weights.items():
        module, _, leaf = name.rpartition(".")
        setattr(vae.get_submodule(module), leaf, nn.Parameter(tensor))
    for module in vae.modules():
        if isinstance(module, nn.GroupNorm):
            module.num_groups = config["norm_num_groups"]
        if hasattr(module, "head_dim"):
            module.head_dim = config["block_out_channels"][-1]
    missing = [name for name, parameter in vae.named_parameters() if parameter.is_meta]
    if missing:
        raise ValueError(f"{type(vae).__name__} has no {', '.join(missing)}")


def norm_preserving_guidance(
    model_fn: Any, cfg_scale: float, shared: dict[str, Any], positive: Any, negative: Any, **others: Any
) -> torch.Tensor:
    """Guidance that keeps the norm of each token: ``QwenImagePipeline`` of diffusers has it, that of DiffSynth not."""
    predicted = model_fn(**positive, **shared, **others)
    if cfg_scale == 1:
        return predicted
    unguided = model_fn(**negative, **shared, **others)
    guided = unguided + cfg_scale * (predicted - unguided)

    def mean_square(velocity: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(velocity.square().mean(dim=1, keepdim=True), 2)

    return guided * F.interpolate((mean_square(predicted) / mean_square(guided)).sqrt(), scale_factor=2)


def observe(pipe: Any, call: Mapping[str, Any], tensors: bool) -> dict[str, np.ndarray]:
    """Draw a picture and look on.

    Args:
        pipe: one of this module's.
        call: its arguments.
        tensors: whether to see what goes into the transformer too.

    Returns:
        The arrays that README.md names.
    """
    decoded: list[torch.Tensor] = []
    forwards: list[dict[str, Any]] = []
    model_fn, to_image = pipe.model_fn, pipe.vae_output_to_image

    def see_forward(**inputs: Any) -> torch.Tensor:
        forwards.append(inputs)
        inputs["velocity"] = model_fn(**inputs)
        return inputs["velocity"]

    def see_tokens(module: nn.Module, arguments: tuple[torch.Tensor]) -> None:
        forwards[-1]["hidden_states"] = arguments[0]

    def see_block(module: nn.Module, arguments: tuple[()], keywords: dict[str, Any]) -> None:
        forwards[-1].update(keywords)

    def see_image(picture: torch.Tensor) -> Any:
        decoded.append(picture)
        return to_image(picture)

    pipe.model_fn, pipe.vae_output_to_image = see_forward, see_image
    for name in ("controlnet_inputs", "blockwise_controlnet_inputs"):
        if given := call.get(name):
            call = {**call, name: [ControlNetInput(**one) for one in given]}
    if tensors and isinstance(pipe, QwenImagePipeline):
        pipe.dit.img_in.register_forward_pre_hook(see_tokens)
        pipe.dit.transformer_blocks[0].register_forward_pre_hook(see_block, with_kwargs=True)
    pipe(**call, progress_bar_cmd=iter)
    pixels = (decoded[0][0].permute(1, 2, 0).numpy() / 2 + 0.5).clip(0, 1)
    arrays = {
        "pixels": np.rint(pixels * LEVELS).astype(np.uint16),
        "sigmas": np.append(pipe.scheduler.sigmas.numpy(), 0).astype(np.float32),
        "latents": forwards[0]["latents"].numpy(),
    }
    if tensors:
        arrays |= taken_in(forwards[0])
    if tensors and call["cfg_scale"] != 1:
        negative = taken_in(forwards[1])
        arrays |= {
            f"negative.{name}": array
            for name, array in negative.items()
            if not np.array_equal(array, arrays.get(name, ()))
        }
    return arrays


def taken_in(forward: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What a forward of the transformer took in, and its velocity."""
    if "control_context" in forward:
        return {"condition": forward["control_context"][:, :, 0].numpy(), "velocity": forward["velocity"].numpy()}
    if latents := forward.get("blockwise_controlnet_conditioning"):
        conditions = {f"condition.{index}": one.numpy() for index, one in enumerate(latents)}
        rows = forward["prompt_emb"][0].numpy()
        return conditions | {"prompt_embeds": rows, "velocity": forward["velocity"].numpy()}
    image, text = (torch.view_as_real(table).numpy() for table in forward["image_rotary_emb"])
    arrays = {
        "hidden_states": forward["hidden_states"][0].numpy(),
        "prompt_embeds": forward["prompt_emb"][0].numpy(),
        "rotary_image": image,
        "rotary_text": text,
        "velocity": forward["velocity"].numpy(),
    }
    for index, rows in enumerate(forward.get("entity_prompt_emb") or ()):
        arrays[f"entity_prompt_embeds.{index}"] = rows[0].numpy()
    if forward["attention_mask"] is not None:
        arrays["attention_mask"] = forward["attention_mask"][0, 0].numpy() == 0
    return arrays


def config_of(folder: Path) -> dict[str, Any]:
    """A component's config.json."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """A component's weights."""
    return {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}
