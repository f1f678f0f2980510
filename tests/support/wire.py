"""An HTTP answer as bytes from a socket."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Reply:
    """An answer from a socket; its status is 0 if the server closed the connection without one."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def is_whole(self) -> bool:
        """Whether every byte of the promised length has arrived."""
        return self.status > 0 and len(self.body) == int(self.headers["content-length"])

    @property
    def is_wrapped(self) -> bool:
        """Whether this is the wrapped app's own 404."""
        return self.status == 404 and self.headers.get("x-wrapped") == "yes"


def parse_reply(data: bytes) -> Reply:
    """Return the answer in these bytes; fail if it is chunked, because the length is always known here."""
    head, _, body = data.partition(b"\r\n\r\n")
    if not head:
        return Reply(0, {}, b"")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {key.strip().lower(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    assert headers.get("transfer-encoding") is None, "the app did not send the length, though it knows it"
    return Reply(int(first.split(" ")[1]), headers, body)
