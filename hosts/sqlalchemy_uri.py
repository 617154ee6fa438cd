"""SQLAlchemy, opened by URI."""

import sqlite3

import sqlalchemy

from line_protocol import DATABASE, KANBANLOCK, python_is_busy, serve

if KANBANLOCK:
    # kanbanlock: load
    boot = sqlite3.connect(":memory:")
    boot.enable_load_extension(True)
    boot.load_extension(KANBANLOCK)
    # kanbanlock: open
    url = f"sqlite:///file:{DATABASE}?vfs=kanbanlock&uri=true"
    # kanbanlock: end
else:
    url = f"sqlite:///{DATABASE}"
engine = sqlalchemy.create_engine(url, connect_args={"timeout": 0, "isolation_level": None})


@sqlalchemy.event.listens_for(engine, "begin")
def begin_immediate(connection):
    """SQLAlchemy's own recipe for SQLite: docs.sqlalchemy.org, "Enabling Non-Legacy SQLite Transactional Modes"."""
    connection.exec_driver_sql("BEGIN IMMEDIATE")


connection = engine.connect()


def begin():
    connection.begin()


def execute(sql, text):
    was_in_transaction = connection.in_transaction()
    result = connection.exec_driver_sql(sql, () if text is None else (text,))
    value = result.scalar() if result.returns_rows else None
    if not was_in_transaction:
        connection.commit()
    return value


serve(sqlite3.sqlite_version, execute, python_is_busy, begin, connection.commit)
