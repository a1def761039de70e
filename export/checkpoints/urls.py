"""Addresses on Hugging Face and ModelScope, as people copy them from a browser or a script."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from zimgkit.engines.errors import UsageError

HOSTS = {
    "huggingface.co": "huggingface",
    "hf.co": "huggingface",
    "hf-mirror.com": "huggingface",
    "modelscope.cn": "modelscope",
    "modelscope.ai": "modelscope",
}
"""Host, without ``www.`` -> the source's name."""
ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
VIEWS = ("tree", "blob", "resolve", "raw", "commit", "file/view")
"""What stands between a model and a revision."""
NO_MODELS = ("datasets", "spaces", "studios", "collections", "papers", "docs", "api")
BRANCHES = ("main", "master")
"""Default branches, which are no choice of a revision."""
HINT = "give the address of a model on huggingface.co or modelscope.cn, or a file on this machine"


@dataclass(frozen=True)
class Address:
    """A model on a hub, and a file or folder in it."""

    source: str
    """``"huggingface"`` or ``"modelscope"``."""
    model_id: str
    revision: str | None = None
    """None is the default branch."""
    path: str = ""

    @property
    def model(self) -> str:
        """The shortest text that names the model and its hub."""
        return self.model_id if self.source == "huggingface" else f"https://modelscope.cn/models/{self.model_id}"

    @property
    def file(self) -> str:
        """The shortest text that names the file, its revision and its hub."""
        if self.revision is None and self.source == "huggingface":
            return f"{self.model_id}/{self.path}"
        host = "https://huggingface.co/" if self.source == "huggingface" else ""
        return f"{host}{self.model}/resolve/{(self.revision or 'master').replace('/', '%2F')}/{self.path}"

    def revision_of_all(self, given: str | None) -> str | None:
        """The revision of the whole model, where another may be given.

        Raises:
            UsageError: the address is of a single file, or another revision is given.
        """
        if "/" not in self.path and self.path.endswith((".safetensors", ".gguf", *PICKLES)):
            hint = f"zimgkit opens models in the diffusers layout: --model {self.model}"
            raise UsageError(f"{self.path} of {self.model_id} is a single file", hint)
        if self.revision and given not in (None, self.revision):
            raise UsageError(f"--revision is {given}, and the address has {self.revision}", "give one of them")
        return self.revision or given


def parse_url(text: str, source: str = "huggingface") -> Address | None:
    """Take an address apart: a URL, with or without ``https://``, or ``[hf://]owner/name@revision/path``.

    Args:
        text: what may be an address.
        source: the hub of one that names none.

    Returns:
        None if the text is none.

    Raises:
        UsageError: it is a URL, and none of a model on a known hub.
    """
    scheme, separator, rest = text.partition("://")
    if not separator:
        host = text.partition("/")[0].removeprefix("www.").lower()
        scheme, rest = ("https", text) if host in HOSTS and "/" in text else ("", "")
    if scheme == "hf" or (not scheme and re.match(rf"{ID.pattern}@", text)):
        return _in_short(text, *(("huggingface", rest) if scheme else (source, text)))
    if not scheme:
        return None
    try:
        url = urlsplit(f"{scheme}://{rest}")
        host = (url.hostname or "").removeprefix("www.")
    except ValueError:
        host = ""
    if scheme.lower() not in ("http", "https") or host not in HOSTS:
        raise UsageError(f"{text!r} is no address of a model", HINT)
    # Split before %2F becomes a slash, which stands within a revision.
    parts = [unquote(part) for part in url.path.split("/") if part]
    if parts[:1] == ["models"]:
        parts = parts[1:]
    model_id, others = "/".join(parts[:2]), parts[2:]
    if not ID.fullmatch(model_id) or parts[0] in NO_MODELS:
        raise UsageError(f"{text!r} is no address of a model", HINT)
    for view in VIEWS:
        words = view.split("/")
        if others[: len(words)] == words and len(others) > len(words):
            return _address(text, HOSTS[host], model_id, others[len(words)], others[len(words) + 1 :])
    return Address(HOSTS[host], model_id)


def _in_short(text: str, source: str, rest: str) -> Address:
    """``owner/name@revision/path``, as Hugging Face's file system has it."""
    match = re.fullmatch(rf"({ID.pattern})(?:@([^/]+))?(?:/(.*))?", rest)
    if not match:
        raise UsageError(f"{text!r} is no address of a model", "write it as owner/name@revision")
    revision = unquote(match[2]) if match[2] else None
    return _address(text, source, match[1], revision, match[3].split("/") if match[3] else [])


def _address(text: str, source: str, model_id: str, revision: str | None, path: list[str]) -> Address:
    within = "/".join(path)
    if ".." in [revision, *within.split("/")] or "\\" in within:
        raise UsageError(f"{text!r} leads out of the model", HINT)
    return Address(source, model_id, None if revision in BRANCHES else revision, within)
