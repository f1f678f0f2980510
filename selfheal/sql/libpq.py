"""libpq's parameters in a PostgreSQL URL, as hosts and other drivers write them, in asyncpg's words."""

from collections.abc import Mapping
from urllib.parse import unquote, urlencode

from sqlalchemy.engine import URL

from ..errors import SettingsError

_ARGUMENTS = (  # of asyncpg, which SQLAlchemy passes one by one
    *("command_timeout", "dsn", "host", "passfile", "port", "prepared_statement_cache_size", "ssl"),
    *("statement_cache_size", "target_session_attrs", "timeout"),
)
_RENAMED = {"sslmode": "ssl", "connect_timeout": "timeout"}
_IN_DSN = (  # asyncpg takes these in a DSN only; what it does not know itself it passes to the server, as libpq does
    *("application_name", "options", "sslcert", "sslkey", "sslrootcert", "sslcrl", "sslpassword", "sslnegotiation"),
    *("ssl_min_protocol_version", "ssl_max_protocol_version", "krbsrvname", "gsslib"),
)
_HARMLESS = (
    *("channel_binding", "require_auth"),  # asyncpg has no channel binding; TLS with verify-full protects as well
    *("gssencmode", "requirepeer", "sslcompression", "sslsni"),
    *("keepalives", "keepalives_idle", "keepalives_interval", "keepalives_count", "tcp_user_timeout"),
    *("client_encoding", "fallback_application_name", "load_balance_hosts"),
)
_POOLER = "pgbouncer"  # a pooler in transaction mode, in the words of other drivers
_NO_STATEMENT_IS_KEPT = {"statement_cache_size": "0", "prepared_statement_cache_size": "0"}


def in_asyncpgs_words(url: URL) -> URL:
    """Return a URL with asyncpg's parameters; raise `SettingsError` for an unknown one."""
    given = {key: value if isinstance(value, str) else value[-1] for key, value in url.query.items() if value}
    query = {"host": url.query["host"]} if "host" in given else {}  # there may be several
    if url.host is not None and url.host.startswith("%2F"):  # a socket's directory, which SQLAlchemy leaves quoted
        query["host"] = unquote(url.host)
        url = url.set(host=None)
    in_dsn = {key: given.pop(key) for key in _IN_DSN if key in given}
    if given.pop(_POOLER, "false") == "true" or "0" in (given.get(key) for key in _NO_STATEMENT_IS_KEPT):
        query |= _NO_STATEMENT_IS_KEPT  # asyncpg's statements then have no names, and SQLAlchemy keeps none
    for key, value in given.items():
        name = _RENAMED.get(key, key)
        if name in _ARGUMENTS:
            query.setdefault(name, value)
        elif key not in _HARMLESS or (key, value) == ("gssencmode", "require"):
            raise SettingsError(f"the parameter {key!r} of the database URL cannot be honoured; remove it")
    if in_dsn:
        query["dsn"] = f"postgresql://?{urlencode(in_dsn)}"
    _check_numbers(query)
    return url.set(query=query)


def _check_numbers(query: Mapping[str, object]) -> None:
    for key in ("timeout", "command_timeout", *_NO_STATEMENT_IS_KEPT):
        try:
            float(str(query.get(key, "0")))
        except ValueError as error:
            raise SettingsError(f"the parameter {key!r} of the database URL must be a number") from error
