"""Adopting kanbanlock in a Django project.

What changes, at the top of settings.py, which every process of the project reads (here all is in one file):

```diff
+import kanbanlock
+
+kanbanlock.register(default=True)
+
```

DATABASES, the models and the migrations stay as they are: manage.py, the web server's workers and the task queue's
all hold the flock on kanban.db.lock when they write.

What to know:

- `"transaction_mode": "IMMEDIATE"` (Django 5.1) makes `atomic()` begin with BEGIN IMMEDIATE. Without it a transaction
  that reads before it writes may get "database is locked" at once, with kanbanlock or without.
- `"timeout"` is what waits for the flock, in seconds; the default is 5.
- A server that loads the project before it forks (gunicorn's preload_app) is fine, if it opens no connection by then.
- A script that opens kanban.db without the project's settings has not registered: it needs the two lines as well.

Run: `examples/apps/run.py django_project`, which runs it with this change and without. By itself, after
`pip install ./python Django`, in an empty folder: `python app.py`, and `python app.py audit`.
"""

import subprocess
import sys

import django
from django.conf import settings

# settings.py
import kanbanlock

kanbanlock.register(default=True)

settings.configure(
    DATABASES={
        "default": {
            "ENGINE": "django.db.backends.sqlite3",
            "NAME": "kanban.db",
            "OPTIONS": {
                "timeout": 60,
                "transaction_mode": "IMMEDIATE",
                "init_command": "PRAGMA journal_mode = WAL",
            },
        }
    },
    DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
)
django.setup()

# models.py
from django.db import connection, models, transaction


class Task(models.Model):
    number = models.IntegerField(unique=True)
    worker = models.TextField()

    class Meta:
        app_label = "board"
        db_table = "task"


# The app
WORKERS = ["ann", "bob"]
TASKS_EACH = 60


def work(worker):
    """Each task has the number after the last, whoever added that; notes each that it has been told is committed."""
    with open(f"acknowledged-{worker}.txt", "w", buffering=1) as acknowledged:
        for _ in range(TASKS_EACH):
            with transaction.atomic():
                last = Task.objects.aggregate(last=models.Max("number"))["last"] or 0
                task = Task.objects.create(number=last + 1, worker=worker)
            print(task.number, file=acknowledged)


def audit():
    """Every acknowledged commit is in the database, and nothing else."""
    promised = {}
    for worker in WORKERS:
        with open(f"acknowledged-{worker}.txt") as acknowledged:
            promised |= {int(line): worker for line in acknowledged}
    found = dict(Task.objects.values_list("number", "worker"))
    if promised != found:
        sys.exit(f"acknowledged, but not in the database: {sorted(promised.items() - found.items())}")
    print(f"audit: {len(promised)} commits acknowledged, and all found")


def main():
    with connection.schema_editor() as migration:
        migration.create_model(Task)
    workers = [subprocess.Popen([sys.executable, __file__, "work", worker]) for worker in WORKERS]
    if any([worker.wait() for worker in workers]):
        sys.exit("a worker failed")
    numbers = list(Task.objects.order_by("number").values_list("number", flat=True))
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
