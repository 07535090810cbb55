"""What every table starts from: names of constraints, types of columns, words that many statements share."""

import uuid
from datetime import datetime
from typing import Any, ClassVar

from sqlalchemy import ARRAY, DateTime, LargeBinary, MetaData, Text, Uuid, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.dialects.postgresql.base import ischema_names
from sqlalchemy.orm import DeclarativeBase
from sqlalchemy.types import UserDefinedType

NOW = text("clock_timestamp()")
EMPTY_OBJECT = text("'{}'::jsonb")
EMPTY_ARRAY = text("'{}'::text[]")
QUEUED = text("state = 'queued'")
RUNNING = text("state = 'running'")
BY_PRIORITY = text("priority DESC")
READY = text("head_run_at IS NOT NULL AND NOT paused AND NOT cancelling")


class Xid8(UserDefinedType[str]):
    """A 64-bit transaction id: tells which changes every reader can already see, in an order without gaps."""

    cache_ok = True

    def get_col_spec(self, **_: Any) -> str:
        return "xid8"


# Reading a schema back (migrations against models) needs to know the type too.
ischema_names["xid8"] = Xid8


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map: ClassVar[dict[Any, Any]] = {
        datetime: DateTime(timezone=True),
        uuid.UUID: Uuid(),
        str: Text(),
        dict[str, Any]: JSONB(),
        list[str]: ARRAY(Text()),
        bytes: LargeBinary(),
    }
