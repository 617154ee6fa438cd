"""The line protocol of hosts/run.py, for the hosts in Python.

A worker prints "ready VERSION", VERSION being its SQLite's. Then it answers each line that it reads with one line:
"ok", "ok VALUE", "busy" (SQLITE_BUSY) or "error TEXT".

    begin        BEGIN IMMEDIATE
    write TEXT   INSERT INTO task VALUES (TEXT)
    commit       COMMIT
    count        how many tasks there are
"""

import os
import sys

# The library's path, empty if this worker is to run on stock SQLite; the database's path.
KANBANLOCK, DATABASE = os.environ["KANBANLOCK"], os.environ["DATABASE"]


def serve(version, execute, is_busy, begin=None, commit=None):
    """Serves until the input ends.

    execute: runs one SQL statement, with one parameter or none, and returns its first value, if any.
    is_busy: tells whether an exception means SQLITE_BUSY.
    begin, commit: where the host has its own way.
    """
    print("ready", version, flush=True)
    for line in sys.stdin:
        command, _, text = line.rstrip("\n").partition(" ")
        value = None
        try:
            if command == "begin":
                begin() if begin else execute("BEGIN IMMEDIATE", None)
            elif command == "write":
                execute("INSERT INTO task VALUES (?)", text)
            elif command == "commit":
                commit() if commit else execute("COMMIT", None)
            elif command == "count":
                value = execute("SELECT count(*) FROM task", None)
            else:
                raise ValueError(f"unknown command {command!r}")
        except Exception as error:
            print("busy" if is_busy(error) else f"error {error!r}", flush=True)
        else:
            print("ok" if value is None else f"ok {value}", flush=True)


def python_is_busy(error):
    """For sqlite3's exceptions, and for those that wrap one."""
    error = getattr(error, "orig", None) or error.__cause__ or error
    return getattr(error, "sqlite_errorname", None) == "SQLITE_BUSY"
