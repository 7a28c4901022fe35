"""``bench_einsum``, ``bench_model``: how long calls take beside those of torch and of other libraries.

python -m lazy_einsum bench "ij,jk,kl->il" 10x20 20x30 30x40
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from .ambient import kept_random
from .contract import einsum
from .data import flatten
from .errors import LazyEinsumError, LazyEinsumWarning
from .module import OptimizedModule
from .progress import with_progress
from .report_text import WIDTH, shortened
from .signature import TensorType
from .spec import EinsumSpec
from .stopwatch import mean_seconds, synchronize
from .verify import difference

ROUNDS = 15
"""Calls are timed in turns, so often each."""

_ROUND_SECONDS = 0.01
"""In a round a call is made for about so long, and at least once."""

_MOST_OPERANDS = 8
"""Of so many opt_einsum_fx may try all orders."""

_Target = Callable[..., Any]
_Maker = Callable[[], _Target]


class ResultsDifferError(LazyEinsumError):
    """What was to be timed gives other results than what it is compared with, so its times would tell nothing."""


@dataclass(frozen=True)
class Timed:
    """What was timed.

    Attributes:
        name: of a function, or of a library.
        forward: median seconds of a call that autograd does not follow; ``None`` where it was not timed.
        backward: those of a call and its gradients; ``None`` where these were not timed.
        remark: why another library was not timed, say.
    """

    name: str
    forward: float | None = None
    backward: float | None = None
    remark: str = ""


@dataclass(frozen=True)
class Benchmark:
    """Times of calls that do the same; prints as a table.

    Attributes:
        subject: what was called.
        inputs: types of the arguments: ``f32[10, 20]``.
        threads: of torch.
        rounds: in which the calls took turns.
        timed: the first one is what the others are compared with.
        notes: warnings of this library about the calls.
    """

    subject: str
    inputs: tuple[str, ...]
    threads: int
    rounds: int
    timed: tuple[Timed, ...]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data, for ``json``."""
        return asdict(self)

    def __str__(self) -> str:
        first, *_ = self.timed
        passes = [name for name in ("forward", "backward") if getattr(first, name) is not None]
        titles = {"forward": "forward", "backward": "and backward"}
        lines = [
            f"{self.subject} of {', '.join(self.inputs) or 'no arguments'}",
            f"Microseconds, and how many times as fast as {first.name}:",
            f"medians of {self.rounds} rounds in turns, threads: {self.threads}",
            "",
            " " * 30 + "".join(f"{titles[name]:>21}" for name in passes),
        ]
        for one in self.timed:
            row = f"{one.name:30}"
            for name in passes:
                base, took = getattr(first, name), getattr(one, name)
                row += "" if took is None else f"{took * 1e6:12,.1f} {f'({base / took:.2f})':>8}"
            lines.append(row + (f"  {one.remark}" if one.remark else ""))
        return "\n".join([*(shortened(line, WIDTH) for line in lines), *self.notes])


def bench_einsum(
    equation: str, operands: Sequence[Tensor], backward: bool = False, rounds: int = ROUNDS, threads: int = 1
) -> Benchmark:
    """Time ``lazy_einsum.einsum`` and other libraries against ``torch.einsum``, each with its defaults (but for
    opt_einsum_fx, which tries all orders: of more than 8 operands it has ``optimize="auto"``).

    Args:
        equation: as ``torch.einsum`` takes it.
        operands: of the einsum.
        backward: whether calls with the gradients of all operands are timed too.
        rounds: see ``Benchmark``.
        threads: see ``Benchmark``.

    Raises:
        EquationError: the equation is malformed or does not fit the operands.
        ResultsDifferError: a library gives another result than ``torch.einsum``.
        ValueError: no operand can have a gradient, where they are asked for.
    """
    shapes = [operand.shape for operand in operands]
    spec = EinsumSpec.parse(equation, list(map(len, shapes)))
    spec.output_shape(shapes)
    operands = _copies(operands)
    targets: dict[str, _Target] = {
        "torch.einsum": partial(torch.einsum, equation),
        "lazy_einsum.einsum": partial(einsum, equation),
    }
    others: dict[str, _Maker] = {
        "opt_einsum.contract_expression": lambda: _contract_expression(spec, shapes),
        "opt_einsum_fx": lambda: _opt_einsum_fx(spec, operands),
        "cotengra": lambda: _cotengra(spec, shapes),
    }
    followed = [operand for operand in operands if _has_gradients(operand)] if backward else []
    return _benchmark(equation, targets, others, operands, operands, followed, backward, rounds, threads)


