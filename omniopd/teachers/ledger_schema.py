"""The ledger's tables, and how a file gets them."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path

from omniopd.errors import RunError

VERSION = 2
BUSY_S = 60.0

_CREATE = (
    """CREATE TABLE calls (
        id INTEGER PRIMARY KEY,
        time REAL NOT NULL,
        seconds REAL NOT NULL,
        teacher TEXT NOT NULL,
        requests INTEGER NOT NULL,
        input_tokens INTEGER NOT NULL,
        output_tokens INTEGER NOT NULL,
        cost_usd REAL
    )""",
    """CREATE TABLE samples (
        key TEXT NOT NULL,
        sample INTEGER NOT NULL,
        call INTEGER NOT NULL REFERENCES calls (id),
        raw TEXT NOT NULL,
        continuation TEXT NOT NULL,
        PRIMARY KEY (key, sample)
    ) WITHOUT ROWID""",
)
"""Version 1."""

_TO_VERSION_2 = (
    *(
        f"ALTER TABLE calls ADD COLUMN {column} INTEGER NOT NULL DEFAULT 0"
        for column in (
            *("unanswered", "cached_input_tokens", "cache_write_tokens", "reasoning_tokens"),
            "possible_tokens",
        )
    ),
    # What may have been billed besides cost_usd; NULL when nobody can bound it.
    "ALTER TABLE calls ADD COLUMN possible_usd REAL DEFAULT 0.0",
    "UPDATE calls SET possible_usd = NULL WHERE cost_usd IS NULL",
    # Rows of this length make a table without row ids twice as slow to fill.
    "ALTER TABLE samples RENAME TO samples_1",
    """CREATE TABLE samples (
        key TEXT NOT NULL,
        sample INTEGER NOT NULL,
        call INTEGER NOT NULL,
        raw TEXT NOT NULL,
        continuation TEXT NOT NULL,
        PRIMARY KEY (key, sample)
    )""",
    "INSERT INTO samples SELECT key, sample, call, raw, continuation FROM samples_1 ORDER BY call, key, sample",
    "DROP TABLE samples_1",
    """CREATE TABLE teachers (
        id TEXT NOT NULL,
        fingerprint TEXT NOT NULL,
        reads_token_ids INTEGER NOT NULL,
        PRIMARY KEY (id, fingerprint)
    ) WITHOUT ROWID""",
    """CREATE TABLE orders (
        owner TEXT NOT NULL,
        id INTEGER NOT NULL,
        teacher TEXT NOT NULL,
        time REAL NOT NULL,
        tokens INTEGER NOT NULL,
        usd REAL,
        PRIMARY KEY (owner, id)
    ) WITHOUT ROWID""",
    "CREATE TABLE claims (key TEXT PRIMARY KEY, owner TEXT NOT NULL) WITHOUT ROWID",
)
"""Version 1 becomes version 2: its bills count on, and its samples are found where the teacher's fingerprint and so
the key is as it was."""


def connect(path: str) -> sqlite3.Connection:
    """Open a ledger, in autocommit mode; create it or bring it up to date where needed.

    Raises sqlite3.Error or OSError, and RunError for a file of a newer version.
    """
    if path != ":memory:":
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    db = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
    try:
        # In this order: a ledger that another process makes right now gets its tables and its version at once.
        has_tables = db.execute("SELECT 1 FROM sqlite_master").fetchone() is not None
        if has_tables and _version(db, path) == 0:
            raise RunError(f"{path} is a database, and no ledger; expected a ledger or the name of a new file")
        _use_wal(db)
        if _version(db, path) < VERSION:
            db.execute("PRAGMA synchronous=FULL")
            _migrate(db, path)
    except BaseException:
        db.close()
        raise
    return db


def connect_read_only(path: Path | str) -> sqlite3.Connection:
    """Open a ledger that is not to be touched, also one in a folder that cannot be written.

    Raises RunError when it is none, or not of this version.
    """
    file = Path(path)
    if not file.is_file():
        raise RunError(f"there is no ledger {path}; expected a file such as runs/x/ledger.sqlite")
    uri = file.resolve().as_uri() + "?mode=ro"
    try:
        try:
            db, version = _peek(uri, str(path))
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF not in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY):
                raise
            wal = file.with_name(f"{file.name}-wal")
            if wal.is_file() and wal.stat().st_size:
                raise RunError(
                    f"cannot read the ledger {path}: its last answers are in {wal.name} and the folder cannot be "
                    "written; copy both to a folder that can be"
                ) from error
            # Without a write-ahead log and without a writer, the file alone is all there is.
            db, version = _peek(f"{uri}&immutable=1", str(path))
    except sqlite3.Error as error:
        raise RunError(f"cannot open the ledger {path}: {error}; is it a ledger?") from error
    if version == VERSION:
        return db
    db.close()
    raise RunError(
        f"the ledger {path} has version {version}, expected {VERSION}; "
        f"`omniopd cache stats {path}` brings it up to date"
    )


def _peek(uri: str, path: str) -> tuple[sqlite3.Connection, int]:
    db = sqlite3.connect(uri, uri=True, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
    try:
        return db, _version(db, path)
    except BaseException:
        db.close()
        raise


def _use_wal(db: sqlite3.Connection) -> None:
    # Two processes that open a new file at once: SQLite fails one of them here without waiting, to avoid a deadlock.
    deadline = time.monotonic() + BUSY_S
    while True:
        try:
            db.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
        time.sleep(0.01)


def _version(db: sqlite3.Connection, path: str) -> int:
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if version > VERSION:
        raise RunError(f"the ledger {path} has version {version}, this omniopd reads {VERSION}; use a new file")
    return int(version)


def _migrate(db: sqlite3.Connection, path: str) -> None:
    db.execute("BEGIN IMMEDIATE")
    try:
        version = _version(db, path)  # Again, under the lock: another process may have been faster.
        steps = (_CREATE, _TO_VERSION_2)[version:]
        for statement in (statement for step in steps for statement in step):
            db.execute(statement)
        db.execute(f"PRAGMA user_version={VERSION}")
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise
