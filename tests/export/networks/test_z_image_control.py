"""The Z-Image denoiser beside a ControlNet, against diffusers' two networks, in float32.

diffusers keeps the refiners' hints from its transformer; hooks bring them there, as the ControlNets were trained.
"""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np
import pytest
import torch
from diffusers import ZImageControlNetModel, ZImageTransformer2DModel
from safetensors.torch import save_file

from tests.export.networks.test_z_image import TINY, WIDE
from tests.reference import randomize
from zimgkit.engines.errors import CheckpointError
from zimgkit.export.attachments.control import controlled
from zimgkit.export.controls.nets import open_nets
from zimgkit.export.networks.z_image import ZImageConditioner, plain_parts, read_config
from zimgkit.export.networks.z_image_control import (
    OWN,
    PLAIN,
    SHARED,
    ControlConfig,
    ControlledDenoiser,
    fun,
    places,
    read_control,
)
from zimgkit.export.networks.z_image_demo import CONFIGS
from zimgkit.runtime.diffusion.latents import pack
from zimgkit.runtime.families.z_image import LAYOUT, ZImage, network_time, time_embedding, with_pads

DEEP = TINY | {"n_layers": 4, "n_refiner_layers": 2}
VERSIONS = {PLAIN: (16, None), SHARED: (33, "control_layers"), OWN: (33, "control_noise_refiner")}


def nets(config, control, seed):
    """diffusers' transformer and ControlNet with random weights."""
    transformer = ZImageTransformer2DModel(**config).eval()
    randomize(transformer, seed)
    net = ZImageControlNetModel(
        control_layers_places=list(places(read_config(config), control.layers)),
        control_refiner_layers_places=list(range(config["n_refiner_layers"])),
        control_in_dim=control.channels,
        add_control_noise_refiner=control.refiner or None,
        n_refiner_layers=config["n_refiner_layers"],
        **{key: config[key] for key in ("dim", "n_heads", "n_kv_heads")},
    ).eval()
    randomize(net, seed + 1)
    return transformer, net


def theirs(transformer, net, control, latents, time, embeds, condition, scale):
    """The transformer's output, to which the refiners' hints are given too."""
    state = net.state_dict()  # Before it gets the transformer's modules.
    ZImageControlNetModel.from_transformer(net, transformer)
    batch = len(latents)
    inputs = list(latents.unsqueeze(2)), time, [embeds] * batch
    refined = []
    with ExitStack() as hooks:
        if control.refiner:
            blocks = net.control_layers if control.refiner == SHARED else net.control_noise_refiner
            hook = blocks[-1].register_forward_hook(lambda module, given, result: refined.append(result))
            hooks.callback(hook.remove)
        hints = net(*inputs, list(condition.unsqueeze(2).expand(batch, -1, -1, -1, -1)), conditioning_scale=scale)
    with ExitStack() as hooks:
        for block, hint in zip(transformer.noise_refiner, refined[0] if refined else (), strict=False):
            hook = block.register_forward_hook(lambda module, given, result, hint=hint: result + hint * scale)
            hooks.callback(hook.remove)
        output = transformer(*inputs, controlnet_block_samples=hints, return_dict=False)[0]
    return state, -torch.stack(output).squeeze(2).numpy()


def ours(config, control, states, latents, sigma, embeds, condition, scale):
    """The velocity by our network and host functions, from the weights of the two."""
    conditioner, denoiser = (
        ZImageConditioner(read_config(config)),
        ControlledDenoiser(read_config(config), control, "edges"),
    )
    state = states[0] | {f"control.edges.{name}": value for name, value in states[1].items()}
    for network in (conditioner, denoiser):
        network.load_state_dict({name: state[name] for name in network.state_dict()})
    family = ZImage(CONFIGS | {"transformer": config})
    caption = conditioner(*map(torch.from_numpy, family.conditioner_inputs(embeds).values()))
    height, width = 8 * latents.shape[2], 8 * latents.shape[3]
    feeds = {
        **family.denoiser_inputs(latents),
        **family.denoiser_constants(caption.numpy(), len(embeds), height, width),
        "sinusoids": time_embedding(network_time(np.array([sigma], np.float32)), config["t_scale"]),
        "condition": with_pads(pack(condition, LAYOUT)[0])[None],
        "scale": np.array([scale], np.float32),
    }
    names = ("hidden_states", "sinusoids", "caption", "cos", "sin", "pad", "condition", "scale")
    output = denoiser(*(torch.from_numpy(feeds[name]) for name in names))
    return family.velocity(output.numpy(), latents)


