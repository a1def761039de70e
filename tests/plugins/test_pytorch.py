"""The operators as PyTorch's: what is launched with which tensors, when a kernel is trusted, and torch.compile."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from zimgkit.plugins import pytorch
from zimgkit.plugins.compile import OPERATORS
from zimgkit.plugins.manifest import KernelError, read_manifest
from zimgkit.plugins.pytorch import module_of, operators

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def queued(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, dict[str, Any]]]:
    """What is queued, for kernels that do nothing."""
    found: list[tuple[str, str, dict[str, Any]]] = []

    def queue(operator: str, kernel: str, device: torch.device, **arguments: Any) -> bool:
        found.append((operator, kernel, arguments))
        return kernel in read_manifest(operator).kernels

    for operator in OPERATORS:
        monkeypatch.setattr(module_of(operator), "queue", queue)
    return found


def test_the_operators_are_those_that_are_compiled() -> None:
    assert pytorch.OPERATORS == OPERATORS


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_kernel_gets_the_arguments_that_it_has(operator: str, queued: list[Any]) -> None:
    module = module_of(operator)
    assert len(list(module.trials(CPU, torch.bfloat16, module.SIZES[-1:]))) >= 1
    assert queued
    for name, kernel, arguments in queued:
        parameters = read_manifest(name).kernels[kernel].parameters
        assert {each.name for each in parameters} == arguments.keys()
        for each in parameters:
            value = arguments[each.name]
            tensor = value is None or isinstance(value, torch.Tensor)
            assert tensor == (each.type == "pointer"), each.name
            assert isinstance(value, float) == (each.type == "float32"), each.name
            if each.multiple > 1 and not tensor:
                assert value % each.multiple == 0, each.name


def test_strides(queued: list[Any]) -> None:
    """Tokens may be parts of a wider tensor, and rows and tables one for all."""
    wide, tables = torch.zeros(2, 9, 3 * 64), torch.zeros(1, 13, 8).expand(2, -1, -1)
    x = wide[..., 64:128].unflatten(-1, (4, 16))
    context, weight = torch.zeros(2, 4, 4, 16), torch.ones(16)
    y = module_of("qk_norm_rope").launched([(context, weight), (x, weight)], tables, tables, 1e-5)
    assert y.shape == (2, 4, 13, 16)
    first, second = (arguments for _, _, arguments in queued)
    assert (first["x_token"], second["x_token"], second["x_batch"]) == (64, 192, 9 * 192)
    assert (second["table_batch"], second["table_token"], second["y_token"]) == (0, 8, 64)
    assert second["y"].data_ptr() - first["y"].data_ptr() == 4 * 64 * 4
    assert second["cos"].data_ptr() - first["cos"].data_ptr() == 4 * 8 * 4
    module = module_of("gate_norm_modulate")
    form = module.BY_NAME["GateNormModulate_gate"]
    module.launched(form, [wide[..., :64], torch.zeros(2, 9, 64), torch.zeros(1, 64)], 0.0, 0.0)
    arguments = queued[-1][2]
    assert (arguments["x_token"], arguments["branch_token"], arguments["gate_token"]) == (192, 64, 0)
    assert (arguments["gate_batch"], arguments["y"], arguments["has_norm"]) == (0, None, False)


@pytest.mark.parametrize("name", ["weight", "branch_weight", "smooth"])
def test_what_is_broadcast_goes_to_no_kernel(name: str, queued: list[Any]) -> None:
    """A norm may have one weight for all; a kernel would read on behind it."""
    module = module_of("gate_norm_modulate")
    form = module.BY_NAME["GateNormModulate_tanh_rms_smooth_int8"]
    shapes = dict.fromkeys(("x", "branch"), (2, 3, 16)) | {"step": ()}
    inputs = {key: torch.rand(shapes.get(key, (16,))) for key in form.inputs}
    assert module.launched(form, list(inputs.values()), 0.1, 0.1) is not None
    inputs[name] = inputs[name].flatten()[:1]
    assert module.launched(form, list(inputs.values()), 0.1, 0.1) is None
    residual, y = module.composed(form, list(inputs.values()), 0.1, 0.1)
    assert residual.shape == y.shape == (2, 3, 16)


def test_a_sum_with_something_else_is_no_bias() -> None:
    """The stream that a product is added to, where a linear has no bias, comes in the place of one."""
    call, maker = module_of("quantized_linear").CALLS["QuantizedLinear_weights_bias"], torch.Generator().manual_seed(0)
    x, stream = (torch.randn(2, 3, 16, generator=maker) for _ in range(2))
    weight, scale = torch.randint(-9, 9, (16, 16), generator=maker, dtype=torch.int8), torch.rand(16, generator=maker)
    expected = x @ (weight.float() * scale[:, None]).T
    for addend in (stream, stream[0, 0]):
        torch.testing.assert_close(call(x, weight, scale, addend), expected + addend)
    assert module_of("quantized_linear").launched(x, None, weight, scale, stream) is None


@pytest.mark.parametrize(
    ("operator", "call"),
    [
        ("qk_norm_rope", lambda m, x: m.launched([(x.unflatten(-1, (2, 8)), x[0, 0, :8].double())], x, x, 0.1)),
        ("qk_norm_rope", lambda m, x: m.launched([(x.unflatten(-1, (2, 8)).mT, x[0, 0, :8])], x, x, 0.1)),
        (
            "gate_norm_modulate",
            lambda m, x: m.launched(m.BY_NAME["GateNormModulate_gate"], [x, x, x[0].double()], 0, 0),
        ),
        ("gate_norm_modulate", lambda m, x: m.launched(m.BY_NAME["GateNormModulate_gate"], [x[0], x[0], x[0]], 0, 0)),
        ("quantized_linear", lambda m, x: m.launched(x, None, x[0].to(torch.float8_e4m3fn), x[0, :, 0], None)),
        ("quantized_linear", lambda m, x: m.launched(x, None, x[0].char(), torch.ones(4, 2), None)),
    ],
)
def test_what_no_kernel_takes(operator: str, call: Any, queued: list[Any]) -> None:
    assert call(module_of(operator), torch.zeros(1, 4, 16)) is None
    assert not queued


def test_nothing_is_queued_on_a_cpu() -> None:
    assert not pytorch.queue("qk_norm_rope", "qk_norm_rope.float32", CPU)
    assert operators(CPU, torch.bfloat16) == {}


@pytest.mark.parametrize("wrong", [None, "qk_norm_rope", "missing", "broken"])
def test_a_kernel_is_used_once_it_agrees(monkeypatch: pytest.MonkeyPatch, wrong: str | None) -> None:
    """Found on a device that gives what is expected; of one that does not, nothing of its operator is used."""
    one, calls = torch.ones(3), {operator: {operator.upper(): len} for operator in OPERATORS}

    def trials(operator: str) -> Any:
        if operator == "qk_norm_rope" and wrong == "broken":
            raise KernelError("cannot be loaded")
        yield one, one
        if operator == "qk_norm_rope":
            yield (None if wrong == "missing" else one * 1.1 if wrong else one), one

    def module(operator: str) -> Any:
        return SimpleNamespace(CALLS=calls[operator], trials=lambda device, dtype: trials(operator))

    monkeypatch.setattr(pytorch, "is_available", lambda: True)
    monkeypatch.setattr(pytorch, "module_of", module)
    pytorch._agrees.cache_clear()
    found = operators(CUDA, torch.float32)
    pytorch._agrees.cache_clear()
    assert found.keys() == {operator.upper() for operator in OPERATORS} - ({"QK_NORM_ROPE"} if wrong else set())


@pytest.mark.parametrize("found", [torch.tensor([1.0, float("nan")]), torch.tensor([1.0, float("inf")])])
def test_what_is_not_finite_does_not_agree(found: torch.Tensor) -> None:
    assert not pytorch.agrees(found, torch.ones(2))


def test_they_are_compiled_as_they_are() -> None:
    """In a function that is compiled as a whole, with any number of tokens."""
    rotate, gate = module_of("qk_norm_rope").CALLS["QKNormRope"], module_of("gate_norm_modulate").CALLS

    def block(x: torch.Tensor, weight: torch.Tensor, row: torch.Tensor, table: torch.Tensor) -> Any:
        turned = rotate(x.unflatten(-1, (2, 8)), weight[:8], table, table, epsilon=1e-5)
        residual, y = gate["GateNormModulate_gate_layer_shift"](x, turned.transpose(1, 2).flatten(2), *[row] * 4)
        return residual, y

    compiled = torch.compile(block, backend="eager", fullgraph=True, dynamic=True)
    with torch.inference_mode():
        for tokens in (3, 5):
            inputs = (torch.randn(2, tokens, 16), torch.ones(16), torch.randn(16), torch.randn(2, tokens, 4))
            for one, two in zip(compiled(*inputs), block(*inputs), strict=True):
                assert torch.equal(one, two)
