"""Cross-process write serialization for SQLite: every write transaction also holds ``flock(LOCK_EX)`` on ``<db>.lock``.

An app that opens by plain path adds one line at start-up, before it opens a connection::

    kanbanlock.register(default=True)

One that would rather say where opens with ``kanbanlock.connect(path)``.

A VFS is registered with one copy of SQLite in one process. Each process registers; a worker that was forked has it from
its parent. apsw and pysqlite3 have copies of SQLite of their own: ``load()`` is for those.
"""

from __future__ import annotations

import ctypes
import json
import os
import pathlib
import sqlite3
import urllib.parse
from typing import Any

__all__ = ["Error", "connect", "load", "loadable_path", "register", "status"]

_ENTRY_POINT = "sqlite3_kanbanlock_init"
_ENTRY_POINT_DEFAULT = "sqlite3_kanbanlockdefault_init"
_MAKE_DEFAULT = 1  # KANBANLOCK_MAKE_DEFAULT, kanbanlock.h


class Error(RuntimeError):
    """kanbanlock could not be registered with a copy of SQLite: nothing is protected. The text says what to do."""


def loadable_path() -> str:
    """The path of libkanbanlock.so, for ``.load``, ``load_extension()`` and other programs.

    Raises Error if it is not there.
    """
    path = pathlib.Path(__file__).with_name("libkanbanlock.so")
    if not path.exists():
        raise Error(f"{path} is missing: install the package (pip install ./python), do not run it from its source")
    return str(path)


def register(*, default: bool = False) -> None:
    """Registers the VFS ``kanbanlock`` with the SQLite of the standard library's ``sqlite3``, in this process.

    default: connections opened by plain path go through it, too. Connections that are open already do not change.

    Again does no harm; ``default=True`` may be added later, and is not taken back. Raises Error.
    """
    if hasattr(sqlite3.Connection, "enable_load_extension"):
        boot = sqlite3.connect(":memory:")
        try:
            load(boot, default=default)
        finally:
            boot.close()
    else:
        _register_by_symbols(default)


def _register_by_symbols(default: bool) -> None:
    """For a sqlite3 without load_extension: the functions of its SQLite are found by their names."""
    import _sqlite3

    library = ctypes.CDLL(loadable_path())
    # Built into the interpreter, it has no file of its own: then SQLite is to be found in the program itself.
    sqlite = ctypes.CDLL(getattr(_sqlite3, "__file__", None))
    message = ctypes.create_string_buffer(500)
    flags = _MAKE_DEFAULT if default else 0
    # Its type is in kanbanlock.h.
    if library.kanbanlock_register_library(ctypes.c_void_p(sqlite._handle), flags, message, len(message)) != 0:
        raise Error(f"{_copy('sqlite3', sqlite3.sqlite_version)}: {message.value.decode()}")


def load(connection: Any, *, default: bool = False) -> None:
    """Registers the VFS ``kanbanlock`` with the copy of SQLite that this connection belongs to.

    connection: of sqlite3, apsw, pysqlite3 or another module with their methods. It is only used to load, which is
    disabled on it afterwards: it keeps the VFS that it was opened with, and so do all others that are open. Open the
    one for your data afterwards: with sqlite3 and pysqlite3 ``connect("file:kanban.db?vfs=kanbanlock", uri=True)``,
    with apsw ``Connection("kanban.db", vfs="kanbanlock")``.

    default: as for ``register()``. Raises Error, which names the copy of SQLite.
    """
    copy = _copy(type(connection).__module__, _version(connection))
    if not hasattr(connection, "enable_load_extension"):
        advice = "call kanbanlock.register(), which does without" if isinstance(connection, sqlite3.Connection) else ""
        raise Error(f"{copy}: built without load_extension; {advice or 'kanbanlock cannot be loaded into it'}")
    entry_point = _ENTRY_POINT_DEFAULT if default else _ENTRY_POINT
    path = loadable_path()
    connection.enable_load_extension(True)
    try:
        # The method takes no entry point in sqlite3 before Python 3.12; the SQL function does, in all of them.
        connection.execute("SELECT load_extension(?, ?)", (path, entry_point)).fetchall()
    except Exception as error:  # each module has its own kind
        raise Error(f"{copy}: {error}") from error
    finally:
        connection.enable_load_extension(False)


def _version(connection: Any) -> str:
    return str(next(iter(connection.execute("SELECT sqlite_version()")))[0])


