"""The group of ``zimg-export``'s commands."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import invoke
from zimgkit.export.cli.main import cli, main
from zimgkit.export.quantization.statistics import Statistics
from zimgkit.runtime import demo_models
from zimgkit.runtime.commands.cli import cli as run_cli

COMMANDS = (
    *("build", "calibrate", "calibrate-cache", "compile", "swap-lora", "add-controlnet", "remove-controlnet", "i2l"),
    *("export", "push", "inspect", "verify", "sensitivity", "triton", "demo-checkpoint"),
)


def test_help_lists_every_command():
    result = invoke(main, "--help")
    assert (result.code, result.err) == (0, "")
    listed = [line.split()[0] for line in result.out.partition("Commands:\n")[2].splitlines()]
    assert sorted(listed) == sorted(COMMANDS)


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom zimgkit.export.cli.main import cli\n"
        f"for command in {COMMANDS}:\n    cli.main([command, '--help'], standalone_mode=False)\n"
        "sys.exit(', '.join({'torch', 'onnx', 'onnx_ir', 'onnxscript', 'transformers'} & {*sys.modules}) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("Usage: ") == len(COMMANDS)


def test_an_unknown_command():
    invoke(main, "exports").assert_refused("No such command 'exports'", 2)


def test_every_bundle_may_be_a_carried_one_by_name():
    takes = {
        f"{command.name} {parameter.name}": parameter.type
        for group in (cli, run_cli)
        for command in group.commands.values()
        for parameter in command.params
        if parameter.name in ("bundle", "bundles", "from_bundle", "references")
        and command.name != "serve"  # There a bundle may have another name in front.
    }
    assert len(takes) == 16
    for kind in takes.values():
        assert kind.convert("zimg-tiny-z", None, None) == demo_models.FOLDER / "zimg-tiny-z"
        assert kind.convert("none", None, None) == Path("none")


@pytest.mark.parametrize("by_path", [False, True])
def test_carried_bundles_are_not_written_into(by_path):
    bundle = demo_models.FOLDER / "zimg-tiny-z" if by_path else "zimg-tiny-z"
    before = sorted(path.name for path in demo_models.FOLDER.iterdir())
    refused = invoke(main, "compile", bundle)
    refused.assert_refused("zimg-tiny-z comes with zimgkit and stays as it is; compile one of your own: zimg-export", 2)
    costs = invoke(main, "verify", bundle, "--model", "zimg-tiny-z", "--cost", "--quiet")
    costs.assert_refused("stays as it is; leave --cost out, or measure a copy", 2)
    invoke(main, "swap-lora", bundle).assert_refused("stays as it is; write a new bundle with --out", 2)
    assert sorted(path.name for path in demo_models.FOLDER.iterdir()) == before


def test_a_carried_bundle_is_calibrated_into_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("p.txt").write_bytes("\ufeff# comment\ra\r\nb\nc\u2028c\rd".encode())
    options = ("--prompts", "p.txt", "--calibration-size", "64x64", "--calibration-steps", 1)
    result = invoke(main, "calibrate", "zimg-tiny-z", *options, "--calibration-device", "cpu", "--quiet")
    assert (result.code, result.out) == (0, "zimg-tiny-z.calibration.safetensors\n")
    assert list(Statistics.load(Path(result.out.strip())).made["plan"]["prompts"]) == ["a", "b", "c\u2028c", "d"]
