"""An ONNX graph as a flat list of torch calls over numbered slots: compiled once, run many times.

Functions are inlined, constants placed on the device, and every slot is emptied after its last use. What follows
from shapes alone, and small integers, stays on the host, so that no step waits for the device to learn a size.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from itertools import groupby
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import onnx_ir as ir
import torch

from zimgkit.engines.errors import BackendError, BundleError
from zimgkit.engines.torch.ops import HOST_INPUTS, ONLY, OPS, torch_dtype
from zimgkit.plugins.definition import DOMAIN

if TYPE_CHECKING:
    from zimgkit.engines.bundle import Bundle

OPSETS = range(21, 24)
COPY = "a copy to the device"
"""The label of steps that are no node's."""
HOST_CONSTANT = 4096
"""Integer constants of up to this many values may stay on the host: shapes, axes and small tables."""

_Slots = dict[ir.Value | None, int]
"""Value of a graph or of one call of a function -> its slot; an input left out is ``None``."""


class Step(NamedTuple):
    """One call: where its inputs lie, where its outputs go, and which slots nobody needs after it."""

    call: Callable[..., Any]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    frees: tuple[int, ...]
    label: str
    block: str = ""
    """The call of a function, in the graph itself, whose body it is of."""

    @property
    def operator(self) -> str:
        """In ONNX."""
        return self.label.partition(" ")[0]


class Program(NamedTuple):
    """A graph ready to run."""

    slots: list[torch.Tensor | None]
    """What lies in each slot at the start: the constants."""
    steps: list[Step]
    inputs: dict[str, int]
    dtypes: dict[str, torch.dtype]
    outputs: dict[str, int]