@pytest.mark.parametrize(
    ("config", "layers", "refiner", "height", "width", "tokens", "batch", "sigma", "scale"),
    [
        (DEEP, 2, OWN, 8, 12, 20, 1, 1.0, 0.8),
        (DEEP, 4, OWN, 16, 6, 70, 2, 0.3, 1.0),
        (WIDE, 1, OWN, 4, 4, 31, 3, 0.7, 0.35),
        (DEEP, 2, SHARED, 8, 12, 33, 2, 0.9, 0.65),
        (WIDE, 2, SHARED, 6, 16, 8, 1, 0.5, 1.4),
        (DEEP, 2, PLAIN, 8, 12, 20, 1, 1.0, 0.7),
        (TINY, 1, PLAIN, 22, 10, 64, 3, 0.02, 1.0),
    ],
)
@torch.inference_mode()
def test_matches_diffusers(config, layers, refiner, height, width, tokens, batch, sigma, scale):
    control = ControlConfig(VERSIONS[refiner][0], layers, refiner)
    transformer, net = nets(config, control, seed=layers)
    generator = torch.Generator().manual_seed(tokens)
    latents = torch.randn(batch, 16, height, width, generator=generator)
    condition = torch.randn(1, control.channels, height, width, generator=generator)
    embeds = torch.randn(tokens, config["cap_feat_dim"], generator=generator)
    time = torch.full((batch,), (1000 - np.float32(sigma) * 1000) / 1000)
    state, expected = theirs(transformer, net, control, latents, time, embeds, condition, scale)
    given = latents.numpy(), sigma, embeds.numpy(), condition.numpy(), scale
    found = ours(config, control, (transformer.state_dict(), state), *given)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
    plain = transformer(list(latents.unsqueeze(2)), time, [embeds] * batch, return_dict=False)[0]
    plain = -torch.stack(plain).squeeze(2).numpy()
    assert np.abs(plain - expected).max() > 0.05 * np.abs(expected).max()
    off = ours(config, control, (transformer.state_dict(), state), *given[:-1], 0.0)
    assert np.abs(off - plain).max() < 1e-5 * np.abs(plain).max()


RELEASES = {
    "1.0": (range(0, 30, 5), 16, None, 1_550_778_368),
    "2.0": (range(0, 30, 2), 33, "control_layers", 2_950_156_800),
    "2.1": (range(0, 30, 2), 33, "control_noise_refiner", 3_356_225_792),
    "2.1-lite": (range(0, 30, 10), 33, "control_noise_refiner", 1_008_308_480),
}
"""Main layers with hints, channels, refiner and parameters of what was released for Z-Image-Turbo."""
FULL = TINY | {
    "dim": 3840,
    "n_layers": 30,
    "n_refiner_layers": 2,
    "n_heads": 30,
    "n_kv_heads": 30,
    "cap_feat_dim": 2560,
}
FULL |= {"axes_dims": [32, 48, 48]}


def release_shapes(name):
    where, channels, refiner, _ = RELEASES[name]
    with torch.device("meta"):
        net = ZImageControlNetModel(list(where), [0, 1], channels, refiner)
    return {key: tuple(value.shape) for key, value in net.state_dict().items()}


@pytest.mark.parametrize("name", RELEASES)
def test_releases_are_known_by_their_keys(name):
    where, channels, refiner, parameters = RELEASES[name]
    shapes, config = release_shapes(name), read_config(FULL)
    found = read_control(shapes, config)
    assert found == ControlConfig(channels, len(where), refiner or PLAIN)
    assert list(places(config, found.layers)) == list(where)
    assert sum(map(np.prod, shapes.values())) == parameters
    with torch.device("meta"):
        network = ControlledDenoiser(config, found, "edges")
    own = {
        key.removeprefix("control.edges."): tuple(value.shape)
        for key, value in network.state_dict().items()
        if key.startswith("control.edges.")
    }
    assert own == shapes


@pytest.mark.parametrize("zeros", [True, False])
def test_release_2_0_has_refiners_that_were_never_trained(tmp_path, zeros):
    """They are told by what they hold, or lack; then the control layers refine, and no tensor is missing or left."""
    control = nets(DEEP, ControlConfig(33, 2, OWN), 0)[1].state_dict()
    key = "control_noise_refiner.0.before_proj.weight"
    control[key] = torch.zeros(48, 48)
    control["control_layers.0.before_proj.weight"] = torch.ones(48, 48)
    if not zeros:
        del control[key]
    save_file(control, tmp_path / "net.safetensors")
    (found,) = open_nets([f"net={tmp_path / 'net.safetensors'}"], "z-image", DEEP)
    shared = ControlledDenoiser(read_config(DEEP), ControlConfig(33, 2, SHARED), "net").control["net"]
    assert found.net.parameters() == {name: tuple(value.shape) for name, value in shared.state_dict().items()}


@pytest.mark.parametrize("refiner", VERSIONS)
def test_its_plan(refiner):
    control = ControlConfig(VERSIONS[refiner][0], 2, refiner)
    shapes = {name: tuple(value.shape) for name, value in nets(DEEP, control, 0)[1].state_dict().items()}
    denoiser = plain_parts(read_config(DEEP))["denoiser"]
    plan = controlled(denoiser, {"edges": fun(DEEP, shapes, {})}, torch.float32)
    assert [entry.name for entry in plan.inputs][-2:] == ["condition.edges", "scale.edges"]
    called = [node.target for node in plan.graph.nodes if node.op == "call_module"]
    assert called.count("add_hint") == 2 + (0 if refiner == PLAIN else 2)
    assert [called.count(f"control.edges.control_layers.{index}") for index in (0, 1)] == [1 + (refiner == SHARED)] * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"control_all_x_embedder.2-1.weight": None}, "has no control_all_x_embedder"),
        ({"control_all_x_embedder.2-1.weight": (48, 132)}, "48 wide, and the transformer 3840"),
        ({"control_all_x_embedder.2-1.weight": (3840, 68)}, "takes 68 features"),
        ({"control_layers.": None}, "0 control layers"),
        ({"control_layers.15.x": (1,), "control_layers.16.x": (1,)}, "17 control layers, and the transformer 30"),
        ({"control_noise_refiner.1.": None}, "1 refiners, and the transformer 2"),
    ],
)
def test_refuses_what_does_not_fit(change, message):
    shapes = release_shapes("2.1")
    for prefix, shape in change.items():
        shapes = {key: value for key, value in shapes.items() if not key.startswith(prefix)}
        shapes |= {prefix: shape} if shape else {}
    with pytest.raises(CheckpointError, match=message):
        read_control(shapes, read_config(FULL))
