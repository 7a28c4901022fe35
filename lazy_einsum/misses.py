"""``Miss``: a call that no code was there for, and why there was none."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .generic import values_of
from .signature import Signature


@dataclass(frozen=True, slots=True)
class Miss:
    """A call that no specialization could serve. The reason is found when it is asked for.

    Attributes:
        name: class of the module that was called.
        signature: the key that was looked for; only its arguments and modes where the call could not be traced.
        others: the keys that were there, the least recently used first.
        seconds: time spent building.
        failure: why the call could not be traced; empty where it was.
    """

    name: str
    signature: Signature
    others: tuple[Signature, ...]
    seconds: float
    failure: str = ""

    @property
    def reason(self) -> str:
        """Which part of the key differs from the nearest entry, the one that agrees longest; or why the call could not
        be traced.
        """
        if self.failure:
            return f"can't be traced: {self.failure}"
        signature = self.signature
        others = [_as_for(signature, other) for other in self.others if other.module == signature.module]
        if not others:
            return "first call"

        def agreement(other: Signature) -> tuple[int, int]:
            same = sum(a == b for a, b in zip(signature.arguments.leaves, other.arguments.leaves, strict=False))
            same += sum(a == b for a, b in zip(signature.ambient, other.ambient, strict=True))
            return same, sum(a == b for a, b in zip(signature.state, other.state, strict=False))

        nearest = max(others, key=agreement)
        found = signature.difference(nearest)
        if not found and nearest.conditions:
            found = f"it is not so that {' and '.join(nearest.conditions)}"
        return found or "the same signature (an entry was dropped)"


def _as_for(signature: Signature, other: Signature) -> Signature:
    """``other``; of generic code, with the arguments of ``signature`` where these are a case of its own."""
    if other.arguments.symbols and values_of(other.arguments, signature.arguments) is not None:
        return replace(other, arguments=signature.arguments)
    return other
