from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.training import toy
from zimgkit.runtime import demo_models
from zimgkit.training.dataset import read_dataset
from zimgkit.training.methods.cache import Cache
from zimgkit.training.methods.process import FewSteps, process


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.dataset(tmp_path_factory.mktemp("pictures") / "data", sizes=((32, 32), (32, 48)), count=4)


@pytest.fixture(scope="session", params=demo_models.NAMES)
def model(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="session")
def cache_of(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Callable[[str, str], Cache]:
    """The cache of a method by a carried model, made once; its teacher takes 8 steps, a student 2."""
    made: dict[tuple[str, str], Cache] = {}

    def make(model: str, method: str) -> Cache:
        if (model, method) not in made:
            made[model, method] = process(
                model,
                read_dataset(pictures),
                tmp_path_factory.mktemp("cache") / "cache",
                method,
                student=FewSteps(2, shift=2.0),
                teacher={"num_inference_steps": 8},
            )
        return made[model, method]

    return make
