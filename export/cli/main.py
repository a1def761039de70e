"""``zimg-export``: the group of its commands. Each command is a file; none imports PyTorch before it runs."""

from __future__ import annotations

import click

import zimgkit
from zimgkit.export.cli.build import build_command
from zimgkit.export.cli.calibrate import calibrate_command
from zimgkit.export.cli.calibrate_cache import calibrate_cache_command
from zimgkit.export.cli.compile import compile_command
from zimgkit.export.cli.controlnets import add_controlnet_command, remove_controlnet_command
from zimgkit.export.cli.demo_checkpoint import demo_checkpoint_command
from zimgkit.export.cli.export import export_command
from zimgkit.export.cli.i2l import i2l_command
from zimgkit.export.cli.inspect import inspect_command
from zimgkit.export.cli.push import push_command
from zimgkit.export.cli.sensitivity import sensitivity_command
from zimgkit.export.cli.swap_lora import swap_lora_command
from zimgkit.export.cli.triton import triton_command
from zimgkit.export.cli.verify import verify_command
from zimgkit.runtime.commands import console
from zimgkit.runtime.commands.options import SETTINGS


@click.group("zimg-export", context_settings=SETTINGS)
@click.version_option(zimgkit.__version__, "-V", "--version", message="%(version)s")
def cli() -> None:
    """Turn checkpoints into bundles that run without PyTorch."""


for command in (
    build_command,
    calibrate_command,
    calibrate_cache_command,
    compile_command,
    swap_lora_command,
    add_controlnet_command,
    remove_controlnet_command,
    i2l_command,
    export_command,
    push_command,
    inspect_command,
    verify_command,
    sensitivity_command,
    triton_command,
    demo_checkpoint_command,
):
    cli.add_command(command)


def main() -> None:
    """The console script."""
    console.run(cli)
