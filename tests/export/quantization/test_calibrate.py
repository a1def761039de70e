"""Calibration: what it counts against torch's own hooks, how it goes on, and what it refuses."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests import quantized
from tests.commands import invoke
from zimgkit.engines.bundle import Bundle
from zimgkit.engines.errors import UsageError, ZimgError
from zimgkit.export.checkpoints.checkpoint import open_checkpoint
from zimgkit.export.cli.main import main
from zimgkit.export.components import parts_of, wanted_by
from zimgkit.export.quantization.calibrate import (
    CalibrationSet,
    calibrate,
    load_finished,
    read_prompts,
    statistics_path,
)
from zimgkit.export.quantization.calibrate import _observe as observe
from zimgkit.export.quantization.quantize import linear_weights
from zimgkit.export.quantization.statistics import InputStatistics, Statistics
from zimgkit.runtime.pipeline import Pipeline

SHORT = CalibrationSet(quantized.PROMPTS, ((64, 64),), 1)
NAN, INF = float("nan"), float("inf")
FAMILIES = ("z-image", "qwen-image")


@pytest.mark.parametrize("component", ["text_encoder", "denoiser"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_counted_is_what_torchs_linears_get(family, component, bundle_of, checkpoint_of, tmp_path):
    """The network itself in PyTorch, with hooks, on the inputs that the pipeline gives it."""
    folder = bundle_of(family)
    recorder = quantized.Recorder(component)
    with Pipeline(Bundle.open(folder), opener=recorder, warn=lambda _: None) as pipeline:
        negative = pipeline.bundle.manifest.defaults.negative_prompt
        call = {"height": 64, "width": 64, "num_inference_steps": 1, "negative_prompt": negative}
        for seed, prompt in enumerate(SHORT.prompts):
            pipeline(prompt, seed=seed, output_type="latent", **call)
    # Of the two, only this checkpoint of Qwen-Image is guided by default: both branches count.
    branches = 2 if family == "qwen-image" else 1
    assert component != "denoiser" or len(recorder.runs) == branches * len(SHORT.prompts)
    checkpoint = open_checkpoint(str(checkpoint_of(family)))
    part = parts_of(checkpoint)[component]
    network = part.build(torch.float32)
    wanted = wanted_by(checkpoint.tensors, part)
    state = {}
    for name, want in wanted.items():
        state[name] = load_file(want.source.file)[want.source.name].float()
    network.load_state_dict(state, assign=True)
    seen: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.Linear):

            def hook(_: object, inputs: tuple[torch.Tensor], name: str = wanted[f"{name}.weight"].source.name) -> None:
                found = inputs[0].abs().reshape(-1, inputs[0].shape[-1])
                seen[name] = torch.maximum(seen.get(name, torch.zeros(1)), found.amax(0))
                counts[name] = counts.get(name, 0) + found.numel()

            module.register_forward_pre_hook(hook)
    with torch.inference_mode():
        for feeds, _ in recorder.runs:
            network(*(torch.from_numpy(feeds[entry.name]) for entry in part.inputs))

    statistics = calibrate(Bundle.open(folder), SHORT, tmp_path / "s", device="cpu")
    names = {wanted[name].source.name for name in linear_weights(part)}
    assert set(statistics.readers[component]) == names == set(seen)
    for name in names:
        first_reader = statistics.first_reader(component, name)
        if first_reader is None:
            # The text stream after the last attention.
            assert family == "qwen-image" and "transformer_blocks.1." in name
            continue
        entry = statistics.inputs[component][first_reader]
        torch.testing.assert_close(torch.from_numpy(entry.channels), seen[name], rtol=1e-3, atol=1e-4)
        assert entry.histogram.sum() == counts[name]


@pytest.fixture(scope="module")
def whole(bundle_of, tmp_path_factory) -> Statistics:
    folder = tmp_path_factory.mktemp("whole")
    return calibrate(Bundle.open(bundle_of("z-image", "bf16")), SHORT, folder / "s", device="cpu")


def test_an_interrupted_calibration_goes_on(whole, bundle_of, tmp_path):
    bundle, store = Bundle.open(bundle_of("z-image", "bf16")), tmp_path / "s.safetensors"
    seen: list[int] = []

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "calibrate":
            seen.append(done)
            if done == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(bundle, SHORT, store, device="cpu", report=stop)
    assert Statistics.load(store).made["done"] == 2
    assert load_finished(store, bundle.manifest.checkpoint, (), SHORT) is None
    again: list[int] = []
    found = calibrate(bundle, SHORT, store, device="cpu", report=lambda *given: again.append(given[1]))
    assert seen == [0, 1, 2] and again == [2, 3, 4]
    assert [entry.name for entry in tmp_path.iterdir()] == [store.name]
    for component, inputs in whole.inputs.items():
        for name, entry in inputs.items():
            assert np.array_equal(entry.channels, found.inputs[component][name].channels)
            assert np.array_equal(entry.histogram, found.inputs[component][name].histogram)
    # All is there: nothing runs again.
    assert load_finished(store, bundle.manifest.checkpoint, (), SHORT) is not None
    other = CalibrationSet(SHORT.prompts, SHORT.sizes, 2)
    assert load_finished(store, bundle.manifest.checkpoint, (), other) is None
    store.write_bytes(b"broken")
    assert load_finished(store, bundle.manifest.checkpoint, (), SHORT) is None


def test_nan_names_the_layer(bundle_of, tmp_path):
    folder = shutil.copytree(bundle_of("z-image", "bf16"), tmp_path / "b")
    info = Bundle.open(folder).tensors("denoiser")["layers.1.attention_norm1.weight"]
    with info.file.open("r+b") as file:  # In place, for the graph has the place.
        file.seek(info.offset)
        file.write(b"\xc0\x7f")
    with pytest.raises(ZimgError, match=r"NaN or Inf in the input of layers\.1\.attention\.to_q\.weight \(denoiser\)"):
        calibrate(Bundle.open(folder, verify=False), SHORT, tmp_path / "s", device="cpu")
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("value, said", [(NAN, "NaN or Inf"), (-INF, "NaN or Inf"), (-2e38, r"a magnitude of 2e\+38")])
def test_an_input_that_no_histogram_counts(value, said):
    inputs: dict[str, InputStatistics] = {}
    observe(inputs, "denoiser", "q.weight", torch.tensor([[1.0, 1.7e38]]))
    assert inputs["q.weight"].histogram.sum() == 2
    with pytest.raises(ZimgError, match=rf"calibration met {said} in the input of q\.weight \(denoiser\)"):
        observe(inputs, "denoiser", "q.weight", torch.tensor([[1.0, value]]))
    assert inputs["q.weight"].histogram.sum() == 2


def test_too_few_prompts(bundle_of, tmp_path):
    with pytest.raises(UsageError, match="needs 4 prompts, not 1"):
        calibrate(Bundle.open(bundle_of("z-image", "bf16")), CalibrationSet(("a",)), tmp_path / "s")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "has 0 different prompts, and this needs 4"),
        (b"\n \n", "has 0 different prompts"),
        (b"a\nb\na\na\n", "has 2 different prompts"),
        (b"\xff\xfe\x00", "no text in UTF-8"),
    ],
)
def test_prompts_that_do_not_do(text, said, tmp_path):
    (tmp_path / "p.txt").write_bytes(text)
    with pytest.raises(UsageError, match=said):
        read_prompts(tmp_path / "p.txt")


def test_prompts(tmp_path):
    (tmp_path / "p.txt").write_text("a\r\n\n 山 \nb\na\nc", "utf-8")
    assert read_prompts(tmp_path / "p.txt") == ("a", "山", "b", "c")
    with pytest.raises(UsageError, match="No such file"):
        read_prompts(tmp_path / "none.txt")
    with pytest.raises(UsageError, match="Is a directory"):
        read_prompts(tmp_path)


def test_the_command(bundle_of, quantized_of, tmp_path):
    folder = shutil.copytree(bundle_of("z-image", "bf16"), tmp_path / "b")
    (tmp_path / "p.txt").write_text("\n".join(SHORT.prompts))
    options = ("--prompts", tmp_path / "p.txt", "--calibration-size", "64x64", "--calibration-steps", 1)
    result = invoke(main, "calibrate", folder, *options, "--calibration-device", "cpu", "--quiet")
    assert (result.code, result.out) == (0, f"{statistics_path(folder)}\n")
    assert Statistics.load(statistics_path(folder)).made["done"] == 4
    refused = invoke(main, "calibrate", quantized_of("z-image", "int8"), "--quiet")
    refused.assert_refused("is quantized; calibrate a bundle of --precision bf16", 2)
    invoke(main, "calibrate", folder, "--prompts", tmp_path / "no.txt").assert_refused("cannot be read", 2)
    invoke(main, "calibrate", tmp_path / "none").assert_refused("is not a bundle", 1)
    bad = invoke(main, "calibrate", folder, "--calibration-size", "65x64", "--quiet")
    assert bad.code == 2 and "internal error" not in bad.err
