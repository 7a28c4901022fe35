"""How long calls take, on random tensors of given types: ``time_programs``, and what ``explain`` times with."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch

from .program import Program, compile_program
from .signature import TensorType

ROUNDS = 9
"""Programs are timed in turns, so often each."""

ROUND_SECONDS = 0.002
"""In a round a program is run for about so long, and at least once."""

MOST_SECONDS = 1.0
"""All is over after so long; a run that is under way ends first."""


def random_tensor(known: TensorType, seed: int = 0) -> torch.Tensor:
    """A random tensor of a type; small integers. No random generator of the user's is asked."""
    shape, stride = tuple(map(int, known.shape)), tuple(map(int, known.stride))
    tensor = torch.empty_strided(shape, stride, dtype=known.dtype, device=known.device)
    generator = torch.Generator(known.device).manual_seed(seed)
    # A dimension that repeats its memory can't be written as a whole.
    span = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    memory = tensor.as_strided((span,), (1,)) if tensor.numel() else tensor
    if known.dtype.is_floating_point or known.dtype.is_complex:
        memory.normal_(generator=generator)
    else:
        memory.random_(0, 2, generator=generator)
    return tensor


def synchronize(devices: Sequence[torch.device]) -> None:
    """Wait until all that was started on these devices is done."""
    for device in devices:
        if device.type not in ("cpu", "meta"):
            torch.accelerator.synchronize(device)


def device_kind(device: torch.device) -> str:
    """What times on a device depend on, in words: the same for devices of one kind."""
    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    if device.type == "cpu":
        capability, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
        return f"cpu: {platform.machine()} {capability}, threads: {threads}"
    return device.type


def is_here(kind: str) -> bool:
    """Whether this process has a device of this kind, or of this type (``"cuda"``)."""
    devices = [torch.device("cpu")]
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is not None:
        devices += [torch.device(accelerator.type, number) for number in range(torch.accelerator.device_count())]
    # Only those of the type in question are asked: to ask one for its name starts it.
    return any(kind in (device.type, device_kind(device)) for device in devices if kind.startswith(device.type))


def mean_seconds(
    call: Callable[[], Any],
    times: int,
    wait: Callable[[], Any] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Seconds of a call, the mean of so many; ``wait`` and ``clock`` as in ``time_in_turns``."""
    wait()  # for what others have started
    start = clock()
    for _ in range(times):
        call()
    wait()
    return (clock() - start) / times


def time_programs(programs: Sequence[Program], types: Sequence[TensorType]) -> list[list[float]]:
    """Seconds of programs on the same random operands, forward, and backward where autograd follows one.

    They run in a thread of their own, which no mode, hook or profiler of this one sees.

    Args:
        programs: what is timed.
        types: of the operands; ``requires_grad`` says which autograd follows.

    Returns:
        For each complete round the seconds of each program; infinite for those that fail (for want of memory), or for
        which no time was left.
    """
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(_time_programs, programs, types).result()


def _time_programs(programs: Sequence[Program], types: Sequence[TensorType]) -> list[list[float]]:
    try:
        operands = [random_tensor(known).requires_grad_(known.requires_grad) for known in types]
    except RuntimeError:  # no memory for them
        return []
    calls = [partial(_run, compile_program(program), operands) for program in programs]
    devices = list(dict.fromkeys(known.device for known in types))
    return time_in_turns(calls, partial(synchronize, devices))


def _run(function: Callable[..., torch.Tensor], operands: Sequence[torch.Tensor]) -> None:
    result = function(*operands)
    if result.requires_grad:
        followed = [operand for operand in operands if operand.requires_grad]
        torch.autograd.grad(result, followed, torch.ones_like(result))


def time_in_turns(
    calls: Sequence[Callable[[], Any]],
    wait: Callable[[], Any] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[list[float]]:
    """Seconds of each call in each complete round, see ``time_programs``.

    Args:
        calls: what is timed.
        wait: waits until what a call has started is done.
        clock: tells the time, in seconds.
    """
    seconds = partial(mean_seconds, wait=wait, clock=clock)
    end = clock() + MOST_SECONDS
    repeats = [0] * len(calls)
    for place, call in enumerate(calls):
        if clock() >= end:
            break
        try:
            seconds(call, 1)  # the first run is slower
            repeats[place] = max(1, int(ROUND_SECONDS / max(seconds(call, 1), 1e-7)))
        except RuntimeError:
            continue
    rounds: list[list[float]] = []
    for _ in range(ROUNDS):
        took: list[float] = []
        for call, times in zip(calls, repeats, strict=True):
            if times and clock() >= end:
                return rounds
            took.append(seconds(call, times) if times else math.inf)
        rounds.append(took)
    return rounds
