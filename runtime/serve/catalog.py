"""The models that a server has: open bundles by the names that clients call them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from zimgkit.engines.bundle import Bundle, Manifest
from zimgkit.engines.errors import UsageError
from zimgkit.runtime.bundles import open_bundle, place_of
from zimgkit.runtime.families import Family, family_of
from zimgkit.runtime.serve.errors import ApiError, unknown_model


@dataclass(frozen=True)
class Model:
    """One bundle."""

    name: str
    bundle: Bundle
    family: Family = field(repr=False)
    created: int

    @property
    def manifest(self) -> Manifest:
        """Of its bundle."""
        return self.bundle.manifest

    @property
    def loras(self) -> dict[str, float]:
        """What is merged into its weights: file without ending -> scale."""
        return {os.path.splitext(lora.file)[0]: lora.scale for lora in self.manifest.loras}  # noqa: PTH122


class Catalog:
    """All models of a server.

    Args:
        models: the first is what a request without a name gets.
        aliases: another name -> a model's.

    Raises:
        UsageError: two have one name, or an alias is of no model.
    """

    def __init__(self, models: Iterable[Model], aliases: Mapping[str, str] | None = None) -> None:
        self.models: dict[str, Model] = {}
        for model in models:
            if model.name in self.models:
                raise UsageError(f"two bundles are called {model.name!r}", "name one of them: --bundle NAME=FOLDER")
            self.models[model.name] = model
        if not self.models:
            raise UsageError("there is no bundle to serve", "give --bundle FOLDER")
        self.aliases = dict(aliases or {})
        for alias, name in self.aliases.items():
            if name not in self.models:
                raise UsageError(
                    f"the alias {alias!r} is of {name!r}, which is not served", f"serve {list(self.models)}"
                )

    def find(self, name: str | None, loras: Mapping[str, float] | None = None) -> Model:
        """A model by its name, or the first; where LoRAs are asked for, the one of its checkpoint that has these.

        Raises:
            ApiError: there is none.
        """
        named = next(iter(self.models)) if not name else self.aliases.get(name, name)
        model = self.models.get(named)
        if model is None:
            raise unknown_model(named, [*self.models, *self.aliases])
        if loras is None or loras == model.loras:
            return model
        checkpoint = model.manifest.name
        for other in self.models.values():
            if other.manifest.name == checkpoint and other.loras == loras:
                return other
        served = "; ".join(_set(other.loras) for other in self.models.values() if other.manifest.name == checkpoint)
        message = f"{model.name} is not served with {_set(loras)}; served with: {served}"
        raise ApiError(400, message, param="loras", code="lora_not_served")


def _set(loras: Mapping[str, float]) -> str:
    return ", ".join(f"{name}:{scale:g}" for name, scale in loras.items()) or "none"


def open_models(places: Iterable[str]) -> list[Model]:
    """Open bundles, without reading their weights.

    Args:
        places: folders, names of carried models, or ``owner/name`` on a hub, each after ``NAME=`` where it is to be
            called otherwise.

    Raises:
        ZimgError: one is no bundle, or cannot be served.
    """
    models = []
    for place in places:
        name, equals, folder = place.partition("=")
        if not equals or os.path.lexists(place):
            name, folder = "", place
        hub = place_of(folder)
        bundle = open_bundle(folder, verify=False)
        called = name or (hub.model_id if hub else Path(folder).resolve().name)
        models.append(Model(called, bundle, family_of(bundle.manifest), int(time.time())))
    return models
