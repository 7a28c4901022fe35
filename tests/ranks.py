"""Two processes that talk by gloo, for tests of ``torch.distributed``."""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from torch import distributed as dist

from lazy_einsum.errors import LazyEinsumWarning

RANKS = 2
TIMEOUT = timedelta(seconds=20)
"""For one collective: after that a rank which waits for the other fails."""

GRACE = 1.0
"""Seconds that a rank has left after another has failed."""

Scenario = Callable[[int], None]


class Ranks:
    """Runs functions on all ranks at once. The processes stay for the next function until one fails.

    Args:
        folder: where the processes find each other.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []
        self._starts = 0

    def run(self, scenario: Scenario) -> None:
        """Call ``scenario(rank)`` on each rank.

        Raises:
            AssertionError: it raised on some rank, or did not end in time; with the tracebacks of all that failed.
        """
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send(scenario)
        deadline = time.monotonic() + 3 * TIMEOUT.total_seconds()
        waiting = dict(zip(self._pipes, range(RANKS), strict=True))
        failures: dict[int, str] = {}
        while waiting and (ready := wait(list(waiting), max(0.0, deadline - time.monotonic()))):
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = waiting.pop(pipe)
                try:
                    failure = pipe.recv()
                except EOFError:
                    failure = "the process ended"
                if failure is not None:
                    failures[rank] = failure
                    # The others may wait for this one in vain.
                    deadline = min(deadline, time.monotonic() + GRACE)
        failures.update((rank, "did not end in time") for rank in waiting.values())
        if failures:
            self.stop()
            raise AssertionError("\n".join(f"rank {rank}: {failures[rank]}" for rank in sorted(failures)))

    @property
    def is_running(self) -> bool:
        """Whether there are processes."""
        return bool(self._processes)

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._starts += 1
        meeting = self._folder / f"meeting{self._starts}"
        before = os.environ.get("PYTHONHASHSEED")
        try:
            for rank in range(RANKS):
                # Sets and dictionaries come in another order on each rank.
                os.environ["PYTHONHASHSEED"] = str(rank + 1)
                here, there = context.Pipe()
                process = context.Process(target=_serve, args=(rank, there, str(meeting)), daemon=True)
                process.start()
                there.close()
                self._processes.append(process)
                self._pipes.append(here)
        finally:
            if before is None:
                del os.environ["PYTHONHASHSEED"]
            else:
                os.environ["PYTHONHASHSEED"] = before

    def stop(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []


def _serve(rank: int, pipe: Connection, meeting: str) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=RANKS, timeout=TIMEOUT)
    while True:
        scenario = pipe.recv()
        try:
            torch.manual_seed(rank)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's own: this warns of many things on the way
                warnings.simplefilter("error", category=LazyEinsumWarning)
                scenario(rank)
                dist.barrier()
        except BaseException:
            pipe.send(traceback.format_exc())
        else:
            pipe.send(None)
