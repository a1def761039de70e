"""How both commands end: one line for every error, and its exit code."""

from __future__ import annotations

import difflib
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import click

from zimgkit.engines.errors import ZimgError
from zimgkit.runtime.parameters import BY_NAME, INSTEAD

AGAIN = 0.5
"""Seconds until an interruption that was lost comes again."""


def run(command: click.Command) -> NoReturn:
    """Run a command line and exit: 0 when it worked, 2 for wrong usage, 1 for a failure.

    Set ``ZIMG_TRACEBACK=1`` to see where an error came from.
    """
    name = command.name or "zimgkit"
    # A polite kill cleans up as Ctrl-C does.
    for number in ("SIGINT", "SIGTERM", "SIGALRM"):
        if hasattr(signal, number):  # Windows has no alarm.
            signal.signal(getattr(signal, number), _interrupt)
    try:
        result = command.main(prog_name=name, standalone_mode=False)
    except click.NoSuchOption as error:
        _end(name, _no_such_option(error, name), error.exit_code)
    except click.ClickException as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # Of click 8.2 and newer; older ones print the help themselves.
            error.show()
            sys.exit(error.exit_code)
        context = getattr(error, "ctx", None)
        path = context.command_path if context else name
        _end(name, f"{error.format_message().rstrip('.')} (see {path} --help)", error.exit_code)
    except ZimgError as error:
        _end(name, str(error), error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        _remind(0)
        _end(name, "interrupted; nothing half-written is left", 1)
    except MemoryError:
        _end(name, "out of memory; ask for a smaller picture, or use a machine with more", 1)
    except OSError as error:
        _end(name, f"{error.filename or 'input or output'}: {error.strerror or error}", 1)
    except Exception as error:
        _end(
            name, f"internal error: {type(error).__name__}: {error} (ZIMG_TRACEBACK=1 shows where; please report it)", 1
        )
    # What ``--help`` and ``ctx.exit`` give comes back as a number; commands give nothing.
    sys.exit(result if isinstance(result, int) else 0)


def _no_such_option(error: click.NoSuchOption, name: str) -> str:
    """That there is no such option, and which one serves instead, where that is known."""
    wanted = error.option_name.strip("-").replace("-", "_")
    instead = BY_NAME.get(INSTEAD.get(wanted, wanted))
    context = error.ctx
    known = {option for parameter in (context.command.params if context else ()) for option in parameter.opts}
    if instead and f"--{instead.option}" in known:
        hint = f"use --{instead.option}"
    else:
        near = error.possibilities or difflib.get_close_matches(error.option_name, known)
        hint = f"did you mean {near[0]}?" if near else f"see {context.command_path if context else name} --help"
    return f"No such option {error.option_name!r}; {hint}"


def _interrupt(number: int, frame: object) -> None:
    """Raise ``KeyboardInterrupt``, and again after a moment where it was lost: Python ignores what a destructor raises.

    Not while one is on its way already, which would break off the cleaning up.
    """
    _remind(AGAIN)
    if not isinstance(sys.exc_info()[1], KeyboardInterrupt):
        raise KeyboardInterrupt


@contextmanager
def ended_by_interruption() -> Iterator[None]:
    """For what ends itself, in order, when it is interrupted: an interruption within is no error, and comes once."""
    with suppress(KeyboardInterrupt):
        yield
    _remind(0)


def _remind(seconds: float) -> None:
    """Raise the alarm after so many seconds, or never where they are 0."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds)


def _end(name: str, message: str, code: int) -> NoReturn:
    if os.environ.get("ZIMG_TRACEBACK"):
        import traceback

        traceback.print_exc()
    say(f"{name}: error: {' '.join(message.split())}", err=True)
    sys.exit(code)


def warn(message: str) -> None:
    """Say something on stderr that the user should know."""
    say(f"warning: {message}", err=True)


def note(message: str, *, quiet: bool = False) -> None:
    """Say something on stderr that the user may want to know, unless nothing is to be said."""
    if not quiet:
        say(message, err=True)


def say(text: str, *, err: bool = False) -> None:
    """Print a text, what is no text made visible: of a foreign file, it could command the terminal."""
    click.echo("".join(c if c == "\n" or c.isprintable() else repr(c)[1:-1] for c in text), err=err)


def print_json(value: Any) -> None:
    """Print one JSON document on stdout."""
    click.echo(json.dumps(value, indent=1, ensure_ascii=False))
