"""docs/architecture.md names files, classes and functions that exist; modules, classes and functions stay small."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.support import ROOT

PAGE = (ROOT / "docs" / "architecture.md").read_text()
SOURCES = {path.relative_to(ROOT / "selfheal").as_posix(): path.read_text() for path in ROOT.glob("selfheal/**/*.py")}
LIMITS = {ast.ClassDef: 200, ast.FunctionDef: 40, ast.AsyncFunctionDef: 40}


def test_every_module_of_the_page_exists() -> None:
    """Each `package/module.py` of the page is a file of selfheal, and each `package/` a package."""
    modules = set(re.findall(r"`((?:\w+/)*\w+\.py)`", PAGE)) - {"backend.py"}
    known = {*SOURCES, *(Path(name).name for name in SOURCES)}
    assert modules - known == set()
    packages = set(re.findall(r"`(\w+)/`", PAGE)) - {"package"}
    assert packages <= {name.split("/")[0] for name in SOURCES}


def test_every_function_of_the_page_exists() -> None:
    """Each `Class.method` and function that the page names is defined in selfheal."""
    for name in re.findall(r"`((?:[A-Z]\w+\.)?\w+)`", PAGE):
        *owner, last = name.split(".")
        if owner:
            assert any(re.search(rf"class {owner[0]}\b", text) for text in SOURCES.values()), name
            assert any(re.search(rf"def {last}\b", text) for text in SOURCES.values()), name


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_modules_classes_and_functions_are_small(name: str) -> None:
    """No module has more than 300 lines, no class more than 200, no function more than 40."""
    assert len(SOURCES[name].splitlines()) <= 300
    for node in ast.walk(ast.parse(SOURCES[name])):
        limit = LIMITS.get(type(node))
        if limit is not None and isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < limit, node.name