def run(program: Program, feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Run a program on tensors that lie on its device; errors of torch carry a note that names the node."""
    (results,) = run_together(program, [feeds])
    return results


def run_together(program: Program, sets: Sequence[Mapping[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    """Run a program on several sets of tensors, whose shapes may differ: each block on all of them in turn.

    What a block begins with that takes no inputs, a copy of its weights, is done once for all sets.
    """
    values: list[list[Any]] = []
    for feeds in sets:
        slots: list[Any] = program.slots.copy()
        for name, slot in program.inputs.items():
            slots[slot] = feeds[name]
        values.append(slots)
    for _, block in groupby(program.steps, lambda step: step.block):
        steps = [*block]
        while steps and not steps[0].inputs:
            given = _results_of(steps[0], ())
            for slots in values:
                _put(slots, steps[0], given)
            del steps[0]
        for slots in values:
            for step in steps:
                _put(slots, step, _results_of(step, [slots[i] for i in step.inputs]))
    return [{name: slots[slot] for name, slot in program.outputs.items()} for slots in values]


def _results_of(step: Step, values: Sequence[Any]) -> Sequence[torch.Tensor]:
    """What a step gives, one for each of its outputs."""
    try:
        result = step.call(*values)
    except (RuntimeError, IndexError, TypeError, ValueError) as error:
        error.add_note(f"in {step.label}")
        raise
    return (result,) if len(step.outputs) == 1 and isinstance(result, torch.Tensor) else result


def _put(slots: list[Any], step: Step, given: Sequence[torch.Tensor]) -> None:
    for slot, tensor in zip(step.outputs, given, strict=True):
        slots[slot] = tensor
    for slot in step.frees:
        slots[slot] = None


def load(bundle: Bundle, graph: str) -> ir.Model:
    """Read one of a bundle's graphs.

    Raises:
        BundleError: the file is no ONNX graph.
        BackendError: its opset is not covered.
    """
    path = bundle.file(graph)
    try:
        model = ir.load(path)
    except Exception as error:  # Protobuf and onnx_ir raise many kinds.
        raise BundleError(f"{path} is no ONNX graph zimgkit can read ({error})", "build the bundle again") from None
    for imports in (model.graph.opset_imports, *(function.opset_imports for function in model.functions.values())):
        opset = imports.get("", OPSETS[-1])
        if opset not in OPSETS:
            raise BackendError(f"{path} is in opset {opset}, and the torch backend reads {OPSETS[0]} to {OPSETS[-1]}")
    return model


def read_constant(bundle: Bundle, graph: str, tensor: ir.TensorProtocol) -> torch.Tensor:
    """A constant of a graph on the CPU: mapped where it lies in the bundle, or copied out of the graph itself.

    Raises:
        BundleError: it does not lie in a file of the bundle.
        BackendError: its element type is not covered.
    """
    packed = tensor.dtype == ir.DataType.INT4
    try:
        dtype = torch.uint8 if packed else torch_dtype(tensor.dtype)
    except KeyError:
        message = f"the torch backend does not cover the element type {tensor.dtype.name} of {tensor.name!r}"
        raise BackendError(message, "run it with --backend onnxruntime") from None
    shape = tensor.shape.numpy()
    stored_shape = (-(-math.prod(shape) // 2),) if packed else shape
    nbytes = math.prod(stored_shape) * dtype.itemsize
    if not nbytes:
        return torch.empty(shape, dtype=dtype)
    if not isinstance(tensor, ir.ExternalTensor):
        stored = torch.frombuffer(bytearray(tensor.tobytes()), dtype=dtype).reshape(stored_shape)
        return _unpacked(stored, shape) if packed else stored
    path = bundle.file((PurePosixPath(graph).parent / tensor.location).as_posix())
    offset = tensor.offset or 0
    if tensor.length not in (None, nbytes) or not 0 <= offset <= path.stat().st_size - nbytes:
        raise BundleError(f"{bundle.file(graph)}: {tensor.name!r} does not lie in {path}", "build the bundle again")
    raw = np.memmap(path, np.uint8, "r", offset, (nbytes,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # That it is read-only is what we want.
        stored = torch.frombuffer(raw, dtype=dtype).reshape(stored_shape)
    return _unpacked(stored, shape) if packed else stored


def _unpacked(stored: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Numbers of four bits, two to a byte, the first in the low half, as int8; torch has no such type."""
    signed = stored.view(torch.int8)
    return torch.stack([(signed << 4) >> 4, signed >> 4], dim=-1).flatten()[: math.prod(shape)].reshape(shape)


def compile_graph(
    model: ir.Model,
    read: Callable[[ir.TensorProtocol], torch.Tensor],
    device: torch.device,
    operators: Mapping[str, Callable[..., Any]] = {},
    stays: Callable[[torch.Tensor], bool] | None = None,
) -> Program:
    """Turn a model's graph into steps.

    Args:
        model: its nodes in an order in which they can run.
        read: gives a constant on the CPU.
        device: where floats are to be computed.
        operators: functions of the domain ``zimg`` that are not inlined -> what computes them.
        stays: tells which constants are left on the host, although they are computed with on the device; none.

    Raises:
        BackendError: naming the first operator, or attribute of one, that is not covered.
    """
    compiler, graph = _Compiler(device, read, model.functions, operators, stays), model.graph
    slots: _Slots = {None: 0}
    for value in graph.inputs:
        slots[value] = compiler.new()
    for value in graph.initializers.values():
        if value.const_value is None:
            raise BundleError(f"the graph's initializer {value.name!r} has no data", "build the bundle again")
        slots[value] = compiler.constant(read(value.const_value))
    compiler.add(graph, slots, {})
    starts = {str(value.name): slots[value] for value in graph.inputs}
    ends = {str(value.name): compiler.placed(slots[value], host=False) for value in graph.outputs}
    dtypes = {str(value.name): torch_dtype(value.dtype or 0) for value in graph.inputs}
    constants = [slot for slot, value in enumerate(compiler.values) if value is not None]
    return Program(compiler.values, schedule(compiler.steps, set(ends.values()), constants), starts, dtypes, ends)


def _call(
    function: Callable[..., Any] | None, operator: str, attributes: dict[str, Any], inputs: int, label: str
) -> Callable[..., Any]:
    """The function of an operator with its attributes bound, once it is sure that it takes them."""
    if function is None:
        raise BackendError(
            f"the torch backend does not cover the operator {operator}", "run it with --backend onnxruntime"
        )
    only = ONLY.get(operator, {})
    bound = {name: value for name, value in attributes.items() if name not in only}
    try:
        for name, allowed in only.items():
            if allowed and name in attributes and attributes[name] not in allowed:
                raise TypeError(f"{name}={attributes[name]}")
        if not inspect.isbuiltin(function):
            inspect.signature(function).bind(*range(inputs), **bound)
        elif bound:
            raise TypeError(", ".join(bound))
    except TypeError as error:
        raise BackendError(f"the torch backend does not cover {label} as it is ({error})") from None
    return partial(function, **bound) if bound else function


class _Compiler:
    """Collects steps, and decides for every value whether it lives on the device or on the host."""

    def __init__(
        self,
        device: torch.device,
        read: Callable[[ir.TensorProtocol], torch.Tensor],
        functions: Mapping[ir.OperatorIdentifier, ir.Function],
        operators: Mapping[str, Callable[..., Any]],
        stays: Callable[[torch.Tensor], bool] | None,
    ) -> None:
        self._device, self._read, self._functions = device, read, functions
        self._operators, self._stays = operators, stays
        self.values: list[torch.Tensor | None] = [None]  # Slot 0 stands for an input left out.
        self.steps: list[Step] = []
        self._constants: dict[int, torch.Tensor] = {}
        self._host: set[int] = set()
        self._copies: dict[tuple[int, bool], int] = {}
        self._block = ""

    def new(self) -> int:
        self.values.append(None)
        return len(self.values) - 1

    def constant(self, tensor: torch.Tensor) -> int:
        """Reserve a slot for a constant; it goes to the device, or stays on the host, when a step wants it there."""
        slot = self.new()
        self._constants[slot] = tensor
        return slot

    def add(self, nodes: Iterable[ir.Node], slots: _Slots, caller: Mapping[str, ir.Attr], prefix: str = "") -> None:
        """Add the steps of some nodes, and of the functions they call, in place of the calls."""
        for node in nodes:
            name = f"{prefix}{node.name or node.outputs[0].name}"
            inputs, outputs = [slots[value] for value in node.inputs], list(node.outputs)
            resolved = {
                key: caller[str(attribute.ref_attr_name)] if attribute.is_ref() else attribute
                for key, attribute in node.attributes.items()
                if not attribute.is_ref() or attribute.ref_attr_name in caller
            }
            function = self._functions.get(node.op_identifier())
            own = self._operators.get(node.op_type) if node.domain == DOMAIN else None
            if function is not None and own is None:
                inner: _Slots = {None: 0, **dict.fromkeys(function.inputs, 0)}
                inner.update(zip(function.inputs, inputs, strict=False))
                self._block = self._block or name
                self.add(function, inner, {**function.attributes, **resolved}, f"{name}/")
                slots.update((mine, inner[its]) for mine, its in zip(outputs, function.outputs, strict=False))
                self._block = self._block if prefix else ""
                continue
            attributes = {key: self._content(attribute) for key, attribute in resolved.items()}
            operator, label = node.op_type, f"{node.op_type} {name!r}"
            if operator == "Constant":
                ((key, content),) = attributes.items()
                dtype = torch.int64 if "int" in key else None
                slots[outputs[0]] = self.constant(torch.as_tensor(content, dtype=dtype))
                continue
            if operator == "ConstantOfShape":
                fill = attributes.pop("value", torch.zeros(1)).reshape(())
                operator, inputs = "Expand", [self.constant(fill), *inputs]
            if operator != "Split" and own is None:
                if any(value.uses() or value.is_graph_output() for value in outputs[1:]):
                    raise BackendError(f"the torch backend covers only the first output of {label}")
                outputs = outputs[:1]
            name = operator if node.domain in ("", "ai.onnx") else f"{node.domain}.{operator}"
            call = _call(own or OPS.get(name), name, attributes, len(inputs), label)
            to_float = operator == "Cast" and torch_dtype(attributes["to"]).is_floating_point
            found = self._step(operator, call, inputs, len(outputs), label, to_float=to_float)
            slots.update(zip(outputs, found, strict=True))

    def _content(self, attribute: ir.Attr) -> Any:
        tensor = attribute.type == ir.AttributeType.TENSOR
        return self._read(attribute.as_tensor()) if tensor else attribute.value

    def placed(self, slot: int, *, host: bool) -> int:
        """The slot that holds the same value on the host or on the device. Nothing comes back from the device."""
        key = (slot, host)
        if key not in self._copies:
            self._copies[key] = slot
            if slot in self._constants:
                self._copies[key] = self.new()
                constant = self._constants[slot]
                on_host = host or (self._stays is not None and self._stays(constant))
                self.values[-1] = constant.to("cpu" if on_host else self._device)
            elif slot in self._host and not host:
                self._copies[key] = self.new()
                move = partial(torch.Tensor.to, device=self._device)
                self.steps.append(Step(move, (slot,), (self._copies[key],), (), COPY))
        return self._copies[key]

    def _is_host(self, slot: int) -> bool:
        constant = self._constants.get(slot)
        if constant is None:
            return slot in self._host or slot == 0
        return constant.dtype in (torch.bool, torch.int32, torch.int64) and constant.numel() <= HOST_CONSTANT

    def _step(
        self, operator: str, call: Callable[..., Any], inputs: list[int], outputs: int, label: str, *, to_float: bool
    ) -> tuple[int, ...]:
        """Add a step, and copies of its inputs to where it runs; returns the slots of its outputs."""
        reads = HOST_INPUTS.get(operator, set())
        host = operator in ("Shape", "Size") or not (
            to_float or any(not self._is_host(slot) for i, slot in enumerate(inputs) if i not in reads)
        )
        placed = tuple(self.placed(slot, host=host or i in reads) for i, slot in enumerate(inputs))
        found = tuple(self.new() for _ in range(outputs))
        self.steps.append(Step(call, placed, found, (), label, self._block))
        if host and self._device.type != "cpu":
            self._host.update(found)
        return found


def schedule(steps: Sequence[Step], wanted: Collection[int], constants: Collection[int]) -> list[Step]:
    """The steps that lead to some slots, each with the slots that no later one reads.

    Args:
        steps: in an order in which they can run.
        wanted: the slots.
        constants: slots that are never emptied.
    """
    kept = {*wanted, *constants, 0}
    needed, found = set(kept), []
    for step in reversed(steps):
        if needed.isdisjoint(step.outputs):
            continue
        frees = {*step.inputs, *step.outputs} - needed
        found.append(step._replace(frees=tuple(sorted(frees))))
        needed.update(step.inputs)
    return found[::-1]
