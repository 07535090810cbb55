"""A renderer that misbehaves to order, for tests with the executor in their own process."""

from collections.abc import Callable
from typing import Any

from farm import jobs
from tests.farm.conftest import Queue
from tests.stub_worker import StubRenderer


class Ordered(StubRenderer):
    """Does what a test orders before each step."""

    def __init__(self) -> None:
        super().__init__()
        self.step_seconds = 0.0
        self.before_step: Callable[[], None] = lambda: None
        self.staging: Callable[[], None] = lambda: None

    def _misbehave(self, recipes: Any) -> None:
        self.before_step()

    def stage(self, recipes: Any, pictures: Any) -> str:
        self.staging()
        return super().stage(recipes, pictures)


def raising(error: Exception) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


def items(farm: Queue, batch: Any) -> list[Any]:
    return farm.do(jobs.list_jobs, farm.project, batch=batch.id).items
