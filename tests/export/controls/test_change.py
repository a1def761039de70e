"""ControlNets put into a bundle and taken out again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.commands import invoke
from tests.export.lora.swapping import contents, states
from tests.references import checkpoints
from tests.references.cases import picture
from zimgkit.engines.bundle import Bundle
from zimgkit.engines.errors import ZimgError
from zimgkit.export.build import build
from zimgkit.export.cli.main import main
from zimgkit.export.controls.change import add, remove
from zimgkit.export.lora.swap import swap
from zimgkit.export.quality.verify import verify
from zimgkit.runtime import Pipeline
from zimgkit.runtime.commands.inspect import bundle_summary, bundle_text

CALL = {"prompt": "a cup", "negative_prompt": " ", "width": 48, "height": 32, "num_inference_steps": 2, "seed": 1}
EDGES = picture(48, 32, 1)


@pytest.fixture(scope="module")
def checkpoint(recorded_checkpoint_of):
    return recorded_checkpoint_of("qwen-image-control")


@pytest.fixture(scope="module")
def nets(checkpoint):
    return {file.stem: str(file) for file in sorted((checkpoint / "controlnet").glob("*.safetensors"))}


@pytest.fixture(scope="module")
def plain(nets, recorded_bundle_of, tmp_path_factory):
    """What a build without nets gives: see :func:`test_a_quantized_bundle`."""
    folder = tmp_path_factory.mktemp("plain") / "bundle"
    shutil.copytree(recorded_bundle_of("qwen-image-control"), folder)
    remove(folder, [*nets])
    return folder


@pytest.fixture
def bundle(plain, tmp_path):
    return shutil.copytree(plain, tmp_path / "bundle")


def draw(bundle, *names):
    return draw_all(bundle, [names])[names]


def draw_all(bundle, groups):
    """A picture with each of these groups of nets, by one pipeline."""
    found = {}
    with Pipeline.open(bundle) as pipeline:
        for names in groups:
            controls = [{"name": name, "image": EDGES} for name in names] or None
            found[names] = pipeline(**CALL, controls=controls, output_type="np").images[0]
    return found


def test_there_and_back_again(bundle, nets, recorded_bundle_of):
    before, manifest = contents(bundle), Bundle.open(bundle).manifest
    first = states(bundle)
    assert add(bundle, [nets["canny"]]).uncompiled == ()
    add(bundle, [nets["depth"], nets["inpaint"]])
    # Nothing that was there was written, and what was added is what a build gives.
    assert {name: state for name, state in states(bundle).items() if name in first and name != "bundle.json"} == {
        name: state for name, state in first.items() if name != "bundle.json"
    }
    built = recorded_bundle_of("qwen-image-control")
    assert contents(bundle) == contents(built)
    built_manifest = Bundle.open(built).manifest
    assert Bundle.open(bundle).manifest.controls == built_manifest.controls
    assert (draw(bundle, "canny", "depth") == draw(built, "canny", "depth")).all()
    for name, file in nets.items():
        record = built_manifest.files[f"control/{name}/{name}.safetensors"]
        assert (bundle / "control" / name / f"{name}.safetensors").samefile(file) and record.size
    remove(bundle, ["depth"])
    assert (draw(bundle, "canny") == draw(built, "canny")).all()
    remove(bundle, ["inpaint", "canny"])
    assert contents(bundle) == before
    assert Bundle.open(bundle).manifest == manifest


def test_one_of_two_leaves_no_graph_of_both(bundle, nets):
    add(bundle, [nets["canny"], f"edges_2={nets['depth']}"])
    components = Bundle.open(bundle).manifest.components
    assert {"denoiser.control", "denoiser.control.canny", "denoiser.control.edges_2"} <= components.keys()
    remove(bundle, ["canny"])
    left = [name for name in Bundle.open(bundle).manifest.components if "control" in name]
    assert left == ["denoiser.control.edges_2"]
    assert "vae_encoder" in Bundle.open(bundle).manifest.components


def test_what_the_bundle_says_of_them(nets, recorded_bundle_of):
    summary = bundle_summary(recorded_bundle_of("qwen-image-control"))
    assert [entry["name"] for entry in summary["controls"]] == ["canny", "depth", "inpaint"]
    text = bundle_text(summary)
    assert f"ControlNet canny (blockwise), of image, from {nets['canny']}" in text
    assert f"ControlNet inpaint (blockwise), of image and mask, from {nets['inpaint']}" in text


def killed_at(number, bundle, change):
    """Change in a process that is killed when it does its ``number``-th thing to a file; whether it came that far."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1] != 0
    count, root = 0, str(bundle.parent)

    def watch(event, details):
        nonlocal count
        if event in {"open", "os.rename", "os.remove", "os.link", "os.mkdir"} and str(details[0]).startswith(root):
            writes = event != "open" or (details[2] or 0) & (os.O_WRONLY | os.O_RDWR)
            count += bool(writes)
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    try:
        change()
    except BaseException:
        os._exit(0)
    os._exit(0)


