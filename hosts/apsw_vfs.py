"""apsw, which has a copy of SQLite of its own."""

import apsw

from line_protocol import DATABASE, KANBANLOCK, serve

if KANBANLOCK:
    # kanbanlock: load
    boot = apsw.Connection(":memory:")
    boot.enable_load_extension(True)
    boot.load_extension(KANBANLOCK)
    # kanbanlock: open
    db = apsw.Connection(DATABASE, vfs="kanbanlock")
    # kanbanlock: end
else:
    db = apsw.Connection(DATABASE)


def execute(sql, text):
    row = db.execute(sql, () if text is None else (text,)).fetchone()
    return row and row[0]


serve(apsw.sqlite_lib_version(), execute, lambda error: isinstance(error, apsw.BusyError))
