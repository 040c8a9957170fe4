"""What a run says reaches the terminal and the log as text, whatever names are in it."""

from lib.reporting.console import LOG, Report


def test_control_characters_in_names_are_shown_as_escapes(tmp_path, capsys):
    report = Report()
    report.open(tmp_path)
    report.print("Model       \x1b]0;title\x07 \x1b[2J\x9b31m (é, ±, 語)")
    expected = "Model       \\x1b]0;title\\x07 \\x1b[2J\\x9b31m (é, ±, 語)\n"
    assert capsys.readouterr().out == expected == (tmp_path / LOG).read_text(encoding="utf-8")
