"""The files of ours below the root: a process that is killed while it writes one leaves nothing that stays."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from selfheal.disk import mark
from selfheal.disk.temporary import sweep
from tests.support.staging import Root


@pytest.mark.parametrize("write", [mark.marked_ns, lambda root: mark.write_followed(root, "all")])
def test_killed_while_it_writes(root: Root, write: Callable[[int], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """The next sweep removes what a process left that was killed before it named its file."""
    if (child := os.fork()) == 0:
        monkeypatch.setattr(os, "rename", lambda *_, **__: os._exit(9))
        write(root.fd)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert sweep(root.fd) == 1
    assert root.entries() == []
    write(root.fd)
    assert len(root.entries()) == 1


def test_a_mark_is_read_again(root: Root) -> None:
    """A mark stays; a copy of it, which has an inode of its own, is replaced."""
    made = mark.marked_ns(root.fd)
    assert mark.marked_ns(root.fd) == made
    path = root.path / mark.MARK
    text = path.read_text()
    (root.path / "copy").write_text(text)
    os.rename(root.path / "copy", path)
    os.utime(path, (1, 1))
    assert mark.marked_ns(root.fd) not in (made, 10**9)
    assert path.read_text() != text
