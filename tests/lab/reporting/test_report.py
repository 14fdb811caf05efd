"""The command and its page: whole, self-contained, and nothing shrunk beside the paper."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess

import duckdb
import pandas
import pytest
from PIL import Image

from support.commands import call, one_line
from support.outline import outline_of
from support.reproduced import a_full_table, line, write_lines, write_recipe

SHRUNK = {"optimization.epochs": (4, 3), "data.train_samples": (50_000, 500)}


MINUS = "\N{MINUS SIGN}"


def smoke(row, error, **more):
    return line(row, error, budget="smoke", shrunk=SHRUNK, epochs=3, **more)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("report")


@pytest.fixture(scope="module")
def recipe(home):
    return write_recipe(home)


@pytest.fixture(scope="module")
def full(home, recipe):
    folder = write_lines(home / "full", *a_full_table())
    result = call("report", folder, "--recipe", recipe, "--markdown", home / "docs" / "toy.md")
    assert result.exit_code == 0, result.output
    return result.stdout, (folder / "report-full.html").read_text()


@pytest.fixture(scope="module")
def shrunk(home, recipe):
    lines = [smoke("BN, 64", 0.061, seed=0), smoke("WA, 64", 0.2, seed=0)]
    folder = write_lines(home / "shrunk", *lines)
    result = call("report", folder, "--recipe", recipe, "--markdown", folder / "toy.md")
    assert result.exit_code == 0, result.output
    page = (folder / "report-smoke.html").read_text()
    return result.stdout, page, (folder / "toy.md").read_text()


@pytest.fixture(scope="module", params=["full", "shrunk"])
def outline(request):
    page = request.getfixturevalue(request.param)[1]
    return page, outline_of(page)


def test_the_page_is_whole_and_needs_nothing_else(outline):
    page, found = outline
    assert found.open == []
    assert "://" not in page
    assert not any(tag in ("script", "link", "iframe", "object", "img") for tag, _ in found.tags)
    assert all(link.startswith("#") for link in found.links)
    assert {link[1:] for link in found.links} <= set(found.ids)


def test_the_page_can_be_read_with_a_keyboard_and_a_screen_reader(outline):
    _, found = outline
    assert len(found.ids) == len(set(found.ids))
    assert set(found.refers) <= set(found.ids)
    assert found.headings[0] == 1
    assert found.headings.count(1) == 1
    steps = zip(found.headings, found.headings[1:], strict=False)
    assert all(after - before <= 1 for before, after in steps)
    tags = [tag for tag, _ in found.tags]
    assert tags.count("table") == tags.count("caption") > 0
    assert set(found.headers) == {"col", "row"}
    regions = [each for _, each in found.tags if each.get("class") in ("scroll", "drawing")]
    assert len(regions) == tags.count("table") + tags.count("svg")
    assert all(each["tabindex"] == "0" and each["role"] == "region" for each in regions)
    drawn = [each for tag, each in found.tags if tag == "svg"]
    assert drawn
    assert all(each["role"] == "img" and each["aria-labelledby"] for each in drawn)
    assert ("html", {"lang": "en"}) in found.tags


def test_words_of_others_are_escaped(full):
    _, page = full
    assert "Toys &lt;b&gt;&amp; more&lt;/b&gt;" in page
    assert "<i>doubtful" not in page


def cells(page, row):
    """Return the texts of a row's first appearance."""
    inside = re.search(rf'<th scope="row">{row}</th>(.*?)</tr>', page, re.DOTALL)
    return re.findall(r"<td[^>]*>(.*?)</td>", inside[1])


def test_the_paper_stands_beside_its_own_set_up(full):
    _, page = full
    assert cells(page, "BN, 64") == [
        "6.10",
        "6.05 to 6.15",
        "3",
        "0 of 3",
        "5.49",
        "5.00",
        "+1.10 (+1.00 to +1.20)",
    ]
    assert cells(page, "none, 64")[3] == "3 of 3"
    assert cells(page, "none, 64")[5] == "prints “NaN”"
    assert cells(page, "none, 8")[6] == f"no difference seen: +0.50 ({MINUS}0.50 to +1.50)"
    assert cells(page, "WA, 8")[5] == "6.00 (recovered: text | figure)"
    assert cells(page, "WA, 64")[5:] == ["not readable: drawn only", "-"]


