"""results.jsonl: whole at every moment, whatever happens to the writer, the disk or the file."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from filelock import FileLock, Timeout

from filterwise.lab.errors import LabError
from filterwise.lab.results import Results, write_whole
from support.runs import record


@pytest.fixture
def results(tmp_path):
    found = Results(tmp_path / "run")
    found.prepare()
    return found


def test_what_is_added_is_read_back(results):
    first, second = record("bn", seed=0), record("gn+ws", seed=1, diverged=(1, 3))
    results.add(first)
    results.add(second)
    contents = results.read()
    assert contents.records == {first.id: first, second.id: second}
    assert contents.complaints == ()
    lines = results.path.read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == [first.id, second.id]


def test_a_line_has_every_setting_and_where_it_ran(results):
    results.add(record())
    line = json.loads(results.path.read_text())
    assert set(line) == {
        "format",
        "id",
        "settings",
        "outcome",
        "times",
        "versions",
        "hardware",
    }
    assert line["settings"]["weight_decay"] == 5e-4
    assert line["settings"]["seed"] == 0


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"format": 1, "id": "torn', "line 2 is not a run of this program"),
        (b"\xff\xfe\x00rubbish\r\r", "line 2 is not a run of this program"),
        (b'{"name": "another program"}', "line 2 .*Field required"),
        (b"[]", "line 2 "),
    ],
)
def test_lines_of_others_are_reported_and_kept(results, line, words):
    first, last = record("bn"), record("gn")
    results.add(first)
    with results.path.open("ab") as file:
        file.write(line)  # without an end of line, as a torn write leaves it
    results.add(last)
    contents = results.read()
    assert set(contents.records) == {first.id, last.id}
    assert len(contents.complaints) == 1
    assert re.search(words, contents.complaints[0])
    assert results.path.read_bytes().split(b"\n")[1] == line


def test_a_changed_setting_is_not_taken_for_the_run(results):
    results.add(record("bn"))
    text = results.path.read_text().replace('"seed":0', '"seed":5')
    results.path.write_text(text)
    contents = results.read()
    assert not contents.records
    assert "is not that of its settings" in contents.complaints[0]


def test_another_format_is_not_read(results):
    results.add(record("bn"))
    results.path.write_text(results.path.read_text().replace('"format":1', '"format":2'))
    assert "its format is 2, this program reads 1" in results.read().complaints[0]


def test_a_folder_that_cannot_be_written_to_is_one_line(tmp_path):
    (tmp_path / "file").write_text("text")
    with pytest.raises(LabError, match=r"--out: .*cannot be written to: Not a directory\.$"):
        Results(tmp_path / "file" / "run").prepare()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write")
def test_a_folder_without_permission_is_one_line(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(LabError, match="Permission denied"):
        Results(tmp_path / "run").prepare()


def test_a_full_disk_loses_nothing(results):
    """The system itself refuses: no file of this process may grow beyond the first run's size."""
    results.add(record("bn"))
    before = results.path.read_bytes()
    code = textwrap.dedent(f"""
        import resource
        from pathlib import Path
        from filterwise.lab.errors import LabError
        from filterwise.lab.results import Results
        from support.runs import record
        resource.setrlimit(resource.RLIMIT_FSIZE, ({len(before)}, {len(before)}))
        try:
            Results(Path({str(results.folder)!r})).add(record("gn"))
        except LabError as error:
            print(error)
    """)
    pytest.importorskip("resource")
    found = subprocess.run(
        [sys.executable, "-c", code], env=_environment(), capture_output=True, text=True
    )
    assert "results.jsonl cannot be written: File too large" in found.stdout, found.stderr
    assert results.path.read_bytes() == before
    assert [path.name for path in results.folder.glob(".*.tmp")] == []


def test_a_writer_killed_in_the_middle_leaves_the_old_file(results):
    results.add(record("bn"))
    before = results.path.read_bytes()
    code = textwrap.dedent(f"""
        import os, signal
        from pathlib import Path
        from filterwise.lab import results
        from support.runs import record
        # Killed when everything is written beside the file and nothing renamed yet.
        results.os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
        results.Results(Path({str(results.folder)!r})).add(record("gn"))
    """)
    found = subprocess.run([sys.executable, "-c", code], env=_environment())
    assert found.returncode == -9
    assert results.path.read_bytes() == before
    results.add(record("gn"))
    assert len(results.read().records) == 2


def _environment():
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}


def test_several_writers_lose_no_line(results):
    code = textwrap.dedent(f"""
        import sys
        from pathlib import Path
        from filterwise.lab.results import Results
        from support.runs import record
        for number in range(10):
            Results(Path({str(results.folder)!r})).add(record("bn", seed=int(sys.argv[1]) + number))
    """)
    writers = [
        subprocess.Popen([sys.executable, "-c", code, str(seed)], env=_environment())
        for seed in (0, 10)
    ]
    assert [writer.wait() for writer in writers] == [0, 0]
    contents = results.read()
    assert len(contents.records) == 20
    assert contents.complaints == ()


def test_nobody_else_can_write_between_reading_and_renaming(results, monkeypatch):
    results.add(record("bn"))
    lock = FileLock(results.folder / ".locks" / "results.lock")
    seen = []

    def watched(function):
        def wrapper(*arguments):
            with pytest.raises(Timeout):
                lock.acquire(timeout=0)
            seen.append(function)
            return function(*arguments)

        return wrapper

    monkeypatch.setattr(Results, "_lines", watched(Results._lines))
    monkeypatch.setattr("filterwise.lab.results.write_whole", watched(write_whole))
    results.add(record("gn"))
    assert len(seen) == 2


def test_a_run_is_claimed_once(results):
    other = Results(results.folder)
    with results.claim("one") as mine:
        assert mine
        with other.claim("one") as theirs:
            assert not theirs
        with other.claim("two") as theirs:
            assert theirs
    with other.claim("one") as theirs:
        assert theirs
    assert list((results.folder / ".locks").glob("*.lock")) == []


def test_write_whole_replaces_and_leaves_nothing_beside(tmp_path):
    path = tmp_path / "page.html"
    write_whole(path, b"one")
    with path.open("rb") as opened_before:
        write_whole(path, b"two")
        # Renamed over, not written into: who reads at this moment still has the whole old file.
        assert opened_before.read() == b"one"
    assert path.read_bytes() == b"two"
    assert list(tmp_path.iterdir()) == [path]
