"""The ControlNets that come with zimgkit, in the bundles that come with it: what they draw, and their files."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.commands import invoke
from zimgkit.engines.bundle import Bundle
from zimgkit.engines.errors import OutputError
from zimgkit.engines.tensors.safetensors import read_header
from zimgkit.export.cli.main import main
from zimgkit.export.controls.source import find_control
from zimgkit.runtime import demo_models
from zimgkit.runtime.commands.cli import main as run
from zimgkit.training.accuracy import accuracy
from zimgkit.training.judge import look
from zimgkit.training.ship import ship_controlnet
from zimgkit.training.trials import trials

NETS = [*demo_models.CONTROLNETS]
KINDS = {
    "zimg-tiny-z": ("fun", "control_layers.0.before_proj.weight"),
    "zimg-tiny-qwen": ("blockwise", "controlnet_blocks.0.x_rms.weight"),
}


@pytest.mark.parametrize("model", demo_models.CONTROLNETS.values())
def test_things_lie_where_edges_are(model: str) -> None:
    """In their colours, of scenes that were never trained on, one thing and two in turns: 97.5 and 92.5 % of 200."""
    cases = accuracy(demo_models.locate(model), task="control", captions=10)
    assert sum(case.right for case in cases) >= 8


@pytest.mark.parametrize("net", NETS)
def test_their_files(net: str) -> None:
    """Found by name, small, in published keys, whole, and said to be what they are: a path of no machine."""
    model = demo_models.CONTROLNETS[net]
    kind, key = KINDS[model]
    found = find_control(net)
    assert (found.name, found.path) == ("edges", demo_models.locate_controlnet(net))
    assert found.path.stat().st_size <= 620_000
    assert key in read_header(found.path)
    bundle = Bundle.open(demo_models.locate(model))
    bundle.verify(afresh=True)
    (control,) = bundle.manifest.controls
    assert (control.name, control.kind, control.takes) == ("edges", kind, ("image",))
    assert bundle.manifest.sources["control.edges"].model == net


def test_a_picture_without_naming_a_bundle(tmp_path: Path) -> None:
    """The bundle that draws where none is named has one."""
    trial = trials("control", 2)[1]
    assert trial.edges is not None
    trial.edges.save(tmp_path / "edges.png")
    out = tmp_path / "out.png"
    result = invoke(run, "generate", trial.caption, "--control", tmp_path / "edges.png", "--seed", 1, "-o", out)
    assert result.code == 0, result
    drawn = np.asarray(Image.open(out).convert("L"), np.int16)
    edges = np.asarray(trial.edges.convert("L")) > 0
    steps = np.abs(np.diff(drawn, axis=0, append=drawn[-1:])) + np.abs(np.diff(drawn, axis=1, append=drawn[:, -1:]))
    assert steps[edges].mean() > 3 * steps[~edges].mean()
    assert len(look(Image.open(out))) == 2


@pytest.mark.parametrize("net", NETS)
def test_another_bundle_takes_them_by_name(net: str, tmp_path: Path) -> None:
    model = demo_models.CONTROLNETS[net]
    result = invoke(main, "build", "--model", model, "--controlnet", net, "--out", tmp_path / "b", "--quiet")
    assert result.code == 0, result
    assert [control.name for control in Bundle.open(tmp_path / "b").manifest.controls] == ["edges"]


@pytest.mark.parametrize("net", NETS)
def test_shipping_one(net: str, tmp_path: Path) -> None:
    """Of what came from it: the same bundle, but for the names of its graphs."""
    model = demo_models.CONTROLNETS[net]
    plain = tmp_path / "plain"
    carried = Bundle.open(demo_models.locate(model))
    shutil.copytree(carried.root, plain)
    assert invoke(main, "remove-controlnet", plain, "edges", "--quiet").code == 0
    file = tmp_path / f"{net}.safetensors"
    shutil.copy(demo_models.locate_controlnet(net), file)
    ship_controlnet(file, plain, tmp_path / "made", "edges")
    made = Bundle.open(tmp_path / "made")
    made.verify(afresh=True)
    assert made.manifest.sources == carried.manifest.sources
    assert made.manifest.controls == carried.manifest.controls
    assert made.manifest.components.keys() == carried.manifest.components.keys()
    hashes = [sorted(record.sha256 for record in bundle.manifest.files.values()) for bundle in (made, carried)]
    assert hashes[0] == hashes[1]
    with pytest.raises(OutputError, match="exists"):
        ship_controlnet(file, plain, tmp_path / "made", "edges")