def test_nothing_shrunk_stands_beside_the_paper(shrunk):
    stdout, page, text = shrunk
    assert cells(page, "BN, 64") == ["6.10", "6.10 to 6.10", "1", "0 of 1", "5.49"]
    heads = re.findall(r"<caption.*?<span>(.*?)</span>.*?<thead>(.*?)</thead>", page, re.DOTALL)
    with_paper = [caption for caption, head in heads if ">paper<" in head]
    numbers = [caption for caption in with_paper if "smaller than in the paper" not in caption]
    assert numbers
    assert all("Not comparable with the smoke runs" in caption for caption in numbers)
    assert all("[smoke]" in caption or caption in numbers for caption, _ in heads), (
        "a table without its budget"
    )
    titles = re.findall(r'-title">(.*?)</h3>', page)
    assert titles
    assert all(title.endswith("[smoke]") for title in titles)
    for shown in (page, stdout, text):
        assert f"ours {MINUS} paper" not in shown
    assert "Hollow diamond" not in page
    assert cells(page, "optimization.epochs") == ["4", "3", "all"]
    # The paper's numbers are all there, apart.
    assert "<h3>The paper's numbers, apart</h3>" in page
    assert ">5.50</td>" in page


def test_the_figures_are_curves_a_sweep_and_bars(full):
    _, page = full
    names = re.findall(r'<h3 id="toy-table1-full-error-([a-z]+)-title"', page)
    assert names == ["curves", "batch", "rows"]
    assert "diverged: “none, 64” (3)" in page
    # The parts are what a method was run under in several ways.
    assert re.findall(r">(batch \d+)<", page) == ["batch 8", "batch 64"]


@pytest.mark.usefixtures("full")
def test_markdown_says_the_same_and_its_figures_lie_beside_it(home, shrunk):
    text = (home / "docs" / "toy.md").read_text()
    assert "| BN, 64 | 6.10 | 6.05 to 6.15 | 3 | 0 of 3 | 5.49 | 5.00 |" in text
    assert "recovered: text \\| figure" in text
    assert "Toys \\<b\\>& more" in text
    assert "**smoke: " in shrunk[2]
    files = re.findall(r"\]\(([^)]+\.png)\)", text)
    assert len(files) == 3
    for name in files:
        with Image.open(home / "docs" / name) as image:
            assert image.size[0] > 1000
    rows = [each for each in text.splitlines() if each.startswith("|")]
    widths = [len(re.findall(r"(?<!\\)\|", each)) for each in rows]
    assert min(widths) > 2


def test_the_terminal_has_the_tables_and_json_the_numbers(home, recipe, full):
    stdout, _ = full
    assert "no difference seen: +0.50" in stdout
    assert "Page with figures: " in stdout
    result = call("report", home / "full", "--recipe", recipe, "--json")
    assert result.exit_code == 0
    (table,) = json.loads(result.stdout)["tables"]
    row = next(each for each in table["rows"] if each["row"] == "BN, 64")
    assert row["metrics"]["error"]["value"] == pytest.approx(6.1)
    assert row["metrics"]["error"]["difference"]["seen"]


def test_folders_below_are_found_and_budgets_named(recipe, tmp_path):
    write_lines(tmp_path / "a", line("BN, 64"))
    write_lines(tmp_path / "b", smoke("BN, 64", 0.1))
    result = call("report", tmp_path, "--recipe", recipe)
    assert result.exit_code == 0, result.output
    page = (tmp_path / "report-full-smoke.html").read_text()
    assert 'id="toy-table1-full"' in page
    assert 'id="toy-table1-smoke"' in page


def test_a_recipe_that_is_not_known_is_said_so(tmp_path):
    write_lines(tmp_path, line(recipe="their/own"))
    result = call("report", tmp_path)
    assert result.exit_code == 0, result.output
    assert "no recipe their/own" in result.stdout


