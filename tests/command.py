"""Runs a script's command line in this process."""

import sys
from pathlib import Path

import ppllms
from lib import cli

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments, monkeypatch) -> int:
    """The exit status of ppllms.py, run in this process."""
    monkeypatch.setattr(sys, "argv", ["ppllms.py", *map(str, arguments)])
    return cli.run("ppllms.py", ppllms.main)
