"""Python's sqlite3 without load_extension (compiled out, or not to be enabled), opened by plain path."""

import sqlite3

from line_protocol import DATABASE, KANBANLOCK, python_is_busy, serve

if KANBANLOCK:
    # kanbanlock: load
    import _sqlite3, ctypes
    sqlite, message = ctypes.CDLL(_sqlite3.__file__), ctypes.create_string_buffer(500)
    if ctypes.CDLL(KANBANLOCK).kanbanlock_register_library(ctypes.c_void_p(sqlite._handle), 1, message, 500): raise OSError(message.value)
    # kanbanlock: end

db = sqlite3.connect(DATABASE, timeout=0, isolation_level=None)


def execute(sql, text):
    row = db.execute(sql, [] if text is None else [text]).fetchone()
    return row and row[0]


serve(sqlite3.sqlite_version, execute, python_is_busy)
