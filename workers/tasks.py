"""The one Celery task: somebody rang, so look for work."""

from celery import Celery

from farm import doorbell
from workers.executor import Executor


def register(app: Celery, executor: Executor) -> None:
    """Give the app its task. Events of its own would say nothing; `workers.feed` tells of micro-batches instead."""

    @app.task(name=doorbell.TASK, ignore_result=True, send_events=False)
    def render(*_pool: object, **_more: object) -> None:
        executor.work()
