"""A ``Report`` as one page of HTML that needs nothing beside itself: no network, no scripts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from html import escape
from typing import TYPE_CHECKING

from .report_drawing import LEVELS, draw, svg
from .report_text import compared, count, n_bytes, plain_code, seconds, shape_text, shortened

if TYPE_CHECKING:
    from .report import NetworkReport, OrderReport, Report, SpecializationReport

_OPEN = 8
"""Of networks, so many are shown in full; the others open at a click."""

_STYLE = (
    """
.lazy-einsum, body:has(> .lazy-einsum) { --ink: #1c2126; --soft: #5a6572; --paper: #ffffff; --card: #f4f6f8;
  --rule: #d5dbe1; --mark: #0b5cad;
  --h0: #c9ddf0; --h1: #a9d3b0; --h2: #ecd67c; --h3: #f0a35e; --h4: #e2695f; --on: #14181c;
  color: var(--ink); background: var(--paper); font: 15px/1.45 system-ui, sans-serif; color-scheme: light dark; }
@media (prefers-color-scheme: dark) { .lazy-einsum, body:has(> .lazy-einsum) { --ink: #e4e8ec; --soft: #9aa7b4;
  --paper: #14181c; --card: #1e242a; --rule: #37414b; --mark: #7db7f0; --h0: #3f6486; --h1: #427a54; --h2: #847020;
  --h3: #a65e22; --h4: #bc4740; --on: #ffffff; } }
:root:has(> body > .lazy-einsum) { color-scheme: light dark; }
body:has(> .lazy-einsum) { margin: 0; }
.lazy-einsum { padding: 1.2rem clamp(.8rem, 3vw, 2.5rem); }
.lazy-einsum h1 { font-size: 1.5rem; margin: 0 0 .3rem; overflow-wrap: anywhere; }
.lazy-einsum h2 { font-size: 1.1rem; margin: 1.8rem 0 .4rem; overflow-wrap: anywhere; }
.lazy-einsum h3 { font-size: 1rem; margin: 1rem 0 .3rem; }
.lazy-einsum p { margin: .3rem 0; overflow-wrap: anywhere; }
.lazy-einsum .soft { color: var(--soft); }
.lazy-einsum table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; color: inherit;
  background: transparent; }
.lazy-einsum th, .lazy-einsum td { text-align: left; padding: .22rem .6rem; border: 0 solid var(--rule);
  border-bottom-width: 1px; vertical-align: top; background: transparent; color: inherit; }
.lazy-einsum td.n, .lazy-einsum th.n { text-align: right; white-space: nowrap; }
.lazy-einsum td.e { overflow-wrap: anywhere; min-width: 9rem; max-width: 34rem; }
.lazy-einsum caption { text-align: left; font-weight: 600; padding: .3rem 0; color: inherit; }
.lazy-einsum code, .lazy-einsum pre, .lazy-einsum td.e { font-family: ui-monospace, monospace; font-size: .82rem; }
.lazy-einsum pre { margin: 0; background: transparent; color: inherit; }
.lazy-einsum details { background: var(--card); border-radius: .5rem; padding: .5rem .8rem; margin: .6rem 0; }
.lazy-einsum summary { cursor: pointer; overflow-wrap: anywhere; }
.lazy-einsum :focus-visible { outline: 2px solid var(--mark); outline-offset: 2px; }
.lazy-einsum .row { display: flex; flex-wrap: wrap; gap: 1rem 2rem; align-items: flex-start; }
.lazy-einsum .scroll { overflow-x: auto; max-width: 100%; }
.lazy-einsum figure { margin: 0; max-width: 100%; }
.lazy-einsum .stages { display: flex; gap: 1rem; overflow-x: auto; padding-bottom: .5rem; }
.lazy-einsum .stages section { flex: none; max-width: 46rem; overflow-x: auto; border-left: 3px solid var(--rule);
  padding-left: .7rem; }
.lazy-einsum svg path { fill: none; stroke: var(--soft); stroke-opacity: .55; stroke-linecap: round; }
.lazy-einsum svg text { font: 10px system-ui, sans-serif; text-anchor: middle; fill: var(--on); }
.lazy-einsum svg .leaf circle { fill: var(--paper); stroke: var(--soft); }
.lazy-einsum svg .leaf text { fill: var(--ink); }
"""
    + "\n".join(
        f".lazy-einsum .l{level} circle, .lazy-einsum i.l{level} {{ fill: var(--h{level}); background: "
        f"var(--h{level}); }}"
        for level in range(LEVELS)
    )
    + """
.lazy-einsum .legend i { display: inline-block; width: 1.2rem; height: .7rem; }
"""
)


def write_page(report: Report, whole: bool = True) -> str:
    """The page; only what goes into its body where ``whole`` is ``False``, as notebooks have a page of their own."""
    body = f'<style>{_STYLE}</style><main class="lazy-einsum">{"".join(_body(report))}</main>'
    if not whole:
        return body
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(report.name)}: lazy_einsum</title></head><body>{body}</body></html>\n"
    )


def _body(report: Report) -> Iterator[str]:
    yield f"<h1>{escape(report.name)}</h1>"
    if report.networks:
        count = f"{len(report.networks)} network{'s' * (len(report.networks) != 1)} of einsums"
        yield f"<p>{count}, {len(report.fused)} of them made of several calls; "
        yield f"the largest result of a contraction takes {n_bytes(report.largest_bytes)}.</p>"
    if report.eager_ratio is not None:
        yield f"<p>Measured: the networks as written take {report.eager_ratio:.2f} times as long.</p>"
    for reason in report.reasons:
        yield f"<p>Runs as it is: {escape(reason)}</p>"
    cache = dict(report.cache)
    if report.fold_bytes:
        cache["bytes computed once"] = report.fold_bytes
    cells = [f"{value:.3f}" if isinstance(value, float) else str(value) for value in cache.values()]
    yield _table("Cache", [name.replace("_", " ") for name in cache], [cells], numbers=range(len(cells)))
    if report.parts:
        rows = [list(item) for item in report.parts.items()]
        yield _table("Submodules", ["name", "what became of it"], rows, wide=[0, 1])
    if report.misses:
        rows = [[miss.signature, miss.reason, seconds(miss.seconds)] for miss in reversed(report.misses)]
        yield _table("Last misses, the last one first", ["call", "why", "building"], rows, numbers=[2], wide=[0, 1])
    for entry in report.specializations:
        yield from _specialization(entry)


def _specialization(entry: SpecializationReport) -> Iterator[str]:
    yield f"<section><h2>{escape(shortened(entry.signature, 240))}</h2>"
    sizes = ", for other sizes too" if entry.is_generic else ""
    runs = escape(f"runs through {entry.tier}" + (f": {entry.reason}" if entry.reason else ""))
    yield f"<p>{entry.hits} hits{sizes}; {runs}; built in {seconds(entry.build_seconds)}.</p>"
    for number, network in enumerate(entry.networks, 1):
        yield from _network(number, network)
    if entry.repeated or entry.left or entry.folds:
        rows = [[str(call), "computed once: another einsum gives the same"] for call in entry.repeated]
        rows += [[str(left.call), f"left as it is: {left.reason}"] for left in entry.left]
        rows += [[", ".join(fold.names), f"computed once, {n_bytes(fold.bytes)}"] for fold in entry.folds]
        yield _table("Shared, folded, left alone", ["what", "why"], rows, wide=[0, 1])
    yield "<details><summary>Time to build, by stage</summary>"
    times = [[name, seconds(took)] for name, took in entry.stage_seconds.items()]
    yield _table("", ["stage", "time"], times, numbers=[1]) + "</details>"
    yield "<details><summary>Code of every stage</summary>"
    yield '<div class="stages" tabindex="0" role="region" aria-label="code of every stage">'
    before = ""
    for name, text in entry.stages.items():
        code = plain_code(text)
        shown = f"<pre>{escape(code)}</pre>" if code != before else '<p class="soft">no change</p>'
        yield f"<section><h3>{escape(name)}</h3>{shown}</section>"
        before = code
    yield "</div></details></section>"


def _network(number: int, network: NetworkReport) -> Iterator[str]:
    written, optimized = network.written, network.optimized
    yield f"<details{' open' * (number <= _OPEN and network.is_used)}><summary>network {number}: "
    yield f"<code>{escape(network.equation)}</code> <span class=soft>{escape(network.where)}</span></summary>"
    if network.is_fused:
        yield f"<p>Made of {escape(' + '.join(map(str, network.calls)))}</p>"
    if network.made_by == "share":
        yield f"<p>A part that {escape(', '.join(network.shared_by))} have in common, computed once.</p>"
    elif network.made_by:
        yield f"<p>Made by {escape(network.made_by)}.</p>"
    if not network.is_used:
        yield "<p>Nothing uses its result.</p>"
    most = max(step.flops for order in (written, optimized) if order is not None for step in order.steps)
    yield '<div class="row">'
    if written is not None and written.steps:
        yield _figure("as written", written, most)
    yield _figure("optimized" + f" (order by {network.optimizer})" * (len(optimized.steps) > 1), optimized, most)
    yield _table("", ["", "naive", "as written", "optimized"], compared(network), [1, 2, 3]) + "</div>"
    if network.unmeasured:
        yield f"<p>As written it was not timed: {escape(network.unmeasured)}.</p>"
    legend = "".join(f'<i class="l{level}"></i>' for level in range(LEVELS))
    yield f'<p class="soft legend">Few FLOPs {legend} many. Wider lines are larger tensors. Rings are operands.</p>'
    timed = optimized.measured_seconds is not None
    names = [
        "step",
        "operands",
        "einsum",
        "remaining",
        "result",
        "dims",
        "BLAS",
        "kernel",
        "FLOPs",
        "bytes",
        "predicted",
    ]
    rows = [
        [
            str(place),
            ", ".join(map(str, step.operands)),
            step.equation,
            step.remaining,
            shape_text(step.shape),
            str(step.scaling),
            step.blas,
            step.kernel,
            count(step.flops),
            n_bytes(step.bytes),
            seconds(step.seconds),
            *([seconds(step.measured_seconds or 0.0)] if timed else []),
        ]
        for place, step in enumerate(optimized.steps, len(optimized.operands))
    ]
    numbers = [0, 5, 8, 9, 10, *([11] if timed else [])]
    yield _table("Order", [*names, *(["measured"] if timed else [])], rows, numbers, [2, 3, 7])
    operands = [
        [str(place), operand.name, operand.kind, operand.type, n_bytes(operand.bytes), operand.where]
        for place, operand in enumerate(optimized.operands)
    ]
    yield _table("Operands", ["", "name", "kind", "type", "bytes", "where"], operands, [0, 4], [1, 3, 5]) + "</details>"


def _figure(title: str, order: OrderReport, most: int) -> str:
    label = f"contraction tree {title}: {len(order.operands)} operands, {len(order.steps)} steps"
    tree = svg(draw(order, most), label)
    return f'<figure><figcaption>{escape(title)}</figcaption><div class="scroll" tabindex="0">{tree}</div></figure>'


def _table(
    title: str,
    names: Sequence[str],
    rows: Iterable[Sequence[str]],
    numbers: Iterable[int] = (),
    wide: Iterable[int] = (),
) -> str:
    numeric, long = set(numbers), set(wide)

    def row(tag: str, cells: Sequence[str]) -> str:
        texts = []
        for place, cell in enumerate(cells):
            kind = ' class="n"' if place in numeric else ' class="e"' if place in long and tag == "td" else ""
            scope = ' scope="col"' if tag == "th" else ""
            texts.append(f"<{tag}{scope}{kind}>{escape(cell)}</{tag}>")
        return f"<tr>{''.join(texts)}</tr>"

    caption = f"<caption>{escape(title)}</caption>" if title else ""
    head = row("th", names)
    return (
        f'<div class="scroll"><table>{caption}<thead>{head}</thead>'
        f"<tbody>{''.join(row('td', cells) for cells in rows)}</tbody></table></div>"
    )
