#!/usr/bin/env python3
"""The file system matrix: kanbanlock on every file system that this machine can mount, for real.

    tests/filesystems/install.sh; tests/filesystems/run.py

Each row makes a file system (on a loop device, by FUSE, or of two layers), and there

- asks `kanbanlock doctor`: what does it take the file system for, and does its probe find that flock, POSIX and OFD
  locks exclude another process?
- runs the main job, `kanban_board --chaos`, in WAL and in rollback mode, whose audit looks for every acknowledged commit;
  and asks a connection whether its locks are close-proof;
- runs the tests of SUITES, whose databases are then there ($TMPDIR).

Where doctor finds locks that do not exclude, the rest is luck, and not run. A read-only file system is read. What was
found must be what the table in docs/FILESYSTEMS.md says; a row that this machine cannot mount prints `not here: why`.
All mounts are in a mount namespace of their own. Without root only the rows that need no mount are run.

    tests/filesystems/run.py NAME…      only the rows of these names (`--list`)
    tests/filesystems/run.py --docs     writes what was found into docs/FILESYSTEMS.md
"""

import argparse
import contextlib
import datetime
import json
import os
import pathlib
import platform
import re
import shutil
import sqlite3
import stat
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
DOCS = ROOT / "docs/FILESYSTEMS.md"
BEGIN, END = "<!-- matrix:begin -->", "<!-- matrix:end -->"
SUITES = ["close_proof", "two_copies", "lock_file", "moved"]
SFTP_SERVER = "/usr/lib/openssh/sftp-server"
IN_NAMESPACE = "KANBANLOCK_FILESYSTEMS_NAMESPACE"
IMAGE_BYTES = 320 << 20
# For what hangs.
PATIENCE_S = 300
COLUMNS = ["file system", "doctor: file system", "doctor: locks", "WAL", "DELETE", "close-proof", "tests"]


class NotHere(Exception):
    """Why this machine does not have it."""


class Failure(Exception):
    """What is wrong."""


def call(*command, **options):
    """Runs a command that makes something. Its failure means that it cannot be had here."""
    command = [str(part) for part in command]
    if not shutil.which(command[0]):
        raise NotHere(f"{command[0]} is not installed")
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, **options}
    done = subprocess.run(command, check=False, timeout=PATIENCE_S, **options)
    if done.returncode != 0:
        lines = (done.stdout or "").strip().splitlines() or [f"exit status {done.returncode}"]
        raise NotHere(f"{command[0]}: {lines[0]}")


class Place:
    """A folder for one row: images, layers and the mount point. Everything in it is unmounted at the end."""

    def __init__(self, folder, stack):
        self.folder = folder
        self.stack = stack

    def dir(self, name):
        path = self.folder / name
        path.mkdir(exist_ok=True)
        path.chmod(0o755)
        return path

    def image(self, name="image"):
        path = self.folder / name
        with path.open("wb") as file:
            file.truncate(IMAGE_BYTES)
        return path

    def mount(self, *arguments, name="mnt"):
        """mount(8) at a new folder."""
        point = self.dir(name)
        call("mount", *arguments, point)
        self.unmount_later(point)
        return point

    def fuse(self, *command, **options):
        """A FUSE program that takes the mount point as its last argument, and goes to the background."""
        point = self.dir("mnt")
        point.chmod(0o777)
        call(*command, point, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **options)
        self.unmount_later(point)
        if not os.path.ismount(point):
            raise NotHere(f"{command[0]} has mounted nothing")
        return point

    def unmount_later(self, point):
        unmount = ["umount", str(point)]
        lazily = ["umount", "-l", str(point)]
        self.stack.callback(lambda: subprocess.run(unmount, check=False).returncode and subprocess.run(lazily, check=False))


def loop(kind, *mkfs):
    def make(place):
        image = place.image()
        call(*mkfs, image)
        return place.mount("-t", kind, "-o", "loop", image)

    return make


def overlay(*options):
    def make(place):
        lower, upper, work = (place.dir(name) for name in ["lower", "upper", "work"])
        layers = f"lowerdir={lower},upperdir={upper},workdir={work}"
        return place.mount("-t", "overlay", "-o", ",".join([layers, *options]), "overlay")

    return make


