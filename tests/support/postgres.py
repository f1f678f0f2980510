"""A real PostgreSQL server on the loopback interface, with its data in a temporary directory."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import psycopg2

from tests.support.requirements import needs
from tests.support.sockets import free_port


@dataclass(frozen=True)
class PostgresServer:
    """A PostgreSQL server that asks for no password."""

    port: int
    data: Path
    programs: Path
    user: str | None

    def url(self, database: str, port: int | None = None) -> str:
        """Return the URL of one of its databases; `port` is that of a proxy in front of the server."""
        return f"postgresql+asyncpg://postgres@127.0.0.1:{port or self.port}/{database}"

    def sql(self, statement: str, database: str = "postgres") -> str:
        """Run statements, and return the first value that the last one finds; without one an empty string."""
        with closing(
            psycopg2.connect(host="127.0.0.1", port=self.port, user="postgres", dbname=database)
        ) as connection:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute(statement)
                row = cursor.fetchone() if cursor.description else None
        return str(row[0]) if row else ""

    def dump(self, database: str) -> str:
        """Return the statements that make the tables of a database, with their rows."""
        at = ["-h", "127.0.0.1", "-p", str(self.port), "-U", "postgres", "-t", "public.*"]
        command = [str(self.programs / "pg_dump"), "--inserts", *at, database]
        dumped = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return "\n".join(line for line in dumped.splitlines() if not line.startswith("\\"))  # of psql

    def ask_password(self, role: str) -> None:
        """Ask this role for its password from now on."""
        rules = self.data / "pg_hba.conf"
        rules.write_text(f"host all {role} 127.0.0.1/32 scram-sha-256\n{rules.read_text()}")
        self.sql("SELECT pg_reload_conf()")

    def empty(self, database: str) -> None:
        """Close the connections to a database, and drop its schemas and settings."""
        self.sql(
            f"""BEGIN READ WRITE; SET LOCAL lock_timeout = '9s';
            SELECT pg_terminate_backend(pid, 9000) FROM pg_stat_activity WHERE datname = '{database}'
                AND pid <> pg_backend_pid();
            ALTER DATABASE {database} RESET ALL;
            DO $$ DECLARE found text; BEGIN
                FOR found IN SELECT nspname FROM pg_namespace WHERE nspname !~ '^pg_|^information_schema$' LOOP
                    EXECUTE format('DROP SCHEMA %I CASCADE', found);
                END LOOP;
            END $$;
            CREATE SCHEMA public; COMMIT""",
            database,
        )

    def control(self, *arguments: str) -> None:
        """Run pg_ctl, for instance `restart -m immediate`.

        Its output goes to the file `run/said`: a pipe would stay open as long as the server that pg_ctl starts.
        """
        command = [str(self.programs / "pg_ctl"), "-D", str(self.data), "-w", *arguments]
        with (self.data.parent / "run" / "said").open("w+") as said:
            done = subprocess.run(command, user=self.user, stdout=said, stderr=said, cwd="/")
            said.seek(0)
            assert done.returncode == 0, f"pg_ctl {' '.join(arguments)}: {said.read()}"


def start_postgres(base: Path, settings: str = "-c max_connections=200") -> PostgresServer:
    """Make and start a PostgreSQL server with its data below `base`; it runs as an unprivileged user if we are root."""
    programs = _programs()
    if programs is None:
        needs("PostgreSQL", "apt-get install postgresql")
        raise AssertionError
    user = None
    if os.geteuid() == 0:
        user = next((name for name in ("postgres", "nobody") if _has_user(name)), None)
    data, run = base / "data", base / "run"
    for directory in (data, run):
        directory.mkdir(parents=True)
        if user is not None:
            shutil.chown(directory, user)
    if user is not None:
        for parent in (base, *base.parents):
            if parent.owner() == "root" and parent != Path("/") and not parent.stat().st_mode & 0o001:
                parent.chmod(parent.stat().st_mode | 0o011)
    port = free_port()
    initdb = [str(programs / "initdb"), "-A", "trust", "-U", "postgres", "-E", "UTF8", "--no-sync", "-D", str(data)]
    subprocess.run(initdb, user=user, check=True, capture_output=True, cwd="/")
    options = f"-h 127.0.0.1 -p {port} -k {run} -c fsync=off -c full_page_writes=off -c autovacuum=off {settings}"
    server = PostgresServer(port, data, programs, user)
    server.control("-l", str(run / "log"), "-o", options, "start")
    return server


def _programs() -> Path | None:
    """Return the directory of the newest PostgreSQL's programs; None if none is installed."""
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: float(path.parent.name))
    if versions:
        return versions[-1]
    found = shutil.which("initdb")
    return Path(found).parent if found else None


def _has_user(name: str) -> bool:
    try:
        pwd.getpwnam(name)
    except KeyError:
        return False
    return True
