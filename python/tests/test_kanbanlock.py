"""The package as its users see it. What concerns the whole process runs in one of its own."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pathlib
import sqlite3
import subprocess
import sys
import textwrap

import pytest

import kanbanlock


@pytest.fixture
def database(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path.resolve() / "kanban.db"


def is_flocked(database: pathlib.Path) -> bool:
    try:
        with open(f"{database}.lock") as lock_file:
            fcntl.flock(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def holds_the_flock(connection: sqlite3.Connection, database: pathlib.Path) -> bool:
    """A write transaction: True if it holds the flock, and no longer than that."""
    connection.isolation_level = None
    connection.execute("CREATE TABLE IF NOT EXISTS task (title TEXT)")
    connection.execute("BEGIN IMMEDIATE")
    connection.execute("INSERT INTO task VALUES ('a task')")
    held = is_flocked(database)
    connection.execute("COMMIT")
    assert not is_flocked(database)
    return held


def in_a_process(script: str, database: pathlib.Path) -> str:
    """What a Python of its own prints."""
    preamble = "import os, sqlite3, sys, pathlib\nsys.path.insert(0, os.environ['TESTS'])\n"
    preamble += "from test_kanbanlock import holds_the_flock, is_flocked\nimport kanbanlock\n"
    preamble += "database = pathlib.Path(os.environ['DATABASE'])\n"
    done = subprocess.run(
        [sys.executable, "-c", preamble + textwrap.dedent(script)],
        env={**os.environ, "DATABASE": str(database), "TESTS": os.path.dirname(__file__)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_connect_holds_the_flock_and_a_plain_connection_does_not(database: pathlib.Path) -> None:
    with contextlib.closing(sqlite3.connect(database)) as plain:
        assert not holds_the_flock(plain, database)
    with contextlib.closing(kanbanlock.connect(database)) as db:
        assert isinstance(db, sqlite3.Connection)
        assert db.execute("PRAGMA busy_timeout").fetchone() == (30_000,)
        assert holds_the_flock(db, database)


def test_keyword_arguments_are_sqlite3s(database: pathlib.Path) -> None:
    with contextlib.closing(kanbanlock.connect(database, timeout=0.5, isolation_level="IMMEDIATE")) as db:
        assert db.isolation_level == "IMMEDIATE"
        assert db.execute("PRAGMA busy_timeout").fetchone() == (500,)


def test_two_processes_exclude_each_other(database: pathlib.Path) -> None:
    with contextlib.closing(kanbanlock.connect(database, isolation_level=None)) as db:
        db.execute("CREATE TABLE task (title TEXT)")
        db.execute("BEGIN IMMEDIATE")
        script = """
            db = kanbanlock.connect(database, timeout=0, isolation_level=None)
            try:
                db.execute("BEGIN IMMEDIATE")
                db.execute("ROLLBACK")
                print("granted")
            except sqlite3.OperationalError as error:
                print(error)
            print(kanbanlock.status(database)["held_by"])
        """
        assert in_a_process(script, database) == f"database is locked\n[{os.getpid()}]"
        db.execute("COMMIT")
        assert in_a_process(script, database) == "granted\n[]"


@pytest.mark.parametrize(
    "name", ["a b.db", "what?.db", "50%.db", "#1.db", "it's \"quoted\".db", "vfs=unix&x.db", "ünï.db", "file:x.db"]
)
def test_a_path_may_have_any_characters(tmp_path: pathlib.Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    absolute = tmp_path.resolve() / name
    with contextlib.closing(kanbanlock.connect(absolute)) as db:
        assert holds_the_flock(db, absolute)
    assert absolute.exists()
    monkeypatch.chdir(tmp_path)
    relative = name if not name.startswith("file:") else f"./{name}"
    for path in relative, os.fsencode(relative), pathlib.Path(name) if relative == name else relative, f"/{absolute}":
        with contextlib.closing(kanbanlock.connect(path)) as db:
            assert db.execute("SELECT count(*) FROM task").fetchone() == (1,)


def test_a_path_may_be_no_text(tmp_path: pathlib.Path) -> None:
    path = os.fsencode(tmp_path.resolve()) + b"/\xff.db"
    with contextlib.closing(kanbanlock.connect(path)) as db:
        assert holds_the_flock(db, pathlib.Path(os.fsdecode(path)))


def test_a_uri_keeps_its_parameters(database: pathlib.Path) -> None:
    gated = "kanbanlock_checkpoint=gate"
    for uri in f"file:{database}?{gated}", f"file:{database}?vfs=kanbanlock&{gated}#x":
        with contextlib.closing(kanbanlock.connect(uri)) as db:
            assert '"checkpoint":"gate"' in db.execute("PRAGMA kanbanlock").fetchone()[0]
    with pytest.raises(ValueError, match="asks for the VFS 'unix'"):
        kanbanlock.connect(f"file:{database}?vfs=unix")
    with pytest.raises(sqlite3.OperationalError):
        kanbanlock.connect(f"file:{database}?kanbanlock_chekpoint=gate")


@pytest.mark.parametrize("path", [":memory:", b":memory:", ""])
def test_a_database_that_nobody_shares_needs_no_lock(path: str | bytes) -> None:
    with contextlib.closing(kanbanlock.connect(path)) as db:
        db.execute("CREATE TABLE task (title TEXT)")


def test_default_is_for_plain_paths_and_is_not_taken_back(database: pathlib.Path) -> None:
    script = """
        plain = lambda: holds_the_flock(sqlite3.connect(database), database)
        before = sqlite3.connect(database)
        print(plain())
        kanbanlock.register()
        print(plain())
        kanbanlock.register(default=True)
        print(plain())
        kanbanlock.connect(database).close()
        kanbanlock.register()
        print(plain(), holds_the_flock(before, database))
    """
    assert in_a_process(script, database) == "False\nFalse\nTrue\nTrue False"


def test_a_forked_worker_has_it(database: pathlib.Path) -> None:
    script = """
        kanbanlock.register(default=True)
        child = os.fork()
        if not child:
            os._exit(0 if holds_the_flock(sqlite3.connect(database), database) else 1)
        print(os.waitpid(child, 0)[1])
    """
    assert in_a_process(script, database) == "0"


def test_by_symbols_as_where_load_extension_is_compiled_out(database: pathlib.Path) -> None:
    script = """
        kanbanlock._register_by_symbols(default=False)
        kanbanlock._register_by_symbols(default=True)
        print(holds_the_flock(sqlite3.connect(database), database))
        kanbanlock.register()
        print(holds_the_flock(kanbanlock.connect(database), database))
    """
    assert in_a_process(script, database) == "True\nTrue"


def test_another_copy_of_sqlite_has_a_registration_of_its_own(database: pathlib.Path) -> None:
    apsw = pytest.importorskip("apsw")
    with pytest.raises(apsw.SQLError, match="no such vfs"):
        apsw.Connection(str(database), vfs="kanbanlock")
    kanbanlock.register()  # another copy's business
    with pytest.raises(apsw.SQLError, match="no such vfs"):
        apsw.Connection(str(database), vfs="kanbanlock")
    kanbanlock.load(apsw.Connection(":memory:"))
    theirs = apsw.Connection(str(database), vfs="kanbanlock")
    theirs.execute("CREATE TABLE task (title TEXT); BEGIN IMMEDIATE")
    assert is_flocked(database)
    with contextlib.closing(kanbanlock.connect(database, timeout=0, isolation_level=None)) as ours:
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            ours.execute("BEGIN IMMEDIATE")
    theirs.execute("COMMIT")
    theirs.close()


def test_an_error_says_which_copy_of_sqlite_is_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other:
        """A connection of another module, whose SQLite is old."""

        def execute(self, sql: str, parameters: object = ()) -> list[tuple[str]]:
            if "load_extension" in sql:
                raise RuntimeError("kanbanlock: this SQLite is version 3.13.0; kanbanlock needs 3.14 or later")
            return [("3.13.0",)]

        def enable_load_extension(self, enable: bool) -> None:
            pass

    Other.__module__ = "oldsqlite"
    with pytest.raises(kanbanlock.Error, match=r"the SQLite 3\.13\.0 of the module oldsqlite: .* 3\.14 or later"):
        kanbanlock.load(Other())
    monkeypatch.delattr(Other, "enable_load_extension")
    with pytest.raises(kanbanlock.Error, match="of the module oldsqlite: built without load_extension"):
        kanbanlock.load(Other())


def test_load_leaves_loading_disabled() -> None:
    with contextlib.closing(sqlite3.connect(":memory:")) as connection:
        if not hasattr(connection, "enable_load_extension"):
            with pytest.raises(kanbanlock.Error, match=r"call kanbanlock\.register\(\)"):
                kanbanlock.load(connection)
            return
        kanbanlock.load(connection)
        with pytest.raises(sqlite3.OperationalError, match="not authorized"):
            connection.execute("SELECT load_extension('x')")


def test_the_path_can_be_loaded() -> None:
    path = pathlib.Path(kanbanlock.loadable_path())
    assert path.name == "libkanbanlock.so" and path.is_file()


def test_status_tells_who_holds_the_flock(database: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError):
        kanbanlock.status(database)
    assert not database.exists()
    with pytest.raises(ValueError, match="no database file"):
        kanbanlock.status(":memory:")
    with contextlib.closing(kanbanlock.connect(database, isolation_level=None)) as db:
        db.execute("CREATE TABLE task (title TEXT)")
        for path in database, str(database), f"file:{database}?mode=ro":
            assert kanbanlock.status(path)["held_by"] == []
        db.execute("BEGIN IMMEDIATE")
        status = kanbanlock.status(database)
        assert status["held_by"] == [os.getpid()]
        assert status["lock_file"] == f"{database}.lock"
        assert status["sqlite"] == sqlite3.sqlite_version
        assert status["process"]["held"] == 1
        assert is_flocked(database), "asking must not let go of it"
        db.execute("COMMIT")
    with open(f"{database}.lock") as lock_file:
        fcntl.flock(lock_file, fcntl.LOCK_EX)
        assert kanbanlock.status(database)["held_by"] == [os.getpid()]
