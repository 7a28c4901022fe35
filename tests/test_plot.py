"""The picture of the benchmark: what is drawn, in which order, and what is said where nothing can draw it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from plot import draw, draw_epoch, ratios

TABLE = {
    "far": {"ours": 1.0, "eager": 30.0, "fx": 4.0, "cotengra": 5.0},
    "near": {"ours": 2.0, "eager": 1.5, "expression": 6.0},
    "too large for torch": {"ours": 1.0, "cotengra": 2.0},
    "alone": {"ours": 1.0},
}


def test_ratios_are_those_of_the_best_peer_and_of_eager_in_order() -> None:
    assert list(ratios(TABLE).items()) == [
        ("near", (0.75, 0.75)),
        ("too large for torch", (2.0, None)),
        ("far", (4.0, 30.0)),
    ]


def test_the_picture_names_each_network(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "networks.svg"
    draw(TABLE, str(path), "A title")
    text = path.read_text()
    for word in ("near", "far", "too large for torch", "A title", "torch.einsum"):
        assert f">{word}<" in text, word
    assert ">alone<" not in text


def test_the_picture_of_an_epoch_says_when_each_is_done(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "epoch.svg"
    draw_epoch({"slow": [10.0, 20.5, 30.25], "fast": [0.5, 0.6, 0.7]}, str(path), "A title")
    text = path.read_text()
    assert ">30.2 s  slow<" in text and ">0.7 s  fast<" in text and ">A title<" in text
    assert text.index("slow<") < text.index("fast<")


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'lazy_einsum\[plot\]'"):
        draw(TABLE, str(tmp_path / "networks.svg"), "A title")
    with pytest.raises(ImportError, match=r"pip install 'lazy_einsum\[plot\]'"):
        draw_epoch({"fast": [0.5]}, str(tmp_path / "epoch.svg"), "A title")
