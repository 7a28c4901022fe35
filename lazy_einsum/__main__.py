"""Command line: ``python -m lazy_einsum calibrate``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from . import cost
from .calibrate import GROUPS, fit, measure, misfit
from .errors import LazyEinsumError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m lazy_einsum", description="Tools of lazy_einsum.")
    commands = parser.add_subparsers(required=True, metavar="command")
    calibrate = commands.add_parser("calibrate", help="measure this machine for the cost model")
    calibrate.add_argument("file", nargs="?", default="machine.json", help="what to write (default: machine.json)")
    calibrate.add_argument(
        "--samples", type=_samples, default=2000, help="calls of torch to time (default: 2000, a minute)"
    )
    calibrate.set_defaults(run=_calibrate)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except (LazyEinsumError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _samples(text: str) -> int:
    least = 5
    if not text.isdigit() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of at least {least}: some of each kind are needed")
    return int(text)


def _calibrate(options: argparse.Namespace) -> None:
    if not Path(options.file).absolute().parent.is_dir():
        raise FileNotFoundError(f"there is no folder for {options.file}; make it, or name another file")
    samples = list(measure(options.samples))
    found = fit(samples)
    found.write(options.file)
    print(f"{len(samples)} calls timed; by which factor the modelled times are off, as a root mean square:")
    for group in GROUPS:
        own = [sample for sample in samples if sample.group == group]
        print(f"  {group:8} {misfit(cost.CPU, own):.2f} before, {misfit(found, own):.2f} now")
    print(f"To plan for this machine: export LAZY_EINSUM_MACHINE={Path(options.file).absolute()}")


if __name__ == "__main__":
    sys.exit(main())