def bench_model(
    model: Any, arguments: Sequence[Tensor], backward: bool = False, rounds: int = ROUNDS, threads: int = 1
) -> Benchmark:
    """Time ``OptimizedModule`` of a model against the model as it is.

    Args:
        model: a module or a function.
        arguments: positional ones.
        backward: whether steps are timed too: a call, and the gradients of the parameters, or of the arguments where
            there are none.
        rounds: see ``Benchmark``.
        threads: see ``Benchmark``.

    Raises:
        ResultsDifferError: the wrapped model gives other results or gradients.
        ValueError: there is nothing that can have a gradient, where they are asked for.
    """
    arguments = _copies(arguments)
    own = [*model.parameters(), *model.buffers()] if isinstance(model, nn.Module) else []
    name = type(model).__name__ if isinstance(model, nn.Module) else getattr(model, "__name__", "model")
    targets: dict[str, _Target] = {"the model as it is": model, "OptimizedModule": OptimizedModule(model)}
    followed = [tensor for tensor in own if tensor.requires_grad]
    followed = followed or [tensor for tensor in arguments if _has_gradients(tensor)]
    return _benchmark(name, targets, {}, arguments, [*own, *arguments], followed, backward, rounds, threads)


def _copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """What calls may write, and autograd may follow."""
    return [tensor.detach().clone() for tensor in tensors]


def _has_gradients(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


# --- the others -------------------------------------------------------------------------------------------------------


def _contract_expression(spec: EinsumSpec, shapes: Sequence[Sequence[int]]) -> _Target:
    import opt_einsum

    expression: _Target = opt_einsum.contract_expression(str(spec), *shapes)
    return expression


def _opt_einsum_fx(spec: EinsumSpec, operands: Sequence[Tensor]) -> _Target:
    import opt_einsum_fx

    graph = fx.Graph()
    arguments = [graph.placeholder(f"x{number}") for number in range(len(operands))]
    graph.output(graph.call_function(torch.einsum, (str(spec), *arguments)))
    # By default it tries all orders: for ever, of more operands.
    options = {"optimize": "auto"} if len(operands) > _MOST_OPERANDS else {}
    module = fx.GraphModule(nn.Module(), graph)
    optimized: _Target = opt_einsum_fx.optimize_einsums_full(module, tuple(operands), options)
    return optimized


def _cotengra(spec: EinsumSpec, shapes: Sequence[Sequence[int]]) -> _Target:
    import cotengra

    terms = [tuple(term) for term in spec.inputs]
    expression: _Target = cotengra.array_contract_expression(terms, tuple(spec.output), shapes=list(map(tuple, shapes)))
    return expression


# --- all of them in turns ---------------------------------------------------------------------------------------------


def _benchmark(
    subject: str,
    targets: Mapping[str, _Target],
    others: Mapping[str, _Maker],
    arguments: Sequence[Tensor],
    state: Sequence[Tensor],
    followed: Sequence[Tensor],
    backward: bool,
    rounds: int,
    threads: int,
) -> Benchmark:
    """Time the targets, and the others as far as they can be made. ``state`` is all that calls may write, ``followed``
    what gradients are computed of.
    """
    if backward and not followed:
        raise ValueError("no tensor here has gradients; expected one of floats (32x128:float32), or no --backward")
    inputs = tuple(str(TensorType.of(argument)) for argument in arguments)
    for tensor in followed if backward else ():
        tensor.requires_grad_()
    wait = partial(synchronize, list({tensor.device for tensor in state}))
    notes: list[str] = []
    took: dict[str, dict[str, float]] = {name: {} for name in [*targets, *others]}
    with _threads(threads), kept_random():
        with _noted(notes):
            made, remarks = _made(others, arguments)
        for title in ("forward", "backward") if backward else ("forward",):
            with torch.set_grad_enabled(title == "backward"):
                with _noted(notes):
                    runs: dict[str, Callable[[], Any]] = {
                        name: _step(target, arguments, followed) if title == "backward" else partial(target, *arguments)
                        for name, target in {**targets, **made}.items()
                    }
                    _check(runs, state)
                turns = with_progress(range(rounds), rounds, f"rounds, {title}")
                for name, seconds in _medians(runs, turns, wait).items():
                    took[name][title] = seconds
    timed = tuple(Timed(name, **took[name], remark=remarks.get(name, "")) for name in took)
    return Benchmark(subject, inputs, threads, rounds, timed, tuple(dict.fromkeys(notes)))


def _made(makers: Mapping[str, _Maker], arguments: Sequence[Tensor]) -> tuple[dict[str, _Target], dict[str, str]]:
    """What can be called, and why the others can't."""
    made: dict[str, _Target] = {}
    remarks: dict[str, str] = {}
    for name, make in makers.items():
        try:
            target = make()
            target(*arguments)
            made[name] = target
        except Exception as error:  # other libraries may raise anything
            is_missing = isinstance(error, ModuleNotFoundError) and error.name == name
            remarks[name] = "not installed" if is_missing else f"{type(error).__name__}: {' '.join(str(error).split())}"
    return made, remarks


def _step(target: _Target, arguments: Sequence[Tensor], followed: Sequence[Tensor]) -> Callable[[], Any]:
    """A call and its gradients."""
    outputs = _followed(target(*arguments))
    if not outputs:
        raise ValueError("no result has gradients; expected a model with one that does, or no --backward")
    torch.manual_seed(0)
    # Contiguous: the results of two may have the same values in another layout.
    cotangents = [torch.randn_like(output, memory_format=torch.contiguous_format) for output in outputs]

    def run() -> Any:
        return torch.autograd.grad(_followed(target(*arguments)), followed, cotangents, allow_unused=True)

    return run


def _followed(value: Any) -> list[Tensor]:
    """The tensors of a result that autograd follows."""
    leaves: list[Any] = []
    flatten(value, leaves)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]


