"""Seeded random programs, as Python source, that hold a library which rewrites linear algebra to what eager torch does.

``python tests/fuzzer.py --seed 17`` prints program 17 and checks it; ``--count 1000`` checks a range of seeds.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import random
import re
import string
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))

from behaviour import TOLERANCE, Observation, Rounding, clone_tree, differences, observe

# Values stay within these bounds while a program is generated, so that 1e-10 means rounding and nothing else.
LARGEST, SMALLEST_DIVISOR, LARGEST_NUMEL, LARGEST_RANK = 1e4, 1e-2, 4096, 5
LETTERS = string.ascii_lowercase + string.ascii_uppercase


@dataclass(frozen=True)
class Profile:
    """Which kinds of statements a program may hold, with weights."""

    name: str
    weights: Mapping[str, float]
    dtypes: tuple[torch.dtype, ...]
    dtype_weights: tuple[float, ...]
    regions: bool = True
    aliased_inputs: bool = True
    #: All forms of einsum (ellipsis, sublists, implicit output, spaces), or plain explicit text only.
    all_forms: bool = True
    statements: tuple[int, int] = (4, 11)
    #: Regions of saved-tensor hooks too.
    saved_hooks: bool = False


EVERYTHING = Profile(
    name="everything",
    weights={
        "einsum": 8,
        "matmul": 4,
        "scalar": 7,
        "binary": 3,
        "unary": 1.5,
        "view": 3.5,
        "reduce": 1,
        "in_place": 1.5,
        "indexed_write": 0.5,
        "write_later": 0.4,
        "cancel": 0.3,
        "join": 0.5,
        "noise": 0.2,
        "region": 0.8,
        "branch": 0.3,
        "split": 0.3,
        "introspect": 0.5,
    },
    dtypes=(torch.float64, torch.int64, torch.complex128, torch.float32),
    dtype_weights=(6, 2, 1.5, 1),
)

PURE = replace(
    EVERYTHING,
    name="pure",
    weights={"einsum": 8, "matmul": 3, "scalar": 8, "binary": 3, "unary": 0.7, "view": 2, "reduce": 0.5},
    regions=False,
    aliased_inputs=False,
)

# Writes, views and grad modes among products: what may not be moved past each other.
EFFECTS = replace(
    EVERYTHING,
    name="effects",
    weights={
        "einsum": 6,
        "matmul": 2,
        "scalar": 7,
        "binary": 2,
        "unary": 0.5,
        "view": 2,
        "in_place": 4,
        "indexed_write": 1,
        "write_later": 1.5,
        "cancel": 1,
        "region": 3,
    },
    dtypes=(torch.float64,),
    dtype_weights=(1,),
    all_forms=False,
)

# Python that reads what a cache's key must hold.
KEYS = replace(
    EVERYTHING,
    name="keys",
    weights={"einsum": 4, "matmul": 1, "scalar": 3, "binary": 1, "view": 1, "introspect": 4, "branch": 1},
    statements=(2, 6),
)

# What opt_einsum_fx says it supports: einsum, multiplication and division, scalars; nothing in place.
PREDECESSOR = replace(
    PURE,
    name="predecessor",
    weights={"einsum": 6, "scalar": 6, "binary": 3, "unary": 0.5},
    dtypes=(torch.float64,),
    dtype_weights=(1,),
    all_forms=False,
    statements=(3, 8),
)

# Linear algebra under all its names, einsums and writes among it. In half of these programs every network of products
# is joined, as sizes here are too small for it to pay.
PRODUCTS = replace(
    EVERYTHING,
    name="products",
    weights={
        "chain": 6,
        "product": 5,
        "matmul": 3,
        "einsum": 3,
        "scalar": 3,
        "sum": 2,
        "binary": 2,
        "spread": 2,
        "reduce": 1.5,
        "diagonal": 1,
        "turn": 3,
        "view": 1,
        "in_place": 1,
        "indexed_write": 0.3,
        "write_later": 0.4,
        "region": 0.8,
        "split": 0.3,
        "introspect": 0.3,
    },
    all_forms=False,
)

# Products of what was reshaped, and reshaped products. In half of these programs all networks are joined.
RESHAPED = replace(
    PRODUCTS,
    name="reshaped",
    weights={
        "regroup": 8,
        "chain": 3,
        "product": 2,
        "matmul": 1,
        "einsum": 3,
        "scalar": 1,
        "binary": 1,
        "spread": 1,
        "turn": 2,
        "view": 1,
        "in_place": 0.5,
        "write_later": 0.3,
        "region": 0.5,
        "introspect": 0.2,
    },
    statements=(4, 9),
)

# Hooks on values in the middle and on what autograd saves; nothing is written, as what had a hook may not be.
HOOKS = replace(
    PURE,
    name="hooks",
    weights={**PURE.weights, "unary": 2, "hook": 6, "region": 2, "cancel": 1, "split": 0.3},
    regions=True,
    saved_hooks=True,
    all_forms=False,
    dtypes=(torch.float64, torch.complex128),
    dtype_weights=(4, 1),
)

# The same contractions several times, and values with several users, among writes and regions. In half of these
# programs all is shared that may be.
SHARING = replace(
    EVERYTHING,
    name="sharing",
    weights={
        "again": 6,
        "einsum": 4,
        "chain": 2,
        "product": 2,
        "matmul": 3,
        "scalar": 1,
        "turn": 1.5,
        "view": 1.5,
        "unary": 0.7,
        "in_place": 1.2,
        "write_later": 0.4,
        "region": 0.7,
    },
    all_forms=False,
    statements=(6, 12),
)

_ALL = (EVERYTHING, PURE, EFFECTS, KEYS, PREDECESSOR, PRODUCTS, RESHAPED, HOOKS, SHARING)
PROFILES = {profile.name: profile for profile in _ALL}


@dataclass(frozen=True)
class Input:
    """One argument or one tensor of the module: an expression that builds it, for each set of sizes."""

    name: str
    expressions: tuple[str, ...]
    requires_grad: bool = False
    leaf: bool = True


@dataclass(frozen=True)
class Program:
    """A random module, its inputs in several sets of sizes, and what may be said about it."""

    seed: int
    profile: str
    body: str
    inputs: tuple[Input, ...]
    state: tuple[Input, ...]
    tolerance: float
    #: Whether ``forward`` takes a Python number ``k`` too.
    constant: bool = False

    @property
    def source(self) -> str:
        """The module as Python text."""
        lines = ["class Program(torch.nn.Module):", "    def __init__(self):", "        super().__init__()"]
        lines.append("        g = torch.Generator().manual_seed(1)")
        for item in self.state:
            if item.name.startswith("w"):
                built = f"torch.nn.Parameter({item.expressions[0]}, requires_grad={item.requires_grad})"
                lines.append(f"        self.{item.name} = {built}")
            else:
                lines.append(f"        self.register_buffer({item.name!r}, {item.expressions[0]})")
        names = [item.name for item in self.inputs] + ["k=1"] * self.constant
        lines.append(f"    def forward(self, {', '.join(names)}):")
        lines.append(textwrap.indent(self.body, "        "))
        return "\n".join(lines)

    def inputs_source(self, which: int) -> str:
        """Python text that builds the arguments."""
        lines = []
        for item in self.inputs:
            lines.append(f"{item.name} = {item.expressions[which]}")
        lines.extend(f"{item.name}.requires_grad_()" for item in self.inputs if item.requires_grad)
        return "\n".join(lines)

    def build(self) -> nn.Module:
        """Make the module."""
        scope: dict[str, Any] = {"torch": torch}
        exec(compile(self.source, f"<program {self.seed}>", "exec"), scope)
        module = scope["Program"]()
        assert isinstance(module, nn.Module)
        return module

    def arguments(self, which: int, seed: int) -> tuple[Tensor, ...]:
        """Make the arguments for one set of sizes."""
        scope: dict[str, Any] = {"torch": torch, "g": torch.Generator().manual_seed(seed)}
        for item in self.inputs:
            scope[item.name] = eval(item.expressions[which], scope)
        arguments = clone_tree(tuple(scope[item.name] for item in self.inputs))
        for item, argument in zip(self.inputs, arguments):
            argument.requires_grad_(item.requires_grad)
        return tuple(arguments)

    def reproduction(self, which: int) -> str:
        """A script that shows both results."""
        names = ", ".join(item.name for item in self.inputs)
        return (
            f"# program {self.seed}, profile {self.profile}\n"
            "import copy, torch\nfrom lazy_einsum import OptimizedModule\n\n"
            f"{self.source}\n\ng = torch.Generator().manual_seed(2)\n{self.inputs_source(which)}\n"
            f"child = Program()\nargs = ({names},)\n"
            "fresh = copy.deepcopy([a.detach() for a in args])  # keeps shared memory, as writes need\n"
            "print(OptimizedModule(copy.deepcopy(child))(*args))\nprint(child(*fresh))\n"
        )


class Rejected(Exception):
    """A statement that eager torch refuses, or whose values leave the bounds."""


class Abandoned(Exception):
    """A write that eager torch refused for one of the two sets of sizes after it was done for the other."""


@dataclass(frozen=True)
class Value:
    """A tensor of the program under construction: its name and the symbolic size of each dimension."""

    name: str
    dims: tuple[str, ...]
    dtype: torch.dtype

    @property
    def rank(self) -> int:
        return len(self.dims)


class Generator:
    """Builds one program; each statement is executed in both sets of sizes before it is kept."""

    def __init__(self, seed: int, profile: Profile) -> None:
        self.random = random.Random(seed * 7919 + 13)
        self.seed = seed
        self.profile = profile
        self.lines: list[str] = []
        self.indent = 0
        self.values: list[Value] = []
        self.counter = 0
        self.used: set[str] = set()
        self.inside: set[str] = set()  # values made in regions
        self.inverse: dict[str, str] = {}
        self.contractions: list[tuple[str, tuple[str, ...] | None]] = []
        self.pinned: set[str] = set()
        self.low_precision = False
        self.constant = profile.regions and self.random.random() < 0.25

    # -- the way a program comes about ---------------------------------------------------------------------------

    def program(self) -> Program:
        rng = self.random
        first = {symbol: rng.choice((2, 3, 3, 4, 5)) for symbol in "ABCDE"}
        if rng.random() < 0.3:
            first[rng.choice("ABCDE")] = 1
        second = {symbol: rng.choice((1, 2, 3, 4, 6)) for symbol in "ABCDE"}
        # Sizes that are seen to vary make generic code; statements are not tried with these.
        further = [{symbol: rng.choice((2, 4, 5, 6, 7)) for symbol in "ABCDE"} for _ in range(2)]
        dtype = rng.choices(self.profile.dtypes, self.profile.dtype_weights)[0]
        self.dtype = dtype
        inputs, state, dims = self._declare(dtype)
        for symbol in self.pinned:
            for sizes in (second, *further):
                sizes[symbol] = first[symbol]
        self.sizes = (first, second)
        self.environments: list[dict[str, Any]] = []
        built_inputs: list[Input] = []
        built_state: list[Input] = []
        for item, template in inputs:
            expressions = tuple(template(sizes) for sizes in (first, second, *further))
            built_inputs.append(replace(item, expressions=expressions))
        for item, template in state:
            built_state.append(replace(item, expressions=tuple(template(sizes) for sizes in self.sizes)))
        shell = Program(self.seed, self.profile.name, "", tuple(built_inputs), tuple(built_state), 0.0, self.constant)
        for which in range(2):
            module = replace(shell, body="pass").build()
            arguments = shell.arguments(which, 2)
            scope: dict[str, Any] = {"torch": torch, "self": module, "k": 1}
            for item, argument in zip(built_inputs, arguments):
                scope[item.name] = argument if item.leaf else argument.clone()
            self.environments.append(scope)
        for item in (*built_inputs, *built_state):
            name = item.name if item in built_inputs else f"self.{item.name}"
            self.values.append(Value(name, dims[item.name], dtype))
        for _ in range(rng.randint(*self.profile.statements)):
            self._statement()
        returned = self._returns()
        if self.low_precision:
            tolerance = TOLERANCE[torch.float32]
        else:
            tolerance = TOLERANCE[torch.float64]
        body = "\n".join([*self.lines, f"return {returned}"])
        return replace(shell, body=body, tolerance=tolerance)

    def _declare(self, dtype: torch.dtype) -> tuple[list[Any], list[Any], dict[str, tuple[str, ...]]]:
        rng = self.random
        differentiable = dtype.is_floating_point or dtype.is_complex
        dims: dict[str, tuple[str, ...]] = {}
        inputs: list[tuple[Input, Callable[[Mapping[str, int]], str]]] = []
        for i in range(rng.randint(1, 3)):
            name = f"x{i}"
            if i and self.profile.aliased_inputs and rng.random() < 0.08:
                base, _ = rng.choice(inputs)
                if base.leaf:
                    form, shape = self._alias(base.name, dims[base.name])
                    dims[name] = shape
                    inputs.append(
                        (Input(name, (), base.requires_grad and rng.random() < 0.7), lambda sizes, form=form: form)
                    )
                    continue
            rank = rng.choices((0, 1, 2, 3, 4), (0.3, 1.5, 5, 3, 0.5))[0]
            shape = tuple(rng.choices("ABCDE1", (3, 3, 3, 1.5, 1, 0.7))[0] for _ in range(rank))
            dims[name] = shape
            requires_grad = differentiable and rng.random() < 0.6
            leaf = not (requires_grad and rng.random() < 0.4)
            inputs.append(
                (Input(name, (), requires_grad, leaf), self._tensor(shape, dtype, strided=rng.random() < 0.25))
            )
        state: list[tuple[Input, Callable[[Mapping[str, int]], str]]] = []
        for i in range(rng.choices((0, 1, 2), (4, 3, 2))[0]):
            parameter = differentiable and rng.random() < 0.7
            name = f"w{i}" if parameter else f"b{i}"
            shape = tuple(rng.choices("ABCDE", (3, 3, 3, 1.5, 1))[0] for _ in range(rng.randint(1, 3)))
            dims[name] = shape
            self.pinned.update(shape)
            state.append(
                (Input(name, (), parameter and rng.random() < 0.85), self._tensor(shape, dtype, strided=False))
            )
        return inputs, state, dims

    def _tensor(self, shape: tuple[str, ...], dtype: torch.dtype, strided: bool) -> Callable[[Mapping[str, int]], str]:
        order = list(range(len(shape)))
        self.random.shuffle(order)
        step = self.random.random() < 0.4

        def expression(sizes: Mapping[str, int]) -> str:
            lengths = [sizes.get(symbol, 1) for symbol in shape]
            if strided and shape:
                lengths = [lengths[axis] for axis in order]
                if step:
                    lengths[-1] *= 2
            size = f"({', '.join(map(str, lengths))}{',' if len(lengths) == 1 else ''})"
            if dtype.is_floating_point or dtype.is_complex:
                text = f"torch.randn({size}, generator=g, dtype={dtype})"
            else:
                text = f"torch.randint(-5, 6, {size}, generator=g, dtype={dtype})"
            if strided and shape:
                if step:
                    text += "[..., ::2]"
                inverse = [order.index(axis) for axis in range(len(shape))]
                text += f".permute({', '.join(map(str, inverse))})"
            return text

        return expression

    def _alias(self, name: str, shape: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
        kind = self.random.randrange(3)
        if kind == 0 and len(shape) == 2:
            return f"{name}.t()", (shape[1], shape[0])
        if kind == 1 and shape:
            return f"{name}[0]", shape[1:]
        return f"{name}.view_as({name})", shape

    # -- statements -----------------------------------------------------------------------------------------------

    def _statement(self) -> None:
        names, weights = zip(*self.profile.weights.items())
        for _ in range(12):
            kind = self.random.choices(names, weights)[0]
            try:
                getattr(self, f"_{kind}")()
            except Rejected:
                continue
            return

    def _keep(self, code: str, dims: tuple[str, ...] | None) -> Value:
        """Run ``NAME = code`` everywhere and remember the result, or raise Rejected."""
        name = f"v{self.counter}"
        results = self._run(f"{name} = {code}", name)
        if dims is not None:
            for result, sizes in zip(results, self.sizes):
                expected = tuple(self._size(symbol, sizes) for symbol in dims)
                assert tuple(result.shape) == expected, f"{code}: {tuple(result.shape)} != {expected}"
        self.counter += 1
        if self.indent:
            self.inside.add(name)
        self.used.update(re.findall(r"\b(?:self\.)?[a-z]\d+\b", code))
        value = Value(name, dims or (), results[0].dtype)
        self.values.append(value)
        if re.search(r"einsum|matmul| @ |\.(mm|bmm|mv|dot)\(", code):
            self.contractions.append((code, dims))
        self.lines.append("    " * self.indent + f"{name} = {code}")
        return value

    def _size(self, symbol: str, sizes: Mapping[str, int]) -> int:
        if "*" in symbol:
            product = 1
            for factor in symbol.split("*"):
                product *= self._size(factor, sizes)
            return product
        if symbol.endswith("[1:]"):
            return max(self._size(symbol[:-4], sizes) - 1, 0)
        if symbol.endswith("[::2]"):
            return (self._size(symbol[:-5], sizes) + 1) // 2
        return 1 if symbol == "1" else sizes[symbol]

    def _run(self, statement: str, name: str | None) -> list[Tensor]:
        results = []
        code = compile(statement, "<statement>", "exec")
        before = (
            [[(t._version, t) for t in scope.values() if isinstance(t, Tensor)] for scope in self.environments]
            if name is None
            else None
        )
        for scope in self.environments:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    exec(code, scope)
            except Exception as error:
                if name is None and any(t._version != v for rows in before or () for v, t in rows):
                    raise Abandoned from error
                if name is not None:
                    for other in self.environments:
                        other.pop(name, None)
                raise Rejected from error
            if name is not None:
                results.append(scope[name])
        for result in results:
            self._bounded(result)
        return results

    def _bounded(self, tensor: Tensor) -> None:
        assert isinstance(tensor, Tensor)
        if tensor.numel() > LARGEST_NUMEL or tensor.dim() > LARGEST_RANK:
            raise Rejected
        if tensor.dtype in (torch.float32, torch.complex64, torch.float16, torch.bfloat16):
            self.low_precision = True
        if tensor.numel() and (tensor.is_floating_point() or tensor.is_complex()):
            largest = tensor.detach().abs().max().item()
            if not largest < LARGEST:
                raise Rejected

    def _write(self, code: str) -> None:
        """Run a statement that writes in place; undo nothing, so it is tried on copies first."""
        copies = []
        for scope in self.environments:
            tensors = {k: v for k, v in scope.items() if isinstance(v, Tensor)}
            memo = _copy_environment(tensors, scope["self"])
            copies.append({"torch": torch, "k": 1, **memo})
        compiled = compile(code, "<write>", "exec")
        for trial in copies:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    exec(compiled, trial)
            except Exception as error:
                raise Rejected from error
            for value in trial.values():
                if isinstance(value, Tensor):
                    self._bounded(value)
        # Autograd's own rules (a leaf, a view of a leaf) hold on the real tensors only, so this may be rejected too.
        self._run(code, None)
        self.lines.append("    " * self.indent + code)

    def _pick(self, condition: Callable[[Value], bool] | None = None, recent: float = 0.4) -> Value:
        candidates = [v for v in self.values if condition is None or condition(v)]
        if not candidates:
            raise Rejected
        draw = self.random.random()
        if draw < recent:
            return candidates[-1]
        unused = [v for v in candidates if v.name not in self.used]
        if draw < recent + 0.3 and unused:
            return self.random.choice(unused)
        return self.random.choice(candidates)

    def _like(self, value: Value) -> Value:
        return self._pick(lambda v: v.dtype == value.dtype)

    # einsum -------------------------------------------------------------------------------------------------------

    def _einsum(self, first: Value | None = None) -> None:
        rng = self.random
        first = first or self._pick()
        count = rng.choices((1, 2, 3, 4), (1.5, 6, 2, 0.5))[0]
        operands = [first] + [self._like(first) for _ in range(count - 1)]
        if rng.random() < 0.1 and count > 1:
            operands[1] = operands[0]
        symbol_of: dict[int, str] = {}
        labelled: list[list[int]] = []
        for operand in operands:
            mine: list[int] = []
            for symbol in operand.dims:
                same = [x for x, s in symbol_of.items() if s == symbol and x not in mine]
                diagonal = [x for x in mine if symbol_of[x] == symbol]
                broadcast = [x for x, s in symbol_of.items() if x not in mine and (symbol == "1" or s == "1")]
                if diagonal and rng.random() < 0.12:
                    label = rng.choice(diagonal)
                elif same and rng.random() < 0.75:
                    label = rng.choice(same)
                elif broadcast and rng.random() < 0.3:
                    label = rng.choice(broadcast)
                    if symbol_of[label] == "1":
                        symbol_of[label] = symbol
                else:
                    label = len(symbol_of)
                    symbol_of[label] = symbol
                mine.append(label)
            labelled.append(mine)
        work = 1
        for symbol in symbol_of.values():
            work *= self._size(symbol, self.sizes[0])
        if work > 30000:
            raise Rejected
        uses = {label: sum(mine.count(label) for mine in labelled) for label in symbol_of}
        output = [x for x in symbol_of if rng.random() < (0.85 if uses[x] == 1 else 0.45)]
        rng.shuffle(output)
        output = output[:4]
        code, dims = self._spell(operands, labelled, output, uses, symbol_of)
        self._keep(code, dims)

    def _spell(
        self,
        operands: Sequence[Value],
        labelled: list[list[int]],
        output: list[int],
        uses: Mapping[int, int],
        symbol_of: Mapping[int, str],
    ) -> tuple[str, tuple[str, ...]]:
        rng = self.random
        form = rng.random() if self.profile.all_forms else 1.0
        names = ", ".join(v.name for v in operands)
        function = rng.choice(("torch.einsum", "torch.einsum", "torch.einsum", "torch.functional.einsum"))
        if form < 0.1:
            parts = ", ".join(f"{v.name}, {mine}" for v, mine in zip(operands, labelled))
            return f"torch.einsum({parts}, {output})", tuple(symbol_of[x] for x in output)
        letters = rng.sample(LETTERS if rng.random() < 0.3 else string.ascii_lowercase, len(symbol_of))
        text = ["".join(letters[x] for x in mine) for mine in labelled]
        target = "".join(letters[x] for x in output)
        if form < 0.25:
            singles = sorted((x for x in symbol_of if uses[x] == 1), key=lambda x: letters[x])
            return f"{function}({','.join(text)!r}, {names})", tuple(symbol_of[x] for x in singles)
        if form < 0.4:
            # The ellipsis stands for one label that leads every operand that has it.
            leading = [
                x for x in symbol_of if all(mine[0] == x and mine.count(x) == 1 for mine in labelled if x in mine)
            ]
            if leading:
                label = rng.choice(leading)
                text = [t.replace(letters[label], "...") for t in text]
                text = [t if "..." in t or rng.random() < 0.5 else f"...{t}" for t in text]
                target = target.replace(letters[label], "...")
        if form < 0.45:
            text = [" ".join(t) if "." not in t else f" {t} " for t in text]
            return f"{function}({' , '.join(text) + ' -> ' + target!r}, {names})", tuple(symbol_of[x] for x in output)
        equation = f"{','.join(text)}->{target}"
        if form < 0.5:
            return f"{function}({equation!r}, [{names}])", tuple(symbol_of[x] for x in output)
        return f"{function}({equation!r}, {names})", tuple(symbol_of[x] for x in output)

    # matrix products ------------------------------------------------------------------------------------------------

    def _matmul(self) -> None:
        rng = self.random
        kind = rng.choice(
            ("matmul", "matmul", "linear", "tensordot", "tensordot", "outer", "addmm", "bilinear", "multi_dot")
        )
        if kind == "outer":
            a = self._pick(lambda v: v.rank == 1)
            b = self._pick(lambda v: v.rank == 1 and v.dtype == a.dtype)
            if a.dims == b.dims and rng.random() < 0.5:
                self._keep(f"torch.{rng.choice(('dot', 'inner', 'vdot'))}({a.name}, {b.name})", ())
                return
            self._keep(f"torch.outer({a.name}, {b.name})", (*a.dims, *b.dims))
            return
        if kind == "linear":
            a = self._pick(lambda v: v.rank >= 1)
            b = self._pick(lambda v: v.rank == 2 and v.dims[1] == a.dims[-1] and v.dtype == a.dtype)
            bias = [v for v in self.values if v.dims == (b.dims[0],) and v.dtype == a.dtype]
            extra = f", {rng.choice(bias).name}" if bias and rng.random() < 0.5 else ""
            self._keep(f"torch.nn.functional.linear({a.name}, {b.name}{extra})", (*a.dims[:-1], b.dims[0]))
            return
        if kind == "tensordot":
            a = self._pick(lambda v: v.rank >= 1)
            b = self._pick(lambda v: v.dtype == a.dtype and bool(set(v.dims) & set(a.dims)))
            shared = rng.choice(sorted(set(a.dims) & set(b.dims)))
            i = rng.choice([i for i, s in enumerate(a.dims) if s == shared])
            j = rng.choice([j for j, s in enumerate(b.dims) if s == shared])
            left = tuple(s for k, s in enumerate(a.dims) if k != i)
            right = tuple(s for k, s in enumerate(b.dims) if k != j)
            if i == a.rank - 1 and j == 0 and rng.random() < 0.5:
                self._keep(f"torch.tensordot({a.name}, {b.name}, {rng.choice(('1', 'dims=1'))})", left + right)
            else:
                self._keep(f"torch.tensordot({a.name}, {b.name}, dims=([{i}], [{j}]))", left + right)
            return
        if kind == "bilinear":
            a = self._pick(lambda v: v.rank == 2)
            b = self._pick(lambda v: v.rank == 2 and v.dims[0] == a.dims[0] and v.dtype == a.dtype)
            w = self._pick(lambda v: v.rank == 3 and v.dims[1:] == (a.dims[1], b.dims[1]) and v.dtype == a.dtype)
            self._keep(f"torch.nn.functional.bilinear({a.name}, {b.name}, {w.name})", (a.dims[0], w.dims[0]))
            return
        if kind == "addmm":
            a = self._pick(lambda v: v.rank == 2)
            b = self._pick(lambda v: v.rank == 2 and v.dims[0] == a.dims[1] and v.dtype == a.dtype)
            c = self._pick(lambda v: v.dims in ((a.dims[0], b.dims[1]), (b.dims[1],), ()) and v.dtype == a.dtype)
            scale = f", alpha={rng.choice((1, 2, -3))}, beta={rng.choice((0, 1, 2))}" if rng.random() < 0.6 else ""
            self._keep(f"torch.addmm({c.name}, {a.name}, {b.name}{scale})", (a.dims[0], b.dims[1]))
            return
        if kind == "multi_dot":
            a = self._pick(lambda v: v.rank == 2)
            b = self._pick(lambda v: v.rank == 2 and v.dims[0] == a.dims[1] and v.dtype == a.dtype)
            c = self._pick(lambda v: v.rank in (1, 2) and v.dims[0] == b.dims[1] and v.dtype == a.dtype)
            self._keep(f"torch.linalg.multi_dot([{a.name}, {b.name}, {c.name}])", (a.dims[0], *c.dims[1:]))
            return
        a = self._pick(lambda v: v.rank >= 1)
        candidates = []
        for v in self.values:
            if v.dtype != a.dtype or not v.rank:
                continue
            if v.rank == 1:
                if v.dims[0] == a.dims[-1]:
                    candidates.append((v, v.name, v.dims))
                continue
            if v.dims[-2] == a.dims[-1]:
                candidates.append((v, v.name, v.dims))
            if v.dims[-1] == a.dims[-1]:
                flipped = (*v.dims[:-2], v.dims[-1], v.dims[-2])
                spelled = rng.choice((f"{v.name}.mT", f"{v.name}.transpose(-1, -2)"))
                if v.rank == 2:
                    spelled = rng.choice((spelled, f"{v.name}.T", f"{v.name}.t()"))
                candidates.append((v, spelled, flipped))
        if not candidates:
            raise Rejected
        _, text, dims = rng.choice(candidates)
        if a.rank == 1:
            result = (*dims[:-2], dims[-1]) if len(dims) > 1 else ()
        elif len(dims) == 1:
            result = a.dims[:-1]
        else:
            result = (*_broadcast(a.dims[:-2], dims[:-2]), a.dims[-2], dims[-1])
        forms = [f"{a.name} @ {text}", f"torch.matmul({a.name}, {text})", f"{a.name}.matmul({text})"]
        if a.rank == 2 and len(dims) == 2:
            forms += [f"torch.mm({a.name}, {text})", f"{a.name}.mm({text})"]
        if a.rank == 2 and len(dims) == 1:
            forms.append(f"torch.mv({a.name}, {text})")
        if a.rank == 3 and len(dims) == 3 and a.dims[0] == dims[0]:
            forms.append(f"torch.bmm({a.name}, {text})")
        self._keep(rng.choice(forms), result)

    def _product(self) -> None:
        """Products that ``_matmul`` does not make."""
        rng = self.random
        kind = rng.choice(("baddbmm", "addmv", "inner", "vecdot", "bilinear", "linear", "multi_dot", "chain_matmul"))
        if kind == "inner":
            a = self._pick(lambda v: v.rank >= 1)
            b = self._pick(lambda v: v.rank >= 1 and v.dims[-1] == a.dims[-1] and v.dtype == a.dtype)
            self._keep(f"torch.inner({a.name}, {b.name})", (*a.dims[:-1], *b.dims[:-1]))
        elif kind == "vecdot":
            a = self._pick(lambda v: v.rank >= 1)
            b = self._pick(lambda v: v.rank >= 1 and v.dims[-1] == a.dims[-1] and v.dtype == a.dtype)
            self._keep(f"torch.linalg.vecdot({a.name}, {b.name})", _broadcast(a.dims[:-1], b.dims[:-1]))
        elif kind == "baddbmm":
            a = self._pick(lambda v: v.rank == 3)
            b = self._pick(lambda v: v.rank == 3 and v.dims[:2] == (a.dims[0], a.dims[2]) and v.dtype == a.dtype)
            dims = (a.dims[0], a.dims[1], b.dims[2])
            c = self._pick(lambda v: v.dims in (dims, dims[1:], dims[2:], ()) and v.dtype == a.dtype)
            scale = rng.choice(("", "", ", beta=1, alpha=1", ", alpha=2", ", beta=0"))
            self._keep(f"torch.baddbmm({c.name}, {a.name}, {b.name}{scale})", dims)
        elif kind == "addmv":
            a = self._pick(lambda v: v.rank == 2)
            b = self._pick(lambda v: v.dims == a.dims[1:] and v.dtype == a.dtype)
            c = self._pick(lambda v: v.dims in (a.dims[:1], ()) and v.dtype == a.dtype)
            self._keep(f"{c.name}.addmv({a.name}, {b.name}{rng.choice(('', ', alpha=2'))})", a.dims[:1])
        elif kind == "bilinear":
            a = self._pick(lambda v: v.rank >= 1)
            b = self._pick(lambda v: v.rank >= 1 and v.dims[:-1] == a.dims[:-1] and v.dtype == a.dtype)
            w = self._pick(lambda v: v.rank == 3 and v.dims[1:] == (a.dims[-1], b.dims[-1]) and v.dtype == a.dtype)
            bias = [v for v in self.values if v.dims == w.dims[:1] and v.dtype == a.dtype]
            extra = f", {rng.choice(bias).name}" if bias and rng.random() < 0.5 else ""
            self._keep(f"torch.nn.functional.bilinear({a.name}, {b.name}, {w.name}{extra})", (*a.dims[:-1], w.dims[0]))
        elif kind == "linear":
            a = self._pick(lambda v: v.rank >= 1)
            b = self._pick(lambda v: v.dims == a.dims[-1:] and v.dtype == a.dtype)
            self._keep(f"torch.nn.functional.linear(weight={b.name}, input={a.name})", a.dims[:-1])
        else:
            first = (1, 2) if kind == "multi_dot" else (2,)
            a = self._pick(lambda v: v.rank in first)
            chain, last = [a.name], a
            for _ in range(rng.choice((1, 2, 2, 3))):
                last = self._pick(partial(_continues, a.dtype, last.dims[-1:]))
                chain.append(last.name)
            listed = ", ".join(chain)
            call = f"torch.linalg.multi_dot([{listed}])" if kind == "multi_dot" else f"torch.chain_matmul({listed})"
            self._keep(call, (*a.dims[:-1], last.dims[1]))

    def _chain(self) -> None:
        """Several products in one statement, some of them turned."""
        rng = self.random
        a = self._pick(lambda v: v.rank >= 2)
        text, dims = a.name, a.dims
        for _ in range(rng.choice((2, 2, 3, 4))):
            if len(dims) < 2:
                break
            if rng.random() < 0.2:
                text, dims = f"({text}).mT", (*dims[:-2], dims[-1], dims[-2])
            b = self._pick(partial(_multiplies, a.dtype, dims), recent=0.1)
            other, shape = self._updated(b), b.dims
            if b.rank > 1 and (shape[-2] != dims[-1] or (shape[-1] == dims[-1] and rng.random() < 0.5)):
                if b.rank == 2 and rng.random() < 0.4:
                    bias = self._row(a.dtype, shape[0])
                    text = f"torch.nn.functional.linear({text}, {self._updated(b)}{bias and f', {bias}'})"
                    dims = (*dims[:-1], shape[0])
                    continue
                other, shape = f"{other}.transpose(-2, -1)", (*shape[:-2], shape[-1], shape[-2])
            text = rng.choice((f"({text}) @ {other}", f"({text}).matmul({other})", f"torch.matmul({text}, {other})"))
            batch = _broadcast(dims[:-2], shape[:-2])
            dims = (*batch, dims[-2], *shape[-1:]) if len(shape) > 1 else dims[:-1]
        self._keep(text, dims)

    def _row(self, dtype: torch.dtype, size: str) -> str:
        """A vector of this size, or nothing."""
        found = [v.name for v in self.values if v.dtype == dtype and v.dims == (size,)]
        found += [f"{v.name}[0]" for v in self.values if v.dtype == dtype and v.rank == 2 and v.dims[1] == size]
        return self.random.choice(found) if found and self.random.random() < 0.5 else ""

    def _updated(self, weight: Value) -> str:
        """A tensor, or its sum with a product."""
        rng = self.random
        if weight.rank != 2 or rng.random() < 0.5:
            return weight.name
        matrices = [v for v in self.values if v.dtype == weight.dtype and v.rank == 2]
        pairs = [
            f"({one.name} @ {two.name})"
            for one in matrices
            for two in matrices
            if one.dims[1] == two.dims[0] and (one.dims[0], two.dims[1]) == weight.dims
        ]
        pairs += [f"({one.name} @ {one.name}.mT @ {weight.name})" for one in matrices if one.dims[0] == weight.dims[0]]
        if not pairs:
            return weight.name
        product = rng.choice(pairs)
        forms = (
            f"({weight.name} + {product})",
            f"({weight.name} - {product})",
            f"({product} * 2 + {weight.name})",
            f"torch.add({weight.name}, {product}, alpha=3)",
        )
        return rng.choice(forms)

    def _turn(self) -> None:
        """A permutation of dimensions."""
        rng = self.random
        a = self._pick(lambda v: v.rank >= 2)
        order = list(range(a.rank))
        one, two = rng.sample(order, 2)
        turned = [*order]
        turned[one], turned[two] = two, one
        moved = [dim for dim in order if dim != one]
        moved.insert(two, one)
        shuffled = rng.sample(order, len(order))
        forms = [
            (f"{a.name}.transpose({one}, {two - a.rank})", turned),
            (f"torch.swapaxes({a.name}, {one}, {two})", turned),
            (f"{a.name}.movedim({one}, {two})", moved),
            (f"torch.moveaxis({a.name}, ({one},), ({two},))", moved),
            (f"{a.name}.permute({', '.join(map(str, shuffled))})", shuffled),
            (f"torch.permute({a.name}, {tuple(shuffled)})", shuffled),
        ]
        if a.rank == 2:
            forms += [(f"{a.name}.T", [1, 0]), (f"{a.name}.t()", [1, 0])]
        text, places = rng.choice(forms)
        self._keep(text, tuple(a.dims[place] for place in places))

    def _regroup(self) -> None:
        """Dimensions taken together, or apart, and a product with something in the same shape."""
        rng = self.random
        a = self._pick(lambda v: v.rank >= 2 or "*" in "".join(v.dims))
        if rng.random() < 0.2:
            b = self._pick(lambda v: v.dtype == a.dtype and v.rank == a.rank)
            # (Of transposed matrices torch itself gives no product without data.)
            text = f"torch.kron({a.name}.contiguous(), {b.name}.contiguous())"
            dims = tuple("*".join(pair) for pair in zip(a.dims, b.dims, strict=True))
            if a.rank > 2 or any("[" in dim or "1" in dim.split("*") or len(dim) > 12 for dim in dims):
                raise Rejected
        else:
            text, dims = self._reshaped(a.name, a.dims)
        for _ in range(rng.choice((1, 2, 3))):
            if not dims:
                break
            other, shape = self._fitting(a.dtype, dims)
            if len(shape) == 2 and shape[0] == dims[-1] and rng.random() < 0.7:
                text, dims = f"({text}) @ {other}", (*dims[:-1], *shape[1:])
            elif _broadcasts(dims, shape):
                text, dims = f"({text}) * {other}", _broadcast(dims, shape)
            if rng.random() < 0.8 and dims:
                text, dims = self._reshaped(f"({text})", dims)
        self._keep(text, dims)

    def _reshaped(self, text: str, dims: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
        """A tensor in another shape: two dimensions as one, or one as two, or one more of size 1."""
        rng = self.random
        merged = [place for place, dim in enumerate(dims) if "*" in dim]
        if merged and rng.random() < 0.6:
            place = rng.choice(merged)
            left, _, right = dims[place].partition("*")
            sizes = [f"{v.name}.shape[{dim}]" for v in self.values for dim, size in enumerate(v.dims) if size == left]
            if sizes:
                apart = (*dims[:place], left, right, *dims[place + 1 :])
                return f"{text}.unflatten({place}, ({rng.choice(sizes)}, -1))", apart
        if len(dims) < 2 or rng.random() < 0.15:
            place = rng.randrange(len(dims) + 1)
            return f"{text}.unsqueeze({place})", (*dims[:place], "1", *dims[place:])
        place = rng.randrange(len(dims) - 1)
        if any("[" in dim for dim in dims[place : place + 2]):
            raise Rejected
        together = (*dims[:place], "*".join(dims[place : place + 2]), *dims[place + 2 :])
        return f"{text}.flatten({place}, {place + 1})", together

    def _fitting(self, dtype: torch.dtype, dims: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
        """A tensor, as it is or with two dimensions as one, whose first or last dimension is the last of ``dims``."""
        found = [(v.name, v.dims) for v in self.values if v.dtype == dtype and 1 <= v.rank <= 3]
        found += [
            (
                f"{name}.flatten({place}, {place + 1})",
                (*shape[:place], "*".join(shape[place : place + 2]), *shape[place + 2 :]),
            )
            for name, shape in found
            for place in range(len(shape) - 1)
        ]
        found = [
            (text, shape)
            for text, shape in found
            if dims[-1] == shape[-1] or (dims[-1] == shape[0] and len(shape) == 2)
        ]
        if not found:
            raise Rejected
        return self.random.choice(found)

    def _sum(self) -> None:
        """A weight with something added, as low-rank updates have it."""
        rng = self.random
        a = self._pick(lambda v: v.rank >= 1)
        b = self._pick(lambda v: v.dims == a.dims and v.dtype == a.dtype)
        number = self._number(a.dtype)
        text = rng.choice(
            (
                f"{a.name} + {b.name}",
                f"{a.name} + {number} * {b.name}",
                f"{a.name} - {b.name}",
                f"torch.add({a.name}, {b.name}, alpha=2)",
                f"{b.name} * {number} + {a.name}",
            )
        )
        self._keep(text, a.dims)

    def _again(self) -> None:
        """A contraction that was there before, in another order, under other names, or times one more tensor."""
        rng = self.random
        if not self.contractions:
            raise Rejected
        code, dims = rng.choice(self.contractions[-4:])
        found = re.fullmatch(r"torch\.(functional\.)?einsum\('([a-zA-Z,]+)->([a-zA-Z]*)', ([^()]+)\)", code)
        if found is not None and dims is not None and rng.random() < 0.8:
            letters = dict(zip(LETTERS, rng.sample(LETTERS, len(LETTERS))))
            terms = list(zip(found[2].split(","), found[4].split(", ")))
            places = list(range(len(dims)))
            rng.shuffle(terms)
            if rng.random() < 0.5:
                rng.shuffle(places)
            if rng.random() < 0.4 and places:
                # A label of the result goes on to another tensor.
                label = rng.choice(found[3])
                b = self._pick(
                    lambda v: v.dtype == self.dtype and v.rank == 1 and v.dims[0] == dims[found[3].index(label)]
                )
                terms.append((label, b.name))
                places.remove(found[3].index(label))
            equation = f"{','.join(term for term, _ in terms)}->{''.join(found[3][place] for place in places)}"
            equation = "".join(letters.get(character, character) for character in equation.replace("->", ">"))
            code = f"torch.einsum({equation.replace('>', '->')!r}, {', '.join(name for _, name in terms)})"
            dims = tuple(dims[place] for place in places)
        elif dims is not None and len(dims) > 1 and rng.random() < 0.6:
            b = self._pick(lambda v: v.dtype == self.dtype and v.rank in (1, 2) and v.dims[0] == dims[-1], recent=0.1)
            code, dims = f"({code}) @ {b.name}", (*dims[:-1], *b.dims[1:])
        self._keep(code, dims)

    # scalars ----------------------------------------------------------------------------------------------------------

    def _number(self, dtype: torch.dtype) -> str:
        rng = self.random
        integers = ("2", "3", "-1", "5", "-2", "1", "7", "True")
        floats = ("2.0", "0.5", "-1.5", "0.25", "3.0", "1.7", "-0.3", "1.0")
        if dtype.is_complex:
            return rng.choice((*integers, *floats, "2j", "(1+0.5j)", "-1j"))
        if dtype.is_floating_point:
            if rng.random() < 0.03 and self.profile.all_forms:
                return rng.choice(("2j", "(1-1j)"))
            return rng.choice((*integers, *floats, *floats))
        if rng.random() < 0.15 and self.profile.all_forms:
            return rng.choice(floats)
        return rng.choice((*integers, "9007199254740993"))

    def _scalar(self) -> None:
        rng = self.random
        if self.inverse and self.profile.regions and rng.random() < 0.25:
            # The factor of a recent value taken back: what cancels must leave no less than a copy.
            name, inverse = rng.choice(list(self.inverse.items())[-3:])
            (a,) = [v for v in self.values if v.name == name]
            self._keep(inverse, a.dims)
            return
        a = self._pick(recent=0.6)
        number = self._number(a.dtype)
        integer = not (a.dtype.is_floating_point or a.dtype.is_complex)
        if self.constant and rng.random() < 0.4:
            number = "k"
        if rng.random() < 0.08 and a.rank and self.profile.all_forms:
            number = rng.choice((f"{a.name}.shape[-1]", f"{a.name}.size(0)", f"({a.name}.shape[0] ** 0.5)"))
        n = a.name
        forms = [f"{n} * {number}", f"{number} * {n}", f"{n} * {number}", f"{number} * {n}"]
        forms += [f"{n}.mul({number})", f"-{n}"]
        if not (integer and rng.random() < 0.7):
            forms += [f"{n} / {number}", f"{n} / {number}", f"{n}.div({number})"]
        if self.profile.all_forms:
            forms += [f"torch.mul({n}, {number})", f"torch.neg({n})", f"{n}.neg()", f"{n} + {number}"]
            forms += [f"{number} - {n}", f"torch.true_divide({n}, {number})", f"{n} - {number}"]
            forms += [f"torch.add({n}, {n}, alpha={rng.choice((2, 3))})", f"+{n}", f"torch.multiply({n}, {number})"]
            if not a.dtype.is_complex and "j" not in number:
                forms.append(f"{n}.div({number}, rounding_mode={rng.choice(('floor', 'trunc'))!r})")
        code = rng.choice(forms)
        if rng.random() < 0.15:
            self._inverse_scalar(a, number)
            return
        if "rounding_mode" in code:
            self._far_from_steps(f"{n} / {number}")
        kept = self._keep(code, a.dims)
        if code in (f"-{n}", f"torch.neg({n})", f"{n}.neg()"):
            self.inverse[kept.name] = rng.choice((f"-{kept.name}", f"-1 * {kept.name}", f"{kept.name} / -1"))
        elif code in (f"{n} * {number}", f"{number} * {n}") and number in ("2", "0.5", "2.0", "0.25", "-2"):
            self.inverse[kept.name] = rng.choice((f"{kept.name} / {number}", f"{kept.name} * {1 / float(number)}"))

    def _inverse_scalar(self, a: Value, number: str) -> None:
        self._away_from_zero(a)
        self._keep(self.random.choice((f"{number} / {a.name}", f"1.0 / ({number} * {a.name})")), a.dims)

    def _away_from_zero(self, value: Value) -> None:
        for scope in self.environments:
            tensor = eval(value.name, scope)
            if tensor.dtype == torch.bool or (tensor.numel() and tensor.detach().abs().min().item() < SMALLEST_DIVISOR):
                raise Rejected

    def _far_from_steps(self, code: str) -> None:
        """Rounding is a step function: reject where the last bit would decide."""
        for scope in self.environments:
            with torch.no_grad():
                try:
                    tensor = eval(code, scope)
                except Exception as error:
                    raise Rejected from error
            if tensor.is_complex() or tensor.dtype == torch.bool:
                raise Rejected
            if tensor.numel() and ((tensor.double() - tensor.double().round()).abs().min().item() < 1e-4):
                raise Rejected

    # two tensors ------------------------------------------------------------------------------------------------------

    def _binary(self) -> None:
        rng = self.random
        a = self._pick()
        b = self._pick(lambda v: _broadcasts(a.dims, v.dims) and (v.dtype == a.dtype or rng.random() < 0.1))
        if rng.random() < 0.12:
            b = a
        dims = _broadcast(a.dims, b.dims)
        kinds = ["{a} * {b}", "{a} * {b}", "{a} * {b}", "{a} + {b}", "{a} - {b}", "{a} / {b}", "torch.mul({a}, {b})"]
        kinds.append("{a}.mul({b})")
        if self.profile.all_forms:
            kinds += ["torch.add({a}, {b}, alpha=2)", "torch.sub({a}, {b})", "{a}.div({b})"]
            kinds += ["torch.where({a} == {a}, {a}, {b})", "torch.addcmul({a}, {b}, {b}, value=2)"]
        code = rng.choice(kinds)
        if "/" in code or "div" in code:
            if a is b:
                raise Rejected
            self._away_from_zero(b)
            if rng.random() < 0.3 and b.dtype.is_floating_point:
                number = self._number(torch.float64)
                if "j" not in number:
                    self._keep(f"{a.name} / ({number} * {b.name})", dims)
                    return
        self._keep(code.format(a=a.name, b=b.name), dims)

    def _unary(self) -> None:
        rng = self.random
        a = self._pick()
        n = a.name
        forms = [f"{n}.clone()", f"{n}.contiguous()", f"{n}.detach()", f"torch.square({n})", f"{n} ** 2"]
        if a.dtype.is_floating_point:
            forms += [f"torch.tanh({n})", f"torch.sin({n})", f"torch.sigmoid({n})", f"torch.exp(torch.tanh({n}))"]
            forms += [f"{n}.double()", f"{n}.to(torch.float64)", f"{n}.tanh()", f"{n} ** 3"]
            if rng.random() < 0.2:
                forms.append(f"{n}.float()")
            if rng.random() < 0.4:
                self._away_from_zero(a)
                forms += [f"torch.relu({n})", f"{n}.abs()", f"torch.nn.functional.relu({n})"]
            if a.rank:
                forms += [f"torch.softmax({n}, dim=-1)", f"torch.cumsum({n}, dim=0)"]
        elif a.dtype.is_complex:
            forms += [f"{n}.conj()", f"{n}.conj()", f"{n}.real", f"{n}.imag", f"torch.conj_physical({n})"]
        elif a.dtype != torch.bool:
            forms += [f"{n}.abs()", f"{n} % 5", f"{n} // 2", f"{n}.double()", f"{n} > 0"]
        if not self.profile.all_forms:
            forms = [f"torch.tanh({n})", f"{n}.sin()", f"{n}.clone()"]
        self._keep(rng.choice(forms), a.dims)

    def _noise(self) -> None:
        a = self._pick(lambda v: v.dtype.is_floating_point)
        n = a.name
        forms = (f"{n} + torch.rand_like({n})", f"torch.nn.functional.dropout({n}, 0.5, self.training)")
        self._keep(self.random.choice(forms), a.dims)

    # views ------------------------------------------------------------------------------------------------------------

    def _view(self) -> None:
        rng = self.random
        a = self._pick(lambda v: v.rank >= 1)
        n, dims, rank = a.name, a.dims, a.rank
        order = list(range(rank))
        rng.shuffle(order)
        axis = rng.randrange(rank)
        options: list[tuple[str, tuple[str, ...]]] = [
            (f"{n}.permute({', '.join(map(str, order))})", tuple(dims[i] for i in order)),
            (f"torch.permute({n}, {tuple(order)!r})", tuple(dims[i] for i in order)),
            (f"{n}.unsqueeze({axis})", (*dims[:axis], "1", *dims[axis:])),
            (f"{n}[None]", ("1", *dims)),
            (f"{n}[..., 0]", dims[:-1]),
            (f"{n}.select({axis}, -1)", (*dims[:axis], *dims[axis + 1 :])),
            (f"{n}[1:]", (f"{dims[0]}[1:]", *dims[1:])),
            (f"{n}[..., ::2]", (*dims[:-1], f"{dims[-1]}[::2]")),
            (f"{n}.reshape(-1)", ("*".join(dims),)),
            (f"{n}.view_as({n})", dims),
        ]
        if rank >= 2:
            i, j = rng.sample(range(rank), 2)
            swapped = list(dims)
            swapped[i], swapped[j] = swapped[j], swapped[i]
            moved = list(dims)
            moved.insert(j, moved.pop(i))
            options += [
                (f"{n}.transpose({i}, {j})", tuple(swapped)),
                (f"torch.movedim({n}, {i}, {j})", tuple(moved)),
                (f"{n}.mT", (*dims[:-2], dims[-1], dims[-2])),
                (f"{n}.flatten(0, 1)", (f"{dims[0]}*{dims[1]}", *dims[2:])),
                (f"{n}.reshape({n}.shape[0] * {n}.shape[1], *{n}.shape[2:])", (f"{dims[0]}*{dims[1]}", *dims[2:])),
                (f"{n}.reshape({n}.shape[0], -1)", (dims[0], "*".join(dims[1:]))),
                (f"{n}.view({n}.size(0), -1)", (dims[0], "*".join(dims[1:]))),
            ]
            if rank == 2:
                options += [(f"{n}.T", (dims[1], dims[0])), (f"{n}.t()", (dims[1], dims[0]))]
            if dims[0] == dims[1]:
                options += [(f"{n}.diagonal()", (*dims[2:], dims[0]))] * 2
                if rank == 2:
                    options += [(f"torch.trace({n})", ()), (f"torch.diagonal({n}, 0)", (dims[0],))]
            if rng.random() < 0.3:
                other = rng.choice([v for v in self.values if v.rank])
                options.append((f"{n}[None].expand({other.name}.shape[0], *{n}.shape)", (other.dims[0], *dims)))
        if "1" in dims:
            where = dims.index("1")
            options += [(f"{n}.squeeze({where})", (*dims[:where], *dims[where + 1 :]))] * 3
            other = rng.choice([v for v in self.values if v.rank])
            size = f"{other.name}.shape[0]"
            spread = ", ".join(size if i == where else "-1" for i in range(rank))
            options.append((f"{n}.expand({spread})", (*dims[:where], other.dims[0], *dims[where + 1 :])))
        code, result = rng.choice(options)
        # A slice of merged dimensions has no name that can be told from a merger with a slice.
        if any(len(symbol) > 24 for symbol in result) or ("*" in "".join(dims) and ("[1:]" in code or "::2" in code)):
            raise Rejected
        self._keep(code, result)

    def _reduce(self) -> None:
        rng = self.random
        a = self._pick(lambda v: v.rank >= 1)
        axis = rng.randrange(a.rank)
        rest = (*a.dims[:axis], *a.dims[axis + 1 :])
        n = a.name
        options = [
            (f"{n}.sum({axis})", rest),
            (f"torch.sum({n}, dim={axis})", rest),
            (f"{n}.sum({axis}, keepdim=True)", (*a.dims[:axis], "1", *a.dims[axis + 1 :])),
            (f"{n}.sum(dim=({axis},))", rest),
            (f"{n}.sum()", ()),
        ]
        if a.dtype.is_floating_point:
            options += [(f"{n}.mean({axis})", rest), (f"{n}.sum({axis}, dtype=torch.float64)", rest)]
        code, result = rng.choice(options)
        self._keep(code, result)

    def _spread(self) -> None:
        """A product element by element of what gets new dimensions for it, and often its sum."""
        rng = self.random
        a = self._pick(lambda v: v.rank >= 1)
        b = self._pick(lambda v: v.rank in (1, 2) and v.dtype == a.dtype)
        if b.rank == 1:
            forms = (f"{a.name}[..., None] * {b.name}", f"{b.name} * {a.name}.unsqueeze(-1)")
            product = self._keep(rng.choice(forms), (*a.dims, b.dims[0]))
        elif b.dims[0] == a.dims[-1]:
            product = self._keep(f"{a.name}[..., None] * {b.name}", (*a.dims, b.dims[1]))
        else:
            raise Rejected
        if rng.random() < 0.7:
            self._keep(f"{product.name}.sum({rng.choice((-2, product.rank - 2))})", (*a.dims[:-1], product.dims[-1]))

    def _diagonal(self) -> None:
        a = self._pick(lambda v: len(set(v.dims)) < v.rank)
        first, second = self.random.choice(
            [(i, j) for i in range(a.rank) for j in range(a.rank) if i != j and a.dims[i] == a.dims[j]]
        )
        rest = tuple(dim for axis, dim in enumerate(a.dims) if axis not in (first, second))
        if a.rank == 2 and self.random.random() < 0.5:
            self._keep(f"{a.name}.trace()", ())
        else:
            self._keep(f"{a.name}.diagonal(0, {first}, {second})", (*rest, a.dims[first]))

    def _join(self) -> None:
        a = self._pick(lambda v: v.rank >= 1)
        b = self._pick(lambda v: v.dims == a.dims and v.dtype == a.dtype)
        if self.random.random() < 0.5:
            self._keep(f"torch.stack([{a.name}, {b.name}]).sum(0)", a.dims)
        else:
            self._keep(f"torch.cat([{a.name}, {b.name}], dim=0)[:{a.name}.shape[0]]", a.dims)

    def _split(self) -> None:
        a = self._pick(lambda v: v.rank >= 2)
        part = self.random.choice((f"{a.name}.unbind(0)[0]", f"torch.unbind({a.name}, 0)[-1]", f"list({a.name})[0]"))
        self._keep(part, a.dims[1:])

    # effects ----------------------------------------------------------------------------------------------------------

    def _in_place(self) -> None:
        rng = self.random
        a = self._pick(lambda v: not v.name.startswith("self.w"))
        number = self._number(a.dtype)
        n = a.name
        others = [v for v in self.values if _fits(v.dims, a.dims) and v.dtype == a.dtype]
        b = rng.choice(others).name
        forms = [
            f"{n}.mul_({number})",
            f"{n}.add_({number})",
            f"{n}.add_({b})",
            f"{n}.neg_()",
            f"{n}.add_({b}, alpha=2)",
        ]
        forms += [f"{n}.copy_({b})", f"{n}.mul_({b})", f"{n}.fill_(1)", f"{n}.zero_()"]
        forms += [f"{n} *= {number}", f"{n} += {b}", f"{n} -= {number}"] if "." not in n else []
        if a.dtype.is_floating_point or a.dtype.is_complex:
            forms += [f"{n}.div_({number})", f"{n}.tanh_()"]
        if a.dtype.is_complex and rng.random() < 0.3:
            forms.append(f"{n}.conj_physical_()")
        self._write(rng.choice(forms))

    def _indexed_write(self) -> None:
        rng = self.random
        a = self._pick(lambda v: v.rank >= 1 and not v.name.startswith("self.w"))
        n = a.name
        where, rest = rng.choice(
            (("0", a.dims[1:]), ("..., 0", a.dims[:-1]), ("1:", (f"{a.dims[0]}[1:]", *a.dims[1:])))
        )
        others = [v.name for v in self.values if _fits(v.dims, rest) and v.dtype == a.dtype]
        right = rng.choice([*others, self._number(a.dtype)])
        self._write(f"{n}[{where}] {rng.choice(('=', '+=', '*='))} {right}")

    def _write_later(self) -> None:
        """An operand of an einsum, or what a scalar made it of, is written before the backward pass."""
        rng = self.random
        a = self._pick(lambda v: v.rank >= 1 and not v.name.startswith("self.w"))
        n = a.name
        operand = a
        if rng.random() < 0.5:
            operand = self._keep(rng.choice((f"{n} * 2", f"-{n}", f"{n} / 4", f"0.5 * {n}")), a.dims)
        self._einsum(operand)
        self._write(rng.choice((f"{n}.mul_(2)", f"{n}.zero_()", f"{n}[0] = 1", f"{n}.add_({n})")))

    def _cancel(self) -> None:
        """Two factors that cancel, often where no gradients are wanted: what remains is no alias and has no grad."""
        rng = self.random
        unused = [v for v in self.values if v.name not in self.used and v.name.startswith("v")]
        a = rng.choice(unused) if unused else self._pick()
        first, second = rng.choice(
            (("{} * 2", "{} / 2"), ("-{}", "-{}"), ("{} / 4", "4 * {}"), ("{} * 0.5", "2.0 * {}"))
        )

        def write() -> None:
            self._keep(second.format(self._keep(first.format(a.name), a.dims).name), a.dims)

        if self.indent or rng.random() < 0.4:
            write()
            return
        self.lines.append("with torch.no_grad():")
        start = len(self.lines)
        try:
            with self._indented(), torch.no_grad():
                write()
        finally:
            if len(self.lines) == start:
                self.lines.pop()

    def _hook(self) -> None:
        """A hook on a value, used before or not."""
        if self.indent:
            raise Rejected
        rng = self.random
        # Views made in regions without gradients may require some, or not: as what they are views of came about.
        made = [v for v in self.values if v.name.startswith("v") and v.name not in self.inside]
        a = rng.choice(made or [self._pick()])
        hooks = (
            "lambda g: g * 3",
            f"lambda g: g * {a.name}.detach()",
            f"lambda g, k={rng.choice((2, 3))}: g * k",
            f"lambda g: g * (2 if self.training else 5) + {self._pick().name}.detach().abs().mean()",
            "torch.neg",
        )
        # (So may all views in a call without gradients.)
        code = f"torch.is_grad_enabled() and {a.name}.requires_grad and {a.name}"
        code += ".retain_grad()" if rng.random() < 0.2 else f".register_hook({rng.choice(hooks)})"
        self._run(code, None)
        self.lines.append("    " * self.indent + code)

    def _region(self) -> None:
        if self.indent:
            raise Rejected
        regions: list[tuple[str, Callable[[], Any]]] = [
            ("with torch.no_grad():", torch.no_grad),
            ("with torch.no_grad():", torch.no_grad),
            ("with torch.set_grad_enabled(False):", torch.no_grad),
            ("with torch.enable_grad():", torch.enable_grad),
        ]
        if self.profile.saved_hooks:
            keeps = self._pick().name
            pack = self.random.choice(("lambda t: t * 2", f"lambda t: t * {keeps}.detach().abs().mean()", "torch.neg"))
            hooks = f"with torch.autograd.graph.saved_tensors_hooks({pack}, lambda t: t * 1):"
            regions += [(hooks, nullcontext), (hooks, nullcontext), (hooks, nullcontext)]
            regions.append(("with torch.autograd.graph.save_on_cpu():", nullcontext))
        header, context = self.random.choice(regions)
        self.lines.append(header)
        start = len(self.lines)
        with self._indented(), context():
            for _ in range(self.random.randint(1, 3)):
                self._statement()
        if len(self.lines) == start:
            self.lines.pop()
            raise Rejected

    @contextmanager
    def _indented(self) -> Iterator[None]:
        self.indent += 1
        try:
            yield
        finally:
            self.indent -= 1

    def _branch(self) -> None:
        a = self._pick(lambda v: v.rank >= 1)
        b = self._pick(lambda v: v.dims == a.dims and v.dtype == a.dtype)
        self._keep(f"2 * {a.name} if {a.name}.shape[0] > 2 else {b.name} * 3", a.dims)

    def _introspect(self) -> None:
        """Python that depends on what a key must hold."""
        rng = self.random
        a = self._pick()
        n = a.name
        inputs = [v.name for v in self.values if v.name.startswith("x")]
        source = rng.choice(inputs if rng.random() < 0.6 else [v.name for v in self.values])
        required = f"{source}.requires_grad"
        if source.startswith("v"):  # of views made without gradients no key tells
            required = "self.training" if source in self.inside else f"torch.is_grad_enabled() and {required}"
        conditions = [
            "self.training",
            required,
            f"{source}.is_contiguous()",
            "torch.is_grad_enabled()",
            f"{source}.dtype in (torch.float64, torch.int64)",
            f"{rng.choice(inputs)}.stride() == {rng.choice(inputs)}.stride()",
        ]
        if self.constant:
            conditions += ["type(k) is int"] * 2
        forms = [f"({n} * 2 if {rng.choice(conditions)} else {n} * 3)"] * 3
        forms += [f"{n}.to({source}.dtype)", f"{n} * torch.ones({n}.shape, dtype={n}.dtype)"]
        self._keep(rng.choice(forms), a.dims)

    def _returns(self) -> str:
        rng = self.random
        computed = [v for v in self.values if v.name.startswith("v")]
        if not computed:
            return self.values[-1].name
        chosen = [computed[-1].name]
        for _ in range(rng.choices((0, 1, 2, 3), (5, 3, 1.5, 0.5))[0]):
            chosen.append(self._pick(lambda v: not v.name.startswith("self.")).name)
        rng.shuffle(chosen)
        if len(chosen) == 1:
            return rng.choices((chosen[0], f"({chosen[0]},)", f"{{'out': {chosen[0]}}}"), (8, 1, 1))[0]
        form = rng.random()
        if form < 0.6:
            return f"({', '.join(chosen)})"
        if form < 0.8:
            return f"[{', '.join(chosen)}]"
        return f"{{'a': {chosen[0]}, 'rest': [{', '.join(chosen[1:])}]}}"


def _copy_environment(tensors: Mapping[str, Tensor], module: nn.Module) -> dict[str, Any]:
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    with torch.no_grad():
        plain = clone_tree({"env": dict(tensors), "state": state})

    class Holder:
        pass

    holder = Holder()
    for name, tensor in plain["state"].items():
        setattr(holder, name, tensor.detach())
    return {**{name: tensor.detach() for name, tensor in plain["env"].items()}, "self": holder}


def _broadcasts(a: tuple[str, ...], b: tuple[str, ...]) -> bool:
    return all(x == y or "1" in (x, y) for x, y in zip(reversed(a), reversed(b)))


def _continues(dtype: torch.dtype, dims: tuple[str, ...], value: Value) -> bool:
    """Whether ``value`` is a matrix whose first dimension is ``dims``."""
    return value.dtype == dtype and value.rank == 2 and value.dims[:1] == dims


def _multiplies(dtype: torch.dtype, dims: tuple[str, ...], value: Value) -> bool:
    """Whether something with ``dims`` can be multiplied by ``value``, or by that with its last dimensions exchanged."""
    return (
        value.dtype == dtype
        and 1 <= value.rank <= 3
        and dims[-1] in value.dims[-2:]
        and value.rank + len(dims) < LARGEST_RANK + 2
    )


def _broadcast(a: tuple[str, ...], b: tuple[str, ...]) -> tuple[str, ...]:
    if not _broadcasts(a, b):
        raise Rejected
    longer, shorter = (a, b) if len(a) >= len(b) else (b, a)
    padded = ("1",) * (len(longer) - len(shorter)) + shorter
    return tuple(y if x == "1" else x for x, y in zip(longer, padded))


def _fits(small: tuple[str, ...], large: tuple[str, ...]) -> bool:
    return len(small) <= len(large) and all(x in (y, "1") for x, y in zip(reversed(small), reversed(large)))


def generate(seed: int, profile: Profile = EVERYTHING) -> Program:
    """The program of a seed: the same on every machine and in every process."""
    for attempt in itertools.count():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                return replace(Generator(seed + attempt * 1_000_003, profile).program(), seed=seed)
            except Abandoned:
                continue
    raise AssertionError


# -- checking --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Failure:
    """What went wrong with a program."""

    program: Program
    call: Call
    problems: tuple[str, ...]

    @property
    def only_fell_back(self) -> bool:
        """Whether all was right, but not optimized."""
        return all(problem.startswith("warned: ") and " runs as it is, " in problem for problem in self.problems)

    def __str__(self) -> str:
        problems = "; ".join(self.problems)
        about = f"program {self.program.seed}: call {self.call.name}: {problems}"
        return f"{about}\n{self.program.reproduction(self.call.which)}"


class Call(NamedTuple):
    """One call of a program in a series: what differs from the first."""

    name: str
    which: int = 0
    seed: int = 2
    grad: bool = True
    train: bool = True
    k: Any = 1
    other_layout: bool = False
    flip_requires_grad: bool = False
    other_dtype: bool = False
    #: Inputs that could be are one tensor, ``"same"``, or memory of one, ``"view"``.
    shared: str = ""
    inference: bool = False
    autocast: bool = False
    #: What happens to the module's tensors before: they are "replaced", or "frozen".
    state: str = ""


FIRST = Call("first")
INNER_VIEW = "A view was created in no_grad mode"
SMALLER = {torch.float64: torch.float32, torch.int64: torch.int32, torch.complex128: torch.complex64}


def calls_of(program: Program) -> list[Call]:
    """Calls that hold a cache to its key: each differs from the first in one thing that the code may depend on."""
    calls = [
        FIRST,
        Call("again with other values", seed=3),
        Call("other sizes", which=1, seed=4),
        Call("no_grad", seed=5, grad=False),
    ]
    if program.constant:
        calls += [Call("float in place of int", seed=6, k=1.0), Call("bool in place of int", seed=7, k=True)]
    if "self.training" in program.body:
        calls.append(Call("eval", seed=8, train=False))
    if program.seed % 3 == 1:
        calls += [Call("a third set of sizes", which=2, seed=12), Call("a fourth set of sizes", which=3, seed=13)]
        if program.constant:
            calls += [Call("another number", seed=6, k=2.5), Call("a third number", seed=6, k=-0.75)]
    strides = Call("other strides", seed=9, other_layout=True)
    flipped = Call("requires_grad flipped", seed=10, flip_requires_grad=True)
    # Behind all others, because it converts the module too.
    dtype = Call("other dtype", seed=11, other_dtype=True)
    possible = [strides, flipped, Call("inference mode", seed=14, inference=True)]
    if len(program.inputs) > 1:
        possible += [Call("one tensor twice", seed=15, shared="same"), Call("views", seed=16, shared="view")]
    if program.state:
        possible += [Call("state replaced", seed=17, state="replaced"), Call("state frozen", seed=18, state="frozen")]
    if any("float32" in item.expressions[0] for item in program.inputs):
        possible.append(Call("autocast", seed=19, autocast=True))
    possible.append(dtype)
    chosen = [random.Random(program.seed).choice(possible)]
    words = {"stride": strides, "contiguous": strides, "requires_grad": flipped, "dtype": dtype}
    chosen += [call for word, call in words.items() if word in program.body]
    if re.search(r"^ *x\d(\.\w+_\(|\[.*\] .?= | .= )", program.body, flags=re.MULTILINE):
        chosen += [call for call in possible if call.shared == "view"]
    return calls + [call for call in possible if call in chosen]


def _relaid(tensor: Tensor) -> Tensor:
    """The same values, dimensions in the opposite order in memory, or spread out."""
    if tensor.dim() < 2:
        return torch.stack([tensor, tensor], dim=-1)[..., 0]
    order = tuple(reversed(range(tensor.dim())))
    return tensor.permute(order).contiguous().permute(order)


def _call(
    program: Program, target: Callable[..., Any], module: nn.Module, call: Call, rounding: Rounding | None = None
) -> Observation:
    leaves = list(program.arguments(call.which, call.seed))
    is_leaf = [item.leaf for item in program.inputs]
    if call.other_layout:
        # What shares memory keeps sharing it.
        alone = [not _shares(x, leaves) for x in leaves]
        leaves = [_relaid(x.detach()).requires_grad_(x.requires_grad) if one else x for x, one in zip(leaves, alone)]
    if call.other_dtype:
        leaves = [x.detach().to(SMALLER.get(x.dtype, x.dtype)).requires_grad_(x.requires_grad) for x in leaves]
        for dtype, smaller in SMALLER.items():
            _convert(module, dtype, smaller)
    if call.flip_requires_grad:
        leaves = [x.detach().requires_grad_(not x.requires_grad and not _is_integer(x)) for x in leaves]
        is_leaf = [True for _ in is_leaf]
    if call.state:
        _change_state(module, call.state)
    passed = [x if leaf else x.clone() for x, leaf in zip(leaves, is_leaf)]
    if call.shared:
        passed = [_within(x, passed[:number], call.shared) for number, x in enumerate(passed)]
    module.train(call.train)
    wanted = {item.name: x for item, x in zip(program.inputs, leaves)}
    wanted.update(module.named_parameters())
    kwargs = {"k": call.k} if program.constant else {}
    if rounding is not None:
        rounding.perturb([*passed, *module.parameters(), *module.buffers()])
    with ExitStack() as stack:
        stack.enter_context(torch.set_grad_enabled(call.grad))
        if call.inference:
            stack.enter_context(torch.inference_mode())
        if call.autocast:
            stack.enter_context(torch.autocast("cpu"))
        if rounding is not None:
            stack.enter_context(rounding)
        second, in_turn = (call == FIRST and program.seed % 3 == rest for rest in (0, 1))
        return observe(target, tuple(passed), kwargs, module=module, leaves=wanted, second=second, in_turn=in_turn)


def _within(x: Tensor, others: Sequence[Tensor], shared: str) -> Tensor:
    """``x``, or a tensor of its type that shares the memory of one of ``others``."""
    for other in others:
        if other.dtype != x.dtype:
            continue
        if other.shape == x.shape:
            return other if shared == "same" else other.view_as(other)
        if shared == "view" and other.is_contiguous() and x.numel() <= other.numel():
            return other.view(-1)[: x.numel()].view(x.shape)
    return x


def _change_state(module: nn.Module, how: str) -> None:
    for name, tensor in list(module.named_parameters()):
        if how == "frozen":
            if tensor.is_leaf:  # not where forward wrote a value that requires grad
                tensor.requires_grad_(not tensor.requires_grad)
        else:
            setattr(module, name, nn.Parameter(tensor.detach() * 1.25, requires_grad=tensor.requires_grad))
    for name, tensor in list(module.named_buffers()):
        if how == "replaced":
            setattr(module, name, tensor.detach() * 2)


def _is_integer(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex())


def _shares(tensor: Tensor, others: Sequence[Tensor]) -> bool:
    memory = tensor.untyped_storage().data_ptr()
    return sum(other.untyped_storage().data_ptr() == memory for other in others) > 1


def _convert(module: nn.Module, dtype: torch.dtype, smaller: torch.dtype) -> None:
    module._apply(lambda tensor: tensor.to(smaller) if tensor.dtype == dtype else tensor)


def check(
    program: Program,
    wrap: Callable[[nn.Module], Callable[..., Any]],
    *,
    values_only: bool = False,
    calls: Sequence[Call] | None = None,
) -> Failure | None:
    """Run a program through ``wrap`` and in eager; the first difference, or None.

    ``values_only`` leaves out memory, strides and gradients: what a library promises that only says "same numbers".
    """
    expected_module, module = program.build(), program.build()
    wrapped = wrap(module)
    done: list[Call] = []  # since the modules were new
    fallen: Failure | None = None
    for call in calls_of(program) if calls is None else calls:
        theirs = _call(program, expected_module, expected_module, call)
        ours = _call(program, wrapped, module, call)
        done.append(call)
        problems = _problems(program, done, ours, theirs, values_only)
        if problems:
            failure = Failure(program, call, tuple(problems))
            if not failure.only_fell_back:
                return failure
            fallen = fallen or failure
        if theirs.error is not None:
            # How far each came before the error is nobody's promise: the next call finds modules as new.
            expected_module, module = program.build(), program.build()
            wrapped = wrap(module)
            done = []
    return fallen


def _problems(
    program: Program, calls: Sequence[Call], ours: Observation, theirs: Observation, values_only: bool
) -> list[str]:
    """What is wrong with the last of ``calls``."""
    if theirs.error is not None and INNER_VIEW in str(theirs.error) and ours.error is None:
        # Whether a result of torch.einsum is a view inside is no promise of eager's.
        return []
    compare = _values_only if values_only else differences
    tolerance = TOLERANCE[torch.float32] if _narrow(program, calls[-1]) else program.tolerance
    if not _finite(theirs):
        # Only the values of the first call are held within bounds; a division by zero tells signs of zero.
        tolerance = float("inf")
    problems = compare(ours, theirs, tolerance=tolerance)
    if problems:
        moved = [_moved(program, calls, seed) for seed in range(3)]
        problems = compare(ours, theirs, tolerance=tolerance, moved=moved)
    if not values_only:
        expected = {(warned.category, str(warned.message)) for warned in theirs.warned}
        problems += [f"warned: {w.message}" for w in ours.warned if (w.category, str(w.message)) not in expected]
    return problems


def _narrow(program: Program, call: Call) -> bool:
    """Whether a call computes in single precision what the first call of the program does not."""
    integers = "int64" in program.inputs[0].expressions[0]
    return call.other_dtype or (type(call.k) is float and integers)


def _moved(program: Program, calls: Sequence[Call], seed: int) -> Observation:
    """What eager does in the last of ``calls`` when every operation of all of them rounds in another way."""
    module = program.build()
    rounding = Rounding(seed)
    return [_call(program, module, module, call, rounding) for call in calls][-1]


def _finite(seen: Observation) -> bool:
    tensors = [*seen.leaves, *seen.after.values(), *seen.gradients.values()]
    return all(bool(x.detach().resolve_conj().isfinite().all()) for x in tensors if isinstance(x, Tensor))


def _values_only(
    ours: Observation, theirs: Observation, *, tolerance: float, moved: Sequence[Observation] = ()
) -> list[str]:
    bare = {"aliasing": (), "written": (), "gradients": {}, "random_state": None, "python_random_state": None}
    found = differences(
        replace(ours, **bare),
        replace(theirs, **bare),
        tolerance=tolerance,
        moved=[replace(other, **bare) for other in moved],
        ignore=frozenset({"aliasing"}),
    )
    return [text for text in found if "strides" not in text and "requires_grad" not in text and "is_leaf" not in text]


def _eager_runs(program: Program) -> Iterator[Observation]:
    module = program.build()
    for call in calls_of(program):
        yield _call(program, module, module, call)


def shrink(failure: Failure, wrap: Callable[[nn.Module], Callable[..., Any]]) -> Failure:
    """The same kind of failure with as few statements as single removals reach."""
    kind = failure.problems[0][:30]

    def attempt(body: str) -> Failure | None:
        try:
            candidate = replace(failure.program, body=body)
            if any(seen.error for seen in _eager_runs(candidate)):
                return None
            found = check(candidate, wrap)
        except Exception:
            # Without one of its statements a program may be no program.
            return None
        return found if found is not None and found.problems[0][:30] == kind else None

    progress = True
    while progress:
        progress = False
        lines = failure.program.body.split("\n")
        bodies = ["\n".join(lines[:i] + lines[i + 1 :]) for i in reversed(range(len(lines) - 1))]
        names = re.findall(r"^ *(v\d+) = ", failure.program.body, flags=re.MULTILINE)
        if lines[-1][len("return ") :] not in names:
            bodies += ["\n".join([*lines[:-1], f"return {name}"]) for name in names]
        else:
            bodies += ["\n".join([*lines[:-1], f"return {name}"]) for name in names[: names.index(lines[-1][7:])]]
        for body in bodies:
            smaller = attempt(body)
            if smaller is not None:
                failure, progress = smaller, True
                break
    return failure


def main() -> int:
    """Command line: check seeds, print what fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--profile", default="everything", choices=sorted(PROFILES))
    parser.add_argument("--against", default="lazy_einsum", choices=("lazy_einsum", "opt_einsum_fx", "eager"))
    parser.add_argument("--networks", action="store_true", default=None, help="join networks whether that pays or not")
    parser.add_argument("--whole", action="store_true", help="print programs that fail as they are, not shrunk")
    parser.add_argument("--stop", type=int, default=3, help="stop after this many failures (0: never)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    failures: list[Failure] = []
    start = time.perf_counter()
    for seed in range(options.seed, options.seed + options.count):
        program = generate(seed, PROFILES[options.profile])
        if (seed - options.seed) % 500 == 499:
            print(f"{seed - options.seed + 1} programs, {len(failures)} failed", file=sys.stderr, flush=True)
        if options.count == 1:
            print(program.reproduction(0))
        failure = check_against(options.against, program, options.networks)
        if failure is not None:
            failures.append(failure)
            if options.against == "lazy_einsum":
                print(f"--- {failure if options.whole else shrink(failure, optimized(program))}", flush=True)
            if options.stop and len(failures) >= options.stop:
                break
    elapsed = time.perf_counter() - start
    checked = seed - options.seed + 1
    print(f"{len(failures)} of {checked} programs failed in {elapsed:.1f} s ({options.profile}, {options.against})")
    if options.against == "opt_einsum_fx":
        wrong = [f for f in failures if not any(p.startswith("raised") for p in f.problems)]
        print(f"wrong results: {len(wrong)}; crashes: {len(failures) - len(wrong)}")
    return 1 if failures else 0


def optimized(program: Program) -> Callable[[nn.Module], Callable[..., Any]]:
    """How the library is applied to a program: to one in six so that the second set of sizes makes generic code."""
    from lazy_einsum import OptimizedModule

    return partial(OptimizedModule, dynamic=True if program.seed % 6 == 1 else None)


def check_against(library: str, program: Program, networks: bool | None = None) -> Failure | None:
    """Check a program with a named library, in ``every_network`` or not (``None``: half of the profiles products,
    reshaped and sharing).
    """
    if library == "eager":
        return check(program, lambda module: module)
    if library == "opt_einsum_fx":
        import opt_einsum_fx

        arguments = program.arguments(0, 2)

        def wrap(module: nn.Module) -> Callable[..., Any]:
            def call(*args: Any) -> Any:
                # Its default, "optimal", needs minutes for what it fuses from some programs.
                return opt_einsum_fx.optimize_einsums_full(module, arguments, {"optimize": "greedy"})(*args)

            return call

        return check(program, wrap, values_only=True, calls=[FIRST])
    if networks is None:
        networks = program.profile in ("products", "reshaped", "sharing") and program.seed % 2 == 1
    with every_network() if networks else nullcontext():
        return check(program, optimized(program))


@contextmanager
def every_network() -> Iterator[None]:
    """Products join others, multiply the terms of sums, are shared or copied, whether that pays or not."""
    with ExitStack() as stack:
        for name in ("recompute", "distribute", "join_reshaped", "share"):
            # Of the package, the name is that of the function.
            module = importlib.import_module(f"lazy_einsum.passes.{name}")
            stack.enter_context(patch.object(module, "pays", lambda *seconds: True))
        networks = importlib.import_module("lazy_einsum.networks")
        stack.enter_context(patch.object(networks, "pays", lambda *seconds: True))
        yield


if __name__ == "__main__":
    sys.exit(main())
