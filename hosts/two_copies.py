"""Two copies of SQLite in one process, Python's and apsw's: each loads kanbanlock, and they exclude each other.

Prints one line: what happened. KANBANLOCK empty: the same on stock SQLite.
"""

import fcntl
import os
import sqlite3

import apsw

KANBANLOCK, DATABASE = os.environ["KANBANLOCK"], os.environ["DATABASE"]
assert sqlite3.sqlite_version != apsw.sqlite_lib_version(), "not two copies, or not to be told apart"

if KANBANLOCK:
    boot = sqlite3.connect(":memory:")
    boot.enable_load_extension(True)
    boot.load_extension(KANBANLOCK)
    other = apsw.Connection(":memory:")
    other.enable_load_extension(True)
    other.load_extension(KANBANLOCK)
    a = sqlite3.connect(f"file:{DATABASE}?vfs=kanbanlock", uri=True, timeout=0, isolation_level=None)
    b = apsw.Connection(DATABASE, vfs="kanbanlock")
else:
    a = sqlite3.connect(DATABASE, timeout=0, isolation_level=None)
    b = apsw.Connection(DATABASE)
a.execute("CREATE TABLE task (title TEXT)")


def is_flocked():
    """True if somebody holds the flock: asked through a descriptor of our own."""
    try:
        with open(DATABASE + ".lock") as lock_file:
            fcntl.flock(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def try_to_begin(connection, busy):
    """"refused" or "granted"; what is granted is rolled back."""
    try:
        connection.execute("BEGIN IMMEDIATE")
    except busy as error:
        assert getattr(error, "sqlite_errorname", "SQLITE_BUSY") == "SQLITE_BUSY", error
        return "refused"
    connection.execute("ROLLBACK")
    return "granted"


a.execute("BEGIN IMMEDIATE")
flocked = is_flocked()
second = try_to_begin(b, apsw.BusyError)
a.execute("INSERT INTO task VALUES ('from Python''s copy')")
a.execute("COMMIT")
b.execute("BEGIN IMMEDIATE")
first = try_to_begin(a, sqlite3.OperationalError)
b.execute("INSERT INTO task VALUES ('from apsw''s copy')")
b.execute("COMMIT")
print("flocked" if flocked else "free", second, first, a.execute("SELECT count(*) FROM task").fetchone()[0])