def test_a_kill_at_any_point_leaves_a_whole_bundle(plain, nets, tmp_path):
    source = shutil.copytree(plain, tmp_path / "source")
    add(source, [nets["canny"]])
    had = Bundle.open(source).manifest.controls
    results, number = [], 1
    while True:
        bundle = shutil.copytree(source, tmp_path / "bundle")
        if not killed_at(number, bundle, lambda bundle=bundle: add(bundle, [nets["depth"]])):
            break
        opened = Bundle.open(bundle)
        opened.verify(afresh=True)
        results.append(opened.manifest.controls != had)
        # The next one clears what was left.
        remove(bundle, ["canny"])
        contents(bundle)
        shutil.rmtree(bundle)
        number += 3
    assert len(results) > 3
    assert results == sorted(results)


def test_two_at_once(bundle, nets):
    child = os.fork()
    if not child:
        try:
            add(bundle, [nets["canny"]])
        finally:
            os._exit(0)
    for _ in range(100):
        try:
            add(bundle, [nets["depth"]])
            break
        except ZimgError as error:
            assert "\n" not in str(error)
    os.waitpid(child, 0)
    names = {control.name for control in Bundle.open(bundle).manifest.controls}
    assert names and names <= {"canny", "depth"}
    contents(bundle)


def test_loras_are_swapped_under_nets(checkpoint, bundle, nets, tmp_path):
    lora = checkpoints.write_lora("style", checkpoint, tmp_path / "style.safetensors")
    add(bundle, [nets["canny"], nets["depth"]])
    groups = ((), ("canny",), ("canny", "depth"))
    before = draw_all(bundle, groups)
    swap(bundle, [str(lora)])
    merged = build(
        str(checkpoint), tmp_path / "merged", precision="fp32", loras=[str(lora)],
        controlnets=[nets["canny"], nets["depth"]],
    )  # fmt: skip
    swapped, expected = draw_all(bundle, groups), draw_all(merged.root, groups)
    for names, old in before.items():
        assert np.abs(swapped[names] - expected[names]).max() < 1e-5
        assert np.abs(swapped[names] - old).max() > 0.01
    # A net comes to what has LoRAs, and the LoRAs go.
    remove(bundle, ["depth"])
    add(bundle, [nets["depth"]])
    assert np.abs(draw(bundle, "canny", "depth") - expected["canny", "depth"]).max() < 1e-5
    swap(bundle, [])
    for names, found in draw_all(bundle, groups).items():
        assert np.abs(found - before[names]).max() < 1e-5
    contents(bundle)


@pytest.fixture(scope="module")
def edges(checkpoint_of, tmp_path_factory):
    """A net for the checkpoint that quantized bundles are of."""
    checkpoint = checkpoint_of("qwen-image")
    features = json.loads((checkpoint / "transformer/config.json").read_text())["in_channels"]
    folder = tmp_path_factory.mktemp("edges")
    return str(checkpoints.write_blockwise("edges", checkpoint, folder / "edges.safetensors", features))


@pytest.mark.parametrize("precision", ["fp8", "int8", "int8-weights"])  # The next test has the last one.
def test_a_quantized_bundle(precision, quantized_of, checkpoint_of, edges, tmp_path):
    bundle = shutil.copytree(quantized_of("qwen-image", precision), tmp_path / "bundle")
    before, plain, without = contents(bundle), Bundle.open(bundle).manifest, draw(bundle)
    add(bundle, [edges])
    kept = Bundle.open(bundle).manifest.quantization.unquantized["control.edges"]
    assert kept["controlnet_blocks.0.input_proj.weight"] == "of a ControlNet" and len(kept) == 5
    assert "edges" in bundle_text(bundle_summary(bundle))
    checked = verify(bundle, str(checkpoint_of("qwen-image")))
    assert checked["passed"] and "denoiser.control.edges" in checked["components"]
    drawn = draw(bundle, "edges")
    assert np.isfinite(drawn).all() and np.abs(drawn - without).max() > 0.01
    assert (draw(bundle) == without).all()
    remove(bundle, ["edges"])
    assert contents(bundle) == before
    assert Bundle.open(bundle).manifest == plain


