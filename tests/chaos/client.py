"""A careful client: sends every submission under an Idempotency-Key until it is answered, and remembers what was."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from threading import Lock
from typing import Any
from uuid import uuid4

import httpx

from tests.chaos.history import History
from tests.chaos.invariants import Violation
from tests.chaos.secrets import named_in

PATIENCE_SECONDS = 180.0
AGAIN_SECONDS = 0.1


@dataclass(frozen=True)
class Submission:
    """One accepted batch, and how long the answer took from the first try, in seconds."""

    id: str
    jobs: int
    seconds: float
    tries: int


class Client:
    """Speaks to the API. Threads may share it. Seeds count up through the whole run, so that each names one job."""

    def __init__(self, url: str, key: str, history: History, hidden: Mapping[str, str]) -> None:
        """`hidden`: secrets by name, which no answer may hold."""
        self.http = httpx.Client(base_url=f"{url}/api/v1", headers={"Authorization": f"Bearer {key}"}, timeout=30)
        self.http.event_hooks["response"] = [self._look]
        self.submissions: list[Submission] = []
        self.leaks: list[Violation] = []
        self._hidden = hidden
        self._history = history
        self._lock = Lock()
        self._seed = 0

    @property
    def accepted(self) -> int:
        """Jobs that a 2xx was received for."""
        return sum(one.jobs for one in self.submissions)

    def submit(self, prompts: int | list[str], *, seeds_from: int | None = None, **defaults: Any) -> Submission:
        """Submit a batch and try until it is accepted. Fails after three minutes, and at any refusal."""
        texts = [f"a crack {n}" for n in range(prompts)] if isinstance(prompts, int) else prompts
        with self._lock:
            first, self._seed = self._seed, self._seed + len(texts)
        first = first if seeds_from is None else seeds_from
        rows = [{"prompt": text, "seed": first + n} for n, text in enumerate(texts)]
        size = {"width": 64, "height": 64} | defaults
        key = str(uuid4())
        self._history.write("submit", key=key, first_seed=first, jobs=len(rows))
        began = time.monotonic()
        answer, tries = self._insist("/batches", key, {"jobs": rows, "defaults": size})
        made = Submission(answer["id"], answer["total"], time.monotonic() - began, tries)
        assert made.jobs == len(rows), answer
        with self._lock:
            self.submissions.append(made)
        self._history.write("accepted", key=key, batch=made.id, jobs=made.jobs, tries=tries)
        return made

    def tell(self, batch: str, verb: str) -> int:
        """cancel, pause, resume or retry a batch, once; answers the HTTP status, 0 where there was no answer."""
        try:
            status = self.http.post(f"/batches/{batch}/{verb}").status_code
        except httpx.HTTPError:
            status = 0
        self._history.write(verb, batch=batch, status=status)
        return status

    def _look(self, answer: httpx.Response) -> None:
        said = answer.read() + str(answer.headers.raw).encode()
        self.leaks += [Violation("secret", f"{name} stands in an answer") for name in named_in(said, self._hidden)]

    def _insist(self, path: str, key: str, body: dict[str, Any]) -> tuple[dict[str, Any], int]:
        deadline, tries = time.monotonic() + PATIENCE_SECONDS, 0
        while True:
            tries += 1
            what = "no answer"
            try:
                answer = self.http.post(path, json=body, headers={"Idempotency-Key": key})
                what = f"{answer.status_code} {answer.text[:300]}"
                # 409: the first try is still under way; 429 and 5xx: later.
                if answer.is_success:
                    return answer.json(), tries
                assert answer.status_code in (409, 429) or answer.status_code >= 500, what
            except httpx.HTTPError as error:
                what = repr(error)
            assert time.monotonic() < deadline, f"nobody accepted a submission for {PATIENCE_SECONDS:.0f} s: {what}"
            time.sleep(AGAIN_SECONDS)


def spread(total: int, pieces: int) -> Iterable[int]:
    """`total` in nearly equal parts."""
    whole, rest = divmod(total, pieces)
    return [whole + (n < rest) for n in range(pieces)]
