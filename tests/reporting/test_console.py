"""What a run says reaches the terminal and the log as text, whatever names are in it."""

import io
import re

import pytest

from lib.cli.exit_status import importing
from lib.reporting.console import LOG, Report


def test_control_characters_in_names_are_shown_as_escapes(tmp_path, capsys):
    report = Report()
    report.open(tmp_path)
    report.print("Model       \x1b]0;title\x07 \x1b[2J\x9b31m (é, ±, 語)")
    expected = "Model       \\x1b]0;title\\x07 \\x1b[2J\\x9b31m (é, ±, 語)\n"
    assert capsys.readouterr().out == expected == (tmp_path / LOG).read_text(encoding="utf-8")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_counts_in_whole_numbers_and_never_past_its_end(monkeypatch, recwarn):
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    with Report().progress(4, "search") as advance:
        for _ in range(12):
            advance(1 / 3)
        advance(-2)  # a batch that ran out of memory is run again
        advance(2)
    counts = re.findall(r"(\S+)/4 ", terminal.getvalue())
    assert counts and set(counts) <= {"0", "1", "2", "3", "4"} and not recwarn.list


def test_without_a_terminal_there_is_a_line_each_minute(monkeypatch, capsys):
    seconds = iter([0, 30, 61, 90, 119, 600, 3000])
    monkeypatch.setattr("lib.reporting.console.time.monotonic", lambda: next(seconds))
    with Report().progress(100, "search") as advance:
        for _ in range(5):
            advance(10)
        advance(50)
    assert capsys.readouterr().err.splitlines() == [
        "search: 20% after 1 min, about 4 min to go",
        "search: 50% after 10 min, about 10 min to go",
    ]


def test_what_takes_seconds_says_nothing_without_a_terminal(capsys):
    with Report().progress(2, "search") as advance:
        advance(1)
        advance(1)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("stderr", [Terminal(), io.StringIO()])
def test_a_terminal_is_told_of_the_imports_and_the_line_goes_away(stderr, monkeypatch):
    monkeypatch.setattr("sys.stderr", stderr)
    with importing():
        pass
    shown = stderr.getvalue().split("\r")
    assert shown == (["Loading torch, transformers and datasets ...", " " * 44, ""] if stderr.isatty() else [""])
