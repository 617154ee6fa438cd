#!/usr/bin/env python3
"""Runs the examples for existing apps that are not Rust, with kanbanlock and without.

    cargo build --release -p kanbanlock-extension && hosts/install.sh && examples/apps/run.py

Each app is one file, whose header shows as a diff what adopting kanbanlock changes. The app without kanbanlock is made
from that diff, backwards: so the diff is complete, and it is what makes the difference.

- Both print what expected.txt says: the app stays what it was.
- While they write, all their processes are stopped (SIGSTOP) again and again. If SQLite's own write lock is held then,
  an outsider's LOCK_NB on kanban.db.lock is refused with kanbanlock, each time. Without it there is no such file.
- Each app's audit finds every commit that was acknowledged; and it fails once one of them has been deleted.

    examples/apps/run.py NAME…     only these
"""

import argparse
import contextlib
import fcntl
import os
import pathlib
import random
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
import tempfile
import time

APPS = pathlib.Path(__file__).resolve().parent
ROOT = APPS.parent.parent
sys.path.insert(0, str(ROOT))
sys.dont_write_bytecode = True
from hosts import run as hosts
from hosts.run import Failure, expect

# How often an app is to be found in a write transaction, and in how many runs at most: on a machine that is busy with
# other things one run may be over too soon.
SIGHTINGS = 5
RUNS = 10
# Of the database: sqlite.org/fileformat2.html, "Lock-Byte Page". Of its -shm: sqlite.org/walformat.html, "WAL Locks".
RESERVED_BYTE = 0x40000001
WRITE_BYTE = 120
# Hostile to URIs and shells: the apps open kanban.db in such a folder.
FOLDER = "odd ?vfs=unix&#%20'\"$;"


class App:
    def __init__(self, name, interpreter, needs=None):
        self.folder = APPS / name
        self.script = next(self.folder.glob("app.*"))
        self.interpreter = str(interpreter)
        self.title = f"{name}, {self.interpreter.removeprefix(f'{ROOT}/')}"
        self.needs = [self.interpreter, str(needs or interpreter)]

    def missing(self):
        """What is not installed, or None."""
        return next((one for one in self.needs if not shutil.which(one) and not os.path.exists(one)), None)

    def without_kanbanlock(self):
        """The app as it was: the diff in its header, backwards."""
        comment = "// " if self.script.suffix == ".js" else ""
        text = self.script.read_text()
        lines = [line.removeprefix(comment) for line in text.splitlines()]
        diff = lines[lines.index("```diff") + 1 :]
        diff = diff[: diff.index("```")]
        for hunk in "\n".join(diff).split("\n …\n"):
            lines = hunk.split("\n")
            old, new = ("".join(f"{line[1:]}\n" for line in lines if line[0] != other) for other in "+-")
            if text.count(f"\n{new}") != 1:
                raise Failure(f"{self.script}: the lines of its diff are not in it, or more than once:\n{new}")
            text = text.replace(f"\n{new}", f"\n{old}")
        return text


def all_apps():
    # With load_extension, and, where there is such a Python, without.
    pythons = sorted({hosts.DEBIAN_PYTHON, hosts.python_for_ctypes()})
    return [
        *(App("python_workers", python) for python in pythons),
        App("django_project", hosts.PYTHON),
        App("sqlalchemy_engine", hosts.PYTHON),
        App("better_sqlite3", "node", needs=hosts.NODE_MODULES / "better-sqlite3"),
    ]


# What an outsider sees. --------------------------------------------------------------------------------------


def threads(group):
    """The states of all threads of a process group, by proc(5)'s letters; those of zombies left out."""
    for process in pathlib.Path("/proc").glob("[0-9]*"):
        # A process may end, and take its files away, at any moment.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for thread in process.glob("task/*/stat") if os.getpgid(int(process.name)) == group else ():
                state = thread.read_text().rpartition(") ")[2][0]
                if state not in "ZX":
                    yield state


@contextlib.contextmanager
def stopped(group):
    """All processes of the group stand still, somewhere."""
    os.killpg(group, signal.SIGSTOP)
    try:
        deadline = time.monotonic() + hosts.PATIENCE_S
        while set(threads(group)) - {"T"}:
            if time.monotonic() > deadline:
                raise Failure("the app's processes do not stop")
        yield
    finally:
        os.killpg(group, signal.SIGCONT)


def is_writing(database):
    """Whether somebody has SQLite's own write lock: RESERVED in rollback mode, WRITE in WAL mode."""
    return is_locked(database, RESERVED_BYTE) or is_locked(f"{database}-shm", WRITE_BYTE)


