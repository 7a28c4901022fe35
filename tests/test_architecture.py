"""Imports between the modules of the package go from a higher rank to a lower one only."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import lazy_einsum

PACKAGE = Path(lazy_einsum.__file__).parent

#: A module imports those of lower ranks only. Ranks are the order in which the code can be read, from the bottom.
RANKS = {
    "errors": 0,
    "sizes": 0,
    "hints": 0,
    "counter": 0,
    "where": 0,
    "objects": 0,
    "distributed": 0.7,
    "impure": 1,
    "regions": 0,
    "closures": 0,
    "data": 0.5,
    "outside": 4,
    "spec": 1,
    "calls": 1,
    "cost": 1,
    "backends": 1.1,
    "calibrate": 4,
    "signature": 1,
    "symbols": 1,
    "labelsets": 1.5,
    "exact": 1.8,
    "search": 2,
    "plan": 3,
    "ways": 3,
    "backward": 3.5,
    "best_ways": 3.7,
    "ambient": 2,
    "layout": 2,
    "surroundings": 2,
    "generic": 2,
    "argument_names": 2,
    "decompose": 4,
    "saved": 5,
    "orders": 5.5,
    "stopwatch": 4,
    "fastest": 5.6,
    "choice": 5.7,
    "known": 2,
    "json_files": 0.5,
    "version": 0,
    "plan_file": 5,
    "program": 3,
    "kernels": 4,
    "blocks": 4.5,
    "graph": 3,
    "products": 4,
    "dimensions": 4.5,
    "frozen": 4,
    "folds": 3.5,
    "networks": 5,
    "scalars": 5,
    "state": 3,
    "live": 2,
    "fakes": 3,
    "shadow": 5,
    "net": 4,
    "modes": 4,
    "record": 4,
    "recorder": 6,
    "passes": 6,
    "tracing": 7,
    "witness": 4,
    "source_code": 7.5,
    "specialize": 8,
    "compiled": 9,
    "ahead": 9.5,
    "verify": 9,
    "cache": 9,
    "misses": 3,
    "logs": 9,
    "report_text": 9,
    "report_drawing": 9.2,
    "report_page": 9.5,
    "report_figure": 9.5,
    "report": 10,
    "figures": 10.1,
    "operand_names": 10.1,
    "running": 10.1,
    "written": 10.2,
    "anatomy": 10.3,
    "explain": 11,
    "timing": 10.5,
    "contract": 9,
    "functional": 9,
    "dispatch": 10,
    "dynamo": 10,
    "parts": 11,
    "exporting": 11.5,
    "module": 12,
    "bench": 12.5,
    "progress": 0,
    "__init__": 13,
    "__main__": 14,
}

FILES = sorted(PACKAGE.rglob("*.py"))


def _module_of(path: Path) -> str:
    """The name under which a file has a rank: its own, or that of its folder."""
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def _is_type_checking(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _imports(path: Path) -> list[tuple[int, str]]:
    """(line, module of the package) for each import in a file that happens when it runs."""
    tree = ast.parse(path.read_text())
    only_for_types = {id(inner) for node in ast.walk(tree) if _is_type_checking(node) for inner in ast.walk(node)}
    depth = len(path.relative_to(PACKAGE).parts)
    found: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        if id(node) in only_for_types:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level == depth:
                start = "lazy_einsum"
            elif node.level == 1:
                start = f"lazy_einsum.{_module_of(path)}"
            else:
                start = ""
            base = ".".join(part for part in (start, node.module) if part)
            names = [f"{base}.{alias.name}" for alias in node.names] if base == "lazy_einsum" else [base]
        else:
            continue
        found.extend((node.lineno, name.split(".")[1]) for name in names if name.startswith("lazy_einsum."))
    return found


def test_every_module_has_a_rank() -> None:
    assert {_module_of(path) for path in FILES} <= RANKS.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_to_lower_ranks(path: Path) -> None:
    own = _module_of(path)
    wrong = []
    for line, other in _imports(path):
        inside_folder = other == own and len(path.relative_to(PACKAGE).parts) > 1
        # Of the passes, only their __init__ knows the others.
        allowed = path.stem == "__init__" if inside_folder else RANKS.get(other, -1) < RANKS[own]
        if not allowed:
            wrong.append(f"line {line}: {own} (rank {RANKS[own]}) imports {other} (rank {RANKS.get(other)})")
    assert wrong == []


def test_planning_and_algebra_need_no_torch() -> None:
    for name in ("errors", "spec", "cost", "search", "plan"):
        tree = ast.parse((PACKAGE / f"{name}.py").read_text())
        roots = {
            alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
        }
        roots |= {(node.module or "").split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert "torch" not in roots, name


def test_only_plan_searches_for_orders() -> None:
    users = {
        path.name for path in FILES if "opt_einsum" in _imported_roots(path) or "cotengra" in _imported_roots(path)
    }
    assert users == {"plan.py", "bench.py"}  # the latter times them


def _imported_roots(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    roots = {
        alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    }
    return roots | {
        (node.module or "").split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and not node.level
    }


def test_the_check_sees_an_import_upwards(tmp_path: Path) -> None:
    """Control: ``plan`` importing ``module`` would be found."""
    assert RANKS["module"] > RANKS["plan"]
    assert ("module" in {other for _, other in _imports(PACKAGE / "__init__.py")}) is True
    assert "errors" in {other for _, other in _imports(PACKAGE / "plan.py")}
    assert "graph" in {other for _, other in _imports(PACKAGE / "passes" / "fuse_einsums.py")}
