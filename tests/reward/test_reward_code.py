"""A version's name holds the code that decides what it says."""

import ast
from pathlib import Path

import reward
from reward.snapshot import CODE

HERE = Path(reward.__file__).parent
DECIDE = ("model", "course", "hearing", "poison", "evidence")


def imported(module: str) -> set[str]:
    """The modules of this package that one imports."""
    found = set()
    for node in ast.walk(ast.parse((HERE / f"{module}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "reward":
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("reward."):
            found.add((node.module or "").split(".")[1])
    return {name for name in found if (HERE / f"{name}.py").exists()}


def test_whatever_decides_a_score_is_part_of_the_version():
    known, waiting = set(), [*DECIDE]
    while waiting:
        if (module := waiting.pop()) not in known:
            known.add(module)
            waiting += imported(module)
    assert known - {"snapshot"} <= {*CODE}
    assert sorted(CODE) == list(CODE)
