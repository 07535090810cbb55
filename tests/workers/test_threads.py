"""Two threads of one worker: while one renders, the other stages and stores; and each knows what the other holds."""

from threading import Event, Thread
from typing import Any

import pytest

from farm.storage import Store
from tests.farm.conftest import Queue
from tests.stub_worker import WarmState
from tests.workers.ordered import Ordered
from workers.executor import Executor


def test_two_threads_overlap_storing_with_denoising_and_a_third_is_sent_away(
    executor: Executor, farm: Queue, store: Store, renderer: Ordered, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = farm.submit(8)
    rendering, release = Event(), Event()
    real = store.put
    seen = []

    def slow(*args: Any) -> None:
        # The first micro-batch is on its way to S3: that must not keep the second from the device.
        seen.append(rendering.wait(10))
        release.set()
        real(*args)

    def second() -> None:
        if farm.counts(batch).get("running") == 8:
            rendering.set()

    monkeypatch.setattr(store, "put", slow)
    renderer.before_step = second
    threads = [Thread(target=executor.work) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert release.wait(10)
    executor.work()
    for thread in threads:
        thread.join(20)
    assert all(seen)
    assert farm.counts(batch) == {"succeeded": 8}


def test_what_one_thread_holds_is_warm_for_the_next_claim(
    executor: Executor, farm: Queue, store: Store, renderer: Ordered, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that knows its pace leaves a cold lane to those who run its jobs; here that is the worker itself."""
    farm.submit(8)
    monkeypatch.setattr(renderer, "warm_state", lambda: WarmState({}, frozenset()))
    executor._pace.render.took(0.01)
    real, claimed, first = store.put, [], iter([True])

    def put(*args: Any) -> None:
        if next(first, False):
            claimed.append(executor._claim())
        real(*args)

    monkeypatch.setattr(store, "put", put)
    assert executor.work_once()
    assert [len(one.jobs) for one in claimed] == [4]


def test_the_next_micro_batch_is_staged_while_the_device_renders(
    executor: Executor, farm: Queue, renderer: Ordered
) -> None:
    """Fetching, verifying and parsing wait for nobody; only what changes the device waits for it."""
    batch = farm.submit(8)
    executor._pace.ahead.took(1.0)
    staged: list[int] = []
    second = Event()
    steps: list[bool] = []

    def staging() -> None:
        staged.append(len(steps))
        if len(staged) == 2:
            second.set()

    def before_step() -> None:
        # The first micro-batch stops before its last step until the second is staged.
        steps.append(len(steps) < 3 or second.wait(10))

    renderer.staging, renderer.before_step = staging, before_step
    threads = [Thread(target=executor.work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert farm.counts(batch) == {"succeeded": 8}
    assert all(steps)
    assert staged[0] == 0
    assert 1 <= staged[1] <= 3, "before the first micro-batch had taken its fourth and last step"
