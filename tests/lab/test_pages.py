"""Figures and page: whole, self-contained, and right for keyboard and screen reader."""

from __future__ import annotations

import io
import re
from xml.etree import ElementTree

import pytest
from PIL import Image

from filterwise.lab.figures import draw
from filterwise.lab.look.drawing import DARK, INK, LIGHT, inline
from filterwise.lab.pages import page
from filterwise.lab.reading import read
from filterwise.lab.summary import Cell
from filterwise.lab.timing import StepTime
from support.outline import outline_of
from support.runs import PANEL, record, summary_of


def records():
    found = []
    for micro_batch in (1, 64):
        for seed in range(3):
            found += [
                record("none", 1.0, seed=seed, micro_batch=micro_batch, diverged=(1, 3)),
                record("gn+ws", 0.05, seed=seed, micro_batch=micro_batch),
            ]
        found.append(record("bn", failed="one value", micro_batch=micro_batch))
    return found


FACTS = {
    "command": "filterwise compare --out 'a <b>'",
    "folder": "/home/<script>alert(1)</script>",
    "finished": "2026-01-01 00:00 UTC",
    "runs": 12,
    "data": {"name": "<i>digits</i>", "origin": "Nowhere", "train": 3, "classes": 10},
    "settings": {"epochs": 2, "rows": [("Optimizer", "SGD")]},
    "versions": "torch 2",
    "hardware": "some",
    "notes": ("a & b",),
    "nets": [],
}


@pytest.fixture(scope="module")
def summary():
    steps = {Cell(PANEL, "gn+ws"): StepTime(1.25, 1.2, 1.3, 1.0, 9)}
    return summary_of(*records(), steps=steps)


@pytest.fixture(scope="module")
def figures(summary):
    return draw(summary)


@pytest.fixture(scope="module")
def html(summary, figures):
    return page(summary, read(summary), figures, FACTS)


@pytest.fixture(scope="module")
def outline(html):
    return outline_of(html)


def test_every_element_is_closed(outline):
    assert outline.open == []


def test_nothing_points_outside_and_nothing_runs(html, outline):
    assert "://" not in html
    assert "//" not in re.sub(r"\s//\s", "", html)
    assert not any(tag in ("script", "link", "iframe", "object", "img") for tag, _ in outline.tags)
    assert "@import" not in html
    local = {"results.jsonl", "error_by_micro_batch.svg", "error_by_epoch.png"}
    assert local <= set(outline.links)
    assert all(link.startswith("#") or "/" not in link for link in outline.links)


def test_names_are_unique_and_references_lead_somewhere(outline):
    assert len(outline.ids) == len(set(outline.ids))
    assert set(outline.refers) <= set(outline.ids)
    inside = {link[1:] for link in outline.links if link.startswith("#")}
    assert inside <= set(outline.ids)


def test_headings_skip_no_level(outline):
    assert outline.headings[0] == 1
    assert outline.headings.count(1) == 1
    steps = zip(outline.headings, outline.headings[1:], strict=False)
    assert all(after - before <= 1 for before, after in steps)


def test_tables_have_captions_and_scopes(html, outline):
    tags = [tag for tag, _ in outline.tags]
    assert tags.count("table") == tags.count("caption") == 2
    assert set(outline.headers) == {"col", "row"}
    assert "Table 2: plain net, learning rate 0.1, micro-batch 64</caption>" in html


def test_the_language_is_named_and_figures_have_words(outline):
    assert ("html", {"lang": "en"}) in outline.tags
    drawn = [found for tag, found in outline.tags if tag == "svg"]
    assert len(drawn) == 2
    assert all(found["role"] == "img" and found["aria-labelledby"] for found in drawn)


def test_scrolling_regions_can_be_reached_by_keyboard(outline):
    regions = [found for _, found in outline.tags if found.get("class") == "scroll"]
    assert len(regions) == 2
    assert all(found["tabindex"] == "0" and found["role"] == "region" for found in regions)


def test_the_page_has_command_numbers_and_reading(html):
    assert "filterwise compare --out &#39;a &lt;b&gt;&#39;" in html
    assert "<td>100.0</td>" in html
    assert "<td>3 of 3</td>" in html
    assert "<td>1.25</td>" in html
    assert "cannot be trained: one value" in html
    assert "What speaks against normalizing weights" in html


def test_words_of_others_are_escaped(html):
    assert "<script>" not in html
    assert "<i>digits" not in html
    assert "a &amp; b" in html


def test_both_colour_schemes_have_all_colours(html):
    assert "prefers-color-scheme: dark" in html
    for colours in (LIGHT, DARK):
        assert all(colour in html for colour in colours)


@pytest.mark.parametrize(("colours", "page"), [(LIGHT, "#ffffff"), (DARK, "#16171a")])
def test_colours_stand_out_from_the_page(colours, page):
    for colour in colours:
        bright, dim = sorted((_luminance(colour), _luminance(page)), reverse=True)
        assert (bright + 0.05) / (dim + 0.05) >= 4.5


def _luminance(colour):
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_figures_are_whole_files_and_repeatable(summary, figures):
    for figure, again in zip(figures, draw(summary), strict=True):
        ElementTree.fromstring(figure.svg)
        assert Image.open(io.BytesIO(figure.png)).size[0] > 1000
        assert figure.svg == again.svg


def test_the_figure_shows_medians(figures):
    """Marks of gn+ws: one at micro-batch 1 and one at 64, at the height of the 5 % tick."""
    svg = ElementTree.fromstring(figures[0].svg)
    marks = [
        (float(use.get("x")), float(use.get("y")))
        for use in svg.iter("{http://www.w3.org/2000/svg}use")
        if (use.get("style") or "").startswith(f"fill: {LIGHT[1]}; stroke")
    ]
    ticks = [
        float(use.get("y"))
        for use in svg.iter("{http://www.w3.org/2000/svg}use")
        if INK in (use.get("style") or "")
    ]
    (left, height), (right, other), _legend = marks
    assert left < right
    assert height == other
    # From below: two ticks for the micro-batches at the axis, then 2 %, 5 %, ...
    assert sorted(ticks, reverse=True)[3] == height


def test_inlined_figures_take_the_colours_of_the_page(figures):
    for figure in figures:
        text = inline(figure)
        assert "var(--series-2)" in text
        assert "currentColor" in text
        assert LIGHT[1] not in text
        assert text.startswith("<svg role=")


def test_one_micro_batch_and_no_error_can_be_drawn():
    draw(summary_of(record("bn", 0.0), record("gn", failed="one value")))
    draw(summary_of(record("bn", failed="one value")))
