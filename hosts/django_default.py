"""Django: the lines go to the top of settings.py, and DATABASES stays as it is."""

import sqlite3

import django
from django.conf import settings

from line_protocol import DATABASE, KANBANLOCK, python_is_busy, serve

if KANBANLOCK:
    # kanbanlock: load
    boot = sqlite3.connect(":memory:")
    boot.enable_load_extension(True)
    boot.execute("SELECT load_extension(?, 'sqlite3_kanbanlockdefault_init')", [KANBANLOCK])
    # kanbanlock: end

settings.configure(
    DATABASES={
        "default": {
            "ENGINE": "django.db.backends.sqlite3",
            "NAME": DATABASE,
            "OPTIONS": {"timeout": 0, "transaction_mode": "IMMEDIATE"},
        }
    }
)
django.setup()

from django.db import connection, transaction

atomic = transaction.atomic()


def execute(sql, text):
    with connection.cursor() as cursor:
        cursor.execute(sql.replace("?", "%s"), None if text is None else [text])
        row = cursor.fetchone()
    return row and row[0]


def commit():
    atomic.__exit__(None, None, None)


serve(sqlite3.sqlite_version, execute, python_is_busy, atomic.__enter__, commit)
