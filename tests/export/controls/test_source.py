"""How nets on hubs are named, and which file of which id is fetched for that."""

from __future__ import annotations

import pytest

from zimgkit.engines.errors import CheckpointError
from zimgkit.export.controls.source import find_control
from zimgkit.runtime import hub

UNION = "Z-Image-Turbo-Fun-Controlnet-Union-2.1"
TILE = "Z-Image-Turbo-Fun-Controlnet-Tile-2.1-8steps"


@pytest.fixture
def fetched(tmp_path, monkeypatch):
    """The calls of ``hub.fetch``; each gives a folder with the file that was asked for."""
    calls = []

    def fetch(model_id, *, revision, source, allow):
        calls.append((source, model_id, revision, allow[0]))
        (tmp_path / allow[0]).touch()
        return tmp_path

    monkeypatch.setattr(hub, "fetch", fetch)
    return calls


@pytest.mark.parametrize("source", ["huggingface", "modelscope"])
@pytest.mark.parametrize(
    ("place", "file", "name"),
    [
        (TILE, TILE, "tile"),
        (TILE.lower(), TILE, "tile"),
        (f"PAI/{UNION}/{UNION}-8steps.safetensors", f"{UNION}-8steps", "union_8steps"),
        (f"alibaba-pai/{UNION}/{UNION}.safetensors", UNION, "union"),
        (f"mine=alibaba-pai/{UNION}/{UNION}.safetensors", UNION, "mine"),
    ],
)
def test_known_files_are_fetched_by_the_id_that_a_hub_has(fetched, place, file, name, source):
    found = find_control(place, source)
    owner = {"huggingface": "alibaba-pai", "modelscope": "PAI"}[source]
    assert fetched == [(source, f"{owner}/{UNION}", None, f"{file}.safetensors")]
    assert (found.name, found.path.name) == (name, f"{file}.safetensors")


def test_other_files_are_fetched_as_they_are_named(fetched):
    found = find_control("someone/Z-Image-Fun-Controlnet-2.0/Z-Image-Fun-Controlnet-Union-2.0.safetensors")
    assert fetched == [
        ("huggingface", "someone/Z-Image-Fun-Controlnet-2.0", None, "Z-Image-Fun-Controlnet-Union-2.0.safetensors")
    ]
    assert found.name == "union_2_0"


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("no-such-net", "there is no ControlNet 'no-such-net'"),
        ("owner/name/net.pt", "net.pt is a pickle"),
        ("owner/name/net.gguf", "on a hub a ControlNet is a .safetensors file"),
        ("owner/name/../net.safetensors", "does not exist|there is no ControlNet"),
    ],
)
def test_names_that_are_none(fetched, place, message):
    with pytest.raises(CheckpointError, match=message):
        find_control(place)
    assert not fetched
