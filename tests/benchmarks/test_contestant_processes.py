from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from contestant_processes import Contestants, FailedError, resident, tree

WORKER = """
import json, os, subprocess, sys, time
megabytes, opening, then = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
held = [b"1" * (megabytes << 20)]
time.sleep(opening)
child = subprocess.Popen(["sleep", "60"]) if then == "child" else None
print(json.dumps({"pid": os.getpid(), "child": child and child.pid}), flush=True)
for turn, _ in enumerate(sys.stdin):
    if then == "raise":
        raise ValueError("it went wrong")
    if then == "abort":
        os.abort()
    if then == "grow":
        held.append(b"1" * (400 << 20))
        time.sleep(1)
    time.sleep(0.15)
    print(json.dumps({"turn": turn, "pid": os.getpid()}), flush=True)
"""


def worker(megabytes=1, opening=0.0, then=""):
    return [sys.executable, "-I", "-S", "-c", WORKER, str(megabytes), str(opening), then]


def has_ended(process):
    """Within two seconds: a signal takes a moment."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state in "ZX":
            return True
        time.sleep(0.02)
    return False


def test_turns_go_to_one_process_while_there_is_memory(tmp_path):
    with Contestants({"a": worker(), "b": worker()}, tmp_path, 1 << 30) as contestants:
        turns = [contestants.turn(name) for name in "abba"]
    assert [turn["turn"] for turn in turns] == [0, 0, 1, 1]
    assert turns[0]["pid"] == turns[3]["pid"] == contestants.first["a"]["pid"]
    assert all(has_ended(turn["pid"]) for turn in turns)


def test_those_that_open_fastest_are_closed_for_others(tmp_path):
    commands = {"slow": worker(100, opening=0.8), "a": worker(100), "b": worker(100)}
    with Contestants(commands, tmp_path, 270 << 20) as contestants:
        turns = {name: [] for name in commands}
        for _ in range(2):
            for name in commands:
                turns[name].append(contestants.turn(name))
    assert [turn["turn"] for turn in turns["slow"]] == [0, 1]
    assert [turn["turn"] for turn in turns["a"] + turns["b"]] == [0, 0, 0, 0]
    assert len({turn["pid"] for turn in turns["a"]}) == 2
    assert contestants.first["a"]["pid"] == turns["a"][0]["pid"]
    assert 200 << 20 < contestants.peak <= 270 << 20
    assert contestants.peaks["a"] > 100 << 20


def test_one_that_grows_gets_the_room_of_others(tmp_path):
    with Contestants({"a": worker(150), "b": worker(1, then="grow")}, tmp_path, 500 << 20) as contestants:
        contestants.turn("a")
        contestants.turn("b")
        assert contestants.turn("a")["turn"] == 0
    assert contestants.peaks["b"] > 400 << 20


def test_one_that_takes_too_much_is_ended(tmp_path):
    with Contestants({"a": worker(1, then="grow"), "b": worker()}, tmp_path, 300 << 20) as contestants:
        with pytest.raises(FailedError, match=r"more than 0\.293 GiB of memory; give it more with --memory"):
            contestants.turn("a")
        assert has_ended(contestants.first["a"]["pid"])
        assert contestants.turn("b")["turn"] == 0


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (worker(then="raise"), "ended with 1: ValueError: it went wrong"),
        (worker(then="abort"), "ended by SIGABRT"),
        ([sys.executable, "-c", "raise SystemExit('never open')"], "ended with 1: never open"),
        ([sys.executable, "-c", 'print(\'{"failed": "so it says"}\')'], "so it says"),
    ],
)
def test_what_went_wrong_is_told(command, reason, tmp_path):
    with Contestants({"a": command}, tmp_path, 1 << 30) as contestants:
        for _ in range(2):
            with pytest.raises(FailedError, match=reason):
                contestants.turn("a")


def test_what_they_started_ends_with_them(tmp_path):
    with pytest.raises(KeyboardInterrupt), Contestants({"a": worker(then="child")}, tmp_path, 1 << 30) as contestants:
        contestants.turn("a")
        started = contestants.first["a"]
        assert tree(started["pid"]) == [started["pid"], started["child"]]
        raise KeyboardInterrupt
    assert has_ended(started["pid"])
    assert has_ended(started["child"])


def test_memory_of_what_is_gone_is_none():
    with subprocess.Popen(["true"]) as process:
        process.wait()
    assert resident(process.pid) == 0
    assert resident(os.getpid()) > 1 << 20
