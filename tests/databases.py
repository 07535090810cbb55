"""Databases for tests: cloned from a migrated template, then emptied for the next test, which is cheaper."""

import uuid
from typing import LiteralString

import psycopg
from psycopg import sql
from sqlalchemy import make_url

from farm.settings import Settings

ROUNDS = 5
"""Times a database is taken from those who still speak to it before it is dropped."""
SECONDS = 10

# What a test may have changed besides rows. Statistics count too: they decide how the next test's queries are run.
_SHAPE = """
    SELECT (SELECT count(*) FROM pg_class), (SELECT count(reloptions) FROM pg_class),
        (SELECT count(*) FROM pg_attribute), (SELECT count(*) FROM pg_proc), (SELECT count(*) FROM pg_constraint),
        (SELECT count(*) FROM pg_trigger WHERE tgenabled = 'O'),
        (SELECT count(*) FROM pg_statistic s JOIN pg_class c ON c.oid = s.starelid
            WHERE c.relnamespace = 'public'::regnamespace),
        (SELECT count(*) FROM pg_db_role_setting s JOIN pg_database d ON d.oid = s.setdatabase
            WHERE d.datname = current_database())
"""
_WRITTEN = """
    SELECT relname FROM pg_class
    WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace AND pg_relation_size(oid) > 0
"""
_OTHERS = "SELECT pg_terminate_backend(pid, %s) FROM pg_stat_activity WHERE datname = %s"


class Databases:
    """The databases of one server: `take` one that is migrated and empty, and `give_back` whatever is left of it."""

    def __init__(self, server: Settings, template: str) -> None:
        self._server = server
        self._template = template
        self._spare: list[str] = []
        with self._connect(template) as connection:
            self._shape = connection.execute(_SHAPE).fetchone()
            self._seeds = {name: _rows(connection, name) for name in _written(connection)}

    def take(self) -> str:
        """The name of a database nobody had before, with what the migrations put there and nothing else."""
        if self._spare:
            return self._spare.pop()
        name = _fresh()
        self._administer("CREATE DATABASE {} TEMPLATE {} STRATEGY FILE_COPY", name, self._template)
        return name

    def give_back(self, name: str) -> None:
        """Empty it under a new name, which whoever still holds the old one does not know, or drop it: when somebody
        does not let go, or a test changed more than rows."""
        emptied = _fresh()
        if not self._taken_away(name, emptied):
            self._administer("DROP DATABASE {} WITH (FORCE)", name)
        elif self._empty(emptied):
            self._spare.append(emptied)
        else:
            self._administer("DROP DATABASE {} WITH (FORCE)", emptied)

    def _taken_away(self, name: str, emptied: str) -> bool:
        for _ in range(ROUNDS):
            with self._connect("postgres") as connection:
                connection.execute(_OTHERS, [SECONDS * 1000, name])
            try:
                self._administer("ALTER DATABASE {} RENAME TO {}", name, emptied)
            except psycopg.errors.ObjectInUse:
                continue
            return True
        return False

    def _empty(self, name: str) -> bool:
        with self._connect(name) as connection:
            if connection.execute(_SHAPE).fetchone() != self._shape:
                return False
            spoilt = [table for table in _written(connection) if table not in self._seeds]
            if spoilt:
                tables = sql.SQL(", ").join(map(sql.Identifier, spoilt))
                connection.execute(sql.SQL("TRUNCATE {} RESTART IDENTITY CASCADE").format(tables))
            for table, rows in self._seeds.items():
                if _rows(connection, table) != rows:
                    connection.execute(sql.SQL("TRUNCATE {}").format(sql.Identifier(table)))
                    with connection.cursor().copy(sql.SQL("COPY {} FROM STDIN").format(sql.Identifier(table))) as copy:
                        copy.write(rows)
        return True

    def _administer(self, statement: LiteralString, *names: str) -> None:
        with self._connect("postgres") as connection:
            connection.execute(sql.SQL(statement).format(*map(sql.Identifier, names)))

    def _connect(self, name: str) -> psycopg.Connection:
        url = make_url(self._server.database_url.get_secret_value()).set(database=name, drivername="postgresql")
        return psycopg.connect(url.render_as_string(hide_password=False), autocommit=True)


def _fresh() -> str:
    return f"test_{uuid.uuid4().hex}"


def _written(connection: psycopg.Connection) -> list[str]:
    return [name for (name,) in connection.execute(_WRITTEN)]


def _rows(connection: psycopg.Connection, table: str) -> bytes:
    with connection.cursor().copy(sql.SQL("COPY {} TO STDOUT").format(sql.Identifier(table))) as copy:
        return b"".join(bytes(part) for part in copy)
