"""Figures: what is drawn is what was recorded, and a person can read it."""

from __future__ import annotations

import csv
import io
import itertools
import math

import pytest

from filterwise.lab.diagnosis.catalogue import FIGURES, Runs
from filterwise.lab.diagnosis.densities import density
from filterwise.lab.diagnosis.lines import totals
from filterwise.lab.diagnosis.runs import Setting

PAPERS = {
    *(f"wa/fig{number}" for number in (2, 4, 5, 7, 8, 9, 10, 11, 12)),
    "ws/fig4",
    "equinorm/fig1",
    *(f"pws/fig{number}" for number in (1, 2, 6)),
}


@pytest.fixture(scope="module")
def made():
    return Runs(Setting(epochs=1, width=4))


def test_every_diagnostic_figure_of_the_papers_is_there():
    assert set(FIGURES) >= PAPERS


def normal(low=-5.0, high=5.0, total=10_000):
    width = (high - low) / 64
    edges = [low + width * place for place in range(65)]
    below = [0.5 * (1 + math.erf(edge / math.sqrt(2))) for edge in edges]
    return [low, high, *(total * (b - a) for a, b in itertools.pairwise(below))]


def test_a_density_is_that_of_the_counted_numbers():
    curve = density(normal())
    assert curve is not None
    step = curve.at[1] - curve.at[0]
    assert sum(curve.height) * step == pytest.approx(1, abs=0.01)
    for x, y in zip(curve.at, curve.height, strict=True):
        assert y == pytest.approx(math.exp(-x * x / 2) / math.sqrt(2 * math.pi), abs=0.02)


@pytest.mark.parametrize("row", [[0.0, 0.0, *[1] * 64], [0.0, 1.0, *[0] * 64], [math.nan] * 66])
def test_what_has_no_density_has_none(row):
    assert density(row) is None


def test_shares_weigh_filters_by_their_gradient_and_layers_alike():
    records = [
        {"step": 1, "layer": layer, "signal": signal, "value": value}
        for layer, values in {
            "a": ([3.0, 4.0, 0.0], [0.1, 0.2, math.nan], [0.9, 0.8, math.nan]),
            "b": ([1.0], [0.5], [0.5]),
        }.items()
        for signal, value in zip(("effective_gradient_norm", "x", "y"), values, strict=True)
    ]
    of_a = (9 * 0.1 + 16 * 0.2) / 25
    found = totals(records, ["x", "y"])
    assert found[1]["x"] == pytest.approx((of_a + 0.5) / 2)
    assert found[1]["x"] + found[1]["y"] == pytest.approx(1)


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_has_axes_with_n_and_its_data_beside_it(name, made):
    plot = FIGURES[name].plot(made)
    text = plot.figure.svg.decode()
    assert plot.figure.name.replace("-", "/", 1) == name or name.startswith("wa/fig2")
    assert "n = " in text
    assert plot.figure.png.startswith(b"\x89PNG")
    rows = list(csv.DictReader(io.StringIO(plot.data)))
    assert len(rows) > 5
    assert all(None not in row.values() for row in rows)
    for panel in {row["panel"] for row in rows if name.startswith("wa")}:
        assert panel.split(" (")[0] in text


def test_the_same_records_give_the_same_file(made):
    entry = FIGURES["pws/fig6"]
    assert entry.plot(made).figure.svg == entry.plot(made).figure.svg


def test_the_ws_shares_add_to_one_and_the_toy_kernel_is_balanced(made):
    rows = csv.DictReader(io.StringIO(FIGURES["ws/fig4"].plot(made).data))
    shares = [float(row["value"]) for row in rows if row["panel"] == "shares"]
    assert sum(shares) == pytest.approx(1, abs=1e-5)
    rows = csv.DictReader(io.StringIO(FIGURES["equinorm/fig1"].plot(made).data))
    parts = [(row["line"], float(row["value"])) for row in rows if row["panel"] == "contribution"]
    assert len(parts) == 82
    for sign, value in parts:
        assert value == pytest.approx(9 if sign == "positive" else -9, rel=1e-4)


def test_the_variance_figure_shows_what_centring_takes_away(made):
    rows = list(csv.DictReader(io.StringIO(FIGURES["wa/fig2-variance"].plot(made).data)))
    last = {row["net"]: float(row["median"]) for row in rows if row["panel"] == "wa"}
    assert {row["net"] for row in rows} >= {"measured", "printed", "predicted (patches)"}
    assert last["printed"] > 0
