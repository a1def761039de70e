"""Files that are whole or absent, whatever happens while they are written."""

from __future__ import annotations

import pytest

from zimgkit.engines.files import beside, replacing


def test_a_file_takes_its_place_at_the_end(tmp_path):
    path = tmp_path / "f.txt"
    path.write_text("old")
    with replacing(path) as part:
        part.write_text("new")
        assert path.read_text() == "old" and part.parent == tmp_path and part.name.startswith(".f.txt.")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_nothing_half_written_stays(tmp_path):
    path = tmp_path / "f.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as part:
        part.write_text("ne")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_folder_in_the_way(tmp_path):
    (tmp_path / "d").mkdir()
    with pytest.raises(OSError, match="directory"), replacing(tmp_path / "d") as part:
        part.write_text("new")
    assert list(tmp_path.iterdir()) == [tmp_path / "d"]


def test_names_beside_differ(tmp_path):
    names = {beside(tmp_path / "x", "old") for _ in range(100)}
    assert len(names) == 100 and all(name.parent == tmp_path and name.suffix == ".old" for name in names)
