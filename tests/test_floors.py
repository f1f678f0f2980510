"""The house: a room imports only rooms of a lower floor, never a neighbour, never upwards."""

from __future__ import annotations

import ast
from pathlib import Path

import selfheal

PACKAGE = Path(selfheal.__file__).parent
FLOORS = [
    {"errors", "events", "flight", "threads", "syscalls", "content_types", "digests", "endings"},
    {"settings", "names", "sources", "policy", "workers", "absent", "statements"},
    {"staging", "tables", "files", "records", "direct", "readers", "transactions"},
    {"disk", "engine", "queries", "intake"},
    {"blobs", "catalogue", "responses", "listing"},
    {"db", "hits"},
    {"bodies", "landing", "gathering", "outcomes"},
    {"restoration", "following"},
    {"reconcile"},
    {"store"},
    {"middleware", "sides"},
    {"bulk_restore", "bulk_migrate", "bulk_verify"},
    {"bulk"},
    {"scripts"},
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def _room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imported_rooms(path: Path) -> set[str]:
    depth = len(path.relative_to(PACKAGE).parts)
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == depth:
            rooms |= {node.module.partition(".")[0]} if node.module else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("selfheal"):
            rooms.add((node.module or "").partition(".")[2].partition(".")[0])
    return rooms


def test_every_room_has_a_floor() -> None:
    """A room that nobody placed belongs nowhere."""
    rooms = {_room(path) for path in PACKAGE.rglob("*.py")} - {"__init__"}
    assert rooms == set(FLOOR_OF)


def test_imports_only_go_down() -> None:
    """An import of a neighbour or of a higher floor is a breach."""
    breaches = [
        f"{path.name} imports {room}"
        for path in PACKAGE.rglob("*.py")
        if _room(path) != "__init__"
        for room in _imported_rooms(path)
        if FLOOR_OF.get(room, 99) >= FLOOR_OF[_room(path)]
    ]
    assert breaches == []
