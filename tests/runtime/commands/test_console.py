"""How a command ends: its exit code, and one line on stderr for every error."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

from tests.commands import Result, heed_interrupts, invoke
from zimgkit.engines.errors import (
    BackendError,
    BundleError,
    CheckpointError,
    DownloadError,
    OutputError,
    UsageError,
    ZimgError,
)
from zimgkit.runtime.commands import console


def end(action: Callable[[], Any], *arguments: object) -> Result:
    """Run a small tool whose one command does ``action``."""

    @click.group("tool")
    def tool() -> None:
        """A tool."""

    @tool.command()
    @click.argument("name")
    @click.option("--count", type=int)
    def go(name: str, count: int | None) -> None:
        action()

    return invoke(lambda: console.run(tool), *(arguments or ("go", "name")))


def raising(error: BaseException) -> Callable[[], None]:
    def action() -> None:
        raise error

    return action


class TestErrors:
    @pytest.mark.parametrize(
        "kind", [ZimgError, CheckpointError, DownloadError, BundleError, BackendError, OutputError]
    )
    def test_what_zimg_raises_on_purpose(self, kind):
        end(raising(kind("it broke", "mend it"))).assert_refused("tool: error: it broke; mend it\n", 1)

    def test_wrong_usage(self):
        end(raising(UsageError("height is 5", "give 16"))).assert_refused("tool: error: height is 5; give 16\n", 2)

    def test_messages_of_several_lines_become_one(self):
        end(raising(ZimgError("first\n  second\r\n\tthird", "and\nmore"))).assert_refused(
            "first second third; and more\n", 1
        )

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("go",), "Missing argument 'NAME' (see tool go --help)"),
            (("go", "a", "b"), "Got unexpected extra argument (b) (see tool go --help)"),
            (
                ("go", "a", "--count", "many"),
                "Invalid value for '--count': 'many' is not a valid integer (see tool go --help)",
            ),
            (("go", "a", "--count"), "'--count' requires an argument"),
            (("go", "a", "--cuont", "1"), "--cuont"),
            (("stop",), "'stop' (see tool --help)"),
            (("--nonsense",), "--nonsense'; see tool --help"),
        ],
    )
    def test_what_click_refuses(self, arguments, message):
        end(lambda: None, *arguments).assert_refused(message, 2)

    def test_other_errors_of_click(self):
        end(raising(click.ClickException("no luck."))).assert_refused("tool: error: no luck (see tool --help)\n", 1)
        end(raising(click.FileError("a.txt", "it is gone"))).assert_refused("'a.txt': it is gone", 1)

    def test_out_of_memory(self):
        end(raising(MemoryError())).assert_refused("tool: error: out of memory; ask for a smaller picture", 1)

    @pytest.mark.parametrize(
        ("error", "message"),
        [
            (
                OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
                "tool: error: input or output: No space left on device\n",
            ),
            (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/a/b"), "tool: error: /a/b: No space left on device\n"),
            (PermissionError(errno.EACCES, "Permission denied", "/a"), "tool: error: /a: Permission denied\n"),
            (OSError("it ended early"), "tool: error: input or output: it ended early\n"),
        ],
    )
    def test_files(self, error, message):
        end(raising(error)).assert_refused(message, 1)

    @pytest.mark.parametrize("error", [RuntimeError("a\nb"), KeyError("k"), AssertionError(), RecursionError("deep")])
    def test_what_nobody_expected(self, error):
        result = end(raising(error))
        kind = type(error).__name__
        assert result.code == 1
        assert result.out == ""
        assert result.err.startswith(f"tool: error: internal error: {kind}: ")
        assert result.err.endswith("(ZIMG_TRACEBACK=1 shows where; please report it)\n")
        assert result.err.count("\n") == 1

    @pytest.mark.parametrize("error", [KeyboardInterrupt(), click.Abort()])
    def test_interrupted(self, error):
        """Where a terminal shows ^C, click ends that line first."""
        result = end(raising(error))
        assert result.code == 1
        assert result.out == ""
        assert result.err.lstrip("\n") == "tool: error: interrupted; nothing half-written is left\n"

    def test_traceback_on_demand(self, monkeypatch):
        monkeypatch.setenv("ZIMG_TRACEBACK", "1")
        result = end(raising(BundleError("it broke")))
        assert result.code == 1
        assert result.err.startswith("Traceback (most recent call last):\n")
        assert "in action\n" in result.err
        assert result.err.endswith("tool: error: it broke\n")

    def test_no_traceback_otherwise(self, monkeypatch):
        monkeypatch.setenv("ZIMG_TRACEBACK", "")
        end(raising(BundleError("it broke"))).assert_refused("tool: error: it broke\n", 1)


class TestSuccess:
    def test_nothing_is_said(self):
        assert end(lambda: None) == Result(0, "", "")

    @pytest.mark.parametrize("arguments", [("--help",), ("go", "--help")])
    def test_help(self, arguments):
        result = end(lambda: None, *arguments)
        assert (result.code, result.err) == (0, "")
        assert result.out.startswith("Usage: tool")

    def test_no_arguments_give_the_help(self):
        result = invoke(lambda: console.run(click.Group("tool", {"go": click.Command("go")})))
        assert "Usage: tool [OPTIONS] COMMAND [ARGS]...\n" in result.out + result.err
        assert "error" not in result.out + result.err

    @pytest.mark.parametrize("code", [0, 3])
    def test_a_command_that_ends_itself(self, code):
        assert end(lambda: click.get_current_context().exit(code)) == Result(code, "", "")


def test_warnings_go_to_stderr():
    assert end(lambda: console.warn("the prompt was cut")) == Result(0, "", "warning: the prompt was cut\n")


def test_json_goes_to_stdout():
    value = {"prompt": "一只猫 é", "seed": 2**63, "list": [1.5, None, True]}
    result = end(lambda: console.print_json(value))
    assert json.loads(result.out) == value
    assert "一只猫 é" in result.out
    assert (result.code, result.err) == (0, "")


TOOL = """
    import os, signal, sys, time
    from pathlib import Path
    import click
    from zimgkit.engines.bundle import atomic_folder
    from zimgkit.runtime.commands import console

    @click.group("tool")
    def tool():
        pass

    @tool.command()
    @click.argument("target", type=click.Path(path_type=Path))
    def build(target):
        with atomic_folder(target) as work:
            (work / "half").write_text("x")
            print("ready", flush=True)
            time.sleep(60)

    class Lossy:
        def __del__(self):
            print("ready", flush=True)
            time.sleep(30)

    @tool.command()
    def drop():
        Lossy()
        time.sleep(30)

    @tool.command()
    def talk():
        for _ in range(1000):
            click.echo("x" * 1000)

    console.run(tool)
