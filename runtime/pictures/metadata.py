"""What made a picture, written into its file so that it can be made again.

A file carries it twice. The text in the form of AUTOMATIC1111's web UI is for people and the viewers of this field: the
prompt, ``Negative prompt: …``, and one line ``Steps: 8, Sampler: Euler, CFG scale: 4, …``. It is ambiguous where a
prompt looks like it, so an exact copy as JSON goes beside it, and is preferred when zimgkit reads.

===========  =====================================  ========================
format       text                                   exact copy
===========  =====================================  ========================
PNG          text chunk ``parameters``              text chunk ``zimg``
JPEG, WebP   EXIF ``UserComment``, in UTF-16        EXIF ``MakerNote``
===========  =====================================  ========================

What other tools write is read by :mod:`zimgkit.runtime.pictures.foreign`.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import msgspec

from zimgkit.engines.errors import UsageError
from zimgkit.runtime.parameters import PARAMETERS, ControlPicture, Parameter, Picture
from zimgkit.runtime.pictures import foreign

if TYPE_CHECKING:
    from PIL import Image

NEGATIVE = "Negative prompt:"
PAIR = re.compile(r'(\w[\w /-]{0,60}):\s*("(?:[^"\\]|\\.)*"|[^,]*)(?:,|$)')
"""One ``Key: value`` of the last line. Keys are bounded so that a long prompt is not searched over and over."""
TEXT_CHUNK, EXACT_CHUNK = "parameters", "zimg"
EXIF_IFD, USER_COMMENT, MAKER_NOTE = 0x8769, 0x9286, 0x927C
SOFTWARE, NAMED_TAGS = 0x0131, (0x010E, 0x010F, 0x0110)
"""EXIF tags; the latter hold ``name:text`` where ComfyUI writes WebP."""
UNICODE, MAKER = b"UNICODE\0", b"zimg\0"
MAX_IMAGES = 1000
MOST_NAMED = 6
"""Names in a warning."""
JPEG_EXIF_LIMIT = 65_533 - len(b"Exif\0\0")
"""Bytes of EXIF that a JPEG segment can hold."""


PROVENANCE: dict[str, tuple[str, type]] = {
    "Num images": ("num_images", int),
    "Image index": ("image_index", int),
    "Family": ("family", str),
    "Precision": ("precision", str),
    "LoRAs": ("loras", str),
    "Backend": ("backend", str),
    "VAE tiling": ("vae_tiling", str),
    "Model": ("model", str),
    "Version": ("version", str),
}
"""Key in the text -> field that is no parameter of a call."""
WEB_ORDER = ("Steps", "Sampler", "CFG scale", "Seed", "Size", "Model")
"""Keys that the web UI writes, in its order; the others follow, and the version comes last."""
KEYS: dict[str, tuple[str, type]] = {
    **{parameter.key: (parameter.name, parameter.type) for parameter in PARAMETERS if parameter.key},
    **PROVENANCE,
}
"""Key in the text -> field, and its type."""


INPUT_FILES = {
    "Input image": "image",
    "Start image": "input_image",
    "Mask": "mask_image",
    "Context image": "context_image",
    "Entity masks": "eligen_entity_masks",
    "ControlNets": "controls",
}
"""Key in the text -> parameter that is a picture; it is read from the exact copy alone."""
READ = {*KEYS, *INPUT_FILES, "Size", "Sampler", "Model hash"}
"""Keys of the web UI that are read, or say what is not worth a warning."""


class InputFile(msgspec.Struct, frozen=True):
    """A picture that another one was drawn from."""

    name: str
    """Of its file; empty where it had none."""
    sha256: str
    """Of its pixels, as :func:`.reading.digest` takes it."""

    def __str__(self) -> str:
        return f"{self.name or 'a picture'} ({self.sha256[:10]})"


class ControlRecord(msgspec.Struct, frozen=True, omit_defaults=True):
    """A ControlNet that acted, see :class:`.controls.ControlInput`."""

    name: str
    image: InputFile | None = None
    mask: InputFile | None = None
    inpaint_image: InputFile | None = None
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    counts_down: bool = False

    def __str__(self) -> str:
        pictures = " and ".join(str(file) for file in (self.image, self.inpaint_image, self.mask) if file)
        window = f" from {self.start:g} to {self.end:g}" if abs(self.end - self.start) < 1 else ""
        return f"{self.name} {self.scale:g}{window}: {pictures}"


class Record(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What made a picture, beside the parameters of the call; ``None`` where it is not known."""

    num_images: int = 1
    """Pictures whose noise was drawn together from this seed."""
    image_index: int = 0
    """Which of them this is."""
    model: str | None = None
    """The bundle's name."""
    family: str | None = None
    precision: str | None = None
    loras: str | None = None
    """What is merged into the bundle: files, scales and the beginnings of hashes."""
    backend: str | None = None
    vae_tiling: str | None = None
    """Size and stride of the tiles that the VAE took, such as ``"1024/768"``."""
    version: str | None = None
    """The program and its version, such as ``"zimgkit 0.1.0"``."""

    def call(self) -> dict[str, Any]:
        """The parameters of the call that are known, by name."""
        found = {p.name: getattr(self, p.name) for p in PARAMETERS if p.recorded}
        return {name: value for name, value in found.items() if value is not None}

    def to_text(self) -> str:
        """As the web UI writes it; what is not known is left out."""
        known = self.call()
        size = f"{known['width']}x{known['height']}" if known.get("width") and known.get("height") else None
        pairs = {key: getattr(self, name) for key, (name, _) in KEYS.items()} | {"Sampler": "Euler", "Size": size}
        pairs |= {key: _listed(known.get(name)) for key, name in INPUT_FILES.items()}
        if self.num_images == 1:
            pairs |= {"Num images": None, "Image index": None}
        version = pairs.pop("Version")
        ordered = {key: pairs.pop(key) for key in WEB_ORDER} | pairs | {"Version": version}
        last = ", ".join(f"{key}: {_quote(value)}" for key, value in ordered.items() if value is not None)
        negative = f"\n{NEGATIVE} {known['negative_prompt']}" if known.get("negative_prompt") else ""
        return f"{known['prompt']}{negative}\n{last}".strip()

    def to_json(self) -> str:
        """An exact copy."""
        return msgspec.json.encode(self).decode()


