"""``verify=True``: the first call of each signature also runs the child itself, and every stage's code where the
two differ, to name the pass at fault.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from .ambient import generators, product_bits
from .backends import EAGER
from .data import flatten
from .errors import LazyEinsumError
from .record import Trace
from .specialize import Specialization, Stage, compile_graph, finish, read

# Relative to the largest value: sums in another order differ by rounding, which grows with the root of their length;
# these leave room for sums of a million terms.
_TOLERANCE = {
    torch.float64: 1e-10,
    torch.complex128: 1e-10,
    torch.float32: 1e-3,
    torch.complex64: 1e-3,
    torch.bfloat16: 1e-1,
    torch.float16: 1e-1,
}
# The same where float32 products are made of operands with fewer bits, as far as torch's flags let them be.
_ROUNDED = {"tf32": 1e-2, "bf16": 1e-1}


class Verifier:
    """Runs the child for one call before the specialization does, and compares.

    Args:
        child: the module or callable.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.
    """

    def __init__(self, child: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._child = child
        self._args = args
        self._kwargs = kwargs
        self._stages: list[tuple[Stage, Trace]] = []
        self._written = self._tensors()
        self._before = [tensor.detach().clone() for tensor in self._written]
        self._random = [(generator, generator.get_state()) for generator in generators()]

    def add_stage(self, stage: Stage, traced: Trace) -> None:
        """Remember a stage of the build."""
        self._stages.append((stage, traced))

    def run(self, entry: Specialization, values: tuple[Any, ...]) -> Any:
        """What ``entry`` gives for ``values``, which is what the child gives.

        Raises:
            LazyEinsumError: it is not.
        """
        expected = self._observe(
            lambda: (
                self._child.forward(*self._args, **self._kwargs)
                if isinstance(self._child, nn.Module)
                else self._child(*self._args, **self._kwargs)
            )
        )
        self._restore()
        result: list[Any] = []

        def specialized() -> Any:
            result.append(entry.run(*values))
            return result[0]

        found = difference(expected, self._observe(specialized))
        if found is None:
            return result[0]
        inputs = values[: len(values) - len(entry._state)]
        raise LazyEinsumError(
            f"{type(self._child).__name__}{entry.signature}: the specialized code gives another result than the "
            f"module itself: {found}; "
            f"the first stage that does is {self._first_wrong(entry, expected, inputs)!r} (see "
            "specializations[...].stages)"
        )

    def _first_wrong(self, entry: Specialization, expected: list[Any], inputs: tuple[Any, ...]) -> str:
        for stage, traced in self._stages:
            self._restore()
            targets = [str(node.target) for node in stage.graph.nodes if node.op == "get_attr"]
            state = [read(self._child, traced.state[target]) for target in dict.fromkeys(targets)]
            run = finish(compile_graph(stage.graph, tuple(dict.fromkeys(targets))), traced, torch.is_grad_enabled())

            def stage_run(run: Callable[..., Any] = run, state: list[Any] = state) -> Any:
                return run(*inputs, *state)

            if difference(expected, self._observe(stage_run)) is not None:
                return stage.name
        return "compile" if entry.tier == EAGER else f"backend {entry.tier!r}"

    def _observe(self, function: Callable[[], Any]) -> list[Any]:
        """Copies of what ``function`` returns and of what it leaves in the tensors it may write."""
        leaves: list[Any] = []
        flatten(function(), leaves)
        values = [leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        return values + [tensor.detach().clone() for tensor in self._written]

    def _restore(self) -> None:
        for generator, state in self._random:
            generator.set_state(state)
        for tensor, value in zip(self._written, self._before, strict=True):
            # .data: the user's graph must not notice.
            tensor.data.copy_(value)

    def _tensors(self) -> list[torch.Tensor]:
        leaves: list[Any] = []
        flatten((self._args, self._kwargs), leaves)
        found = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if isinstance(self._child, nn.Module):
            found += [*self._child.parameters(), *self._child.buffers()]
        return list({id(tensor): tensor for tensor in found}.values())


def difference(expected: Sequence[Any], found: Sequence[Any]) -> str | None:
    """How values differ beyond rounding, in words; ``None`` where they do not.

    Args:
        expected: tensors and Python values.
        found: what is held against them, in the same order.

    >>> difference([torch.ones(2)], [torch.ones(2) + 1e-6]) is None
    True
    >>> difference([torch.ones(2)], [torch.zeros(2)])
    'value 0 differs by up to 1, where values are up to 1'
    """
    if len(expected) != len(found):
        return f"{len(found)} values, expected {len(expected)}"
    for number, (a, b) in enumerate(zip(expected, found, strict=True)):
        if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
            if type(a) is not type(b) or (not isinstance(a, torch.Tensor) and a != b and a == a):
                return f"value {number} is {b!r}, expected {a!r}"
            continue
        if (a.dtype, a.shape, a.device) != (b.dtype, b.shape, b.device):
            ours, theirs = (f"{x.dtype} of shape {tuple(x.shape)} on {x.device}" for x in (b, a))
            return f"value {number} is a {ours}, expected {theirs}"
        if a.numel() == 0:
            continue
        tolerance = _TOLERANCE.get(a.dtype)
        if tolerance is None:
            if not torch.equal(a, b):
                return f"value {number} differs"
            continue
        tolerance = max(tolerance, _ROUNDED.get(product_bits(a.device.type, a.dtype), 0.0))
        wide = torch.complex128 if a.is_complex() else torch.float64
        a, b = a.to(wide), b.to(wide)
        finite = a.abs()[torch.isfinite(a.abs())]
        scale = float(finite.max()) if finite.numel() else 1.0
        if not torch.allclose(a, b, rtol=tolerance, atol=tolerance * max(scale, 1e-30), equal_nan=True):
            gap = float((a - b).abs().nan_to_num().max())
            return f"value {number} differs by up to {gap:.3g}, where values are up to {scale:.3g}"
    return None
