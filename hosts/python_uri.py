"""Python's sqlite3 with load_extension, opened by URI."""

import sqlite3

from line_protocol import DATABASE, KANBANLOCK, python_is_busy, serve

if KANBANLOCK:
    # kanbanlock: load
    boot = sqlite3.connect(":memory:")
    boot.enable_load_extension(True)
    boot.load_extension(KANBANLOCK)
    # kanbanlock: open
    db = sqlite3.connect(f"file:{DATABASE}?vfs=kanbanlock", uri=True)
    # kanbanlock: end
else:
    db = sqlite3.connect(DATABASE)
db.isolation_level = None
db.execute("PRAGMA busy_timeout = 0")


def execute(sql, text):
    row = db.execute(sql, [] if text is None else [text]).fetchone()
    return row and row[0]


serve(sqlite3.sqlite_version, execute, python_is_busy)