"""


@pytest.fixture(scope="module")
def tool(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    path = tmp_path_factory.mktemp("tool") / "tool.py"
    path.write_text(textwrap.dedent(TOOL))
    return [sys.executable, str(path)]


class TestProcess:
    """What only a process of its own can show."""

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_signals_leave_nothing_half_written(self, tool: list[str], tmp_path: Path, number: signal.Signals) -> None:
        target = tmp_path / "target"
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        with subprocess.Popen([*tool, "build", str(target)], preexec_fn=heed_interrupts, **pipes) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            assert len(list(tmp_path.iterdir())) == 1
            process.send_signal(number)
            _, err = process.communicate(timeout=20)
        assert process.returncode == 1
        assert err.strip() == "tool: error: interrupted; nothing half-written is left"
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_a_signal_lost_in_a_destructor_comes_again(self, tool: list[str], number: signal.Signals) -> None:
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        with subprocess.Popen([*tool, "drop"], preexec_fn=heed_interrupts, **pipes) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            process.send_signal(number)
            _, err = process.communicate(timeout=20)
        assert "Exception ignored" in err
        assert process.returncode == 1
        assert err.splitlines()[-1] == "tool: error: interrupted; nothing half-written is left"

    def test_a_reader_that_has_gone(self, tool: list[str]) -> None:
        reading, writing = os.pipe()
        os.close(reading)
        with os.fdopen(writing, "w") as out:
            done = subprocess.run([*tool, "talk"], stdout=out, stderr=subprocess.PIPE, check=False, timeout=20)
        assert (done.returncode, done.stderr) == (1, b"")

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
    def test_a_full_disk_behind_stdout(self, tool: list[str]) -> None:
        with Path("/dev/full").open("w") as out:
            done = subprocess.run([*tool, "talk"], stdout=out, stderr=subprocess.PIPE, check=False, timeout=20)
        assert (done.returncode, done.stderr) == (1, b"tool: error: input or output: No space left on device\n")


def test_a_picture_where_the_system_lacks_what_linux_has(tmp_path: Path) -> None:
    """What macOS and Windows lack is done without, as far as a test on Linux can tell."""
    code = """
        import os, signal, sys
        sys.modules["fcntl"] = None
        del os.posix_fallocate, signal.SIGALRM, signal.setitimer
        from zimgkit.runtime.commands.cli import main
        sys.argv = ["zimg-run", "generate", *"circle --bundle zimg-tiny-qwen --num-inference-steps 1 --quiet".split()]
        main()
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]
