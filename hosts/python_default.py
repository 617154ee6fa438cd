"""Python's sqlite3 with load_extension, opened by plain path."""

import sqlite3

from line_protocol import DATABASE, KANBANLOCK, python_is_busy, serve

if KANBANLOCK:
    # kanbanlock: load
    boot = sqlite3.connect(":memory:")
    boot.enable_load_extension(True)
    boot.execute("SELECT load_extension(?, 'sqlite3_kanbanlockdefault_init')", [KANBANLOCK])
    # kanbanlock: end

db = sqlite3.connect(DATABASE, timeout=0, isolation_level=None)


def execute(sql, text):
    row = db.execute(sql, [] if text is None else [text]).fetchone()
    return row and row[0]


serve(sqlite3.sqlite_version, execute, python_is_busy)
