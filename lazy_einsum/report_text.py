"""A ``Report`` as text of at most 100 columns."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .report import NetworkReport, OrderReport, Report, SpecializationReport, StepReport

WIDTH = 100


def write_text(report: Report) -> str:
    """The whole report."""
    cache = report.cache
    lines = [
        *_wrapped(f"{report.name}: {cache['currsize']} of at most {cache['maxsize']} specializations"),
        f"{cache['hits']} hits, {cache['misses']} misses, {cache['evictions']} evictions, {cache['fallbacks']} "
        f"fall-backs; {cache['build_seconds']:.3f} s building",
    ]
    if report.misses:
        lines += _wrapped(f"last miss: {report.last_miss}")
    if report.fold_bytes:
        lines.append(f"{report.fold_bytes} bytes are kept of what was computed once")
    for reason in report.reasons:
        lines += _wrapped(f"runs as it is: {reason}")
    for name, state in report.parts.items():
        lines += _wrapped(f"{name}: {state}")
    if report.eager_ratio is not None:
        lines.append(f"measured: its networks as written take {report.eager_ratio:.2f} times as long")
    for entry in report.specializations:
        lines += ["", *_specialization(entry)]
    return "\n".join(lines)


def _specialization(entry: SpecializationReport) -> Iterator[str]:
    yield from _wrapped(entry.signature)
    stages = ", ".join(f"{name} {took * 1e3:.1f}" for name, took in entry.stage_seconds.items() if took >= 5e-5)
    generic = ", for other sizes too" if entry.is_generic else ""
    tier = f"runs through {entry.tier}" + (f": {entry.reason}" if entry.reason else "")
    yield from _wrapped(f"{entry.hits} hits{generic}; {tier}", "  ")
    yield from _wrapped(f"built in {entry.build_seconds * 1e3:.1f} ms: {stages}", "  ")
    for number, network in enumerate(entry.networks, 1):
        yield ""
        yield from ("  " + line for line in _network(network, f"network {number}: ", WIDTH - 2))
    if entry.repeated or entry.left:
        yield ""
    for call in entry.repeated:
        yield from _wrapped(f"computed once, as another einsum gives the same: {call}", "  ")
    for reason in dict.fromkeys(left.reason for left in entry.left):
        calls = [str(left.call) for left in entry.left if left.reason == reason]
        yield from _wrapped(f"left as it is, {reason}: {', '.join(calls)}", "  ")
    for fold in entry.folds:
        yield ""
        yield from _wrapped(f"computed once, of {', '.join(fold.names)} ({fold.bytes} bytes):", "  ")
        yield from _code(fold.code)
    yield ""
    yield "  code:"
    yield from _code(entry.code)


def network_text(network: NetworkReport) -> str:
    """One network."""
    return "\n".join(_network(network, "", WIDTH))


def _network(network: NetworkReport, title: str, width: int) -> Iterator[str]:
    place = f"  {network.where}" if network.where else ""
    yield from _wrapped(f"{title}{shortened(network.equation, width - 20)}{place}", width=width)
    if network.is_fused:
        yield from _wrapped(f"made of {' + '.join(map(str, network.calls))}", width=width)
    if network.made_by == "share":
        yield from _wrapped(f"a part that {', '.join(network.shared_by)} have in common, computed once", width=width)
    elif network.made_by:
        yield f"made by {network.made_by}"
    if not network.is_used:
        yield "nothing uses its result"
    if network.folded:
        yield f"{network.folded} of its steps are computed once, of frozen tensors"
    for number, operand in enumerate(network.optimized.operands):
        yield shortened(f"{number:>4}  {operand.name}  {operand.type}  {operand.where}".rstrip(), width)
    yield from _comparison(network, width)
    if len(network.path) > 1:
        yield f"order by {network.optimizer}: {shortened(str(list(network.path)), width - 45)}"
    yield from _steps(network.optimized)


def _comparison(network: NetworkReport, width: int) -> Iterator[str]:
    """What it costs naively, as written and optimized."""
    rows = [("", "naive", "as written", "optimized"), *compared(network)]
    if network.eager_ratio is not None:
        rows.append(("times as fast as written", "", "", f"{network.eager_ratio:.2f}"))
    for name, naive, written, optimized in rows:
        yield f"{name:24} {naive:>12} {written:>12} {optimized:>12}"
    if network.unmeasured:
        yield from _wrapped(f"as written it was not timed: {network.unmeasured}", width=width)


def _steps(order: OrderReport) -> Iterator[str]:
    is_timed = any(step.measured_seconds is not None for step in order.steps)
    yield (
        f"{'step':>4} {'operands':<9} {'einsum':<19} {'result':<13} {'dims':>4} {'BLAS':<12} {'kernel':<13} "
        f"{'FLOPs':>7} {'time' if not is_timed else 'measured':>9}"
    )
    for number, step in enumerate(order.steps, len(order.operands)):
        yield _step(number, step)


def _step(number: int, step: StepReport) -> str:
    operands = shortened(",".join(map(str, step.operands)), 9)
    shape = shortened(shape_text(step.shape), 13)
    time = step.seconds if step.measured_seconds is None else step.measured_seconds
    return (
        f"{number:>4} {operands:<9} {shortened(step.equation, 19):<19} {shape:<13} {step.scaling:>4} {step.blas:<12} "
        f"{shortened(step.kernel, 13):<13} {count(step.flops):>7} {seconds(time):>9}"
    )


def _code(text: str) -> Iterator[str]:
    for line in plain_code(text).splitlines():
        yield from _wrapped(line, "    ")


def plain_code(text: str) -> str:
    """Code without the ends of lines that drop values."""
    return re.sub(r";  [\w = ]+ = None$", "", text.strip(), flags=re.MULTILINE)


def _wrapped(text: str, indent: str = "", width: int = WIDTH) -> list[str]:
    own = len(text) - len(text.lstrip())
    start = indent + " " * own
    return textwrap.wrap(
        text.lstrip(), width, initial_indent=start, subsequent_indent=start + "    ", break_on_hyphens=False
    ) or [""]


def shortened(text: str, width: int) -> str:
    """The text, its middle left out where it is longer."""
    if len(text) <= width:
        return text
    return text[: width // 2 - 1] + ".." + text[len(text) - (width - width // 2 - 1) :]


def shape_text(shape: Sequence[int]) -> str:
    """``2x3``; ``scalar`` of no dimensions."""
    return "x".join(map(str, shape)) or "scalar"


def count(value: int) -> str:
    """A number of at most seven characters.

    >>> count(9999), count(12345678)
    ('9999', '1.23e7')
    """
    if value < 10_000:
        return str(value)
    return _short_exponent(f"{value:.2e}")


def _short_exponent(text: str) -> str:
    """``1e7`` for ``1e+07``."""
    return text.replace("e+0", "e").replace("e+", "e")


def n_bytes(value: int) -> str:
    """A number of bytes with its unit.

    >>> n_bytes(1000), n_bytes(5 * 2**20)
    ('1000 B', '5 MiB')
    """
    size = float(value)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{size:.4g} {unit}"


def seconds(value: float) -> str:
    """A time with its unit, of at most nine characters.

    >>> seconds(2.5e-6), seconds(0.0123), seconds(1.82e10)
    ('2.5 us', '12.3 ms', '1.82e10 s')
    """
    for unit, factor in (("us", 1e6), ("ms", 1e3)):
        if value * factor < 1000:
            return f"{value * factor:.3g} {unit}"
    return _short_exponent(f"{value:.3g} s")


FIGURES: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("scaling", "scaling", str),
    ("FLOPs", "flops", count),
    ("FLOPs backward", "backward_flops", count),
    ("bytes moved", "bytes", n_bytes),
    ("largest intermediate", "largest_bytes", n_bytes),
    ("peak memory", "peak_bytes", n_bytes),
    ("saved for backward", "saved_bytes", n_bytes),
    ("predicted time", "seconds", seconds),
    ("predicted backward", "backward_seconds", seconds),
    ("measured time", "measured_seconds", seconds),
)
"""What orders are compared by: its name, the attribute of ``OrderReport``, how its value is shown."""


def compared(network: NetworkReport) -> Iterator[tuple[str, str, str, str]]:
    """Rows of figures by name: naively, as written and optimized; those that the optimized order has."""
    for name, attribute, show in FIGURES:
        if attribute == "backward_flops" and not network.optimized.backward_flops:
            continue
        naive, written, optimized = (
            getattr(order, attribute, None) for order in (network.naive, network.written, network.optimized)
        )
        if optimized is not None:
            naive_text, written_text = ("" if value is None else show(value) for value in (naive, written))
            yield name, naive_text, written_text, show(optimized)
