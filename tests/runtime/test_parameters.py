"""The one list of a call's parameters: what is derived from it, and what its checks say."""

from __future__ import annotations

import inspect
import math

import numpy as np
import pytest

from zimgkit.engines.errors import UsageError
from zimgkit.runtime.commands.cli import cli
from zimgkit.runtime.controls import OF_DIFFUSERS, WAYS
from zimgkit.runtime.inputs import Inputs
from zimgkit.runtime.parameters import BY_NAME, INSTEAD, PARAMETERS, TENSORS, checked, refuse_unknown
from zimgkit.runtime.pictures.metadata import KEYS, Parameters
from zimgkit.runtime.pipeline import CALLBACK_ARGUMENTS, Pipeline
from zimgkit.runtime.request import KNOWN, Request


def options(command: str) -> dict[str, str]:
    """Options of a command that are parameters of a call: what they are called -> the parameter."""
    found = {option.name: option.opts[-1] for option in cli.commands[command].params}
    return {opt.removeprefix("--"): name for name, opt in found.items() if name in BY_NAME}


def test_the_commands_have_the_options_that_the_list_says():
    expected = {parameter.option.partition("/")[0]: parameter.name for parameter in PARAMETERS if parameter.option}
    assert options("generate") == expected
    assert options("sheet") == {k: v for k, v in expected.items() if v != "prompt"}


def test_the_call_takes_what_the_list_says():
    signature = [p for p in inspect.signature(Pipeline.__call__).parameters if p not in ("self", "others")]
    assert set(signature) == {*KNOWN, *CALLBACK_ARGUMENTS}
    for name in KNOWN:
        assert f"    {name}: " in str(Pipeline.__call__.__doc__)


def test_a_request_holds_every_parameter():
    aliases = {"prompt", "negative_prompt", "true_cfg_scale", "cfg_scale", "generator"}
    plural = {"prompts", "negative_prompts"}
    aliases |= {"input_image", "edit_image", "inpaint_mask", "layer_input_image", "layer_num", "cfg_normalize"}
    aliases |= {"resolution"}  # It is a height and a width then.
    aliases |= {*WAYS, *OF_DIFFUSERS} - {"controls"}
    others = {"unused_negative_prompt", "caching", "inputs", "blends_velocity", "references", "layered"}
    fields = {*Request.__dataclass_fields__, *Inputs.__dataclass_fields__}
    assert fields - others == {*KNOWN} - aliases | plural


def test_pictures_carry_what_the_list_says():
    fields = set(Parameters.__struct_fields__)
    assert {parameter.name for parameter in PARAMETERS if parameter.recorded} <= fields
    assert {name for name, _ in KEYS.values()} <= fields


@pytest.mark.parametrize("parameter", PARAMETERS, ids=lambda parameter: parameter.name)
def test_ranges(parameter):
    if parameter.type not in (int, float):
        return
    for bound in (parameter.low, parameter.high):
        if math.isfinite(bound):
            value = parameter.type(bound)
            assert checked(parameter, value) == value
    outside = [parameter.low - parameter.multiple] if math.isfinite(parameter.low) else []
    outside += [parameter.high + 1] if math.isfinite(parameter.high) and parameter.high < 1e15 else []
    outside = [parameter.type(value) for value in outside]
    for value in (*outside, "much", None, [1], math.nan, math.inf):
        with pytest.raises(UsageError, match=parameter.name):
            checked(parameter, value)


def test_numbers_of_numpy_serve():
    assert checked(BY_NAME["seed"], np.int64(5)) == 5
    assert checked(BY_NAME["guidance_scale"], np.float32(1.5)) == 1.5
    assert checked(BY_NAME["sigmas"], np.array([1.0, 0.5])) == (1.0, 0.5)


def test_a_lower_bound_on_the_largest_value():
    with pytest.raises(UsageError, match="height is 64; give a number from 16 to 48"):
        checked(BY_NAME["height"], 64, high=48)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("steps", "use num_inference_steps"),
        ("joint_attention_kwargs", "swap-lora"),
        ("timesteps", "sigmas"),
        ("promt", "did you mean prompt?"),
        ("num_inference_step", "did you mean num_inference_steps?"),
        ("use_en_prompt", "a prompt"),
        ("zzz", "leave it out"),
    ],
)
def test_what_there_is_not_is_named_with_what_serves_instead(name, hint):
    with pytest.raises(UsageError, match=rf"no argument {name!r}.*{hint.replace('?', '.')}"):
        refuse_unknown([name], KNOWN)


def test_no_name_stands_for_two_things():
    assert not {*INSTEAD} & {*BY_NAME, *TENSORS}