RECORDED: dict[Any, Any] = {tuple: tuple[float, ...], Picture: InputFile, ControlPicture: ControlRecord}
"""The type of a parameter -> what is written of it, where that is another."""


def _recorded(parameter: Parameter) -> Any:
    kind: Any = RECORDED.get(parameter.type, parameter.type)
    return tuple.__class_getitem__((kind, ...)) if parameter.several else kind


Parameters: Any = msgspec.defstruct(
    "Parameters",
    [("prompt", str)] + [(p.name, _recorded(p) | None, None) for p in PARAMETERS if p.recorded and p.name != "prompt"],
    bases=(Record,),
    module=__name__,
    frozen=True,
    kw_only=True,
    omit_defaults=True,
)
"""A :class:`Record` with a field for each parameter of a call that pictures carry."""


def from_text(text: str) -> Record:
    """Read what the web UI, or a tool that writes like it, has written.

    Keys that zimgkit does not know, and values it cannot read, are passed over. Exact only for prompts that do not
    look like the rest of the text.
    """
    lines, pairs = text.strip().split("\n"), _pairs(text)
    body = lines[:-1] if pairs else lines
    split = next((i for i, line in enumerate(body) if line.lstrip().startswith(NEGATIVE)), len(body))
    negative = "\n".join(body[split:]).lstrip().removeprefix(NEGATIVE).strip()
    found = {name: _parsed(pairs.get(key), kind) for key, (name, kind) in KEYS.items()}
    width, _, height = pairs.get("Size", "").partition("x")
    found |= {"width": _parsed(width, int), "height": _parsed(height, int)}
    known = {name: value for name, value in found.items() if value is not None}
    record: Record = Parameters(prompt="\n".join(body[:split]).strip(), negative_prompt=negative or None, **known)
    return record


def _pairs(text: str) -> dict[str, str]:
    """The parameters in the last line, if it has three of them: else the web UI takes it for a part of the prompt."""
    matches = PAIR.findall(text.strip().split("\n")[-1])
    return {key.strip(): _unquote(value) for key, value in matches} if len(matches) >= 3 else {}


def from_json(text: str | bytes) -> Record:
    """Read an exact copy.

    Raises:
        msgspec.MsgspecError, UnicodeDecodeError: it is none.
    """
    record: Record = msgspec.json.decode(text, type=Parameters)
    return record


def _listed(files: InputFile | Sequence[InputFile | ControlRecord] | None) -> str | None:
    """One file, or several, in words."""
    if files is None or isinstance(files, InputFile):
        return str(files) if files else None
    return ", ".join(map(str, files))


def _quote(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)
    return json.dumps(text, ensure_ascii=False) if re.search(r"[,:\n\"]", text) else text


def _unquote(value: str) -> str:
    with contextlib.suppress(ValueError):
        if value.startswith('"'):
            return str(json.loads(value))
    return value.strip()


def _parsed(value: str | None, kind: Callable[[str], Any]) -> Any:
    """A value as what it should be, or None: other tools may write anything."""
    with contextlib.suppress(ValueError):
        return kind(value) if value else None
    return None


