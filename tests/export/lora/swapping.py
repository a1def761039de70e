"""What a swap does to a bundle, seen from outside."""

from __future__ import annotations

from zimgkit.engines.bundle import MANIFEST, Bundle
from zimgkit.engines.tensors.safetensors import view
from zimgkit.export.lora import swap as swaps
from zimgkit.export.lora.graphs import read_graph


def swap(bundle, *loras, **options):
    return swaps.swap(bundle, [str(lora) for lora in loras], **options)


def contents(bundle):
    """Every weight of a bundle as its graphs and its host take it."""
    opened = Bundle.open(bundle)
    opened.verify(afresh=True)
    found = {}
    for name, component in opened.manifest.components.items():
        tensors = opened.tensors(name)
        for graph in component.graphs.values():
            model = read_graph(opened.file(graph))
            for tensor in model.graph.initializer:
                if entry := {item.key: item.value for item in tensor.external_data}:
                    info = tensors[tensor.name]
                    place = (info.file.relative_to(opened.root).as_posix(), str(info.offset), str(info.nbytes))
                    assert (entry["location"], entry["offset"], entry["length"]) == place, tensor.name
                    found[name, tensor.name] = view(info).tobytes()
        found |= {(name, key): view(tensors[key]).tobytes() for key in component.tensors}
    assert {p.relative_to(bundle).as_posix() for p in bundle.rglob("*") if p.is_file()} == {
        MANIFEST, *opened.manifest.files,
    }  # fmt: skip
    return found


def states(bundle):
    """What each file is, so that a change of it shows."""
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in bundle.rglob("*") if p.is_file()}
