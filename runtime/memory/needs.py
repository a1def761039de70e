"""What each component takes, from the manifest's figures: weights, what an engine keeps of them, and working memory.

The factors were measured with ``benchmarks/engine_memory.py``; OpenVINO's with ``benchmarks/full_size.py``.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from zimgkit.engines.bundle import CPU_GRAPH, Bundle, Manifest
from zimgkit.engines.choice import has_cuda_provider, has_nvidia_gpu
from zimgkit.engines.cpu import adds_integers_exactly, multiplies_bfloat16

if TYPE_CHECKING:
    from zimgkit.runtime.families import Family

COPIES = {
    # It packs what its kernels take as it is stored; bfloat16 and float8 are widened when they are needed.
    ("onnxruntime", "float32"): 1.0,
    ("onnxruntime", "int8"): 1.0,
    ("onnxruntime", "int8-dynamic"): 1.0,
    ("onnxruntime", "int8-weights"): 1.0,
    ("onnxruntime", "int4-weights"): 1.2,
    # It reads weights where they lie and keeps, from the first run on, those of products as its kernels read them: at
    # the most all, in the type that it computes in.
    ("openvino", "float32"): 1.1,
    ("openvino", "bfloat16"): 0.9,
    ("openvino", "int8"): 1.7,
    ("openvino", "int8-dynamic"): 1.15,
    ("openvino", "int8-weights"): 1.15,
    ("openvino", "int4-weights"): 1.5,
}
"""(backend, precision) -> memory of its own that an open engine holds on a CPU, per byte of its weights as they are
stored. The others compute on the mapped file."""
WITHOUT_BFLOAT16 = {
    ("openvino", "bfloat16"): 2.1,
    ("openvino", "int4-weights"): 1.9,
}
"""Likewise on a CPU that does not multiply bfloat16, where that is more."""
WIDENED = 2.4
"""How often ONNX Runtime holds 8-bit weights in float32 while it opens a graph that dequantizes them."""
ENCODER = "vae_encoder"
"""What makes latents of pictures."""
VISION = "vision_encoder"
"""What reads pictures that a prompt speaks of."""
PICTURES = "picture_conditioner"
"""What makes of these what the denoiser takes."""
DENOISER = "denoiser"
"""What takes the steps."""
ORDER = (VISION, "text_encoder", "conditioner", PICTURES, ENCODER, DENOISER, "vae_decoder")
"""The components with a graph, in the order a picture uses them."""
CONVOLUTIONS = {ENCODER, "vae_decoder"}
"""Those of convolutions."""
QUANTIZED = ("text_encoder", DENOISER)
"""Those that a quantized bundle quantizes."""
BYTES = {"float32": 4.0, "bfloat16": 2.0, "int4-weights": 0.6}
BYTES |= dict.fromkeys(("fp8", "int8", "int8-dynamic", "int8-weights"), 1.03)
"""Precision -> bytes of a weight, scales included."""
FLOAT = 4
"""Bytes of a number that a CPU computes in: float32."""
MARGIN = 1.1
"""On what is reckoned."""
BASE = 192 << 20
"""Bytes of the program itself, without weights: the interpreter, its libraries and what their allocators keep."""
TOKEN_ROWS, TOKEN_HIDDEN_ROWS = 14, 3
"""How many rows of a transformer's width, and of its feed-forward's, a token takes at the most."""
WEIGHTS_AT_ONCE = 5
"""Matrices of another type that are at one time there in float32 as well."""
PIXEL_MAPS = 4
"""Feature maps of the VAE decoder that are there at one time, of the picture's size and its most channels there.

