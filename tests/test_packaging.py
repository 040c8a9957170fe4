"""An installation has the four commands, all rooms and their data, and asks for the Python that the docs name."""

import importlib
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.mark.parametrize("script", PROJECT["project"]["scripts"].values())
def test_a_console_script_is_the_command_of_a_script_at_the_top_or_of_a_room(script):
    module, _, attribute = script.partition(":")
    is_at_the_top = module in PROJECT["tool"]["setuptools"]["py-modules"] and (ROOT / f"{module}.py").is_file()
    assert is_at_the_top or module.startswith("lib.") and module.endswith(".__main__")
    assert callable(getattr(importlib.import_module(module), attribute))


def test_all_rooms_and_their_data_are_installed():
    assert PROJECT["tool"]["setuptools"]["packages"]["find"]["include"] == ["lib", "lib.*"]
    assert all((path.parent / "__init__.py").is_file() for path in (ROOT / "lib").rglob("*.py"))
    data = PROJECT["tool"]["setuptools"]["package-data"]
    for path in (path for path in (ROOT / "lib").rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")):
        patterns = [(ROOT / room.replace(".", "/"), pattern) for room, names in data.items() for pattern in names]
        assert any(path in folder.glob(pattern) for folder, pattern in patterns), f"{path} would not be installed"


def test_one_python_is_named_everywhere():
    version = PROJECT["project"]["requires-python"].removeprefix(">=")
    assert PROJECT["tool"]["ruff"]["target-version"] == f"py{version.replace('.', '')}"
    assert PROJECT["tool"]["mypy"]["python_version"] == version
    for page in ("README.md", "INSTALL.md"):
        assert f"Python {version} or newer" in (ROOT / page).read_text()
