"""Bundle to picture: prompt, noise, schedule, guidance and the loop, in numpy. Never imports torch.

>>> from zimgkit.runtime import Pipeline
>>> pipeline = Pipeline.open("zimg-tiny-z")  # doctest: +SKIP
>>> pipeline("a red circle left of a blue square", seed=0).images[0].save("out.png")  # doctest: +SKIP
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zimgkit.runtime.pipeline import Output, Pipeline

__all__ = ["Output", "Pipeline"]


def __getattr__(name: str) -> Any:
    """Import the pipeline when it is first asked for, so that the commands start at once."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from zimgkit.runtime import pipeline

    return getattr(pipeline, name)
