"""The table of operators that work element by element: complete, and true of each."""

from collections import defaultdict
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_prune.graph.operators import OperatorTables
from lightning_prune.graph.rules import RULES
from lightning_prune.graph.rules.elementwise import ELEMENTWISE
from lightning_prune.graph.tracer import tensors_in

TABLES = OperatorTables(RULES, {})
RANDOM = {"binomial", "poisson", "rrelu", "rrelu_with_noise", "rrelu_with_noise_functional"}
OF_WHOLE_NUMBERS = ("bitwise", "logical", "gcd", "lcm", "__")
# The first becomes `nonzero` before a rule is asked, and the other runs on a GPU alone.
NOT_RUN = {"aten.where.default", "aten._masked_scale.default"}
COLUMNS = [4, 0, 2]


@cache
def overloads() -> dict[str, list[Any]]:
    """Return the overloads of all ATen operators that take tensors and return them, by name."""
    found = defaultdict(list)
    for schema in torch._C._jit_get_all_schemas():
        namespace, _, name = schema.name.partition("::")
        takes_tensors = any(str(argument.type) == "Tensor" for argument in schema.arguments)
        writes_elsewhere = any(argument.is_out for argument in schema.arguments)
        if namespace == "aten" and takes_tensors and not writes_elsewhere:
            packet = getattr(torch.ops.aten, name)
            overload = schema.overload_name or "default"
            found[name] += [getattr(packet, overload)] if overload in packet.overloads() else []
    return found


def test_what_pytorch_tags_as_pointwise_has_a_rule() -> None:
    """If a new version has more: decide whether the table in rules/elementwise.py gets it, or it needs its own rule."""
    tagged = [each for found in overloads().values() for each in found if torch.Tag.pointwise in each.tags]
    assert len({str(each.overloadpacket) for each in tagged}) > 200
    assert [str(each) for each in tagged if TABLES.look_up(each).rule is RULES["unknown"]] == []


def test_the_tag_decides_nothing() -> None:
    without = {name: rule for name, rule in RULES.items() if name not in ("aten.leaky_relu", "aten.erf")}
    tables = OperatorTables(without, {})
    for function in (torch.ops.aten.leaky_relu.default, torch.ops.aten.leaky_relu_.default, torch.ops.aten.erf.default):
        assert tables.look_up(function).rule is RULES["unknown"]


@pytest.mark.parametrize("name", ["leaky_relu_", "gelu_", "relu6_", "masked_fill_", "hardswish_", "copy_", "add_"])
def test_what_works_in_place_goes_by_its_twin(name: str) -> None:
    for function in overloads()[name]:
        operator = TABLES.look_up(function)
        assert operator.rule is RULES["pointwise"]
        assert operator.takes_numbers


def test_what_moves_elements_is_not_in_the_table() -> None:
    for name in ("squeeze_", "cumsum", "sort", "glu", "softmax", "prelu", "tril", "roll", "max", "clone", "equal"):
        assert all(TABLES.look_up(function).rule is not RULES["pointwise"] for function in overloads()[name])


# -- what the table says is so -----------------------------------------------------------------------------------------


def tensor_for(function: Any, name: str) -> Tensor:
    operator = function.overloadpacket.__name__
    if operator.startswith(OF_WHOLE_NUMBERS):
        return torch.randint(1, 5, (3, 5))
    if operator.startswith("_conj"):
        return torch.randn(3, 5, dtype=torch.complex64)
    if name == "value":  # of `masked_fill`
        return torch.tensor(2.0)
    numbers = 0.1 + 0.8 * torch.rand(3, 5)
    return numbers > 0.5 if name in ("mask", "condition") else numbers


def number_for(function: Any, kind: str) -> Any:
    whole = function.overloadpacket.__name__.startswith(OF_WHOLE_NUMBERS)
    numbers = {"float": 0.5, "number": 2 if whole else 0.5, "Optional[number]": 0.5, "bool": True}
    return numbers.get(kind, "floor" if "str" in kind else 2)


def arguments(function: Any) -> tuple[list[Any], dict[str, Any]]:
    """Return tensors of three rows for the arguments that must be given, and numbers for the others."""
    args, kwargs = [], {}
    for argument in function._schema.arguments:
        kind, name = str(argument.type), argument.name
        if argument.has_default_value() and name not in ("min", "max"):
            continue
        value = tensor_for(function, name) if "Tensor" in kind else number_for(function, kind)
        if argument.kwarg_only:
            kwargs[name] = value
        else:
            args.append(value)
    return args, kwargs


def columns(value: Any) -> Any:
    return value[:, COLUMNS].clone() if isinstance(value, Tensor) and value.dim() else value


@pytest.mark.parametrize("name", sorted(ELEMENTWISE - RANDOM))
def test_an_operator_of_the_table_works_element_by_element(name: str) -> None:
    """Some columns of the output are what those columns of the arguments give."""
    for function in overloads().get(name, ()):  # an older PyTorch may not have it
        if str(function) in NOT_RUN:
            continue
        args, kwargs = arguments(function)
        chosen = list(map(columns, args))  # before what works in place changes them
        expected = tensors_in([function(*args, **kwargs)])
        found = tensors_in([function(*chosen, **kwargs)])
        assert expected
        for whole, some in zip(expected, found, strict=True):
            assert whole.shape == (3, 5)
            torch.testing.assert_close(some, columns(whole), rtol=0, atol=0, equal_nan=True)


def test_random_operators_of_the_table_keep_the_shape() -> None:
    ones = torch.ones(3, 5)
    for output in (torch.ops.aten.poisson(ones), torch.ops.aten.binomial(ones, ones), torch.rrelu(ones, training=True)):
        assert output.shape == (3, 5)