def _check(runs: Mapping[str, Callable[[], Any]], state: Sequence[Tensor]) -> None:
    """Raise where one gives other tensors than the first one, from the same state and random numbers."""
    before = [tensor.detach().clone() for tensor in state]
    found: dict[str, list[Tensor | None]] = {}
    for name, run in runs.items():
        torch.manual_seed(0)
        leaves: list[Any] = []
        flatten(run(), leaves)
        # A gradient may be none. Of other objects nothing is known.
        found[name] = [
            None if leaf is None else leaf.detach().clone()
            for leaf in leaves
            if leaf is None or isinstance(leaf, Tensor)
        ]
        with torch.no_grad():
            for tensor, value in zip(state, before, strict=True):
                tensor.copy_(value)
    (first, expected), *rest = found.items()
    for name, values in rest:
        gap = difference(expected, values)
        if gap is not None:
            raise ResultsDifferError(f"nothing was timed: {name} gives other results than {first}: {gap}")


def _medians(
    runs: Mapping[str, Callable[[], Any]], turns: Iterable[object], wait: Callable[[], Any]
) -> dict[str, float]:
    """Median seconds of each; in each turn all are called, so that a disturbance hits all alike."""
    once = {name: mean_seconds(run, 1, wait) for name, run in runs.items()}
    repeats = {name: max(1, int(_ROUND_SECONDS / max(took, 1e-7))) for name, took in once.items()}
    samples: dict[str, list[float]] = {name: [] for name in runs}
    collects = gc.isenabled()
    gc.disable()
    try:
        for _ in turns:
            for name, run in runs.items():
                run()  # the first call after another one's may pay for memory that the other one gave back
                samples[name].append(mean_seconds(run, repeats[name], wait))
    finally:
        if collects:
            gc.enable()
    return {name: statistics.median(values) for name, values in samples.items()}


@contextlib.contextmanager
def _threads(number: int) -> Iterator[None]:
    """Torch has so many threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _noted(notes: list[str]) -> Iterator[None]:
    """Warnings of this library go to the notes; those of others are not shown."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    notes += [str(item.message) for item in caught if issubclass(item.category, LazyEinsumWarning)]
