"""The prefix: where in a request's path the names begin, wherever the app is mounted, and which requests are ours."""

from dataclasses import dataclass
from urllib.parse import unquote_to_bytes

from starlette.types import Scope

from .. import names
from ..events import logger

MISSES_UNTIL_WARNING = 100
OURS = f"/{names.OWN_PREFIX}"


@dataclass(frozen=True, slots=True)
class Route:
    """Who answers a request: selfheal for a `name`; nobody (404) if it `is_ours`, for our own files are not for
    visitors, whatever the wrapped app serves; else the wrapped app, and no cache keeps its errors if it `is_below`.
    """

    name: str | None = None
    is_ours: bool = False
    is_below: bool = False


class Prefix:
    """The prefix of the uploads, and whether a request was ever below it."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.below = f"{path}/"
        self.is_settled = False
        self._last_part = f"/{path.rpartition('/')[2]}/"
        self._misses = 0

    def route(self, scope: Scope) -> Route:
        """Return who answers a request."""
        path = self.path_in(scope)
        is_below = path.startswith(self.below)
        if is_below:
            self.is_settled = True
        elif not self.is_settled:
            self.note_miss(scope)
        if not is_below or scope["method"] not in ("GET", "HEAD"):
            return Route(is_ours=OURS in path)
        name = names.from_path(path, self.path, scope.get("raw_path"))
        return Route(name, is_ours=name is None and OURS in path, is_below=True)

    def path_in(self, scope: Scope) -> str:
        """Return the path to compare with the prefix: the whole one if the prefix begins with the `root_path` of mounts
        and servers, else the one after the `root_path`. Never both, so that each name has one URL.
        """
        path: str = scope["path"]
        root = scope.get("root_path", "").rstrip("/")
        if not root:
            return path
        is_whole = path.startswith(f"{root}/") and not _is_stripped(scope, root)
        if self.below.startswith(f"{root}/"):
            return path if is_whole else root + path
        return path[len(root) :] if is_whole else path

    def note_miss(self, scope: Scope) -> None:
        """A request was not below the prefix: warn once if none ever was, though many look as if they should be."""
        if scope["method"] not in ("GET", "HEAD") or self._last_part not in scope.get("root_path", "") + scope["path"]:
            return
        self._misses += 1
        if self._misses >= MISSES_UNTIL_WARNING:
            self.is_settled = True
            logger.warning(
                "no request was below the prefix %r so far, but %d had %r in their path, such as %r (root_path %r); "
                "set the prefix of SelfHealMiddleware to the path of the uploads, with or without that of the mount",
                self.path, self._misses, self._last_part, scope["path"], scope.get("root_path", ""),
            )  # fmt: skip


def _is_stripped(scope: Scope, root: str) -> bool:
    """Whether a mount removed `root` from the path, and what is left begins with it by chance, or by intent."""
    raw: bytes | None = scope.get("raw_path")
    return raw is not None and unquote_to_bytes(raw) == (root + scope["path"]).encode("utf-8", "surrogatepass")
