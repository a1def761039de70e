"""Where temporary bundles lie, and what becomes of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from zimgkit.export.quality import references


@pytest.fixture
def built(monkeypatch):
    """The folders that bundles are built in; they stay empty."""
    found = []
    monkeypatch.setattr(references, "open_checkpoint", lambda *_, **__: None)
    monkeypatch.setattr(references, "_build", lambda *given: found.append(given[2]) or given[2].mkdir())
    return found


@pytest.mark.parametrize("writable", [True, False])
def test_a_temporary_bundle_lies_where_it_can_be_written(tmp_path, monkeypatch, built, writable):
    work, elsewhere = tmp_path / "work", tmp_path / "tmp"
    work.mkdir()
    elsewhere.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setattr(references, "gettempdir", lambda: str(elsewhere))
    monkeypatch.setattr("os.access", lambda path, mode: writable or Path(path) != work)
    (work / ".zimgkit.01234567.references").mkdir()  # A killed process left it.
    with references.temporary_bundle("model"):
        (folder,) = built
        assert folder.parents[1] == (work if writable else elsewhere) and folder.is_dir()
    assert not list(elsewhere.iterdir()) and len(list(work.iterdir())) == (0 if writable else 1)
