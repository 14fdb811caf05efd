"""Records and the plain-text table."""

from __future__ import annotations

import dataclasses

import pytest

from filterwise.report import Report, Row, notes_text, text_table

ROWS = [
    Row("conv1", "Conv2d", "convert", "ws", fan_in=147, filters=64),
    Row("bn1", "BatchNorm2d", "replace", None, "GroupNorm, 32 groups"),
    Row("layer1.0.conv1", "Conv2d", "convert", "ws(eps=1e-10)", "", 576, 64),
    Row("layer1.0.bn1", "BatchNorm2d", "remove", None, "the recipe has none"),
    Row("layer1.0.conv1.bias", "Conv2d", "add", None, "the removed layer1.0.bn1 had a shift"),
    Row("fc", "Linear", "keep", None, "classifier: no weight layer follows it", 512, 1000),
]


def test_table_shows_every_row_in_full_and_counts_them() -> None:
    text = str(Report(ROWS, ["1 layer is normalized by nothing."], "gn+ws"))
    assert text == (
        "layer                kind         what                   why"
        "                                     fan-in\n"
        "conv1                Conv2d       convert ws"
        "                                                        147\n"
        "bn1                  BatchNorm2d  replace                GroupNorm, 32 groups\n"
        "layer1.0.conv1       Conv2d       convert ws(eps=1e-10)"
        "                                             576\n"
        "layer1.0.bn1         BatchNorm2d  remove                 the recipe has none\n"
        "layer1.0.conv1.bias  Conv2d       add                    "
        "the removed layer1.0.bn1 had a shift\n"
        "fc                   Linear       keep                   "
        "classifier: no weight layer follows it     512\n"
        "\n"
        "2 converted, 1 kept, 1 norm replaced, 1 norm removed, 1 parameter added (gn+ws)\n"
        "\n"
        "note: 1 layer is normalized by nothing."
    )


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([], "no layer and no norm to report"),
        ([Row("bn1", "BatchNorm2d", "keep")] * 2, "2 norms kept"),
        ([Row("bn1", "BatchNorm2d", "remove")] * 2, "2 norms removed"),
        ([Row("conv1", "Conv2d", "remove", fan_in=9, filters=4)], "1 method removed"),
        ([Row("conv1", "Conv2d", "refuse", fan_in=1, filters=4)] * 3, "3 refused"),
        ([Row("bn1", "BatchNorm2d", "replace"), Row("c", "Conv2d", "keep", fan_in=9)],
         "1 kept, 1 norm replaced"),
    ],
)  # fmt: skip
def test_summary_tells_norms_from_layers(rows: list[Row], expected: str) -> None:
    assert Report(rows).summary == expected


def test_report_is_a_sequence_of_records() -> None:
    report = Report(ROWS)
    assert len(report) == len(ROWS)
    assert list(report) == ROWS
    assert report[-1] is ROWS[-1]
    assert tuple(report[:2]) == tuple(ROWS[:2])
    assert report.converted == ["conv1", "layer1.0.conv1"]
    assert report.to_dicts()[0] == {
        "name": "conv1",
        "kind": "Conv2d",
        "action": "convert",
        "method": "ws",
        "reason": "",
        "fan_in": 147,
        "filters": 64,
        "difference": None,
    }


def test_report_keeps_what_it_was_given() -> None:
    rows, notes = list(ROWS), ["one"]
    report = Report(rows, notes)
    rows.clear()
    notes.clear()
    assert len(report) == len(ROWS)
    assert report.notes == ("one",)
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.rows = ()  # pyright: ignore[reportAttributeAccessIssue]


def test_empty_report_prints_a_sentence() -> None:
    assert str(Report([])) == "no layer and no norm to report"
    assert not Report([])


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    text = text_table(("a", "number"), [("longer", 7), ("", 12_345_678)], right={"number"})
    assert text.split("\n") == ["a         number", "longer         7", "        12345678"]


def test_line_breaks_stay_out_of_the_table() -> None:
    assert text_table(("a", "b"), [("one\ntwo", "x")]).split("\n") == ["a        b", "one two  x"]
    assert notes_text(["one\n  two"]) == "note: one two"


def test_row_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="a row has 1 cells, the table 2 columns"):
        text_table(("a", "b"), [("x",)])


def test_differences_are_a_column_where_there_are_any() -> None:
    rows = [Row("conv1", "Conv2d", "convert", "ws", fan_in=147, filters=64, difference=2.1e-7)]
    assert "difference" not in str(Report(ROWS))
    lines = str(Report([*rows, ROWS[-1]])).splitlines()
    assert lines[0].endswith("fan-in  difference")
    assert lines[1].endswith("2.1e-07")
