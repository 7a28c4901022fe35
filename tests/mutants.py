"""Faults planted in a copy of the package, to prove that the random programs find such faults.

Each is a substitution in the source, so that it stands for what a person could have written. One whose text is no
longer there fails its test: it has to follow the code.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Mutant:
    """One fault: replacements ``(file, before, after)`` in files of the package."""

    name: str
    edits: tuple[tuple[str, str, str], ...]
    profile: str = "everything"


def _one(name: str, file: str, before: str, after: str, profile: str = "everything") -> Mutant:
    return Mutant(name, ((file, before, after),), profile)


_CHECK = "    return check\n"


def _check_without(part: str) -> str:
    """A test of tensors in place of the C++ one, without one of its parts."""
    parts = {
        "shape": "tuple(t.shape) == k.shape",
        "dtype": "t.dtype == k.dtype",
        "strides": "TensorType.of(t).stride == k.stride",
        "requires_grad": "t.requires_grad == k.requires_grad",
        "class": "isinstance(t, torch.Tensor)",
    }
    kept = " and ".join(text for name, text in parts.items() if name != part)
    return f"    return lambda *tensors: all({kept} for t, k in zip(tensors, types, strict=True))\n"


MUTANTS = [
    _one(
        "a factor of both operands enters once, not squared",
        "passes/fuse_scalars.py",
        "for operand, degree in linear.operands:\n            if operand in self.scaled:",
        "for operand, degree in dict(linear.operands).items():\n            if operand in self.scaled:",
        "pure",
    ),
    _one(
        "the factor of a denominator is not inverted",
        "scalars.py",
        "((top, 1), (bottom, -1))",
        "((top, 1), (bottom, 1))",
        "pure",
    ),
    _one(
        "a number over a scaled tensor multiplies by the scale",
        "scalars.py",
        "Linear(factor, ((bottom, -1),))",
        "Linear(factor, ((bottom, 1),))",
        "pure",
    ),
    _one("division by an integer multiplies", "scalars.py", "factor.power(-1) if factor", "factor if factor", "pure"),
    _one("negation is forgotten", "scalars.py", "Factor(Fraction(-1), int)", "Factor(Fraction(1), int)", "pure"),
    _one(
        "an integer factor stays an integer when it is inverted",
        "scalars.py",
        "kind = float if self.kind is int and degree < 0 else self.kind",
        "kind = self.kind",
        "pure",
    ),
    _one(
        "a number that turns integers into floats moves like any other",
        "passes/fuse_scalars.py",
        "if linear.only_scales and dtype_of(linear.operands[0][0]) != dtype_of(node):",
        "if False:",
    ),
    _one(
        "writes in place are not seen",
        "graph.py",
        "return any(after < node < before and _overlap(written, storages) for node, written in self._writes)",
        "return False",
        "effects",
    ),
    _one(
        "autograd keeps operands that are written later",
        "graph.py",
        " and not (may_require_grad(end) and self.spoil_any(reads, start))",
        "",
        "effects",
    ),
    _one(
        "einsums whose operands are written later are rewritten",
        "graph.py",
        "return may_require_grad(node) and self.spoil_any(node.all_input_nodes, node)",
        "return False",
        "effects",
    ),
    _one(
        "work moves into another grad mode",
        "graph.py",
        "return a.movable and b.movable and a.grad == b.grad",
        "return a.movable and b.movable",
        "effects",
    ),
    _one(
        "a region without gradients is lost when its factors cancel",
        "passes/fuse_scalars.py",
        # (Each of two lines stands for most of the other.)
        "may_require_grad(value.core) == may_require_grad(node)\n"
        "            # What came of a region without grad may say that it requires some because of a later write to it."
        "\n"
        "            same_type = same_type and (known.grad or not may_require_grad(value.core))",
        "True",
        "effects",
    ),
    _one(
        "work takes the grad mode of the factors that cancelled behind it",
        "passes/fuse_scalars.py",
        "replace(known, grad=before.grad, movable=before.movable)",
        "known",
        "effects",
    ),
    _one(
        "factors that cancel give the operand itself",
        "passes/fuse_scalars.py",
        "if value.factor.value == 1 and value.private and same_type:",
        "if value.factor.value == 1 and same_type:",
        "pure",
    ),
    _one(
        "labels that an inlined einsum sums capture those of the outer one",
        "spec.py",
        'free = fresh_symbols("".join(self.inputs))',
        'free = fresh_symbols("")',
        "pure",
    ),
    _one(
        "size-1 broadcasting is ignored",
        "spec.py",
        "if sizes.get(label, 1) == 1:",
        "if label not in sizes:",
        "pure",
    ),
    _one(
        "the order of the output is dropped",
        "kernels.py",
        "value = self.contiguous(self.arrange(value, order_asked_for(wanted, strides, self.sizes)))",
        "return self.contiguous(self.arrange(value, order_asked_for(wanted, strides, self.sizes)))",
        "pure",
    ),
    _one(
        "a result that was contiguous is not",
        "passes/lower.py",
        "write.tree(tree, leaves, _asked(tree, users, exact))",
        "write.tree(tree, leaves, None)",
        "pure",
    ),
    _one(
        "the factor of a lowered network is dropped",
        "passes/lower.py",
        "leaves, strides, scale)",
        "leaves, strides, None)",
        "pure",
    ),
    _one(
        "the factor of a lowered network is applied to every operand of the last step",
        "kernels.py",
        'writer.scaled(value, scale) if place == _Place("value", operand_number) else value',
        "writer.scaled(value, scale)",
        "pure",
    ),
    _one(
        "single use is counted by users in the lowering",
        "passes/lower.py",
        "joins = uses(operand) == 1 and",
        "joins = len(operand.users) == 1 and",
        "pure",
    ),
    _one(
        "the last step of a contraction order is transposed",
        "passes/choose_paths.py",
        "*(values[number] for number in last.operands)",
        "*(values[number] for number in reversed(last.operands))",
        "pure",
    ),
    _one(
        "the bias of a product that joins is dropped",
        "passes/join_products.py",
        "node.target, node.args = torch.add, (einsum, added)",
        "node.target, node.args = torch.positive, (einsum,)",
        "products",
    ),
    _one(
        "a term that is subtracted is added",
        "passes/distribute.py",
        "yield left, right, alpha.times(Factor(-ONE.value, int))",
        "yield left, right, alpha",
        "products",
    ),
    _one(
        "a sum with other users is distributed",
        "passes/distribute.py",
        "if any(uses(node) != 1 for node in (*found.between, *found.scalings, term)):",
        "if any(uses(node) != 1 for node in (*found.scalings, term)):",
        "products",
    ),
    _one(
        "products join past writes and regions",
        "networks.py",
        'if not same_mode(operand, node):\n        return "they run in different modes"\n'
        "    if not writers.allow(inner[1], operand, node):",
        "if False:",
        "products",
    ),
    _one(
        "what is equal is shared past writes and hooks",
        "passes/share.py",
        "return same_mode(first, second) and not self._writers.part(reads, first, second)",
        "return same_mode(first, second)",
        "sharing",
    ),
    _one(
        "two results become one tensor",
        "passes/share.py",
        "if known.storage != given.storage and keepers(part.node):",
        "if False:",
        "sharing",
    ),
    _one(
        "a shared value has its dimensions in another order",
        "passes/share.py",
        "spec, operands = part.rest(output)\n        part.node.args",
        "spec, operands = part.rest(part.spec.output)\n        part.node.args",
        "sharing",
    ),
    _one(
        "what differs in the labels that are summed is shared",
        "passes/share.py",
        "if one.inputs == two.inputs and set(one.output) == set(two.output):",
        "if one.inputs == two.inputs:",
        "sharing",
    ),
    _one(
        "hooks on tensors are forgotten",
        "recorder.py",
        "self._stamp_effect(self.graph.call_method(name, (node, *given)), user_line())",
        "None",
        "hooks",
    ),
    _one(
        "a value with a hook is inlined",
        "graph.py",
        "    for user in node.users:\n",
        "    for user in node.users:\n        if user.target == 'register_hook':\n            continue\n",
        "hooks",
    ),
    _one(
        "saved-tensor hooks are left too late",
        "modes.py",
        "            self._regions.pop()\n            self._write(leave)\n",
        "            self._regions.pop()\n",
        "hooks",
    ),
    _one(
        "saved-tensor hooks are nobody's mode",
        "recorder.py",
        "return self._may_move and self._modes.are_those_of_the_call",
        "return self._may_move",
        "hooks",
    ),
    _one("a key without shapes", "ambient.py", _CHECK, _check_without("shape"), "keys"),
    _one("a key without dtypes", "ambient.py", _CHECK, _check_without("dtype"), "keys"),
    _one("a key without strides", "ambient.py", _CHECK, _check_without("strides"), "keys"),
    _one("a key without requires_grad", "ambient.py", _CHECK, _check_without("requires_grad"), "keys"),
    Mutant(
        "a key without the types of constants",
        (
            ("data.py", "self._key = (type(value), _bits(value))", "self._key = (_bits(value),)"),
            ("state.py", "elif type(value) in (int, float, str, bytes):", "elif type(value) in (int, float):"),
            (
                "state.py",
                ' and type({variable}) is {type(value).__name__}")',
                '")',
            ),
        ),
    ),
    _one(
        "a key without the mode of training",
        "state.py",
        "    elif isinstance(found, Constant):\n",
        '    elif path and path[-1][1] == "training":\n        pass\n    elif isinstance(found, Constant):\n',
    ),
    _one("layouts ignore the strides of dimensions of size 1", "fakes.py", "if _is_iterated(func):", "if False:"),
    _one("memory that inputs share is not looked at", "state.py", "if overlap is not None:", "if False:", "effects"),
    _one(
        "generic code without its conditions",
        "state.py",
        '" and ".join([*least, *checks, *conditions])',
        '" and ".join([*least, *checks])',
        "keys",
    ),
    _one(
        "a key without the grad mode",
        "state.py",
        "    writer.require(f\"{writer.name(torch.is_grad_enabled)}() is {modes['grad']}\")\n",
        "",
    ),
]


def plant(mutant: Mutant, folder: Path) -> Path:
    """Copy the package into ``folder`` with the fault in it; the folder to import from."""
    shutil.copytree(ROOT / "lazy_einsum", folder / "lazy_einsum", ignore=shutil.ignore_patterns("__pycache__"))
    for file, before, after in mutant.edits:
        path = folder / "lazy_einsum" / file
        text = path.read_text()
        if text.count(before) != 1:
            raise ValueError(
                f"mutant {mutant.name!r}: {file} holds {before!r} {text.count(before)} times, expected once"
            )
        path.write_text(text.replace(before, after))
    return folder


@dataclass(frozen=True)
class Hunt:
    """What random programs say of a planted fault.

    Attributes:
        found: number of the program (from 1) that goes wrong with the fault and right without; None if there is none.
        failure: what that program did.
        wrong_without: seeds of programs that go wrong without the fault too, so that they show nothing.
    """

    found: int | None
    failure: str
    wrong_without: tuple[int, ...]


def run_programs(source: Path, profile: str, first: int, count: int) -> tuple[int | None, str]:
    """Run random programs on the package in ``source``, in a process of its own; the first seed that fails, and how."""
    command = [sys.executable, str(ROOT / "tests" / "fuzzer.py"), "--profile", profile]
    command += ["--seed", str(first), "--count", str(count), "--stop", "1", "--whole"]
    environment = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=source)
    failure = re.search(r"^--- program (\d+): (.*)", done.stdout, flags=re.MULTILINE)
    if failure is not None:
        return int(failure[1]), failure[2]
    if done.returncode:
        raise RuntimeError(f"the programs from {first} on did not run:\n{done.stdout[-500:]}{done.stderr[-2000:]}")
    return None, ""


def hunt(mutant: Mutant, folder: Path, count: int = 2000) -> Hunt:
    """Run at most ``count`` random programs on a planted fault, until one goes wrong that the real code does right."""
    source = plant(mutant, folder)
    wrong_without: list[int] = []
    seed = 0
    while seed < count:
        failed, failure = run_programs(source, mutant.profile, seed, count - seed)
        if failed is None:
            break
        if run_programs(ROOT, mutant.profile, failed, 1)[0] is None:
            return Hunt(failed + 1, failure, tuple(wrong_without))
        wrong_without.append(failed)
        seed = failed + 1
    return Hunt(None, "", tuple(wrong_without))


def main() -> None:
    """Print after how many programs each fault is found."""
    import tempfile

    for mutant in MUTANTS:
        if len(sys.argv) > 1 and sys.argv[1] not in mutant.name:
            continue
        with tempfile.TemporaryDirectory() as folder:
            done = hunt(mutant, Path(folder))
        print(f"{done.found!s:>5}  {mutant.profile:10}  {mutant.name:75}  {done.failure[:110]}", flush=True)
        if done.wrong_without:
            print(f"       wrong without the fault too: programs {done.wrong_without}", flush=True)


if __name__ == "__main__":
    main()