Its encoder has half as many, and no picture takes less for that: the decoder follows."""
SCORES = 2
"""How often scores are there: ONNX Runtime keeps the memory of those of refiners, which have fewer tokens."""
PIXELS = 8 * FLOAT
"""Bytes of a pixel in one channel while a picture is put together, cut to bytes and saved."""


@dataclass(frozen=True)
class Need:
    """What one component takes, in bytes."""

    mapped: int = 0
    """Files that an open engine reads its weights from. The system takes their memory back where it is short."""
    held: int = 0
    """What an open engine holds beside that."""
    working: int = 0
    """What it takes besides while it runs."""
    releases: bool = False
    """Whether an engine lets go of its files once it has a copy of its own."""

    @property
    def opened(self) -> int:
        """Of an open engine, the files that it reads from included."""
        return self.held + (0 if self.releases else self.mapped)

    @property
    def addresses(self) -> int:
        """Of the address space, at the most: files may be let go of late."""
        return self.held + self.mapped


def precision_of(manifest: Manifest) -> str:
    """Of the weights: what they are quantized to, or their element type."""
    return manifest.quantized or manifest.precision


def on_host(backend: str, device: str | None) -> bool:
    """Whether a backend computes in the host's memory, as far as can be told without loading it.

    Args:
        backend: its name.
        device: as the user names it; None for the best one present.
    """
    if device is not None:
        return device.lower().startswith("cpu")
    if backend.startswith("tensorrt"):
        return False
    if backend == "openvino" or not has_nvidia_gpu():
        return True
    return backend == "onnxruntime" and not has_cuda_provider()


def stored_bytes(manifest: Manifest, precision: str | None = None, denoiser: str = DENOISER) -> dict[str, int]:
    """Bytes of the weights of each component with a graph, in the order a picture uses them.

    Args:
        manifest: of a bundle.
        precision: another one than the bundle's, of which it is reckoned.
        denoiser: the component that denoises, whose bytes stand under the plain one's name.
    """
    components = {name: manifest.components[name] for name in ORDER if name in manifest.components}
    components |= {DENOISER: manifest.components[denoiser]} if DENOISER in components else {}
    if precision is None:
        return {name: component.weight_bytes for name, component in components.items() if component.graphs}
    of_weight = {name: BYTES[precision] if name in QUANTIZED else BYTES["bfloat16"] for name in ORDER}
    return {name: math.ceil(of_weight[name] * entry.parameters) for name, entry in components.items() if entry.graphs}


def widened_bytes(manifest: Manifest, backend: str) -> dict[str, float]:
    """What opening takes of the components whose weights ONNX Runtime widens on this CPU.

    Those are quantized in 8 bits, of bundles from before there were graphs for CPUs, or on a CPU that cannot run these.
    """
    precision = manifest.quantized
    if backend != "onnxruntime" or BYTES.get(precision) != BYTES["int8"]:
        return {}
    is_served = precision == "fp8" or adds_integers_exactly()
    components = {name: manifest.components[name] for name in QUANTIZED if name in manifest.components}
    return {
        name: WIDENED * FLOAT * component.parameters
        for name, component in components.items()
        if not is_served or CPU_GRAPH not in component.graphs
    }


def with_scores(manifest: Manifest, backend: str) -> set[str]:
    """The components whose attention keeps all scores, where they compute in the host's memory.

    Those that ONNX Runtime has no graph for CPUs of, of bundles from before there were any.
    """
    if backend != "onnxruntime":
        return set()
    is_served = not precision_of(manifest).startswith("int8") or adds_integers_exactly()
    return {name for name, entry in manifest.components.items() if not is_served or CPU_GRAPH not in entry.graphs}


def host_needs(
    stored: Mapping[str, int],
    precision: str,
    family: Family,
    backend: str,
    sizes: Mapping[str, int],
    batch: int = 1,
    widened: Mapping[str, float] = {},
    scores: Collection[str] = (),
    *,
    in_place: bool = False,
) -> dict[str, Need]:
    """What each component takes where it computes in the host's memory.

    Args:
        stored: bytes of its weights.
        precision: of the weights.
        family: of the bundle.
        backend: what runs it.
        sizes: dynamic dimension -> length, as :meth:`.families.base.Family.dynamic_dimensions` gives them. Those of the
            VAE decoder may be a tile's.
        batch: pictures that are denoised together.
        widened: as :func:`widened_bytes` gives it.
        scores: as :func:`with_scores` gives it.
        in_place: whether ONNX Runtime makes no copies of weights.
    """
    table = COPIES if multiplies_bfloat16() else COPIES | WITHOUT_BFLOAT16
    copies = 0.0 if in_place else table.get((backend, precision), 0.0)
    working = _working(family, sizes, batch, scores, cast=precision != "float32")
    held = {name: widened.get(name, copies * size) for name, size in stored.items()}
    for name in CONVOLUTIONS & held.keys():
        # Whatever convolutions are stored in, their kernels are computed with in float32.
        in_float32 = stored[name] * (1 if precision == "float32" else 2)
        if backend == "onnxruntime":
            held[name] = in_float32  # It packs them once.
        elif precision != "float32":
            working[name] += in_float32
    releases = backend == "onnxruntime" and copies > 0
    return {
        name: Need(size, math.ceil(MARGIN * held[name]), math.ceil(MARGIN * working[name]), releases)
        for name, size in stored.items()
    }


def device_needs(
    bundle: Bundle,
    family: Family,
    backend: str,
    sizes: Mapping[str, int],
    batch: int = 1,
    denoiser: Sequence[str] = (DENOISER,),
) -> dict[str, Need]:
    """Likewise on a device of its own. A plan's working memory, for its largest shapes, is among its bytes.

    The denoiser may be in pieces.
    """
    working = _working(family, sizes, batch, (), cast=False)
    return {
        name: Need(
            held=sum(engine_bytes(bundle, component, backend) for component in components),
            working=0 if bundle.engines(components[0], backend) else math.ceil(MARGIN * working[name]),
        )
        for name in stored_bytes(bundle.manifest)
        for components in [denoiser if name == DENOISER else (name,)]
    }


def residual_bytes(family: Family, sizes: Mapping[str, int], batch: int) -> int:
    """Bytes of a residual that a cache keeps of pictures that are denoised together."""
    return FLOAT * batch * sizes["all_tokens"] * family.denoiser_widths()[0]


def with_branches(bundle: Bundle, needs: Mapping[str, Need]) -> dict[str, Need]:
    """The same, where both branches of guidance have an engine of a component: over one file more, and each its own."""
    found = dict(needs)
    for name, need in needs.items():
        own = bundle.manifest.of_branch(name, positive=True)
        if own != name:
            files = set(bundle.component(own).weights) - set(bundle.component(name).weights)
            more = sum(bundle.file(file).stat().st_size for file in files)
            found[name] = replace(need, mapped=need.mapped + more, held=2 * need.held)
    return found


def encoder_need(stored: int, precision: str, backend: str, widths: tuple[int, int], tokens: int) -> Need:
    """What a transformer takes that runs a few times, so that ONNX Runtime makes no copies of its weights.

    Args:
        stored: bytes of its weights.
        precision: of the weights.
        backend: what runs it, in the host's memory.
        widths: its own, and its feed-forward's.
        tokens: that it computes on at once.
    """
    table = COPIES if multiplies_bfloat16() else COPIES | WITHOUT_BFLOAT16
    copies = 0.0 if backend == "onnxruntime" else table.get((backend, precision), 0.0)
    working = _transformer(widths, tokens, cast=precision != "float32")
    return Need(stored, math.ceil(MARGIN * copies * stored), math.ceil(MARGIN * working))


def engine_bytes(bundle: Bundle, component: str, backend: str) -> int:
    """What an engine of a component takes: its plan and working memory where it is compiled, else its weights."""
    sizes = []
    for engine in bundle.engines(component, backend):
        stored = sum(bundle.manifest.files[name].size for name in engine.files)
        if engine.weight_streaming_budget is not None:
            stored = min(stored, engine.weight_streaming_budget)
        sizes.append(stored + engine.memory_bytes)
    stored = bundle.component(component).weight_bytes
    return max(sizes, default=stored if bundle.weights_budget is None else min(stored, bundle.weights_budget))


def _working(
    family: Family, sizes: Mapping[str, int], batch: int, scores: Collection[str], *, cast: bool
) -> dict[str, float]:
    """Working memory in float32, by component."""
    encoder, denoiser = family.text_encoder_widths(), family.denoiser_widths()
    pixels = 64 * sizes["height"] * sizes["width"]
    # Layers are decoded one by one, and put together all at once.
    autoencoder = pixels * (PIXEL_MAPS * FLOAT * family.vae_channels() + PIXELS * sizes.get("planes", 3))
    found = {
        VISION: _transformer(family.vision_widths(), sizes.get("patches", 0), cast=cast),
        "text_encoder": _transformer(encoder, sizes["tokens"], cast=cast),
        "conditioner": _transformer(denoiser, sizes["tokens"], cast=cast),
        PICTURES: _transformer(denoiser, sizes["all_tokens"], cast=cast),
        "denoiser": _transformer(denoiser, batch * sizes["all_tokens"], cast=cast),
        ENCODER: autoencoder,
        "vae_decoder": autoencoder,
    }
    if "denoiser" in scores:
        found["denoiser"] += SCORES * FLOAT * batch * family.denoiser_heads() * sizes["all_tokens"] ** 2
    for name in CONVOLUTIONS.intersection(scores):
        # The one attention is where maps are smallest.
        found[name] = max(found[name], FLOAT * (sizes["height"] * sizes["width"]) ** 2)
    return found


def _transformer(widths: tuple[int, int], tokens: int, *, cast: bool) -> float:
    """Of a transformer whose attention takes memory linear in the tokens.

    Args:
        widths: its own, and its feed-forward's.
        tokens: of all pictures at once.
        cast: whether weights are of another type than it computes in.
    """
    width, hidden = widths
    activations = tokens * (TOKEN_ROWS * width + TOKEN_HIDDEN_ROWS * hidden)
    return FLOAT * (activations + (WEIGHTS_AT_ONCE * width * hidden if cast else 0))
