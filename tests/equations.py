"""The one table of einsums, grouped by kind, and a Hypothesis strategy for more."""

from __future__ import annotations

from typing import NamedTuple

import torch
from behaviour import clone_tree
from hypothesis import strategies as st


class Row(NamedTuple):
    """An equation as a user would write it, and shapes it is called with."""

    equation: str
    shapes: tuple[tuple[int, ...], ...]


def _rows(*rows: str) -> list[Row]:
    """Rows from text: the equation, then each shape as ``2x3`` (``.`` for a scalar), separated by ``|``."""
    parsed = []
    for row in rows:
        equation, shapes = row.split("|")
        parsed.append(
            Row(equation.strip(), tuple(() if s == "." else tuple(map(int, s.split("x"))) for s in shapes.split()))
        )
    return parsed


GROUPS: dict[str, list[Row]] = {
    # No labels, or an operand without any.
    "scalars": _rows(
        " | .",
        "-> | .",
        ",-> | . .",
        ",,-> | . . .",
        ",ab->ab | . 2x3",
        "ab,->ba | 2x3 .",
        ",ab,bc->ac | . 2x3 3x4",
        ",ij,,jk,,kl->il | . 2x3 . 3x4 . 4x2",
        "a,,-> | 3 . .",
    ),
    # One operand: views, and sums.
    "single": _rows(
        "a->a | 3",
        "ab->ab | 2x3",
        "ab->ba | 2x3",
        "abc->bca | 2x3x4",
        "abcd->dbca | 2x3x4x2",
        "a-> | 4",
        "ab-> | 2x3",
        "ab->a | 2x3",
        "ab->b | 2x3",
        "abc->ca | 2x3x4",
        "abcd->bd | 2x3x4x2",
    ),
    "trace and diagonal": _rows(
        "aa-> | 3x3",
        "aa->a | 3x3",
        "aab->b | 3x3x2",
        "aab->ba | 3x3x2",
        "aba->ab | 3x2x3",
        "baa->ab | 2x3x3",
        "aaa->a | 3x3x3",
        "aaa-> | 2x2x2",
        "aabb->ab | 2x2x3x3",
        "abab->ba | 2x3x2x3",
        "abab-> | 2x3x2x3",
        "aa,aa->a | 3x3 3x3",
        "aa,ab->b | 3x3 3x2",
        "aab,bc->ac | 2x2x3 3x4",
        "aa,bb-> | 2x2 3x3",
        "ab,bb->a | 2x3 3x3",
        "abb,bc->ac | 2x3x3 3x4",
        "aabb,ab->a | 2x2x3x3 2x3",
        "aa,a,ab->b | 3x3 3 3x2",
        # How products lie depends on strides of dimensions of size 1.
        ",Fccd,Fc,Fb->Fb | . 2x1x1x1 2x1 1x2",
        # By the order of its letters torch.einsum copies or views the diagonal.
        "cdb,bcdd,d-> | 2x1x2 2x2x2x2 2",
    ),
    "hadamard": _rows(
        "a,a->a | 3 3",
        "ab,ab->ab | 2x3 2x3",
        "ab,ba->ab | 2x3 3x2",
        "ab,ba->ba | 2x3 3x2",
        "ab,ab->ba | 2x3 2x3",
        "abc,abc,abc->abc | 2x3x2 2x3x2 2x3x2",
        "abc,ac->abc | 2x3x4 2x4",
        "abc,b->cab | 2x3x4 3",
        "ab,a,b->ab | 2x3 2 3",
        "abc,ca,bac->bca | 2x3x4 4x2 3x2x4",
    ),
    "outer": _rows(
        "a,b->ab | 2 3",
        "a,b->ba | 2 3",
        "ab,cd->abcd | 2x3 4x2",
        "ab,cd->cadb | 2x3 4x2",
        "a,b,c->abc | 2 3 4",
        "a,b,c->cab | 2 3 4",
        "a,b,c,d->dcba | 2 3 2 3",
        "ab,c->acb | 2x3 4",
    ),
    "dot and matrix-vector": _rows(
        "a,a-> | 4 4",
        "ab,ab-> | 2x3 2x3",
        "ab,ba-> | 2x3 3x2",
        "abc,cab-> | 2x3x4 4x2x3",
        "ab,b->a | 2x3 3",
        "ab,a->b | 2x3 2",
        "a,ab->b | 2 2x3",
        "b,ab->a | 3 2x3",
        "abc,bc->a | 2x3x4 3x4",
        "abc,cb->a | 2x3x4 4x3",
        "abc,ca->b | 2x3x4 4x2",
        "ab,abcd->cd | 2x3 2x3x4x2",
    ),
    # All transpositions of operands and result.
    "gemm": _rows(
        "ab,bc->ac | 2x3 3x4",
        "ba,bc->ac | 3x2 3x4",
        "ab,cb->ac | 2x3 4x3",
        "ba,cb->ac | 3x2 4x3",
        "ab,bc->ca | 2x3 3x4",
        "ba,bc->ca | 3x2 3x4",
        "ab,cb->ca | 2x3 4x3",
        "ba,cb->ca | 3x2 4x3",
        "abc,cd->abd | 2x3x4 4x5",
        "abc,bd->adc | 2x3x4 3x5",
        "abc,bd->dac | 2x3x4 3x5",
        "abcd,bde->ace | 2x3x4x2 3x2x5",
        "abcd,dbe->eca | 2x3x4x2 2x3x5",
        "abcd,cbef->adef | 2x3x4x2 4x3x2x3",
        "abcd,cbef->edfa | 2x3x4x2 4x3x2x3",
        "efbad,cf->abcde | 2x3x2x2x3 4x3",
        "ab,acdb->cd | 2x3 2x4x5x3",
        "ab,ca,db->cd | 2x3 4x2 5x3",
    ),
    "batch": _rows(
        "zab,zbc->zac | 3x2x4 3x4x2",
        "zab,zbc->azc | 3x2x4 3x4x2",
        "zab,zbc->acz | 3x2x4 3x4x2",
        "zab,zcb->zca | 3x2x4 3x5x4",
        "azb,bzc->zac | 2x3x4 4x3x2",
        "azb,bzc->caz | 2x3x4 4x3x2",
        "abz,bcz->zac | 2x4x3 4x2x3",
        "zab,zb->za | 3x2x4 3x4",
        "za,zb->zab | 3x2 3x4",
        "za,zb->bza | 3x2 3x4",
        "za,za->z | 3x4 3x4",
        "zab,zab->z | 3x2x4 3x2x4",
        "yzab,yzbc->yzac | 2x3x2x4 2x3x4x2",
        "yzab,zybc->zyac | 2x3x2x4 3x2x4x2",
        "bqhd,bkhd->bhqk | 2x3x2x4 2x5x2x4",
        "bhqk,bkhd->bqhd | 2x2x3x5 2x5x2x4",
        "zij,zjk,zk->zi | 5x4x2 5x2x3 5x3",
        "zui,zj,zuv,ijk->zvk | 3x2x3 3x3 3x2x4 3x3x5",
    ),
    # Labels in three or more places.
    "hyperindices": _rows(
        "ab,ac,ad->abcd | 2x2 2x3 2x4",
        "ab,ac,ad->bcd | 3x2 3x3 3x4",
        "ab,ab,ab-> | 2x3 2x3 2x3",
        "a,a,a,a-> | 3 3 3 3",
        "ab,bc,ca,ab->c | 2x3 3x2 2x2 2x3",
        "ab,ac,bc,abc->a | 2x3 2x4 3x4 2x3x4",
        "ab,cb,db,eb->acde | 2x3 2x3 2x3 2x3",
        "iP,aP,PQ,jQ,bQ->iajb | 2x3 2x3 3x3 2x3 2x3",
        "ab,b,bc,b,cd->ad | 2x3 3 3x2 3 2x4",
    ),
    # Labels that only one operand has.
    "lone labels": _rows(
        "ab,c->a | 2x3 4",
        "ab,cd-> | 2x3 4x2",
        "ab,bc->a | 2x3 3x4",
        "ab,bc->c | 2x3 3x4",
        "ab,bc-> | 2x3 3x4",
        "abc,d->b | 2x3x4 2",
        "ab,cd,ef->ae | 2x3 2x3 2x3",
        "ab,bc,cd->b | 2x3 3x4 4x2",
        "aab,c->b | 2x2x3 3",
    ),
    # A size of 1 against a larger one, and sizes of 1 everywhere.
    "size 1": _rows(
        "ab,ab->ab | 1x3 2x3",
        "ab,ab->ab | 2x1 1x3",
        "ab,ab-> | 1x3 2x3",
        "ab,bc->ac | 2x1 3x4",
        "ab,bc->ac | 2x3 1x4",
        "ab,bc->ac | 1x3 3x1",
        "zab,zbc->zac | 1x2x3 4x3x2",
        "zab,zbc->zac | 4x2x3 1x3x2",
        "zab,zbc->zac | 1x2x3 1x3x2",
        "ab,ab,ab->a | 1x3 2x1 2x3",
        "ab,bc,cd->ad | 1x1 3x4 1x2",
        "ab,bc,cd->ad | 2x1 1x4 4x2",
        "a,a->a | 1 1",
        "a,a-> | 1 3",
        "a,b->ba | 1 1",
        "abc->ac | 2x1x3",
        "abc->b | 1x3x1",
        "a->a | 1",
        "aa->a | 1x1",
        "a-> | 1",
        "aab,ab->b | 1x1x3 2x3",
        "ab,a->b | 1x3 1",
        "abc,abd->cd | 2x1x3 2x1x4",
        "a,ab,abc->c | 1 1x1 1x1x3",
        "ab,ac,ad->a | 1x2 1x3 3x2",
    ),
    "zero sizes": _rows(
        "a->a | 0",
        "a-> | 0",
        "ab->b | 0x3",
        "ab->ba | 0x3",
        "ab,bc->ac | 0x3 3x4",
        "ab,bc->ac | 2x0 0x4",
        "a,a-> | 0 0",
        "zab,zbc->zac | 0x2x3 0x3x4",
        "zab,zbc->zac | 2x0x3 2x3x4",
        "zab,zbc->zac | 2x3x0 2x0x4",
        "a,b->ab | 0 3",
        "ab,ab->ab | 0x3 0x3",
        "ab,ab->ab | 1x3 0x3",
        "ab,bc,cd->ad | 2x0 0x3 3x2",
        "aa->a | 0x0",
        "aa-> | 0x0",
        "ab,c->a | 2x0 3",
        "ab,bc->ca | 1x0 1x2",
        "ab,ba-> | 0x2 2x0",
    ),
    "ellipsis": _rows(
        "... | 2x3",
        "...-> | 2x3",
        "...->... | 2x3",
        "...a->... | 2x3x4",
        "...a->a... | 2x3x4",
        "a...->... | 2x3x4",
        "a...b->b...a | 2x3x4x2",
        "...ab,...bc->...ac | 2x3x4 2x4x5",
        "...ab,...bc->...ac | 5x2x3x4 2x4x5",
        "...ab,...bc->...ac | 5x1x3x4 2x4x5",
        "...ab,bc->...ac | 2x3x4 4x5",
        "ab...,b...->a... | 2x3x4 3x4",
        "...,... | 2x3 2x3",
        "...,...-> | 2x3 3",
        "...a,...a->... | 2x3 2x3",
        "a...,...b->ab | 2x3 3x4",
        "...a,a | 2x3 3",
        "...ii->...i | 2x3x3",
        "...,a->a... | . 3",
        "...a,...b,...c->...abc | 2x2 1x3 2x2",
        "a->...a | 3",
    ),
    "implicit output": _rows(
        "ab | 2x3",
        "ba | 2x3",
        "aa | 3x3",
        "ab,bc | 2x3 3x4",
        "cb,ba | 2x3 3x4",
        "ab,cd | 2x3 2x2",
        "ba,ca,da | 2x3 4x3 2x3",
        "zab,zbc | 2x3x4 2x4x5",
        "ii,i | 3x3 3",
        "c,b,a | 2 3 4",
        "i...j | 2x3x4",
    ),
    "capitals": _rows(
        "Ab->bA | 2x3",
        "aA,Ab->ab | 2x3 3x4",
        "bA | 2x3",
        "aB,Bc | 2x3 3x4",
        "zZ,Zy | 2x3 3x4",
        "Aa,aB,Bb->bA | 2x3 3x2 2x4",
    ),
    "spaces": _rows(
        " a b , b c -> a c | 2x3 3x4",
        "ab, bc | 2x3 3x4",
        "a b ->b a | 2x3",
        " ... a ,a b-> ... b | 2x3x4 4x5",
        " , ab -> a | . 2x3",
    ),
    "many operands": _rows(
        "ab,bc,cd,de->ae | 2x3 3x2 2x4 4x3",
        "ab,bc,cd,de->ea | 2x3 3x2 2x4 4x3",
        "ab,bc,cd,da-> | 2x3 3x2 2x4 4x2",
        "a,ab,bc,cd,de,e-> | 2 2x3 3x2 2x3 3x2 2",
        "ab,cd,ef,gh->aceg | 2x2 2x3 2x2 2x3",
        "abc,ade,bdf,cef-> | 2x2x2 2x2x2 2x2x2 2x2x2",
        "pi,qj,ijkl,rk,sl->pqrs | 2x2 2x3 2x3x2x2 3x2 2x2",
        "ab,bc,cd,de,ef,fg,gh,hi->ai | 2x2 2x2 2x2 2x2 2x2 2x2 2x2 2x2",
        "ab,ac,bd,ce,df,eg,fg->a | 2x2 2x2 2x2 2x2 2x2 2x2 2x2",
        "a,b,c,d,e,f,g,abcdefg-> | 2 2 2 2 2 2 2 2x2x2x2x2x2x2",
        "ab,bc,cd,de,ef,fg,gh,hi,ij,jk->ak | 2x2 2x2 2x2 2x2 2x2 2x2 2x2 2x2 2x2 2x2",
        "zab,zbc,zcd,zde,zef,zfg,zgh->zah | 2x2x2 2x2x2 2x2x2 2x2x2 2x2x2 2x2x2 2x2x2",
    ),
    # Regressions of this package and of its peers.
    "once failed": _rows(
        # opt_einsum takes these with an empty result of a step, or without any common label.
        "a,ab,abc->abc | 2 2x3 2x3x2",
        "ab,ab,c->abc | 2x3 2x3 2",
        "ab,ab,c-> | 2x3 2x3 2",
        "ab,cd,ef->acdf | 2x2 2x2 2x2",
        "eb,cb,fb->cef | 2x3 2x3 2x3",
        "dd,fb,be,cdb->cef | 2x2 2x2 2x2 2x2x2",
        "bca,cdb,dbf,afc-> | 2x2x2 2x2x2 2x2x2 2x2x2",
        "dcc,fce,ea,dbf->ab | 2x2x2 2x2x2 2x2 2x2x2",
        "fdf,cdd,ccd,afe->ae | 2x2x2 2x2x2 2x2x2 2x2x2",
        "abcd,ad | 2x2x2x2 2x2",
        "ed,fcd,ff,bcf->be | 2x2 2x2x2 2x2 2x2x2",
        "baa,dcf,af,cde->be | 2x2x2 2x2x2 2x2 2x2x2",
        # A scalar times a vector of one element, where both are broadcast.
        "a,b,ab->a | 1 1 3x3",
        "ab,a-> | 1x1 3",
    ),
}

