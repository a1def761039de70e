"""What a checkpoint becomes: the parts of its family, and where each of their tensors comes from."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial

from zimgkit.export.checkpoints.checkpoint import Checkpoint, check_tensors
from zimgkit.export.checkpoints.stored import Stored, part_of
from zimgkit.export.networks import registry
from zimgkit.export.networks.parts import Part, stored_shapes
from zimgkit.export.weights.addends import Addends
from zimgkit.export.weights.stream import Wanted


def parts_of(checkpoint: Checkpoint, tasks: Collection[str] = (), more: Collection[str] = ()) -> dict[str, Part]:
    """The components a checkpoint becomes, after checking that its tensors are those they take.

    Args:
        checkpoint: an open checkpoint.
        tasks: what it shall be asked for beside what it is for, of :data:`.registry.TASKS`.
        more: components that are needed whatever it is asked for.

    Raises:
        CheckpointError: naming the first tensor that is missing, unexpected or misshapen.
    """
    found: dict[str, Part] = {}
    tasks = registry.tasks_of(checkpoint.family, checkpoint.pipeline, tasks)
    for source in checkpoint.components:
        config = checkpoint.config(source)
        every = registry.parts(checkpoint.family, source, config, tasks)
        own = {name: part for name, part in every.items() if name in more or registry.is_needed(name, tasks)}
        check_source(checkpoint, source, own)
        found |= own
    return found


def check_source(checkpoint: Checkpoint, source: str, parts: Mapping[str, Part]) -> None:
    """Check that a component of a checkpoint has the tensors that its parts take.

    Raises:
        CheckpointError: naming the first tensor that is missing, unexpected or misshapen.
    """
    is_unused = partial(registry.is_unused, checkpoint.family, source, checkpoint.config(source))
    check_tensors(checkpoint.tensors(source), stored_shapes(parts), source, ignore=is_unused)


def wanted_by(
    tensors: Callable[[str], Mapping[str, Stored]], part: Part, addends: Addends | None = None
) -> dict[str, Wanted]:
    """What each of a part's parameters comes from, and what LoRAs add to it.

    Args:
        tensors: a source of the part -> canonical name -> where it lies, such as :meth:`Checkpoint.tensors`.
        part: a component of a bundle.
        addends: what LoRAs add.
    """
    found = {}
    for name, shape in part.parameters().items():
        source, tensor = part.origin(name)
        info, added = tensors(source)[tensor], (addends or {}).get(source, {}).get(tensor, ())
        # Tensors of several sources may have one name, so those of the others keep what tells them apart.
        if name != tensor:
            info = part_of(info, f"{name.removesuffix(tensor)}{info.name}", info.shape)
        found[name] = Wanted(info, shape, part.transforms.get(name), added)
    return found
