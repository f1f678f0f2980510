"""URLs: the address of a name, with the digest of its bytes if caches are to keep the answer for ever."""

from dataclasses import replace
from urllib.parse import quote

from .headers import Plan

VERSION = b"v="
IMMUTABLE = b"public, max-age=31536000, immutable"


def url_of(prefix: str, name: str, sha256: str = "") -> str:
    """Return the URL path of a name; with a digest, the address of these bytes alone."""
    return quote(f"{prefix}/{name}") + (f"?v={sha256}" if sha256 else "")


def is_version(query: bytes, sha256: str) -> bool:
    """Whether a query asks for the bytes of this digest: by one `v`, which other parameters may be beside."""
    wanted = [part[len(VERSION) :] for part in query.split(b"&") if part.startswith(VERSION)]
    return bool(sha256) and wanted == [sha256.encode()]


def kept_for_ever(plan: Plan, query: bytes, sha256: str) -> Plan:
    """Return an answer that caches may keep for ever if its query asks for the bytes of this digest."""
    return immutable(plan) if is_version(query, sha256) else plan


def immutable(plan: Plan) -> Plan:
    """Return an answer that caches may keep for ever; errors stay as they are."""
    if plan.status not in (200, 206, 304):
        return plan
    kept = [header for header in plan.headers if header[0] != b"cache-control"]
    return replace(plan, headers=[*kept, (b"cache-control", IMMUTABLE)])
