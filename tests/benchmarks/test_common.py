from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import common
import pytest


def python(code):
    return common.measure([sys.executable, "-c", code])


def test_measures_peak_memory():
    ballast = bytearray(200_000_000)  # What this process holds does not count.
    small, large = python("pass"), python("x = b'x' * 600_000_000; del x")
    assert large.exit_code == 0
    assert small.peak_bytes < 30e6 < len(ballast)
    assert 600e6 < large.peak_bytes < 600e6 + small.peak_bytes + 50e6


def test_measures_time_and_output():
    done = python("import sys, time; time.sleep(0.3); print('out'); print('err', file=sys.stderr); sys.exit(3)")
    assert done.exit_code == 3
    assert 0.3 <= done.seconds < 5
    assert sorted(done.output.split()) == ["err", "out"]


def test_a_killed_process_failed():
    assert python("import os; os.kill(os.getpid(), 9)").exit_code == -9


def test_what_must_not_fail():
    assert common.run([sys.executable, "-c", "print(1)"]).output == "1\n"
    with pytest.raises(SystemExit, match="failed with 3:\nwhy"):
        common.run([sys.executable, "-c", "print('why'); raise SystemExit(3)"])


def test_what_is_not_there():
    with pytest.raises(SystemExit, match="could not be started"):
        common.measure(["/nowhere/zimg"])


def test_environment_is_added():
    code = "import os; print(os.environ['ZIMG_TEST'], 'PATH' in os.environ)"
    assert common.measure([sys.executable, "-c", code], {"ZIMG_TEST": "a"}).output.split() == ["a", "True"]


def test_told_to_end_it_cleans_up(tmp_path):
    folders, beats = tmp_path / "folders", tmp_path / "beats"
    folders.mkdir()
    beat = f"import time\nwhile True:\n    open({str(beats)!r}, 'a').write('x')\n    time.sleep(0.01)"
    script = f"""
import sys, tempfile
sys.path.append({str(Path(common.__file__).parent)!r})
import common
def main():
    with tempfile.TemporaryDirectory(dir={str(folders)!r}):
        common.measure([sys.executable, "-c", {beat!r}])
common.start(main)
"""
    process = subprocess.Popen([sys.executable, "-c", script])
    while not beats.exists():
        time.sleep(0.01)
        assert process.poll() is None
    process.terminate()
    assert process.wait(10) == 143
    assert list(folders.iterdir()) == []
    heard = beats.stat().st_size
    time.sleep(0.2)
    assert beats.stat().st_size == heard


def test_missing_command():
    with pytest.raises(SystemExit, match="not installed"):
        common.console_script("zimg-no-such-command")


def test_console_script_runs():
    assert "Usage" in common.measure([common.console_script("zimg-run"), "--help"]).output


def test_table_aligns_columns():
    assert common.table(("name", "s"), [("a", 1.5), ("longer", 10)]).splitlines() == [
        "name      s",
        "a       1.5",
        "longer   10",
    ]


@pytest.mark.parametrize(("values", "code"), [((1.0, 2.0), 0), ((1.0, 3.0), 1), ((4.0, 2.0), 1)])
def test_broken_bounds(values, code, capsys):
    assert common.broken_bounds([(f"value {value}", value, 3.0) for value in values]) == code
    assert capsys.readouterr().out.count("BROKEN") == sum(value >= 3 for value in values)


def test_results_say_where_they_come_from(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/benchmarks/footprint.py", "--repeats", "2"])
    common.save(tmp_path / "new" / "a.json", common.machine(), {"seconds": 1})
    found = json.loads((tmp_path / "new" / "a.json").read_text())
    assert found["command"] == "python benchmarks/footprint.py --repeats 2"
    assert found["results"] == {"seconds": 1}
    assert found["machine"]["cores"] >= 1
    assert found["machine"]["versions"]["numpy"]


def test_no_path_saves_nothing():
    common.save(None, {}, {"at": time.time()})
