"""A model of the catalogue: the expected content of the database after any sequence of changes."""

from __future__ import annotations

from dataclasses import dataclass, field

NS = 10**9


@dataclass
class Version:
    """The bytes that a name has, or had; or those of a copy that was set aside."""

    data: bytes
    modified_ns: int
    generation: int
    is_set_aside: bool = False


@dataclass
class NameState(Version):
    """The record of a name, with its earlier versions."""

    is_deleted: bool = False
    history: list[Version] = field(default_factory=list)

    def is_recorded(self, data: bytes) -> bool:
        """Whether these bytes are those of the living record or of a version."""
        return (data == self.data and not self.is_deleted) or data in [version.data for version in self.history]


class CatalogueModel:
    """The expected content of the database, and the bytes that are damaged: in `data`, or only in a `digest`."""

    def __init__(self) -> None:
        self.names: dict[str, NameState] = {}
        self.damaged: dict[bytes, str] = {}

    def alive(self, name: str) -> NameState | None:
        """Return the state of a name, or None if it is absent or deleted."""
        state = self.names.get(name)
        return None if state is None or state.is_deleted else state

    def store(self, name: str, data: bytes, modified_ns: int, *, only_new: bool = False) -> None:
        """Save bytes; with `only_new` change nothing if the name has a record."""
        self.damaged.pop(data, None)  # a save of the same bytes mends them
        state = self.names.get(name)
        if state is None:
            self.names[name] = NameState(data, modified_ns, 1)
        elif not (only_new or (not state.is_deleted and state.data == data)):
            self._replace(state, data, modified_ns)

    def delete(self, name: str) -> None:
        """Delete a name that is alive."""
        state = self.names[name]
        self._remember(state)
        state.generation += 1
        state.is_deleted = True

    def set_aside(self, name: str, data: bytes, modified_ns: int) -> None:
        """A copy was moved away: it becomes a version unless its bytes are recorded; damaged ones are mended."""
        self.damaged.pop(data, None)
        state = self.names[name]
        if not state.is_recorded(data):
            state.history.append(Version(data, modified_ns, state.generation + 1, is_set_aside=True))
            state.generation += 2

    def before(self, name: str) -> Version | None:
        """Return the version that an undo goes back to, or None: the newest, copies that were set aside last."""
        state = self.names.get(name)
        earlier = [] if state is None else [v for v in state.history if state.is_deleted or v.data != state.data]
        return max(earlier, key=lambda version: (not version.is_set_aside, version.generation), default=None)

    def undo(self, name: str) -> None:
        """Make a name what it was before its last change."""
        version = self.before(name)
        assert version is not None
        self._replace(self.names[name], version.data, version.modified_ns)

    def purge(self) -> None:
        """Drop the whole history, and all bytes that no record refers to."""
        for state in self.names.values():
            state.history.clear()
        self.damaged = {data: how for data, how in self.damaged.items() if data in self.referenced()}

    def referenced(self) -> set[bytes]:
        """Return the bytes of every name that is alive."""
        return {state.data for state in self.names.values() if not state.is_deleted}

    def can_be_read(self, data: bytes) -> bool | None:
        """Return whether bytes can be read, or None if only a digest is damaged: they may be served or refused then."""
        how = self.damaged.get(data)
        return True if how is None else None if how == "digest" else False

    def _replace(self, state: NameState, data: bytes, modified_ns: int) -> None:
        if not state.is_deleted:
            self._remember(state)
        if data != state.data:
            modified_ns = max(modified_ns, (state.modified_ns // NS + 1) * NS)
        state.data, state.modified_ns, state.is_deleted = data, modified_ns, False
        state.generation += 1

    def _remember(self, state: NameState) -> None:
        state.history.append(Version(state.data, state.modified_ns, state.generation))
