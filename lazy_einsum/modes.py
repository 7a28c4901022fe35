"""``FollowedModes``: follows the modes that ``forward`` enters and leaves while it is traced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .ambient import Modes, replace_saved_tensor_hooks, saved_tensor_hooks
from .regions import enter_inference, enter_saved_tensors_hooks, leave


class _Region(NamedTuple):
    """What ``forward`` has entered and not left.

    Attributes:
        grad: grad mode before it.
        inference: inference mode before it.
        saved_hooks: those that took the place of the user's while traced; ``None`` where it is an inference mode.
    """

    grad: bool
    inference: bool
    saved_hooks: object = None


class FollowedModes:
    """The modes of one trace. Only switches of the grad mode show in a call; the others are found by asking for them.

    Args:
        write: writes a call that switches a mode into the graph: a function and its arguments.
        record: gives what stands in the graph for a function of the user's.
        refuse: makes the error for a reason.

    Attributes:
        grad: the grad mode.
        switches_grad: whether it was switched.
        switches_others: whether other modes were.
    """

    def __init__(
        self,
        write: Callable[..., object],
        record: Callable[[Callable[..., Any]], Any],
        refuse: Callable[[str], Exception],
    ) -> None:
        self._write = write
        self._record = record
        self._refuse = refuse
        self.grad = self._grad_at_start = torch.is_grad_enabled()
        self.switches_grad = False
        self.switches_others = False
        self._now = self._at_start = Modes.now()
        self._regions: list[_Region] = []

    @property
    def are_those_of_the_call(self) -> bool:
        """Whether all are as they were at the start, grad mode apart."""
        return self._now == self._at_start

    def check(self) -> None:
        """``follow``, and refuse a switch of the grad mode that no call has shown."""
        self.follow()
        if torch.is_grad_enabled() != self.grad:
            raise self._refuse(
                "the grad mode was switched in a way that no call shows (a custom autograd.Function, ...)"
            )

    def is_grad_left_as_it_was(self) -> bool:
        """Whether the grad mode is what it was at the start."""
        return torch.is_grad_enabled() == self.grad == self._grad_at_start

    def switch_grad(self, enabled: bool) -> None:
        """Note a call that set the grad mode."""
        if enabled != self.grad:
            self.grad = enabled
            self.switches_grad = True
            self._write(torch.set_grad_enabled, enabled)

    def follow(self) -> None:
        """Record that ``forward`` entered or left inference mode or saved-tensor hooks, or set the default dtype.

        Raises:
            UntraceableError: it changed another mode, or several at once.
        """
        now, before = Modes.now(), self._now
        if now == before:
            return
        if now.others != before.others:
            raise self._refuse(
                "forward changes a mode on the way (autocast, torch.func, forward-mode differentiation, ...)"
            )
        pair, around = None, now.saved_hooks
        if around is not None and not self._is_known(around):
            # Fakes are nothing for the user's functions.
            if getattr(around[0], "__module__", "") == "torch.utils.checkpoint":
                raise self._refuse("forward uses checkpointing")
            pair, around = replace_saved_tensor_hooks()
            now = now._replace(saved_hooks=saved_tensor_hooks())
        self._leave_saved_hooks(around)
        if now.default_dtype is not before.default_dtype:
            self._write(torch.set_default_dtype, now.default_dtype)
        if now.inference != before.inference:
            self._follow_inference(now.inference, before.inference)
        self._leave_saved_hooks(around)
        entered = [self._at_start.saved_hooks, *(region.saved_hooks for region in self._regions)]
        if around != next(filter(None, reversed(entered)), None):
            raise self._refuse("forward enters or leaves several modes at once, saved-tensor hooks among them")
        if pair is not None:
            self._write(enter_saved_tensors_hooks, *map(self._record, pair))
            self._regions.append(_Region(self.grad, now.inference, now.saved_hooks))
        self._now = now
        self.switches_others = True

    def _follow_inference(self, now: bool, before: bool) -> None:
        if self._regions and self._regions[-1] == _Region(torch.is_grad_enabled(), now):
            self.grad = self._regions.pop().grad
            self._write(leave)
        else:
            self._regions.append(_Region(self.grad, before))
            self.grad = not now
            self._write(enter_inference, now)

    def _is_known(self, hooks: object) -> bool:
        """Whether these saved-tensor hooks were there at the start, or are those in the place of the user's."""
        return hooks == self._at_start.saved_hooks or any(hooks == region.saved_hooks for region in self._regions)

    def _leave_saved_hooks(self, around: object) -> None:
        while self._regions and self._regions[-1].saved_hooks not in (None, around):
            self._regions.pop()
            self._write(leave)
