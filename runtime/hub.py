"""Fetch a checkpoint's or a bundle's files from Hugging Face or ModelScope, through their own clients.

Cache, progress bars, resuming and retries are the clients'; so are their environment variables (``HF_HOME``,
``HF_TOKEN``, ``HF_ENDPOINT``, ``HF_HUB_OFFLINE``; ``MODELSCOPE_CACHE``, ``MODELSCOPE_API_TOKEN``,
``MODELSCOPE_ENDPOINT``). Here live the check for free disk space and the wording of what can go wrong.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from zimgkit.engines.errors import DownloadError, UsageError, ZimgError, install


@dataclass(frozen=True)
class _Hub:
    """One hub: how to fetch from it, and how messages call its parts."""

    name: str
    fetch: Callable[[str, str | None, list[str]], Path]
    login: str
    cache_variable: str
    endpoint_variable: str


def fetch(model_id: str, *, revision: str | None = None, source: str = "huggingface", allow: Sequence[str]) -> Path:
    """Bring a model's files into the hub client's cache, those that are not there yet, and return their folder.

    Args:
        model_id: ``owner/name``.
        revision: branch, tag or commit; the hub's default branch when not given.
        source: ``"huggingface"`` or ``"modelscope"``.
        allow: patterns of the files wanted, relative to the model's root, as :mod:`fnmatch` reads them.

    Returns:
        A folder with the files in their places. It is not there when the model has none of them.

    Raises:
        UsageError: no such source.
        DownloadError: the files are neither in the cache nor could they be fetched; the message says why.
    """
    if source not in HUBS:
        raise UsageError(f"no source is called {source!r}", f"choose one of {', '.join(HUBS)}")
    hub = HUBS[source]
    try:
        return hub.fetch(model_id, revision, list(allow))
    except ZimgError:
        raise
    except Exception as error:  # the clients let through whatever their HTTP stacks and native parts raise
        raise _explain(error, model_id, revision, hub) from error


def _huggingface(model_id: str, revision: str | None, allow: list[str]) -> Path:
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache
    except ImportError:
        raise DownloadError(f"fetching {model_id} needs the huggingface_hub package", install("hub")) from None

    needed = 0
    with contextlib.suppress(Exception):  # the download itself reports an unreachable hub, or uses the cache
        info = HfApi().model_info(model_id, revision=revision, files_metadata=True)
        blobs = Path(constants.HF_HUB_CACHE, f"models--{model_id.replace('/', '--')}", "blobs")
        for file in info.siblings or ():
            etag = file.lfs.sha256 if file.lfs else file.blob_id or file.rfilename
            linked = try_to_load_from_cache(model_id, file.rfilename, revision=info.sha)
            if _matches(file.rfilename, allow) and not isinstance(linked, str) and not (blobs / etag).exists():
                needed += file.size or 0
    _check_space(model_id, needed, Path(constants.HF_HUB_CACHE), "HF_HOME")
    return Path(snapshot_download(model_id, revision=revision, allow_patterns=allow))


def _modelscope(model_id: str, revision: str | None, allow: list[str]) -> Path:
    try:
        from modelscope.hub.api import HubApi
        from modelscope.hub.snapshot_download import snapshot_download
    except ImportError:
        raise DownloadError("fetching from ModelScope needs the modelscope package", install("modelscope")) from None

    cached: Path | None = None
    with contextlib.suppress(Exception):  # nothing is cached yet
        cached = Path(snapshot_download(model_id, revision=revision, local_files_only=True))
    try:
        files = HubApi().get_model_files(model_id, revision=revision or "master", recursive=True)
    except Exception as error:
        # This client has no offline mode of its own: what is cached serves when the hub cannot be reached.
        if cached is not None and _status(error) is None:
            return cached
        raise
    sizes = {file["Path"]: int(file.get("Size") or 0) for file in files if _matches(file["Path"], allow)}
    needed = sum(size for name, size in sizes.items() if cached is None or not (cached / name).is_file())
    cache = Path(os.environ.get("MODELSCOPE_CACHE") or "~/.cache/modelscope").expanduser()
    _check_space(model_id, needed, cache, "MODELSCOPE_CACHE")
    return Path(snapshot_download(model_id, revision=revision, allow_patterns=allow))


HUBS = {
    "huggingface": _Hub("Hugging Face", _huggingface, "hf auth login", "HF_HOME", "HF_ENDPOINT"),
    "modelscope": _Hub("ModelScope", _modelscope, "modelscope login", "MODELSCOPE_CACHE", "MODELSCOPE_ENDPOINT"),
}


def _matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _check_space(model_id: str, needed: int, cache: Path, variable: str) -> None:
    folder = next(path for path in (cache, *cache.parents) if path.exists())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DownloadError(
            f"fetching {model_id} takes {needed / 1e9:,.1f} GB, and {folder} has {free / 1e9:,.1f} GB free",
            f"free some space, or set {variable} to a folder on another disk",
        )


def _explain(error: Exception, model_id: str, revision: str | None, hub: _Hub) -> DownloadError:
    """One line for what a hub's client raised: what is wrong, and what to do."""
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    causes = list(_causes(error))
    status, code = _status(error), _code(error)
    numbers = {cause.errno for cause in causes if isinstance(cause, OSError)}
    lines = str(error).strip().splitlines()
    detail = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    again = "run the same command again: files that are complete are kept"
    login = f"check the name; for a private or gated model, ask its owners for access and log in with: {hub.login}"

    def is_a(kind: type[Exception]) -> bool:
        return any(isinstance(cause, kind) for cause in causes)

    cases = (
        (
            errno.ENOSPC in numbers or "No space left" in str(error),
            f"the disk was full before {model_id} was complete",
            f"free some space, or set {hub.cache_variable} to a folder on another disk; then {again}",
        ),
        (
            code == "RevisionNotFound" or (status == 404 and not code and revision is not None),
            f"{hub.name} has no revision {revision!r} of {model_id}",
            "check the name of both",
        ),
        (code == "GatedRepo" or status == 403, f"{hub.name} does not let you read {model_id} ({status})", login),
        # Hugging Face answers 401 for a model that does not exist, too, unless one is logged in.
        (status == 401, f"{hub.name} has no model {model_id}, or does not let you read it (401)", login),
        (status == 404, f"{hub.name} has no model {model_id}", login),
        (
            is_a(OfflineModeIsEnabled),
            f"{model_id} is not in the cache, or only a part of it, and HF_HUB_OFFLINE is set",
            "unset HF_HUB_OFFLINE to fetch it",
        ),
        (status is not None, f"{hub.name} answered {status} when asked for {model_id}", f"wait a little, then {again}"),
        (
            bool(numbers & {errno.EACCES, errno.EPERM, errno.EROFS}),
            f"the cache of {hub.name} cannot be written ({detail})",
            f"set {hub.cache_variable} to a folder that can",
        ),
        (is_a(HFValidationError), f"{model_id!r} is not a model id ({detail})", "name it as owner/name"),
        (
            is_a(LocalEntryNotFoundError) or isinstance(error, ConnectionError),
            f"{hub.name} cannot be reached, and {model_id} is not in the cache, or only a part of it",
            f"check the network, proxies and {hub.endpoint_variable}, then {again}",
        ),
        (True, f"the download of {model_id} from {hub.name} broke off ({detail})", again),
    )
    return next(DownloadError(message, hint) for applies, message, hint in cases if applies)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error, what it was raised from, and the errors per file that ModelScope's client gathers."""
    yield error
    for cause in (error.__cause__ or error.__context__, *getattr(error, "failed_files", {}).values()):
        if cause is not None:
            yield from _causes(cause)


def _status(error: BaseException) -> int | None:
    """The HTTP status of failure behind an error, if a hub answered at all."""
    for cause in _causes(error):
        status = getattr(getattr(cause, "response", None), "status_code", getattr(cause, "status_code", None))
        if isinstance(status, int) and status >= 400:
            return status
    return None


def _code(error: BaseException) -> str:
    """What Hugging Face says beside the status, such as ``"RevisionNotFound"``."""
    headers = (getattr(getattr(cause, "response", None), "headers", {}) for cause in _causes(error))
    return next((str(found["X-Error-Code"]) for found in headers if found and "X-Error-Code" in found), "")
