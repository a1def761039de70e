"""Helps: every option under one heading, every line whole."""

from __future__ import annotations

import re

import click
import pytest

from tests.commands import invoke
from zimgkit.export.cli import main as export
from zimgkit.runtime.commands import cli as run
from zimgkit.runtime.commands.headings import GroupedCommand
from zimgkit.runtime.commands.options import SETTINGS

COMMANDS = [
    (main, group.commands[name]) for main, group in ((run, run.cli), (export, export.cli)) for name in group.commands
]
LONG = {"generate", "sheet", "build", "compile"}
ids = [f"{main.__name__.split('.')[1]} {command.name}" for main, command in COMMANDS]


@pytest.mark.parametrize(("main", "command"), COMMANDS, ids=ids)
def test_every_option_stands_under_one_heading(main, command) -> None:
    assert isinstance(command, GroupedCommand)
    options = [p for p in command.get_params(click.Context(command, **SETTINGS)) if isinstance(p, click.Option)]
    for option in options:
        headings = [heading for heading, names in command.headings.items() if option.name in names]
        assert len(headings) == (option.opts[-1] != "--help"), option.name
    result = invoke(main.main, command.name, "--help")
    assert (result.code, result.err) == (0, "")
    assert all(len(line) <= 110 for line in result.out.splitlines())
    for option in options:
        assert len(re.findall(rf"^  .*{option.opts[-1]}\b", result.out, re.M)) >= 1
    if command.name in LONG:
        assert len(re.findall(r"^\w.*:$", result.out, re.M)) >= 3


@pytest.mark.parametrize(("main", "command"), COMMANDS, ids=ids)
def test_every_line_is_a_sentence(main, command) -> None:
    for option in command.get_params(click.Context(command, **SETTINGS)):
        if not isinstance(option, click.Option):
            continue
        text = re.sub(r" \[default: [^\[\]]+\]$", "", option.help or "")
        assert re.fullmatch(r"[A-Z][^\[\]]+\.", text), (option.name, text)
        assert len(text.split()) >= 3, (option.name, text)
        assert not re.match(r"(Of|For|As|Likewise|Its|That|This)\b", text), (option.name, text)
        assert "likewise" not in (option.help or "").lower()
