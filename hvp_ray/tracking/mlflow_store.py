"""MLflow's SQLite store: its URI, and how it is created, migrated and repaired before MLflow opens it.

MLflow migrates a new file in about fifty steps. A process that is killed between two of them leaves a file that MLflow never
opens again. Here the migration happens in a file beside the store, which replaces the store when it is complete. A lock that
is released when its process ends keeps other processes out. A replaced file is renamed, never deleted.
"""

import fcntl
import logging
import os
import shlex
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from hvp_ray.errors import HvpRayError, first_line

logger = logging.getLogger(__name__)

_SIDECARS = ("-journal", "-wal", "-shm")
"""Files of SQLite beside a database. They are moved first, because SQLite would apply a journal to another database."""

_LOCKED_SECONDS = 20.0
_DISK_FAILURES = ("disk is full", "disk I/O error", "No space left")


class StoreError(HvpRayError):
    """The store cannot be used, and retries do not help."""


def store_uri(path: Path) -> str:
    """Return the tracking URI of a SQLite file, by its absolute path."""
    quoted = str(path).replace("%", "%25").replace("?", "%3F")  # the characters that SQLAlchemy interprets in a path
    # MLflow creates the folder after `sqlite:///` without unquoting it. After `sqlite+pysqlite:///` it creates none.
    driver = "sqlite" if quoted == str(path) else "sqlite+pysqlite"
    return f"{driver}:///{quoted}"


def store_path(uri: str) -> Path | None:
    """Return the file of a SQLite store; None: another kind of store, or one in memory."""
    if not uri.startswith(("sqlite:", "sqlite+")):
        return None
    from sqlalchemy import make_url

    database = make_url(uri).database
    if not database or database == ":memory:" or database.startswith("file:"):
        return None
    return Path(database).absolute()


def ui_command(uri: str) -> str:
    """Return the shell command that opens MLflow's page on a store."""
    checkout = Path(__file__).parents[2]
    if Path.cwd() == checkout and uri == store_uri(checkout / "runs" / "mlflow.db"):
        return "make ui"
    return f"mlflow server --port 5000 --backend-store-uri {shlex.quote(uri)}"


def prepare_store(uri: str) -> None:
    """Create the SQLite file of a store, migrate that of an older MLflow, or replace one that cannot be opened.

    A file that cannot be migrated is renamed to `<name>.broken-<n>`, one that was migrated to `<name>.old-<n>`. Stores of
    other kinds are left to MLflow.

    Raises:
        StoreError: the file was written by a newer MLflow.
        OSError: the folder cannot be written.
        sqlite3.OperationalError: another process holds the database.
    """
    path = store_path(uri)
    if path is None:
        return
    head, known = _schema_versions()
    if _read_version(path) == head:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.with_name(f".{path.name}.lock")):
        version = _read_version(path)
        if version == head:
            return  # another process has just created it
        if version is not None and version not in known:
            raise StoreError(
                f"{path} was written by a newer MLflow (schema {version}; this one has {head}). Update MLflow, or give "
                f"another store by --tracking.uri"
            )
        new = path.with_name(f".{path.name}.new")
        _delete(new)  # of a process that was killed
        broken = _migrate_copy(path, new)
        if broken is not None:
            _delete(new)
            _migrate(new)
        moved = _move_away(path, "old" if broken is None else "broken")
        os.replace(new, path)
    if moved is not None and broken is not None:
        logger.warning(
            "%s could not be opened (%s) and was renamed to %s; MLflow begins with an empty store",
            path,
            broken,
            moved.name,
        )


def _schema_versions() -> tuple[str | None, set[str]]:
    """Return the schema of this MLflow, and all that it can migrate."""
    import mlflow.store
    from alembic.script import ScriptDirectory

    script = ScriptDirectory(str(Path(mlflow.store.__path__[0]) / "db_migrations"))
    return script.get_current_head(), {revision.revision for revision in script.walk_revisions()}


def _read_version(path: Path) -> str | None:
    """Return the schema recorded in a file; None: no file, no database, or its migration never ended."""
    if not path.is_file() or not path.stat().st_size:
        return None
    try:
        with closing(sqlite3.connect(path, timeout=_LOCKED_SECONDS)) as connection:
            row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    except sqlite3.OperationalError as error:
        if "no such table" in str(error):
            return None
        raise
    except sqlite3.DatabaseError:
        return None
    return None if row is None else str(row[0])


def _migrate_copy(path: Path, new: Path) -> str | None:
    """Copy a store and migrate the copy; return why the store is broken, or None.

    Raises:
        Exception: the disk failed; the store may be intact.
    """
    if not path.is_file() or not path.stat().st_size:
        return "it is empty"
    try:
        with closing(sqlite3.connect(path, timeout=_LOCKED_SECONDS)) as old, closing(sqlite3.connect(new)) as copy:
            old.backup(copy)
        _migrate(new)
    except Exception as error:
        if any(failure in str(error) for failure in _DISK_FAILURES):
            raise
        return first_line(error)
    return None


def _migrate(path: Path) -> None:
    """Migrate a new or older file to the schema of this MLflow."""
    import mlflow.db

    mlflow.db.upgrade.callback(store_uri(path))  # `mlflow db upgrade`


def _move_away(path: Path, why: str) -> Path | None:
    """Rename a store and its sidecar files; return its new path, or None: it was empty."""
    is_empty = not path.is_file() or not path.stat().st_size
    number = 1
    while path.with_name(f"{path.name}.{why}-{number}").exists():
        number += 1
    target = path.with_name(f"{path.name}.{why}-{number}")
    for ending in _SIDECARS:
        sidecar = path.with_name(path.name + ending)
        if sidecar.exists():
            sidecar.rename(target.with_name(target.name + ending))
    if is_empty:
        return None
    path.rename(target)
    return target


def _delete(path: Path) -> None:
    for ending in (*_SIDECARS, ""):
        path.with_name(path.name + ending).unlink(missing_ok=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