def overlay_on_two(place):
    """As in a container whose writable layer is a tmpfs: the inode numbers of two file systems under one device."""
    upper_and_work = place.mount("-t", "tmpfs", "tmpfs", name="tmpfs")
    upper, work = upper_and_work / "upper", upper_and_work / "work"
    upper.mkdir(), work.mkdir()
    layers = f"lowerdir={place.dir('lower')},upperdir={upper},workdir={work}"
    return place.mount("-t", "overlay", "-o", layers, "overlay")


def fuse_overlayfs(place):
    lower, upper, work = (place.dir(name) for name in ["lower", "upper", "work"])
    return place.fuse("fuse-overlayfs", "-o", f"allow_other,lowerdir={lower},upperdir={upper},workdir={work}")


def sshfs(place):
    """To this machine, without sshd: the SFTP server as ssh would start it."""
    if not os.path.exists(SFTP_SERVER):
        raise NotHere(f"{SFTP_SERVER} is not installed")
    ssh = place.folder / "ssh"
    ssh.write_text(f"#!/bin/sh\nexec {SFTP_SERVER}\n")
    ssh.chmod(0o755)
    return place.fuse("sshfs", "-o", f"allow_other,ssh_command={ssh}", f"here:{place.dir('far')}")


def ntfs(place):
    image = place.image()
    call("mkntfs", "-F", "-Q", "-q", image)
    return place.fuse("ntfs-3g", "-o", "allow_other", image)


def fuse2fs(place):
    image = place.image()
    call("mkfs.ext4", "-q", image)
    return place.fuse("fuse2fs", "-o", "fakeroot,allow_other", image)


def gocryptfs(place):
    secret = place.folder / "password"
    secret.write_text("kanban\n")
    call("gocryptfs", "-init", "-q", "-scryptn", "10", "-passfile", secret, place.dir("cipher"))
    return place.fuse("gocryptfs", "-q", "-allow_other", "-passfile", secret, place.dir("cipher"))


def image_of(folder, place, *mkfs):
    """A read-only image with a database in each journal mode. `mkfs`: {image} and {folder} are put in."""
    for journal in ["wal", "delete"]:
        with contextlib.closing(sqlite3.connect(folder / f"{journal}.db")) as db:
            db.execute(f"PRAGMA journal_mode = {journal}")
            db.execute("CREATE TABLE task (title TEXT)")
    image = place.folder / "image"
    call(*(str(part).format(image=image, folder=folder) for part in mkfs))
    return image


def squashfs(place):
    image = image_of(place.dir("content"), place, "mksquashfs", "{folder}", "{image}", "-quiet", "-no-progress")
    return place.mount("-t", "squashfs", "-o", "loop", image)


def erofs(place):
    image = image_of(place.dir("content"), place, "mkfs.erofs", "{image}", "{folder}")
    return place.mount("-t", "erofs", "-o", "loop", image)


class Row:
    def __init__(self, name, make, mounts=True, is_read_only=False):
        self.name = name
        self.make = make
        self.mounts = mounts
        self.is_read_only = is_read_only


def shared_memory(place):
    if not os.path.isdir("/dev/shm"):
        raise NotHere("no /dev/shm")
    folder = tempfile.mkdtemp(prefix="kanbanlock-", dir="/dev/shm")
    os.chmod(folder, 0o755)
    place.stack.callback(shutil.rmtree, folder, ignore_errors=True)
    return pathlib.Path(folder)


def bindfs(*options):
    return lambda place: place.fuse("bindfs", *options, place.dir("under"))


ROWS = [
    Row("this disk", lambda place: place.dir("disk"), mounts=False),
    Row("tmpfs", shared_memory, mounts=False),
    Row("ext4", loop("ext4", "mkfs.ext4", "-q")),
    Row("xfs", loop("xfs", "mkfs.xfs", "-q", "-f")),
    Row("btrfs", loop("btrfs", "mkfs.btrfs", "-q", "-f")),
    Row("overlay", overlay()),
    Row("overlay, layers on two file systems", overlay_on_two),
    Row("squashfs", squashfs, is_read_only=True),
    Row("erofs", erofs, is_read_only=True),
    Row("bindfs", bindfs()),
    Row("bindfs --enable-lock-forwarding", bindfs("--multithreaded", "--enable-lock-forwarding")),
    Row("mergerfs", lambda place: place.fuse("mergerfs", "-o", "allow_other", f"{place.dir('one')}:{place.dir('two')}")),
    Row("fuse-overlayfs", fuse_overlayfs),
    Row("fuse2fs (ext4)", fuse2fs),
    Row("ntfs-3g", ntfs),
    Row("gocryptfs", gocryptfs),
    Row("sshfs", sshfs),
]


