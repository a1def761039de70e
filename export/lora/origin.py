"""The checkpoint that a bundle was built from, opened when a base weight of it is needed."""

from __future__ import annotations

import os
from functools import cached_property

from zimgkit.engines.bundle import Bundle
from zimgkit.engines.errors import CheckpointError, ZimgError
from zimgkit.export.checkpoints.checkpoint import Checkpoint, open_origin, origins
from zimgkit.export.checkpoints.layouts import canonical
from zimgkit.export.checkpoints.stored import Stored


class Origin:
    """The checkpoint of one bundle."""

    def __init__(self, bundle: Bundle, model: str | None, revision: str | None, hub: str) -> None:
        """Take where it is; nothing is opened.

        Args:
            bundle: whose manifest says where the checkpoint was.
            model: where it is now, if not there.
            revision: of that, on the hub.
            hub: ``"huggingface"`` or ``"modelscope"``.
        """
        self._manifest, self._root = bundle.manifest, bundle.root
        self._model = model or bundle.manifest.checkpoint.model
        self._revision = revision if model else bundle.manifest.checkpoint.revision
        self._hub = hub

    @cached_property
    def _checkpoint(self) -> Checkpoint:
        return self.checkpoint_for(
            "not all base weights", "; bundles that keep their base weights (--keep-base) need none"
        )

    def checkpoint_for(self, lack: str, otherwise: str = "") -> Checkpoint:
        """The checkpoint.

        Args:
            lack: what of it the bundle has not.
            otherwise: how that can be had without it, for the hint.

        Raises:
            CheckpointError: it is not there, or another one is.
        """
        hint = f"name it with --model{otherwise}"
        try:
            revision = None if os.path.lexists(self._model) else self._revision
            checkpoint = open_origin(self._manifest, self._model, revision, self._hub)
        except ZimgError as error:
            raise CheckpointError(
                f"{self._root} has {lack}, and its checkpoint cannot be opened ({error.message})", hint
            ) from None
        if origins(checkpoint.sources) != origins(self._manifest.sources):
            raise CheckpointError(f"{self._model} is not the checkpoint that {self._root} was built from", hint)
        return checkpoint

    def tensor(self, component: str, name: str, shape: tuple[int, ...]) -> Stored:
        """Where a tensor lies, by its name in the bundle.

        Raises:
            CheckpointError: the checkpoint is not there, or another one.
        """
        info = self._checkpoint.tensors(component).get(canonical(component, name))
        if info is None or info.shape != shape:
            raise CheckpointError(
                f"{self._model} has no {name!r} of shape {shape}, as {self._root} has", "name its own checkpoint"
            )
        return info
