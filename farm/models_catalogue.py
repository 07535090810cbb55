"""The tables of the catalogue: models, what they consist of, and those on their way. `farm.models` has all tables."""

import uuid
from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, CheckConstraint, ForeignKey, Index, SmallInteger, text
from sqlalchemy.orm import Mapped, mapped_column

from farm.schema import EMPTY_ARRAY, EMPTY_OBJECT, NOW, Base


class Model(Base):
    """A checkpoint or an adapter at a content hash, under the name jobs use: those of its project, or all where it has
    none."""

    __tablename__ = "models"
    name: Mapped[str] = mapped_column(primary_key=True)
    hash: Mapped[str] = mapped_column(index=True)
    kind: Mapped[str]
    family: Mapped[str]
    state: Mapped[str]
    reason: Mapped[str | None]
    bytes: Mapped[int] = mapped_column(BigInteger)
    profile: Mapped[dict[str, Any]] = mapped_column(server_default=EMPTY_OBJECT)
    source: Mapped[dict[str, Any]] = mapped_column(server_default=EMPTY_OBJECT)
    created_at: Mapped[datetime] = mapped_column(server_default=NOW)
    project_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("projects.id"))
    __table_args__ = (
        CheckConstraint("kind IN ('checkpoint', 'vae', 'controlnet', 'motion', 'acceleration', 'style')", name="kind"),
        CheckConstraint("state IN ('pending', 'available', 'refused')", name="state"),
    )


class CatalogueStamp(Base):
    """One row, written by a trigger with every change of `models`: whoever read this stamp has read these models."""

    __tablename__ = "catalogue_stamp"
    single: Mapped[bool] = mapped_column(primary_key=True, server_default=text("true"))
    stamp: Mapped[uuid.UUID]
    __table_args__ = (CheckConstraint("single", name="single"),)


class Registration(Base):
    """A model on its way into the farm: what was asked for, how far it is, and who works on it.

    Finished if and only if available or refused. `attempt` is the fence: it rises at every claim. `lease_until` is the
    claim's end while `worker_id` is set, else the earliest next try. `fresh` are the contents that were not in the
    store before this registration brought them: they go when it is refused.
    """

    __tablename__ = "registrations"
    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    name: Mapped[str]
    kind: Mapped[str]
    source: Mapped[str]
    wanted: Mapped[dict[str, Any]] = mapped_column(server_default=EMPTY_OBJECT)
    pool: Mapped[str]
    state: Mapped[str]
    reason: Mapped[str | None]
    notes: Mapped[list[str]] = mapped_column(server_default=EMPTY_ARRAY)
    raw: Mapped[str | None]
    fresh: Mapped[list[str]] = mapped_column(server_default=EMPTY_ARRAY)
    hash: Mapped[str | None]
    family: Mapped[str | None]
    bytes: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    total_bytes: Mapped[int | None] = mapped_column(BigInteger)
    attempt: Mapped[int] = mapped_column(server_default=text("0"))
    failures: Mapped[int] = mapped_column(SmallInteger, server_default=text("0"))
    crashes: Mapped[int] = mapped_column(SmallInteger, server_default=text("0"))
    worker_id: Mapped[uuid.UUID | None]
    lease_until: Mapped[datetime | None]
    created_at: Mapped[datetime] = mapped_column(server_default=NOW)
    finished_at: Mapped[datetime | None]
    project_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("projects.id"))
    __table_args__ = (
        CheckConstraint("kind IN ('checkpoint', 'vae', 'controlnet', 'motion', 'acceleration', 'style')", name="kind"),
        CheckConstraint(
            "state IN ('waiting', 'fetching', 'checking', 'storing', 'testing', 'available', 'refused')", name="state"
        ),
        CheckConstraint(
            "(finished_at IS NOT NULL) = (state IN ('available', 'refused'))", name="finished_iff_terminal"
        ),
        Index("ix_registrations_open", "pool", "id", postgresql_where=text("finished_at IS NULL")),
        Index("uq_registrations_open_name", "name", unique=True, postgresql_where=text("finished_at IS NULL")),
        {"postgresql_with": {"fillfactor": "50"}},
    )


class ModelFile(Base):
    """One file of a model's content. Kept as long as any recipe may name the hash; names come and go."""

    __tablename__ = "model_files"
    hash: Mapped[str] = mapped_column(primary_key=True)
    path: Mapped[str] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column(index=True)
    sha256: Mapped[str]
    bytes: Mapped[int] = mapped_column(BigInteger)
