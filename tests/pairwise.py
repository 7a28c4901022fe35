"""Contractions of two operands, and those of equivariant networks, against eager ``torch.einsum``.

``python tests/pairwise.py NUMBER [--backward]`` measures one alone, and prints the code that it became.
"""

from __future__ import annotations

import argparse
import ast
import math
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from contestants import prepare
from measure import Run, backward_run, forward_run, geometric_mean, medians

FLOORS = (20e-6, 60e-6, 180e-6)
"""Seconds that contractions are sized for, one after the other, if a good kernel computed them: 20 us to 1 ms."""

LINE = 0.95
"""A contraction is slower than eager where eager takes less than so many times as long."""

_MACS_PER_SECOND = 50e9
_ELEMENTS_PER_SECOND = 10e9

# Contractions of equivariant networks (e3nn, MACE, allegro), of adapters and attention, some of three or four operands.
_MODELS = """
zui,zvj->zuvij | z200 u16 v16 i3 j5
zui,zuj->zuij | z500 u32 i3 j5
uvw,ijk,zuvij->zwk | z50 u16 v16 w16 i3 j3 k5
zuvw,ijk,zuvij->zwk | z50 u16 v8 w16 i3 j3 k5
uv,ijk,zuvij->zuk | z100 u16 v8 i3 j3 k5
uv,ijk,zuvij->zvk | z100 u16 v8 i3 j3 k5
uw,ijk,zuij->zwk | z200 u32 w32 i3 j3 k5
u,ijk,zuij->zuk | z500 u32 i3 j3 k5
uv,ijk,zuvij->zuvk | z100 u16 v8 i3 j3 k5
qw,ijk,zqij->zwk | z200 q32 w32 i3 j5 k7
uvw,zu,zv->zw | z500 u16 v16 w16
uvw,zui,zv->zwi | z200 u16 v16 w16 i5
uvw,zui,zvi->zw | z200 u16 v16 w16 i5
uvw,ijk,zvj->zuiwk | z20 u16 v16 w16 i3 j3 k5
uv,ijk,uw,zvj->zuiwk | z20 u16 v16 w16 i3 j3 k5
wxvik,ekc,bci,be->bcwxv | w4 x4 v4 i4 k11 e5 c32 b20
wxvik,ekc,bci,be->bcwxv | w4 x4 v4 i4 k11 e5 c16 b1
wxvk,ekc,be->bcwxv | w4 x4 v4 k11 e5 c32 b20
bcwi,bci->bcw | b50 c64 w9 i9
bcwxi,bci->bcwx | b20 c32 w9 x9 i9
ijkp,up->uijk | i9 j9 k9 p30 u64
zuij,uijk->zuk | z200 u32 i4 j4 k4
zuj,zui,uijk->zuk | z200 u32 i4 j4 k4
zij,zjk,zk->zi | z1000 i8 j4 k5
bmn,lm,kn->blk | b32 m32 n32 l16 k16
bthd,bshd->bhts | b4 t64 s64 h8 d32
bhts,bshd->bthd | b4 t64 s64 h8 d32
ik,il,jl,jk->ij | i200 j200 k30 l40
bgk,bkd,bk->bgd | b8 g64 k32 d64
"""


