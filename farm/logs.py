"""Structured logs: one line an event, JSON or for a console, with job, attempt, claim and worker bound where known.

Bind what a stretch of code is about with `about(claim=..., worker=...)`; every line inside carries it, those of
libraries too. Values are ids and numbers, never secrets.
"""

import logging
import sys
from contextlib import AbstractContextManager
from typing import Any

import structlog
from structlog.typing import Processor

from farm.settings import Settings

LOUD = ("botocore", "boto3", "urllib3", "s3transfer", "httpx", "httpcore", "PIL", "kombu", "celery", "amqp")
"""Libraries whose debug and info lines hide ours."""


def configure(settings: Settings) -> None:
    """Send every log line of this process, ours and the libraries', to stderr in one format. Call it once, in main."""
    as_json = settings.log_format == "json"
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    shown: list[Processor] = [structlog.stdlib.ProcessorFormatter.remove_processors_meta]
    if as_json:
        shown += [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(default=str)]
    else:
        # Plain tracebacks: the pretty ones print local variables, and some of those are secrets.
        plain = structlog.dev.plain_traceback
        shown.append(structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=plain))
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processors=shown))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    level = getattr(logging, settings.log_level.upper())
    root.setLevel(level)
    for name in LOUD:
        logging.getLogger(name).setLevel(max(level, logging.WARNING))


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """A logger: `log.info("micro-batch claimed", jobs=8)`."""
    logger: structlog.stdlib.BoundLogger = structlog.stdlib.get_logger(name)
    return logger


def about(**ids: Any) -> AbstractContextManager[Any]:
    """Bind ids to every log line inside the `with` block, in this thread."""
    return structlog.contextvars.bound_contextvars(**{key: str(value) for key, value in ids.items()})
