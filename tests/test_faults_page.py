"""docs/faults.md: every test that the page names exists."""

from __future__ import annotations

import ast
import re
from itertools import pairwise

from tests.support import ROOT

PAGE = (ROOT / "docs" / "faults.md").read_text()


def test_every_cited_test_exists() -> None:
    """Each test function that docs/faults.md names is defined somewhere below tests/."""
    trees = [ast.parse(path.read_text()) for path in (ROOT / "tests").rglob("test_*.py")]
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    defined = {node.name for tree in trees for node in ast.walk(tree) if isinstance(node, functions)}
    cited = set(re.findall(r"`(test_\w+)`", PAGE))
    assert cited
    assert sorted(cited - defined) == []


def test_every_row_has_a_proof() -> None:
    """Each row of a table of docs/faults.md names a test, or says "not yet:" and what happens today."""
    lines = PAGE.splitlines()
    rows = [line for line, next_line in pairwise(lines) if line.startswith("| ") and not next_line.startswith("|-")]
    assert len(rows) > 100
    for row in rows:
        proof = row.strip("| ").rpartition(" | ")[2]
        assert "`test_" in proof or proof.startswith("not yet: "), row
        assert "not yet" not in proof.replace("not yet: ", ""), row
