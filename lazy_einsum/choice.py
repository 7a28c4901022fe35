"""``choose_order``: the contraction order of a network, chosen once: by the cost model, or measured."""

from __future__ import annotations

import torch

from . import known
from .ambient import is_capturing
from .fastest import fastest_order
from .known import Answer, Calls, Question
from .layout import Strides
from .orders import Choice, along, plan_by_calls
from .plan import Optimize
from .saved import Written, WrittenNetwork
from .signature import TensorType
from .sizes import is_symbolic
from .stopwatch import device_kind


def choose_order(
    network: WrittenNetwork,
    ratio: float | None,
    optimize: Optimize = "auto",
    memory_limit: int | str | None = None,
    strides: Strides | None = None,
    measure: bool = False,
) -> Choice:
    """What ``plan_by_calls`` chooses, once for each network; or the fastest of a few orders, which are timed.

    Args:
        network: see ``plan_by_calls``.
        ratio: see ``plan_by_calls``.
        optimize: see ``plan_by_calls``.
        memory_limit: see ``plan_by_calls``.
        strides: see ``plan_by_calls``.
        measure: whether to time orders. Not where one order is for many sizes, or there is a search of the user's own,
            or some operands are frozen: what comes of these is computed once.

    Raises:
        MemoryLimitError: see ``make_plan``.
    """
    varies = any(is_symbolic(size) for one in network.types for size in (*one.shape, *one.stride))
    if varies or len(network.types) < 3 or optimize not in ("auto", True):
        return plan_by_calls(network, ratio, optimize, memory_limit, strides)
    devices = {one.device for one in network.types}
    # (To measure is to wait for the device, which no CUDA graph can hold.)
    measure = measure and not (any(network.frozen) or torch.device("meta") in devices or is_capturing(devices))
    question = _question(network, ratio, memory_limit, strides, measure)
    answer = known.find(question)
    if answer is None:
        if measure:
            choice = fastest_order(network, ratio, memory_limit, strides)
        else:
            choice = plan_by_calls(network, ratio, optimize, memory_limit, strides)
        answer = Answer(choice.plan.ssa_path, choice.plan.optimizer, choice.elements)
        known.keep(question, answer)
    known.note(question, answer)
    return Choice(along(network, answer.path, answer.found_by, memory_limit), answer.elements)


def _question(
    network: WrittenNetwork, ratio: float | None, memory_limit: int | str | None, strides: Strides | None, measure: bool
) -> Question:
    types = network.types
    calls = Calls(
        tuple(str(one.dtype) for one in types),
        tuple(tuple(one.stride) for one in types),
        known.first_in(network.memory),
        _listed(network.written),
        ratio,
        None if strides is None else tuple(strides.stride),
        strides is not None and strides.exact,
        _device(types[0], measure),
    )
    follows = tuple(one.requires_grad for one in types)
    return Question(
        str(network.spec),
        tuple(tuple(one.shape) for one in types),
        "measure" if measure else "auto",
        memory_limit,
        follows=follows if any(follows) else (),
        frozen=network.frozen if any(network.frozen) else (),
        calls=calls,
    )


def _device(one: TensorType, measured: bool) -> str | None:
    """What the choice of an order depends on of the device that the operands lie on."""
    if measured:
        return device_kind(one.device)
    return None if one.is_on_processor else one.device.type


def _listed(written: Written) -> tuple[tuple[str, tuple[int | None, ...]], ...]:
    """The einsums of a tree, inner ones first. (Not recursive: the tree of a chain is as deep as it is long.)"""
    order, stack = [], [written]
    while stack:
        node = stack.pop()
        order.append(node)
        stack += [inner for inner in node.operands if inner is not None]
    order.reverse()
    numbers = {id(node): number for number, node in enumerate(order)}
    return tuple(
        (str(node.spec), tuple(None if inner is None else numbers[id(inner)] for inner in node.operands))
        for node in order
    )
