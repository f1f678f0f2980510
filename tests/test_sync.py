"""`UploadStore.sync`: the same methods for synchronous code."""

from __future__ import annotations

import inspect
import io
from pathlib import Path
from typing import Any

import pytest

from selfheal import ImageStorage, UploadStore
from selfheal.sync import SyncImageStorage, SyncUploadStore
from tests.support.sample_images import picture

_OTHERS = ("open", "close", "close_at_home", "share_prefix")


def public_methods(of: type) -> dict[str, Any]:
    """Return the public methods of a class, but for those that make, open and close it."""
    found = {name: getattr(of, name) for name in dir(of) if not name.startswith(("_", "from_"))}
    return {name: value for name, value in found.items() if inspect.isfunction(value) and name not in _OTHERS}


@pytest.mark.parametrize(("of", "sync"), [(UploadStore, SyncUploadStore), (ImageStorage, SyncImageStorage)])
def test_every_method_is_there(of: type, sync: type) -> None:
    """Each public method has its counterpart, with the same parameters."""
    for name, method in public_methods(of).items():
        ours = list(inspect.signature(method).parameters)
        theirs = list(inspect.signature(getattr(sync, name)).parameters)
        assert theirs == ours or theirs == [*ours[:3], "connection", "more"], name


def test_the_life_of_an_upload(directory: Path, sqlite_url: str) -> None:
    """What synchronous code does with an upload."""
    with UploadStore(directory, sqlite_url).sync as uploads:
        uploads.database.create_tables()
        upload = io.BytesIO(png := picture("PNG"))
        upload.name = "me.png"
        upload.read(10)  # as an app does that looks at it first
        saved = uploads.save_uploaded_file(upload)
        assert saved.path.read_bytes() == upload.getvalue()
        saved.path.unlink()
        assert uploads.restore(saved.name).path.read_bytes() == upload.getvalue()
        saved.path.unlink()
        assert uploads.ensure(saved.name).read_bytes() == upload.getvalue()
        saved.path.unlink()
        with uploads.open(saved.name) as file:
            assert file.read() == upload.getvalue()
        uploads.save(saved.name, b"two")
        assert uploads.undo(saved.name).size == len(png)
        saved.path.unlink()
        assert uploads.ensure(saved.name).read_bytes() == png
        saved.path.unlink()
        with uploads.open(saved.name) as file:
            assert file.read() == png
        assert uploads.url(saved.name, versioned=True) == f"{saved.url}?v={saved.sha256}"
        assert uploads.delete(saved.name)
        assert [version.size for version in uploads.database.history(saved.name)]
