"""Command line: ``python -m lazy_einsum "ij,jk,kl->il" 10x20 20x30 30x40``; see ``--help``."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from . import cost
from .bench import ROUNDS, ResultsDifferError, bench_einsum, bench_model
from .calibrate import GROUPS, fit, measure, misfit
from .errors import LazyEinsumError
from .module import OptimizedModule
from .progress import with_progress
from .report import Report
from .signature import TensorType, contiguous_strides
from .spec import EinsumSpec
from .stopwatch import random_tensor

_COMMANDS = """\
  "EQUATION" SHAPE ...   how an einsum of operands of these shapes runs: order, costs, code (python -m lazy_einsum
                         "ij,jk,kl->il" 10x20 20x30 30x40)
  explain                the same for a model (python -m lazy_einsum explain package.module:factory --input 32x128)
  bench                  how long either takes beside torch.einsum and other libraries (python -m lazy_einsum bench
                         "ij,jk,kl->il" 10x20 20x30 30x40)
  calibrate              measure this machine for the cost model (python -m lazy_einsum calibrate machine.json)
"""

_MODEL = "package.module:name of a module, or of what makes one when it is called without arguments"


class _Parser(argparse.ArgumentParser):
    """Errors are one line."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {message}; see {self.prog} --help", file=sys.stderr)
        raise SystemExit(2)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status: 2 where it fails, with one line on standard error; 1 if that is because results
    that ``bench`` compares differ.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    commands: dict[str, Callable[[list[str]], None]] = {
        "bench": _bench,
        "calibrate": _calibrate,
        "explain": _explain,
    }
    command = commands.get(given[0] if given else "")
    try:
        if command is not None:
            command(given[1:])
        else:
            _einsum(given)
    except Exception as error:  # a model's own code may raise anything
        kind = "" if isinstance(error, (LazyEinsumError, OSError, ImportError, ValueError)) else type(error).__name__
        print(f"error: {': '.join(filter(None, (kind, ' '.join(str(error).split()))))}", file=sys.stderr)
        return 1 if isinstance(error, ResultsDifferError) else 2
    return 0


# --- einsums and models -----------------------------------------------------------------------------------------------


