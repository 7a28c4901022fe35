"""All programs of the table on a device that is not the processor, without data: prints what goes wrong.

Run in a process of its own, as a device that torch was told of stays. On it no tensor can be made but fakes, and those
refuse to be mixed with ones on the processor: what is built must make none.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from behaviour import clone_tree
from programs import PROGRAMS, SIZES, Program, on
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from lazy_einsum.errors import UntraceableError
from lazy_einsum.fakes import fake_mode, make_fake
from lazy_einsum.passes import Options
from lazy_einsum.signature import Arguments, TensorType
from lazy_einsum.specialize import compile_graph, read, run_passes
from lazy_einsum.tracing import trace

_setup_privateuseone_for_python_backend("other")

OTHER = torch.device("other", 0)

#: Rows that make tensors on the processor themselves; that call submodules, which hold no fakes; that need kernels of
#: the device (an LSTM).
LEFT_OUT = {
    "S5 random tensor in forward",
    "dropout consumes the stream as eager",
    "result written to out",
    "plain tensor attribute that is replaced",
    "global tensor",
    "S8 hooks on the child and inside",
    "S9 compiled submodule",
    "recurrent cell",
}


def of(tensor: torch.Tensor) -> TensorType:
    """The type of a tensor, those on the device ``meta`` taken to be on the other one."""
    known = plain_of(tensor)
    return replace(known, device=OTHER) if known.device.type == "meta" else known


plain_of = TensorType.of


def problems(row: Program) -> Iterator[str]:
    """What goes wrong with a row, with gradients or without."""
    row = on(row, "meta")
    child = row.make()
    if row.before is not None:
        row.before(0, child)
    call = row.arguments(SIZES[0], torch.Generator().manual_seed(0))
    args, kwargs = clone_tree((call.args, call.kwargs))
    if row.copies:
        args, kwargs = pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, (args, kwargs))
    arguments, _ = Arguments.of(args, kwargs)
    try:
        traced = trace(child, arguments)
    except UntraceableError as error:
        if "device" in str(error) or "backend" in str(error):
            yield str(error)
        return
    *_, last = run_passes(traced.graph, Options())
    targets = list(dict.fromkeys(str(node.target) for node in last.graph.nodes if node.op == "get_attr"))
    with fake_mode():
        inputs = [make_fake(known) for known in arguments.leaves if isinstance(known, TensorType)]
        state = [_fake(read(child, traced.state[target])) for target in targets]
        results = compile_graph(last.graph, targets)(*inputs, *state)
    devices = {leaf.device for leaf in pytree.tree_leaves(results) if isinstance(leaf, torch.Tensor)}
    if devices - {OTHER}:
        yield f"results on {devices}"


def _fake(value: Any) -> Any:
    return make_fake(of(value)) if isinstance(value, torch.Tensor) else value


def main() -> None:
    """Check all of them."""
    torch.set_num_threads(1)
    TensorType.of = of
    checked = 0
    for row in PROGRAMS:
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                try:
                    found = [] if row.name in LEFT_OUT else list(problems(row))
                except Exception as error:
                    found = [f"{type(error).__name__}: {error}"]
                checked += row.name not in LEFT_OUT
                for problem in found:
                    print(f"{row.name}, grad {grad}: {problem}")
    assert checked > 200, checked


if __name__ == "__main__":
    main()
