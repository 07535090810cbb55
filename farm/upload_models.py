"""The tables of uploads: pictures that people sent, and which jobs name them."""

import uuid
from datetime import datetime

from sqlalchemy import BigInteger, ForeignKeyConstraint, Index
from sqlalchemy.orm import Mapped, mapped_column

from farm.schema import NOW, Base


class Upload(Base):
    """A picture that a project sent, by the sha256 of its bytes. `used_at`: when it was last sent or named."""

    __tablename__ = "uploads"
    project_id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    hash: Mapped[str] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column(unique=True)
    media_type: Mapped[str]
    width: Mapped[int]
    height: Mapped[int]
    bytes: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[datetime] = mapped_column(server_default=NOW)
    used_at: Mapped[datetime] = mapped_column(server_default=NOW, index=True)


class JobUpload(Base):
    """A job names an upload. The foreign key is what keeps the upload: nothing deletes it as long as the job is there,
    because a person may retry or replay it."""

    __tablename__ = "job_uploads"
    job_id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    hash: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[uuid.UUID]
    __table_args__ = (
        ForeignKeyConstraint(["project_id", "hash"], ["uploads.project_id", "uploads.hash"]),
        Index("ix_job_uploads_hash", "hash", "project_id"),
    )