class Programs:
    """What is run, built by cargo."""

    def __init__(self):
        self.kanbanlock = self.build("kanbanlock", "build", "--features", "cli", "--bin", "kanbanlock")
        self.board = self.build("kanban_board", "build", "--release", "--example", "kanban_board")
        tests = [option for suite in SUITES for option in ("--test", suite)]
        self.suites = {suite: self.build(suite, "test", "--no-run", *tests) for suite in SUITES}

    @staticmethod
    def build(name, *command):
        cargo = ["cargo", command[0], "--locked", "--message-format=json", *command[1:]]
        done = subprocess.run(cargo, check=True, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        messages = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        made = [one["executable"] for one in messages if one.get("executable") and one["target"]["name"] == name]
        return made[-1]


def run(command, **options):
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
    return subprocess.run([str(part) for part in command], check=False, timeout=PATIENCE_S, **options)


def doctor(programs, db):
    """The verdict on the file system, that on the locks, and whether these can be relied on."""
    done = run([programs.kanbanlock, "doctor", "--json", db])
    if done.returncode not in (0, 1):
        raise Failure(f"doctor: {done.stderr}")
    findings = json.loads(done.stdout)

    def said(check):
        found = [one for one in findings if one["check"] == check]
        if not found:
            raise Failure(f"doctor did not check: {check}")
        return found

    system = said("file system")[0]
    kind = f"{system['verdict']}: {system['what'].split(':')[0]}"
    locks = said("locks")
    wrong = [one["what"].split(":")[0] for one in locks if one["verdict"] != "ok"]
    verdicts = {one["verdict"] for one in locks}
    probe = verdicts.pop() if len(verdicts) == 1 else "mixed"
    if probe == "ok":
        return kind, "ok", True
    return kind, f"{probe}: {', '.join(wrong)}", False


def board(programs, folder, journal, seconds):
    """The main job's verdict, and whether the locks were close-proof."""
    folder = folder / f"board-{journal}"
    folder.mkdir()
    command = [programs.board, "--seconds", seconds, "--chaos", "--journal", journal, "--db", folder / "board.db"]
    done = run(command)
    close_proof = re.search(r'"close_proof":(true|false)', done.stdout)
    is_close_proof = {"true": "yes", "false": "no"}[close_proof[1]] if close_proof else "?"
    if done.returncode not in (0, 1) or not close_proof:
        return f"cannot be run: {(done.stderr or done.stdout).strip().splitlines()[-1]}", is_close_proof
    if done.returncode == 1:
        print(done.stdout)
        return "**commits lost**", is_close_proof
    return "every commit found", is_close_proof


def suites(programs, folder, outputs):
    """Which of the tests fail there; and what they print, to `outputs`."""
    failed = []
    for suite, program in programs.suites.items():
        folder_of_suite = folder / f"tmp-{suite}"
        folder_of_suite.mkdir()
        # Those named stock… are about SQLite without kanbanlock, in a race that a slow file system may not have.
        done = run([program, "--skip", "stock"], env={**os.environ, "TMPDIR": str(folder_of_suite)}, cwd=ROOT)
        names = re.findall(r"^test (\S+) \.\.\. FAILED", done.stdout, re.MULTILINE)
        if names:
            outputs.append(f"{done.stdout}{done.stderr}")
        failed += [f"`{suite}::{name}`" for name in names]
        if done.returncode != 0 and not names:
            raise Failure(f"{suite}: {done.stdout}{done.stderr}")
    return "all pass" if not failed else "all but " + ", ".join(failed)


def read_only(programs, folder, place):
    """Can they be read through kanbanlock?"""
    answers = []
    for journal in ["wal", "delete"]:
        db = folder / f"{journal}.db"
        done = run([programs.kanbanlock, "backup", db, place.folder / f"{journal}-copy.db"])
        kind, locks, _ = doctor(programs, db)
        answer = "can be read" if done.returncode == 0 else "cannot be opened"
        answers.append(f"{answer}; doctor: {kind.split(':')[0]}")
    return [kind, locks, *answers, "–", "–"]


def measure(programs, row, seconds, outputs):
    with contextlib.ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="kanbanlock-fs-", dir=ROOT / "target"))
        os.chmod(scratch, 0o755)  # some tests have processes of another user
        place = Place(pathlib.Path(scratch), stack)
        folder = row.make(place)
        if row.is_read_only:
            return read_only(programs, folder, place)
        probe = folder / "probe.db"
        with contextlib.closing(sqlite3.connect(probe)) as db:
            db.execute("CREATE TABLE task (title TEXT)")
        probe.chmod(stat.S_IRUSR | stat.S_IWUSR)
        kind, locks, are_reliable = doctor(programs, probe)
        if not are_reliable:
            return [kind, locks, "not run", "not run", "–", "not run"]
        wal, close_proof = board(programs, folder, "wal", seconds)
        delete, also = board(programs, folder, "delete", seconds)
        if close_proof != also:
            raise Failure(f"close-proof: {close_proof} in WAL mode, {also} in rollback mode")
        return [kind, locks, wal, delete, close_proof, suites(programs, folder, outputs)]


