"""A folder of the package imports only from those below it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "torchrl_mac"
FLOORS = ("utils", "datasets", "data", "modules", "envs", "objectives", "trainers")


def imported(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports say the whole name"
            yield from (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("floor", FLOORS)
def test_imports_go_down(floor):
    assert {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()} == {
        *FLOORS
    }
    above = FLOORS[FLOORS.index(floor) + 1 :]
    for path in (PACKAGE / floor).rglob("*.py"):
        for name in imported(path):
            root, _, rest = name.partition(".")
            assert root != "torchrl_mac" or rest.split(".")[0] not in above, (path, name)


def test_the_readme_shows_the_floors():
    text = (PACKAGE.parent / "README.md").read_text(encoding="utf-8")
    block = text.partition("## Layout")[2].partition("```\n")[2].partition("```")[0]
    shown = [line.split()[0] for line in block.splitlines() if line.startswith("  ")]
    assert shown == [f"{floor}/" for floor in FLOORS]


if __name__ == "__main__":
    pytest.main([__file__])