def _einsum(arguments: list[str]) -> None:
    parser = _Parser(
        prog="python -m lazy_einsum",
        description="How einsums run, and why.",
        epilog=f"commands:\n{_COMMANDS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("equation", help='as torch.einsum takes it: "ij,jk,kl->il"')
    parser.add_argument(
        "shapes", nargs="+", type=_tensor, metavar="SHAPE", help="of each operand: 10x20, 10x20:float64"
    )
    _add_report_options(parser)
    options = parser.parse_args(arguments)

    def einsum(*operands: torch.Tensor) -> Any:
        return torch.einsum(options.equation, *operands)

    shapes = [shape for shape, _ in options.shapes]
    EinsumSpec.parse(options.equation, list(map(len, shapes))).output_shape(shapes)
    _show(einsum, options.shapes, options)


def _explain(arguments: list[str]) -> None:
    parser = _Parser(prog="python -m lazy_einsum explain", description="How the einsums of a model run, and why.")
    parser.add_argument("model", help=_MODEL)
    _add_input(parser)
    _add_report_options(parser)
    options = parser.parse_args(arguments)
    _show(_load(options.model), options.input, options)


def _add_input(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input",
        action="append",
        type=_tensor,
        default=[],
        metavar="SHAPE",
        help="of a tensor argument: 32x128, 32x128:int64; once for each argument, in order",
    )


def _add_report_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-grad", action="store_true", help="the call runs without gradients")
    parser.add_argument("--measure", action="store_true", help="time each step on random tensors")
    parser.add_argument(
        "--measure-orders",
        action="store_true",
        help="time the few best orders of each network, and take the fastest (at most a second for each)",
    )
    parser.add_argument("--json", action="store_true", help="print data")
    parser.add_argument("--html", metavar="FILE", help="write a page")


def _show(child: Any, types: Sequence[tuple[list[int], torch.dtype | None]], options: argparse.Namespace) -> None:
    model = OptimizedModule(child, optimize="measure" if options.measure_orders else "auto", on_untraceable="raise")
    operands = _operands(types)
    with torch.no_grad() if options.no_grad else contextlib.nullcontext():
        model.prepare(*operands)  # raises where the model can't be traced
        report: Report = model.explain(*operands, measure=options.measure)
    if options.html:
        report.save(options.html)
    if options.json:
        print(json.dumps(report.to_dict(), indent=1))
    elif options.html:
        count = len(report.networks)
        print(f"{count} network{'' if count == 1 else 's'} of einsums, in {options.html}")
    else:
        print(report)


def _tensor(text: str) -> tuple[list[int], torch.dtype | None]:
    """``32x128:int64`` as a shape and a dtype, if it names one."""
    sizes, colon, name = text.partition(":")
    dtype = _dtype(name) if colon else None
    parts = sizes.split("x") if sizes not in ("", "scalar") else []
    if not all(part.isdigit() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is no shape; expected one as 10x20, or scalar")
    return list(map(int, parts)), dtype


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise argparse.ArgumentTypeError(f"{name!r} is no dtype of torch; expected one as in 10x20:float64")
    return dtype


def _operands(types: Sequence[tuple[list[int], torch.dtype | None]]) -> list[torch.Tensor]:
    """Tensors whose elements nobody reads: without memory where there is not enough."""
    try:
        return [torch.empty(shape, dtype=dtype) for shape, dtype in types]
    except RuntimeError:
        return [torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in types]


def _load(name: str) -> Any:
    """The model that ``package.module:name`` names."""
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise ValueError(f"{name!r} names no model; expected package.module:name")
    sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module)
    finally:
        del sys.path[0]
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ValueError(f"{module} has no {attribute!r}")
        found = getattr(found, part)
    model = found if isinstance(found, torch.nn.Module) else found()
    if not callable(model):
        raise TypeError(f"{name} gave a {type(model).__name__}, expected a module or a function")
    return model


# --- times ------------------------------------------------------------------------------------------------------------


def _bench(arguments: list[str]) -> None:
    parser = _Parser(
        prog="python -m lazy_einsum bench",
        description="How long an einsum takes beside torch.einsum and other libraries, or a model wrapped in "
        "OptimizedModule beside the model as it is; in turns, in one process.",
    )
    parser.add_argument("subject", metavar="EQUATION|MODEL", help=f'"ij,jk,kl->il", or {_MODEL}')
    parser.add_argument(
        "shapes", nargs="*", type=_tensor, metavar="SHAPE", help="of each operand of an equation: 10x20, 10x20:float64"
    )
    _add_input(parser)
    parser.add_argument(
        "--dtype", type=_dtype, default=torch.float32, help="of the shapes that name none (default: float32)"
    )
    parser.add_argument("--backward", action="store_true", help="time calls with their gradients too")
    parser.add_argument("--rounds", type=_at_least(1), default=ROUNDS, help=f"of all in turns (default: {ROUNDS})")
    parser.add_argument("--threads", type=_at_least(1), default=1, help="of torch (default: 1)")
    parser.add_argument("--json", action="store_true", help="print data")
    options = parser.parse_intermixed_args(arguments)
    is_model = ":" in options.subject
    if options.shapes if is_model else options.input:
        raise ValueError(
            f"{options.subject!r} is {'a model' if is_model else 'an equation'}; expected its shapes "
            f"{'behind --input, once for each argument' if is_model else 'as plain arguments, without --input'}"
        )
    settings = {"backward": options.backward, "rounds": options.rounds, "threads": options.threads}
    tensors = [
        _random(shape, dtype or options.dtype, seed)
        for seed, (shape, dtype) in enumerate(options.input if is_model else options.shapes)
    ]
    if is_model:
        found = bench_model(_load(options.subject), tensors, **settings)
    else:
        found = bench_einsum(options.subject, tensors, **settings)
    print(json.dumps(found.to_dict(), indent=1) if options.json else found)


def _random(shape: Sequence[int], dtype: torch.dtype, seed: int) -> torch.Tensor:
    known = TensorType(tuple(shape), dtype, torch.device("cpu"), contiguous_strides(shape))
    return random_tensor(known, seed)


def _at_least(least: int) -> Callable[[str], int]:
    """What reads a whole number."""

    def read(text: str) -> int:
        if not text.isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is no number of at least {least}")
        return int(text)

    return read


# --- this machine -----------------------------------------------------------------------------------------------------


def _calibrate(arguments: list[str]) -> None:
    parser = _Parser(prog="python -m lazy_einsum calibrate", description="Measure this machine for the cost model.")
    parser.add_argument("file", nargs="?", default="machine.json", help="what to write (default: machine.json)")
    least = 5  # some of each kind
    parser.add_argument(
        "--samples", type=_at_least(least), default=2000, help="calls of torch to time (default: 2000, a minute)"
    )
    options = parser.parse_args(arguments)
    if not Path(options.file).absolute().parent.is_dir():
        raise FileNotFoundError(f"there is no folder for {options.file}; make it, or name another file")
    samples = list(with_progress(measure(options.samples), options.samples, "calls of torch timed"))
    found = fit(samples)
    found.write(options.file)
    print(f"{len(samples)} calls timed; by which factor the modelled times are off, as a root mean square:")
    for group in GROUPS:
        own = [sample for sample in samples if sample.group == group]
        print(f"  {group:8} {misfit(cost.CPU, own):.2f} before, {misfit(found, own):.2f} now")
    print(f"To plan for this machine: export LAZY_EINSUM_MACHINE={Path(options.file).absolute()}")


if __name__ == "__main__":
    sys.exit(main())