def embedded(parameters: Record, kind: str) -> dict[str, Any]:
    """What Pillow's ``save`` must be given to write parameters into a picture.

    A JPEG holds 64 kB of them. Of longer ones the text is left out, and then the exact copy, rather than the picture.

    Args:
        parameters: what made the picture.
        kind: ``"PNG"``, ``"JPEG"`` or ``"WEBP"``.
    """
    from PIL import Image, PngImagePlugin

    text, exact = parameters.to_text(), parameters.to_json()
    if kind == "PNG":
        chunks = PngImagePlugin.PngInfo()
        chunks.add_text(TEXT_CHUNK, text)  # In Latin-1 where that suffices, else as an international chunk in UTF-8.
        chunks.add_text(EXACT_CHUNK, exact)
        return {"pnginfo": chunks}
    comment, note = UNICODE + text.encode("utf-16-be"), MAKER + exact.encode()
    for tags in ({USER_COMMENT: comment, MAKER_NOTE: note}, {MAKER_NOTE: note}):
        exif = Image.Exif()
        exif.get_ifd(EXIF_IFD).update(tags)
        data = exif.tobytes()
        if kind != "JPEG" or len(data) <= JPEG_EXIF_LIMIT:
            return {"exif": data}
    return {}


def read(path: Path | IO[bytes], warn: Callable[[str], None] = lambda message: None) -> Record:
    """Read what made a picture from its file: the exact copy if zimgkit wrote one, else the text of another tool.

    Args:
        path: the file, or one that is open.
        warn: called with what another tool has written that is not taken over, if anything.

    Raises:
        UsageError: there is no such file, it is no picture, or it carries no parameters or impossible ones.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            texts, exact = _carried(image)
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist", "name a picture that zimgkit has written") from None
    except Exception as error:  # Pillow raises many kinds at broken files.
        raise UsageError(f"{path} is no picture zimgkit can read ({error})", "name a PNG, JPEG or WebP file") from None
    parameters = _decoded(exact)
    if parameters is None:
        parameters, tool, left = _of_another_tool(texts)
        if parameters is None:
            made = f", and was made by {tool}" if tool else ""
            hint = "name one as it was written: editors and web sites drop them"
            raise UsageError(f"{path} carries no generation parameters{made}", hint)
        if left:
            names = [name[:40] for name in left[:MOST_NAMED]]
            more = f" and {len(left) - MOST_NAMED} more" if len(left) > MOST_NAMED else ""
            warn(f"{path} was made by {tool}, of which is not taken over: {', '.join(names)}{more}")
    if not 0 <= parameters.image_index < parameters.num_images <= MAX_IMAGES:
        place = f"picture {parameters.image_index} of {parameters.num_images}"
        raise UsageError(f"{path} says that it is {place}, which cannot be", "give the parameters by hand")
    return parameters


def _decoded(exact: str | bytes) -> Record | None:
    try:
        return from_json(exact)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None


def _of_another_tool(texts: Mapping[str, str]) -> tuple[Record | None, str, Sequence[str]]:
    """What another tool has written, None if nothing that is known; the tool's name, and what is not taken over."""
    if found := foreign.recognize(texts):
        return Parameters(**({"prompt": ""} | found.call), version=found.tool), found.tool, found.left
    tool = texts.get("Software", "")[:60]
    if not (text := texts.get(TEXT_CHUNK)):
        return None, tool, ()
    return from_text(text), tool or "another tool", [key for key in _pairs(text) if key not in READ]


def _carried(image: Image.Image) -> tuple[dict[str, str], str | bytes]:
    """The texts by their names, and the exact copy, that a picture carries; empty where it has none."""
    texts = {str(name): str(value) for name, value in image.info.items() if isinstance(value, str)}
    if isinstance(xmp := image.info.get("xmp"), bytes):
        texts[foreign.XMP] = xmp.decode("utf-8", "replace")
    exif = image.getexif()
    tags = dict(exif) | exif.get_ifd(EXIF_IFD)
    for tag in NAMED_TAGS:
        name, colon, text = str(tags.get(tag, "")).partition(":")
        if colon and name.lower() in ("prompt", "workflow"):
            texts.setdefault(name.lower(), text.rstrip("\0"))
    texts.setdefault("Software", str(tags.get(SOFTWARE, "")).rstrip("\0"))
    comment, note = tags.get(USER_COMMENT, b""), tags.get(MAKER_NOTE, b"")
    texts.setdefault(TEXT_CHUNK, _comment(comment) if isinstance(comment, bytes) else str(comment))
    exact = note.removeprefix(MAKER) if isinstance(note, bytes) and note.startswith(MAKER) else b""
    return texts, texts.get(EXACT_CHUNK, exact) if image.format == "PNG" else exact


def _comment(data: bytes) -> str:
    """A ``UserComment``: eight bytes that name its encoding, which some tools leave out, and the text."""
    kind, body = data[:8], data[8:]
    if kind != UNICODE:
        return (body if b"\0" in kind else data).decode("utf-8", "replace").rstrip("\0 ")
    # The web UI writes big-endian; others follow the byte order of their file.
    texts = [body.decode(f"utf-16-{order}", "replace") for order in ("be", "le")]
    return next((text for text in texts if "Steps:" in text), texts[0])
