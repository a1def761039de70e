"""The group of ``zimg-export``'s commands."""

from __future__ import annotations

import subprocess
import sys

from tests.commands import invoke
from zimgkit.export.cli.main import main

COMMANDS = ("build", "calibrate", "compile", "swap-lora", "inspect", "verify", "sensitivity", "demo-checkpoint")


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
    invoke(main, "export").assert_refused("No such command 'export'", 2)
