"""A bundle onto Hugging Face, with its model card, in one commit: there it is whole or not at all."""

from __future__ import annotations

import os
import re
from pathlib import Path

from zimgkit.engines.bundle import MANIFEST, Bundle
from zimgkit.engines.errors import OutputError, UsageError
from zimgkit.export.publishing.card import HUB_ID, card, licence_of, public

CARD = "README.md"


def push(
    path: Path, repository: str, *, private: bool = False, licence: str | None = None, revision: str | None = None
) -> tuple[str, str]:
    """Upload a bundle after checking it; what is there of it already is not sent again.

    Args:
        path: its folder.
        repository: ``owner/name``; it is made where it is not there.
        private: whether a new one is.
        licence: as hubs call it; the source checkpoint's own where not given.
        revision: the branch; the default one when not given.

    Returns:
        The address of the commit, and the licence that the card states.

    Raises:
        BundleError: it is no bundle, or was changed.
        OutputError: the hub does not take it.
        UsageError: that is no name of a repository, or of a licence.
    """
    if not HUB_ID.fullmatch(repository):
        raise UsageError(f"{repository!r} is not a repository", "name it as owner/name")
    if licence is not None and not re.fullmatch(r"[\w.-]+", licence):
        raise UsageError(f"{licence!r} is not a licence as hubs call it", "such as apache-2.0, or other")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub import CommitOperationAdd, HfApi

    bundle = Bundle.open(path)
    stated = licence or licence_of(bundle.manifest)
    texts = {
        CARD: card(bundle.manifest, repository, stated).encode(),
        MANIFEST: public((bundle.root / MANIFEST).read_bytes()),
    }
    files = [CommitOperationAdd(name, str(bundle.file(name))) for name in bundle.names]
    files += [CommitOperationAdd(name, text) for name, text in texts.items()]
    hub = HfApi()
    try:
        hub.create_repo(repository, private=private, exist_ok=True)
        done = hub.create_commit(
            repository, files, commit_message=f"{bundle.manifest.name}, a bundle of zimgkit", revision=revision
        )
    except Exception as error:  # the client lets through whatever its HTTP stack raises
        raise _explained(error, repository) from error
    return str(done.commit_url), stated


def _explained(error: Exception, repository: str) -> OutputError:
    status = getattr(getattr(error, "response", None), "status_code", None)
    lines = str(error).strip().splitlines()
    detail = f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
    if status in (401, 403) or "token" in detail.lower():
        message = f"Hugging Face does not let you write {repository} ({status or detail})"
        return OutputError(message, "check the name, and log in with a token that may write: hf auth login")
    if status is not None:
        return OutputError(f"Hugging Face answered {status} when {repository} was uploaded ({detail})")
    message = f"{repository} could not be uploaded ({detail})"
    return OutputError(message, "check the network and run the same command again: what is there is not sent again")
