"""Adopting kanbanlock in an app with an SQLAlchemy engine.

What changes, where the engine is made:

```diff
+import functools
 …
+import kanbanlock
+
 …
-connect_args = {"timeout": 60, "isolation_level": None}
-engine = create_engine("sqlite:///kanban.db", connect_args=connect_args)
+open_board = functools.partial(
+    kanbanlock.connect, "kanban.db", timeout=60, isolation_level=None, check_same_thread=False
+)
+engine = create_engine("sqlite:///kanban.db", creator=open_board)
```

The models and the sessions stay as they are.

What to know:

- The URL stays too, although `creator` opens the database: SQLAlchemy chooses the pool by it.
- `check_same_thread=False` is what SQLAlchemy passes by itself for a file: its pool hands connections to any thread.
- BEGIN IMMEDIATE by the event "begin" is SQLAlchemy's own recipe. Without it a session that reads before it writes may
  get "database is locked" at once, with kanbanlock or without.
- An app whose engine is made by somebody else (a URL in Alembic's or a framework's configuration) calls
  `kanbanlock.register(default=True)` before it is, and changes nothing more; or `kanbanlock.register()`, and the URL
  becomes `sqlite:///file:kanban.db?vfs=kanbanlock&uri=true`.
- After a fork: `engine.dispose(close=False)` in the child, as SQLAlchemy says.

Run: `examples/apps/run.py sqlalchemy_engine`, which runs it with this change and without. By itself, after
`pip install ./python SQLAlchemy`, in an empty folder: `python app.py`, and `python app.py audit`.
"""

import functools
import subprocess
import sys

import kanbanlock

from sqlalchemy import create_engine, event, func, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

open_board = functools.partial(
    kanbanlock.connect, "kanban.db", timeout=60, isolation_level=None, check_same_thread=False
)
engine = create_engine("sqlite:///kanban.db", creator=open_board)


@event.listens_for(engine, "begin")
def begin_immediate(connection):
    connection.exec_driver_sql("BEGIN IMMEDIATE")


class Base(DeclarativeBase):
    pass


class Task(Base):
    __tablename__ = "task"
    number: Mapped[int] = mapped_column(primary_key=True)
    worker: Mapped[str]


WORKERS = ["ann", "bob"]
TASKS_EACH = 60


def work(worker):
    """Each task has the number after the last, whoever added that; notes each that it has been told is committed."""
    with open(f"acknowledged-{worker}.txt", "w", buffering=1) as acknowledged:
        for _ in range(TASKS_EACH):
            with Session(engine) as session, session.begin():
                number = session.scalar(select(func.coalesce(func.max(Task.number), 0))) + 1
                session.add(Task(number=number, worker=worker))
            print(number, file=acknowledged)


def audit():
    """Every acknowledged commit is in the database, and nothing else."""
    promised = {}
    for worker in WORKERS:
        with open(f"acknowledged-{worker}.txt") as acknowledged:
            promised |= {int(line): worker for line in acknowledged}
    with Session(engine) as session:
        found = dict(session.execute(select(Task.number, Task.worker)).all())
    if promised != found:
        sys.exit(f"acknowledged, but not in the database: {sorted(promised.items() - found.items())}")
    print(f"audit: {len(promised)} commits acknowledged, and all found")


def main():
    Base.metadata.create_all(engine)
    workers = [subprocess.Popen([sys.executable, __file__, "work", worker]) for worker in WORKERS]
    if any([worker.wait() for worker in workers]):
        sys.exit("a worker failed")
    with Session(engine) as session:
        numbers = list(session.scalars(select(Task.number).order_by(Task.number)))
    if numbers != list(range(1, len(WORKERS) * TASKS_EACH + 1)):
        sys.exit(f"the numbers are not one after the other: {numbers}")
    print(f"{len(WORKERS)} processes have added {TASKS_EACH} tasks each: numbers 1 to {len(numbers)}")
    audit()


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["work", worker]:
            work(worker)
        case ["audit"]:
            audit()
        case _:
            main()