@dataclass(frozen=True)
class Contraction:
    """An einsum with explicit output, and the size of each label."""

    equation: str
    sizes: dict[str, int]

    def __str__(self) -> str:
        return f"{self.equation} " + " ".join(f"{label}{size}" for label, size in sorted(self.sizes.items()))

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of the operands."""
        return [tuple(self.sizes[label] for label in term) for term in self.equation.split("->")[0].split(",")]

    def operands(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[torch.Tensor]:
        """Random operands, the same on all devices."""
        generator = torch.Generator().manual_seed(0)
        return [torch.randn(shape, generator=generator, dtype=dtype).to(device) for shape in self.shapes]

    @property
    def floor(self) -> float:
        """Seconds that a good kernel would take for a contraction of two operands."""
        macs = math.prod(self.sizes.values())
        elements = sum(map(math.prod, self.shapes)) + math.prod(self.sizes[x] for x in self.equation.split("->")[1])
        return max(macs / _MACS_PER_SECOND, elements / _ELEMENTS_PER_SECOND)

    def sized(self, fits: Callable[[Contraction], bool]) -> Contraction:
        """The largest power of all sizes that fits, none below 2: what is long stays longer than what is short."""
        best = Contraction(self.equation, dict.fromkeys(self.sizes, 2))
        for step in range(1, 200):
            scaled = {label: max(2, round(size ** (step / 10))) for label, size in self.sizes.items()}
            found = Contraction(self.equation, scaled)
            if not fits(found):
                break
            best = found
        return best


def random_pairs() -> list[Contraction]:
    """The random contractions of ``data/pairwise.txt`` (from jcmgray/einbench), in the sizes that they have there: 1 to
    1e9 multiply-adds.
    """
    text = (Path(__file__).parent / "data" / "pairwise.txt").read_text()
    rows = re.findall(r"^i=\d+; (\S*); size_dict=({.*});$", text, flags=re.MULTILINE)
    return [Contraction(equation, ast.literal_eval(sizes)) for equation, sizes in rows]


def model_contractions() -> list[Contraction]:
    """Contractions of equivariant networks, adapters and attention."""
    found = []
    for line in _MODELS.split("\n")[1:-1]:
        equation, sizes = line.split(" | ")
        found.append(Contraction(equation, {item[0]: int(item[1:]) for item in sizes.split()}))
    return found


def cases() -> list[Contraction]:
    """All that are measured: those of models, then those of the file, sized for one of ``FLOORS`` after the other."""
    found = model_contractions()
    for number, pair in enumerate(random_pairs()):
        limit = FLOORS[number % len(FLOORS)]
        found.append(pair.sized(lambda case, limit=limit: case.floor <= limit))
    return found


def measured(case: Contraction, backward: bool, rounds: int, round_seconds: float) -> dict[str, float]:
    """Seconds of ours and of eager, which are checked against each other first."""
    operands = case.operands()
    leaves = [x.clone().requires_grad_() for x in operands]
    runs: dict[str, Run] = {}
    expected = torch.einsum(case.equation, *operands)
    for name in ("ours", "eager"):
        target = prepare(name, case.equation, operands)
        assert target is not None
        result = target(*leaves).detach()
        assert torch.allclose(result, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())), (name, str(case))
        runs[name] = backward_run(target, leaves) if backward else forward_run(target, operands)
    return medians(runs, rounds, round_seconds)


def pairwise(backward: bool, stride: int, confirm: bool = True) -> None:
    """How many times as long as ours eager takes, for each ``stride``-th contraction.

    What is below the line is measured again alone, in a process of its own and longer, and counts as it came out there.
    """
    every = cases()
    numbers = range(0, len(every), stride)
    title = "forward+backward" if backward else "forward"
    took = {number: measured(every[number], backward, 7, 0.003) for number in numbers}
    below = [number for number in numbers if _ratio(took[number]) < LINE]
    if confirm:
        for number in below:
            took[number] = _alone(number, backward)
    ratios = {number: _ratio(took[number]) for number in numbers}
    slower = [number for number in numbers if ratios[number] < LINE]
    print(
        f"\npairwise, {title}: eager over ours, {len(ratios)} of {len(every)} contractions: geometric mean "
        f"{geometric_mean(ratios.values()):.2f}; below {LINE}: {len(slower)}"
        + (f" (of {len(below)} before they were measured again alone)" if confirm else "")
    )
    for number in sorted(ratios, key=ratios.__getitem__)[: max(15, len(slower))]:
        ours, eager = took[number]["ours"] * 1e6, took[number]["eager"] * 1e6
        print(
            f"  {number:5} {ratios[number]:5.2f}  ours {ours:8.1f} us  eager {eager:8.1f}  {every[number]}", flush=True
        )


def _ratio(took: dict[str, float]) -> float:
    return took["eager"] / took["ours"]


def _alone(number: int, backward: bool) -> dict[str, float]:
    command = [sys.executable, __file__, str(number), f"--threads={torch.get_num_threads()}", "--seconds"]
    done = subprocess.run(command + ["--backward"] * backward, capture_output=True, text=True, check=True)
    ours, eager = map(float, done.stdout.split())
    return {"ours": ours, "eager": eager}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure one contraction."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("number", type=int, help="of the contraction, as the benchmark prints it")
    parser.add_argument("--backward", action="store_true", help="forward with backward")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", action="store_true", help="print only the seconds, ours and eager's")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    case = cases()[options.number]
    took = measured(case, options.backward, 15, 0.03)
    if options.seconds:
        print(took["ours"], took["eager"])
        return
    print(case, f"ours {took['ours'] * 1e6:.1f} us, eager {took['eager'] * 1e6:.1f}, ratio {_ratio(took):.2f}")
    print(_code(case, options.backward))


def _code(case: Contraction, backward: bool) -> str:
    operands: list[Any] = case.operands()
    target: Any = prepare("ours", case.equation, operands)
    with torch.set_grad_enabled(backward):
        return str(target.prepare(*(x.requires_grad_(backward) for x in operands)).code)


if __name__ == "__main__":
    main()