def test_torn_and_foreign_lines_are_noted_and_left(tmp_path, recipe):
    folder = write_lines(tmp_path, line(), more=b'{"some": "thing"}\n{"torn": ')
    before = (folder / "results.jsonl").read_bytes()
    result = call("report", folder, "--recipe", recipe)
    assert result.exit_code == 0
    assert "2 lines are not counted (the first: line 2 is not a run" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert (folder / "results.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda _: None, "there is no such folder"),
        (lambda path: path.write_text(""), "is a file: name the folder"),
        (lambda path: path.mkdir(), "has no results.jsonl"),
        (lambda path: write_lines(path), "no finished run"),
        (lambda path: write_lines(path, more=b"{}\n"), "line 1 is not a run"),
    ],
)
def test_what_cannot_be_reported_is_one_line(tmp_path, make, words):
    make(tmp_path / "runs")
    assert words in one_line(call("report", tmp_path / "runs"), 2)


def test_a_page_that_cannot_be_written_is_one_line(tmp_path):
    write_lines(tmp_path, line())
    assert "is a folder: name a file" in one_line(call("report", tmp_path, "--out", tmp_path), 2)
    there = tmp_path / "results.jsonl" / "page.html"
    assert "cannot be made" in one_line(call("report", tmp_path, "--out", there), 1)


def test_pandas_opens_the_records(tmp_path):
    write_lines(tmp_path, *a_full_table())
    frame = pandas.read_json(tmp_path / "results.jsonl", lines=True)
    run = pandas.json_normalize(frame["run"].tolist())
    medians = (100 * run["metrics.error"]).groupby(frame["row"]).median()
    assert medians["BN, 64"] == pytest.approx(6.1)
    assert set(run["status"]) == {"finished", "diverged"}


def test_duckdb_opens_the_records(tmp_path):
    write_lines(tmp_path, *a_full_table())
    found = duckdb.sql(
        f"""select row, median(100 * run.metrics.error), count(*)
        from '{tmp_path / "results.jsonl"}' where budget = 'full' group by row"""
    ).fetchall()
    by_row = {row: (median, count) for row, median, count in found}
    assert by_row["BN, 64"] == (pytest.approx(6.1), 3)


@pytest.mark.skipif(
    not (shutil.which("chromium") or shutil.which("google-chrome")),
    reason="no Chromium on this machine",
)
@pytest.mark.usefixtures("full")
@pytest.mark.parametrize("width", [400, 1300])
def test_a_browser_shows_it_without_scrolling_sideways(home, tmp_path, width):
    """The page in a frame of that width, measured by a script of the test's own page."""
    frame = tmp_path / "frame.html"
    page = home / "full" / "report-full.html"
    frame.write_text(
        f'<iframe id="f" style="border:0;width:{width}px;height:900px" src="{page.as_uri()}">'
        "</iframe>"
        "<pre id='out'></pre><script>f.onload = () => { const d = f.contentDocument;"
        " const r = d.documentElement;"
        " out.textContent = 'wide ' + r.scrollWidth + ' of ' + r.clientWidth + ' drawn '"
        " + d.querySelectorAll('figure svg').length + ' small ' + [...d.querySelectorAll("
        "'p, td, th, li')].filter(e => parseFloat(getComputedStyle(e).fontSize) < 13).length; }"
        "</script>"
    )
    found = subprocess.run(
        [
            shutil.which("chromium") or shutil.which("google-chrome"),
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"),
            *("--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'profile'}"),
            *("--virtual-time-budget=4000", "--dump-dom", frame.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "HOME": str(tmp_path)},
        check=True,
    ).stdout
    whole, seen, drawn, small = map(
        int, re.search(r"wide (\d+) of (\d+) drawn (\d+) small (\d+)", found).groups()
    )
    assert (whole, drawn, small) == (seen, 3, 0)
    # But for a scroll bar.
    assert width - 20 <= seen <= width
    assert page.stat().st_size < 1_000_000