ROWS: list[tuple[str, Row]] = [(group, row) for group, rows in GROUPS.items() for row in rows]
"""All rows with their group."""


def row_id(item: tuple[str, Row]) -> str:
    """Name of a row for pytest."""
    group, row = item
    return f"{group}: {row.equation} {' '.join('x'.join(map(str, shape)) or '.' for shape in row.shapes)}"


@st.composite
def equations(draw: st.DrawFn, max_operands: int = 4) -> Row:
    """Equations of few labels with sizes 0 to 4, mostly not 0; operands may broadcast and repeat labels."""
    labels = "abcdeF"[: draw(st.integers(1, 6))]
    sizes = {
        label: draw(st.sampled_from([1, 2, 2, 3, 3, 4, 0] if n == 0 else [1, 2, 2, 3]))
        for n, label in enumerate(labels)
    }
    terms, shapes = [], []
    for _ in range(draw(st.integers(1, max_operands))):
        term = draw(st.text(labels, max_size=4))
        ones = {label: draw(st.integers(0, 7)) == 0 for label in sorted(set(term))}
        terms.append(term)
        shapes.append(tuple(1 if ones[label] else sizes[label] for label in term))
    used = sorted(set("".join(terms)))
    output = "".join(draw(st.permutations(used)))[: draw(st.integers(0, len(used)))]
    return Row(f"{','.join(terms)}->{output}", tuple(shapes))