def _copy(module: str, version: str) -> str:
    """A copy of SQLite, as errors name it: a process may have several."""
    return f"the SQLite {version} of the module {module}"


def connect(path: str | bytes | os.PathLike[Any], *, timeout: float = 30.0, **kwargs: Any) -> sqlite3.Connection:
    """``sqlite3.connect`` through kanbanlock. Registers it, if need be.

    path: a path, with any characters; or a ``file:`` URI, for its parameters (``kanbanlock_checkpoint=gate``); or
    ``":memory:"``, which is nobody else's business and needs no lock.

    timeout: how long a transaction waits for its turn, in seconds; sqlite3's own default is 5. It works at ``BEGIN
    IMMEDIATE``: a transaction that began as a reader cannot wait.

    kwargs: as for sqlite3.connect.

    Raises Error, ValueError (the URI asks for another VFS), or what sqlite3.connect raises.
    """
    register()
    connection: sqlite3.Connection = sqlite3.connect(_uri(path), timeout=timeout, uri=True, **kwargs)
    return connection


def _uri(path: str | bytes | os.PathLike[Any]) -> str:
    path = os.fspath(path)
    if isinstance(path, str) and path.startswith("file:"):
        return _with_vfs(path)
    if path in ("", b"", ":memory:", b":memory:"):
        return ":memory:" if path else ""
    quoted = urllib.parse.quote(os.fsencode(path), safe="/")
    # An empty authority, or "//folder/file" would be taken for one.
    return f"file://{quoted}?vfs=kanbanlock" if quoted.startswith("/") else f"file:{quoted}?vfs=kanbanlock"


def _with_vfs(uri: str) -> str:
    without_fragment = uri.partition("#")[0]
    base, _, query = without_fragment.partition("?")
    vfs = urllib.parse.parse_qs(query, keep_blank_values=True).get("vfs", ["kanbanlock"])
    if vfs != ["kanbanlock"]:
        raise ValueError(f"{uri!r} asks for the VFS {vfs[-1]!r}: open it with sqlite3.connect, or leave vfs= out")
    parameters = [part for part in query.split("&") if part and not part.startswith("vfs=")]
    return base + "?" + "&".join([*parameters, "vfs=kanbanlock"])


def status(path: str | bytes | os.PathLike[Any]) -> dict[str, Any]:
    """What holds for this database now, as seen from this process. It takes no lock and writes nothing.

    - ``lock_file``: the path of ``<db>.lock``; it exists from the first write on.
    - ``held_by``: the processes that hold the flock, by their ids. Empty: nobody does, or a process of another container,
      which /proc/locks does not show.
    - ``sqlite``: the version of this Python's SQLite.
    - ``version``, ``real_vfs``, ``checkpoint``, ``fallback``, ``close_proof``, ``process``: as ``PRAGMA kanbanlock``
      answers for a new connection of this process.

    path: as for ``connect()``. Raises FileNotFoundError, and what ``connect()`` raises.
    """
    uri = _uri(path)
    name = urllib.parse.unquote_to_bytes(uri.partition("?")[0][len("file:") :])
    if not uri.startswith("file:") or name == b":memory:":
        raise ValueError(f"{path!r} is no database file")
    database = pathlib.Path(os.fsdecode(name[2:] if name.startswith(b"//") else name)).resolve()
    if not database.exists():
        raise FileNotFoundError(f"no database {database}")
    connection = connect(uri)
    try:
        (row,) = connection.execute("PRAGMA kanbanlock").fetchone()
    finally:
        connection.close()
    answer: dict[str, Any] = json.loads(row)
    for of_this_connection in "vfs", "level", "held":
        del answer[of_this_connection]
    lock_file = f"{database}.lock"
    return {**answer, "lock_file": lock_file, "held_by": _holders(lock_file), "sqlite": sqlite3.sqlite_version}


def _holders(lock_file: str) -> list[int]:
    """Who has a flock on this file: proc(5), /proc/locks. ``1: FLOCK  ADVISORY  WRITE 708 08:01:131 0 EOF``"""
    try:
        file = os.stat(lock_file)
    except FileNotFoundError:
        return []
    its_id = f"{os.major(file.st_dev):02x}:{os.minor(file.st_dev):02x}:{file.st_ino}"
    with open("/proc/locks") as locks:
        fields = [line.split() for line in locks]
    # A waiter's line has "->" in the second field.
    return [int(field[4]) for field in fields if field[1] == "FLOCK" and field[5] == its_id]
