"""Adopting kanbanlock in a pool of Python worker processes.

What changes, at the top of the module that every process imports:

```diff
+import kanbanlock
+
+kanbanlock.register(default=True)
+
```

The rest stays as it is: 24 processes, one kanban.db in WAL mode, opened by plain path; each makes the tables when it
connects, and writes in `write_txn()`. From now on each transaction and the DDL hold the flock on kanban.db.lock too.

What to know:

- At import, not under `if __name__ == "__main__"`: a forked worker has it from its parent, a spawned one imports this
  module again.
- Connect in the worker, not before the fork: a parent's connection is refused in the child.
- `timeout` is what waits for the flock. sqlite3's own default is 5 seconds; 24 workers may need more.
- Leave `BEGIN IMMEDIATE` as it is. A transaction that began as a reader cannot wait for its turn.
- A flock of your own around `write_txn()` has to go: one process would wait for itself.
- Without the package, in a Python whose sqlite3 has load_extension (the library is what
  `cargo build --release -p kanbanlock-extension` makes):

  ```python
  boot = sqlite3.connect(":memory:")
  boot.enable_load_extension(True)
  boot.execute("SELECT load_extension(?, 'sqlite3_kanbanlockdefault_init')", ["/path/to/libkanbanlock.so"])
  ```

Run: `examples/apps/run.py python_workers`, which runs it with this change and without. By itself, after
`pip install ./python`, in an empty folder: `python app.py`, and `python app.py audit`.
"""

import contextlib
import multiprocessing
import sqlite3
import sys

import kanbanlock

kanbanlock.register(default=True)

WORKERS = 24
TASKS = 600


def connect():
    """What every process does first, and all at about the same time."""
    db = sqlite3.connect("kanban.db", timeout=60, isolation_level=None)
    db.execute("PRAGMA journal_mode = WAL")
    with write_txn(db):
        db.execute("CREATE TABLE IF NOT EXISTS task (number INTEGER PRIMARY KEY, title TEXT NOT NULL)")
        if "done_by" not in [column for _, column, *_ in db.execute("PRAGMA table_info(task)")]:
            db.execute("ALTER TABLE task ADD COLUMN done_by INTEGER")
    return db


@contextlib.contextmanager
def write_txn(db):
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def work(worker):
    """Does tasks until there are none left, and notes each one that it has been told is committed."""
    with contextlib.closing(connect()) as db, open(f"acknowledged-{worker}.txt", "w", buffering=1) as acknowledged:
        while True:
            with write_txn(db):
                task = db.execute("SELECT number FROM task WHERE done_by IS NULL ORDER BY number LIMIT 1").fetchone()
                if task:
                    db.execute("UPDATE task SET done_by = ? WHERE number = ?", (worker, *task))
            if not task:
                return
            print(*task, file=acknowledged)


def audit():
    """Every acknowledged commit is in the database, and no task was given to two workers."""
    promised = []
    for worker in range(WORKERS):
        with open(f"acknowledged-{worker}.txt") as acknowledged:
            promised += [(int(line), worker) for line in acknowledged]
    with contextlib.closing(sqlite3.connect("kanban.db")) as db:
        found = db.execute("SELECT number, done_by FROM task WHERE done_by IS NOT NULL").fetchall()
        (integrity,) = db.execute("PRAGMA integrity_check").fetchone()
    if integrity != "ok":
        sys.exit(f"integrity_check: {integrity}")
    if sorted(promised) != sorted(found):
        sys.exit(f"acknowledged, but not in the database: {sorted(set(promised) - set(found))}")
    print(f"audit: {len(promised)} commits acknowledged, and all found")


def main():
    with contextlib.closing(connect()) as db, write_txn(db):
        db.executemany("INSERT INTO task (title) VALUES (?)", [(f"task {n}",) for n in range(1, TASKS + 1)])
    workers = [multiprocessing.Process(target=work, args=(number,)) for number in range(WORKERS)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if any(worker.exitcode != 0 for worker in workers):
        sys.exit("a worker failed")
    print(f"{WORKERS} workers have done {TASKS} tasks")
    audit()


if __name__ == "__main__":
    audit() if sys.argv[1:] == ["audit"] else main()