def make_operands(
    shapes: tuple[tuple[int, ...], ...],
    dtype: torch.dtype,
    seed: int = 0,
    strided: bool = False,
    device: str = "cpu",
) -> list[torch.Tensor]:
    """Random operands; integers are small, floats of order 1.

    Args:
        shapes: shape of each.
        dtype: type of all.
        seed: of the random numbers; with ``strided`` of the layouts too.
        strided: lay the dimensions in memory in a random order, with gaps, or expanded from size 1.
        device: where they lie.
    """
    generator = torch.Generator().manual_seed(seed)

    def values(shape: tuple[int, ...]) -> torch.Tensor:
        if dtype.is_floating_point or dtype.is_complex:
            return torch.randn(shape, generator=generator, dtype=dtype)
        return torch.randint(-9, 10, shape, generator=generator).to(dtype)

    operands = []
    for shape in shapes:
        if not strided or not shape:
            operands.append(values(shape))
            continue
        order = torch.randperm(len(shape), generator=generator).tolist()
        kind = int(torch.randint(0, 4, (), generator=generator))
        if kind == 0:
            first = shape[order[0]]
            tensor = values((1, *(shape[place] for place in order[1:]))).expand(first, *(-1,) * (len(shape) - 1))
        elif kind == 1:
            tensor = values(tuple(shape[place] * 2 for place in order))[tuple(slice(None, None, 2) for _ in order)]
        else:
            tensor = values(tuple(shape[place] for place in order))
        operands.append(tensor.permute(*(order.index(place) for place in range(len(shape)))))
    return operands if device == "cpu" else clone_tree(operands, device)