def table_line(name, cells):
    return f"| {name} | {' | '.join(cells)} |"


def documented():
    """The lines of the table, by name."""
    text = DOCS.read_text()
    lines = text[text.index(BEGIN) : text.index(END)].splitlines()
    return {line.split(" | ")[0].removeprefix("| "): line for line in lines if line.startswith("| ")}


def is_as_documented(line, expected):
    """Fewer tests may fail: some do where FUSE's caches of attributes last a second."""
    (*cells, tests), (*expected_cells, expected_tests) = line.split(" | "), expected.split(" | ")
    if line.startswith("| this disk |"):
        cells[1:2] = expected_cells[1:2] = []  # yours is another
    failed, may_fail = (set(re.findall("`[^`]*`", cell)) for cell in (tests, expected_tests))
    return cells == expected_cells and failed <= may_fail


def write_docs(lines):
    text = DOCS.read_text()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    head = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    machine = f"Linux {platform.release()}, {platform.machine()}; this disk: ext4; {datetime.date.today()}."
    DOCS.write_text("\n".join([before + BEGIN, "", *head, *lines, "", machine, "", END + after]))


def enter_namespace():
    """A mount namespace of our own, if we may."""
    if os.geteuid() != 0 or os.environ.get(IN_NAMESPACE) or not shutil.which("unshare"):
        return
    own = ["unshare", "--mount", "--propagation", "private", sys.executable, *sys.argv]
    if subprocess.run([*own[:4], "true"], check=False, stderr=subprocess.DEVNULL).returncode == 0:
        os.execvpe(own[0], own, {**os.environ, IN_NAMESPACE: "yes"})


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--docs", action="store_true", help="write docs/FILESYSTEMS.md")
    parser.add_argument("--list", action="store_true", help="print the names of the rows")
    parser.add_argument("--seconds", type=float, default=2, help="of each run of the main job")
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(row.name for row in ROWS))
        return
    unknown = set(arguments.names) - {row.name for row in ROWS}
    if unknown:
        parser.error(f"no such row: {', '.join(sorted(unknown))} (--list)")
    if arguments.docs and arguments.names:
        parser.error("--docs writes the whole table: name no rows")
    enter_namespace()
    may_mount = bool(os.environ.get(IN_NAMESPACE))
    (ROOT / "target").mkdir(exist_ok=True)
    programs = Programs()
    lines, failures, passed = [], [], 0
    for row in ROWS:
        if arguments.names and row.name not in arguments.names:
            continue
        outputs = []  # of tests that fail: shown if they are not expected to
        try:
            if row.mounts and not may_mount:
                raise NotHere("only root can mount")
            line = table_line(row.name, measure(programs, row, arguments.seconds, outputs))
        except NotHere as why:
            print(f"{row.name}: not here: {why}", flush=True)
            continue
        except Failure as failure:
            failures.append(f"{row.name}: {failure}")
            continue
        print(line, flush=True)
        lines.append(line)
        passed += 1
        if not arguments.docs and not is_as_documented(line, documented().get(row.name, "")):
            print(*outputs, sep="\n", flush=True)
            failures.append(f"{row.name}: docs/FILESYSTEMS.md says\n  {documented().get(row.name)}\nfound\n  {line}")
    if arguments.docs:
        write_docs(lines)
    if failures:
        sys.exit("\n".join(failures))
    print(f"{passed} file systems, each as docs/FILESYSTEMS.md says")


if __name__ == "__main__":
    main()
