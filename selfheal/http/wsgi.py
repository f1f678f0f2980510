"""WSGI: a request's environment as a scope, and planned answers as what a WSGI server sends (PEP 3333)."""

import io
from collections.abc import Callable, Generator, Iterator
from http import HTTPStatus
from typing import Any
from wsgiref.types import StartResponse, WSGIEnvironment

from starlette.types import Scope

from ..disk.open_file import PIECE_SIZE, OpenFile
from .conditional import CONDITIONS
from .headers import Headers, Plan, error_messages

_LINES = {status: f"{status} {status.phrase}" for status in HTTPStatus}
_KEYS = tuple((f"HTTP_{key.decode().upper().replace('-', '_')}", key) for key in (*CONDITIONS, b"accept-encoding"))
Failed = Callable[[OSError], object]
"""What is called when a file cannot be read to its end."""


def decoded(text: str) -> str:
    """Return a path or a mount point of an environment, in which each character stands for a byte."""
    return text.encode("latin-1").decode("utf-8", "surrogateescape")


def scope_of(environ: WSGIEnvironment) -> Scope:
    """Return what the prefix needs to know of a request. Servers may tell how its path was written, to tell `%2f` from
    `/`: as `RAW_URI`, or as `REQUEST_URI`.
    """
    root = decoded(environ.get("SCRIPT_NAME", ""))
    scope: Scope = {
        "method": environ["REQUEST_METHOD"],
        "root_path": root,
        "path": root + decoded(environ.get("PATH_INFO", "")),
    }
    uri: str | None = environ.get("RAW_URI", environ.get("REQUEST_URI"))
    if uri is not None:
        scope["raw_path"] = uri.partition("?")[0].encode("latin-1", "replace")
    return scope


def conditions_of(environ: WSGIEnvironment) -> Headers:
    """Return the headers of a request that decide which answer it gets."""
    return [(key, environ[name].encode("latin-1", "replace")) for name, key in _KEYS if name in environ]


def start(start_response: StartResponse, status: int, headers: Headers) -> None:
    """Begin an answer."""
    lines = [(key.decode("latin-1"), value.decode("latin-1")) for key, value in headers]
    start_response(_LINES[HTTPStatus(status)], lines)


def refuse(environ: WSGIEnvironment, start_response: StartResponse, status: int) -> list[bytes]:
    """Answer without a file."""
    begin, body = error_messages(status, is_head=environ["REQUEST_METHOD"] == "HEAD")
    start(start_response, status, begin["headers"])
    return [body["body"]]


def never_stored(start_response: StartResponse) -> StartResponse:
    """Wrap the `start_response` of the wrapped app, as `headers.never_stored` wraps `send`."""

    def start_unstored(status: str, headers: list[tuple[str, str]], *exc_info: Any) -> Callable[[bytes], object]:
        if status[:3] not in ("200", "206", "304"):
            headers = [header for header in headers if header[0].lower() != "cache-control"]
            headers.append(("cache-control", "no-store"))
        return start_response(status, headers, *exc_info)

    return start_unstored


class Pieces:
    """The planned bytes of a file, piece by piece; closed by the server, or with the last reference to it."""

    def __init__(self, file: OpenFile, plan: Plan, failed: Failed) -> None:
        self._file = file
        self._pieces = _read(file, plan, failed)

    def __iter__(self) -> Iterator[bytes]:
        return self._pieces

    def close(self) -> None:
        """Close the file."""
        self._pieces.close()
        self._file.close()

    def __del__(self) -> None:  # a middleware around this one may forget to close
        self.close()


def _read(file: OpenFile, plan: Plan, failed: Failed) -> Generator[bytes, None, None]:
    try:
        with PIECE_SIZE:
            yield from file.pieces_waiting(plan.start, plan.stop)
    except OSError as error:
        failed(error)
        raise


class WholeFile(io.FileIO):
    """A whole file for `wsgi.file_wrapper`: servers read it, or pass its descriptor to the system (sendfile)."""

    def __init__(self, file: OpenFile, failed: Failed) -> None:
        super().__init__(file.detach(), "rb")
        self._size = file.size
        self._failed = failed

    def read(self, size: int | None = -1, /) -> bytes:
        """Read no more than was measured: that is what the headers promise, even if the file grew."""
        left = max(self._size - self.tell(), 0)
        try:
            return super().read(left if size is None or size < 0 else min(size, left)) or b""
        except OSError as error:
            self._failed(error)
            raise

    def close(self) -> None:
        """Close the file, once; if it was not sent to its end, find out whether the disk has lost the rest."""
        if not self.closed:
            try:
                self.read(1)
            except OSError:
                pass
            finally:
                super().close()