def test_a_quantized_bundle_is_what_a_build_gives(checkpoint_of, edges, tmp_path):
    checkpoint = str(checkpoint_of("qwen-image"))
    bundle = build(checkpoint, tmp_path / "bundle", precision="int4-weights", controlnets=[edges]).root
    built, manifest, drawn = contents(bundle), Bundle.open(bundle).manifest, draw(bundle, "edges")
    remove(bundle, ["edges"])
    add(bundle, [edges])
    assert contents(bundle) == built
    found = Bundle.open(bundle).manifest
    assert (found.quantization, found.controls) == (manifest.quantization, manifest.controls)
    assert (draw(bundle, "edges") == drawn).all()


class TestWhatIsNoNetOfIt:
    def refused(self, message, bundle, *arguments):
        states_before = states(bundle)
        result = invoke(main, "add-controlnet", bundle, *arguments, "--quiet")
        result.assert_refused(message, code=result.code)
        assert result.code in (1, 2)
        assert states(bundle) == states_before

    def changed(self, file, out, change):
        weights = load_file(file)
        change(weights)
        save_file(weights, out)
        return out

    def test_files(self, bundle, nets, checkpoint, tmp_path, monkeypatch):
        canny = nets["canny"]
        lora = checkpoints.write_lora("style", checkpoint, tmp_path / "lora.safetensors")
        self.refused("lora.safetensors is no ControlNet that zimgkit knows; it is a LoRA: name it", bundle, lora)
        vae = checkpoint / "vae/diffusion_pytorch_model.safetensors"
        self.refused("is no ControlNet that zimgkit knows", bundle, vae)
        out = tmp_path / "net.safetensors"
        bias = self.changed(canny, out, lambda w: w.update({"img_in.bias": w["img_in.bias"][:32].contiguous()}))
        self.refused("img_in.bias", bundle, bias)
        wide = self.changed(canny, out, lambda w: w.update({"img_in.weight": w["img_in.weight"].repeat(2, 1)}))
        self.refused("it has 2 blocks of width 96, and the transformer 2 of 48", bundle, wide)
        few = self.changed(canny, out, lambda w: [w.pop(k) for k in [*w] if k.startswith("controlnet_blocks.1")])
        self.refused("it has 1 blocks of width 48, and the transformer 2", bundle, few)
        odd = self.changed(canny, out, lambda w: w.update({"img_in.weight": w["img_in.weight"][:, :50].contiguous()}))
        self.refused("its tokens have 50 features; zimgkit knows nets of 64 or 68", bundle, odd)
        nan = self.changed(canny, out, lambda w: w["img_in.bias"].fill_(float("nan")))
        self.refused("'img_in.bias' has 48 values that are NaN or infinite", bundle, nan)
        out.write_bytes(b"not a net")
        self.refused("net.safetensors", bundle, out)
        (tmp_path / "net.ckpt").write_bytes(b"")
        self.refused("net.ckpt is a pickle, which zimgkit never opens", bundle, tmp_path / "net.ckpt")
        (tmp_path / "empty").mkdir()
        self.refused("empty holds no safetensors file", bundle, tmp_path / "empty")
        self.refused("there is no ControlNet", bundle, tmp_path / "missing.safetensors")

    def test_names(self, bundle, nets):
        add(bundle, [nets["canny"]])
        self.refused("two ControlNets are called canny; name it otherwise: NAME=", bundle, nets["canny"])
        self.refused("two ControlNets are called b", bundle, f"b={nets['canny']}", f"b={nets['depth']}")
        self.refused("a ControlNet cannot be called 'a.b'; take letters", bundle, f"a.b={nets['depth']}")
        result = invoke(main, "remove-controlnet", bundle, "pose", "--quiet")
        result.assert_refused("has no ControlNet 'pose'; it has canny", code=result.code)

    def test_without_a_checkpoint_the_encoder_cannot_be_had(self, checkpoint, nets, tmp_path):
        moved = shutil.copytree(checkpoint, tmp_path / "moved")
        bundle = build(str(moved), tmp_path / "bundle", precision="fp32").root
        moved.rename(tmp_path / "there")
        self.refused("has no VAE encoder, and its checkpoint cannot be opened", bundle, nets["canny"])
        add(bundle, [nets["canny"]], model=str(tmp_path / "there"))
        assert Image.fromarray((draw(bundle, "canny") * 255).astype(np.uint8)).size == (48, 32)

    def test_bundles_that_are_carried(self, nets):
        for command in ("add-controlnet", "remove-controlnet"):
            result = invoke(main, command, "zimg-tiny-qwen", nets["canny"])
            result.assert_refused("comes with zimgkit and stays as it is", code=result.code)