def is_locked(path, byte):
    """fcntl(2), F_GETLK: whether another process has locked this byte. It takes no lock."""
    layout = "hhqqi"  # struct flock of a 64-bit Linux: l_type, l_whence, l_start, l_len, l_pid
    try:
        with open(path, "rb") as file:
            question = struct.pack(layout, fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
            answer = struct.unpack(layout, fcntl.fcntl(file, fcntl.F_GETLK, question))
    except FileNotFoundError:
        return False
    return answer[0] != fcntl.F_UNLCK


def watch(process, database, held):
    """Stops the app again and again. Adds to held, for each write transaction that it stood still in: held or not?"""
    while len(held) < SIGHTINGS and process.poll() is None:
        # Not before the first acknowledged commit: who makes or recovers a WAL has its locks, too.
        if any(path.stat().st_size for path in database.parent.glob("acknowledged-*.txt")):
            with stopped(process.pid):
                if is_writing(database):
                    flocked = hosts.is_flocked(database)
                    # Unless somebody else has let the app go on meanwhile.
                    if is_writing(database) and set(threads(process.pid)) == {"T"}:
                        held.append(flocked)
        time.sleep(random.uniform(0, 0.001))  # another moment of the app's; nothing depends on how long it is


# -------------------------------------------------------------------------------------------------------------


def try_app(app, script, environment, in_force):
    """in_force: it has kanbanlock."""
    held = []
    for _ in range(RUNS):
        run_once(app, script, environment, in_force, held)
        if len(held) == SIGHTINGS:
            break
    expect("kanban.db.lock held in write transactions", held, [in_force] * SIGHTINGS)


def run_once(app, script, environment, in_force, held):
    """One run of the app, and its audit, after which one of its commits goes."""
    command = [app.interpreter, str(script)]
    with tempfile.TemporaryDirectory(prefix="kanbanlock-apps-") as folder:
        database = pathlib.Path(folder).resolve() / FOLDER / "kanban.db"
        database.parent.mkdir()
        options = dict(cwd=database.parent, env=environment, stdin=subprocess.DEVNULL, text=True)
        output = pathlib.Path(folder) / "output"
        with open(output, "w") as file:
            # A process group of its own.
            process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True, **options)
            try:
                watch(process, database, held)
                status = process.wait(hosts.PATIENCE_S)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        if status != 0:
            raise Failure(f"{hosts.describe(status)}\n{output.read_text()}")
        expect("output", output.read_text(), (app.folder / "expected.txt").read_text())
        expect("kanban.db.lock exists", pathlib.Path(f"{database}.lock").exists(), in_force)

        with contextlib.closing(sqlite3.connect(database)) as db, db:
            db.execute("DELETE FROM task WHERE rowid = (SELECT max(rowid) FROM task)")
        options |= dict(capture_output=True, timeout=hosts.PATIENCE_S, check=False)
        audit = subprocess.run([*command, "audit"], **options)
        if audit.returncode != 1 or "acknowledged, but not in the database" not in audit.stderr:
            raise Failure(f"the audit did not notice a lost commit: {audit.returncode}\n{audit.stdout}{audit.stderr}")


def main():
    parser = argparse.ArgumentParser(description="Runs the examples for existing apps.")
    parser.add_argument("--library", type=pathlib.Path, default=ROOT / "target/release/libkanbanlock.so")
    parser.add_argument("names", nargs="*", metavar="NAME", help="folders beside this script")
    options = parser.parse_args()
    library = options.library.resolve()
    if not library.exists():
        sys.exit(f"no {library}: run `cargo build --release -p kanbanlock-extension` first")
    apps = all_apps()
    known = {app.folder.name for app in apps}
    expect("examples/apps/*/", {folder.name for folder in APPS.glob("*/")}, known)
    if set(options.names) - known:
        sys.exit(f"no such app: {', '.join(sorted(set(options.names) - known))}; there are {', '.join(sorted(known))}")
    apps = [app for app in apps if not options.names or app.folder.name in options.names]

    failed = skipped = 0
    with tempfile.TemporaryDirectory(prefix="kanbanlock-apps-") as folder:
        # The Python package as its wheel would be, without installing it.
        package = pathlib.Path(folder).resolve() / "kanbanlock"
        package.mkdir()
        shutil.copy(ROOT / "python/src/kanbanlock/__init__.py", package)
        shutil.copy(library, package / "libkanbanlock.so")
        environment = dict(os.environ, KANBANLOCK=str(library), PYTHONPATH=str(package.parent))
        environment["NODE_PATH"] = str(hosts.NODE_MODULES)
        environment["PYTHONDONTWRITEBYTECODE"] = "1"
        for app in apps:
            if app.missing():
                skipped += 1
                print(f"SKIPPED: {app.title}: no {app.missing()} (hosts/install.sh installs it)", flush=True)
                continue
            began = time.monotonic()
            try:
                try_app(app, app.script, environment, True)
                before = package.parent / app.script.name
                before.write_text(app.without_kanbanlock())
                try_app(app, before, environment, False)
            except (Failure, OSError, subprocess.SubprocessError, sqlite3.Error) as failure:
                failed += 1
                print(f"FAILED {app.title}: {failure}", flush=True)
            else:
                seconds = time.monotonic() - began
                print(f"ok     {app.title} ({seconds:.1f} s)", flush=True)
    if not failed and not skipped:
        print(f"kanban.db.lock: held in each of {SIGHTINGS} write transactions of each app, without kanbanlock in none")
    print(f"{len(apps) - failed - skipped} passed, {failed} failed, {skipped} skipped")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
