"""From pictures to stored images: encode, thumbnail, upload, several at once. One that fails fails no other."""

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from threading import Event

import structlog

from farm.errors import FarmError, NotFound, PermanentError, Unavailable
from farm.jobs import ClaimedJob, Difference, Result, StoredImage
from farm.logs import about
from farm.objects import image_key
from farm.settings import Settings
from farm.states import Outcome
from farm.storage import Store
from workers.formats import decode, encode
from workers.lease import Held
from workers.leaving import Leaving
from workers.pictures import Pixels, difference, encode_thumbnail, metadata

MOST_THREADS = 16
SHARE_OF_LIMIT = 0.8
"""How much of the storing limit is spent on trying again while S3 is away; then the job is retried from the start."""
FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 10.0

Answer = Pixels | Exception | None
"""What rendering one job came to: its picture, the error to blame, or nothing where it was dropped."""

log = structlog.get_logger(__name__)


class Storing:
    """Encodes and uploads. Threads, because encoding releases the GIL and uploading mostly waits."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store = store
        self._settings = settings
        self._patience = settings.limit_store.total_seconds() * SHARE_OF_LIMIT
        # Few cores: more threads only take time slices from the denoising. Many: enough to hide S3's latency.
        threads = min(MOST_THREADS, max(2, os.cpu_count() or 1))
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="store")

    def store(
        self,
        held: Held,
        answers: Sequence[Answer],
        unrendered: Callable[[Held, ClaimedJob, Exception | None], Result],
        leaving: Leaving,
    ) -> list[Result]:
        """One result per job, in order; what jobs without a picture come to is asked of `unrendered`. Never raises."""

        def begin(job: ClaimedJob, answer: Answer) -> Callable[[], Result]:
            if answer is None or isinstance(answer, Exception):
                return lambda: unrendered(held, job, answer)
            return self._threads.submit(copy_context().run, self._one, held, job, answer, leaving).result

        begun = [begin(job, answer) for job, answer in zip(held.jobs, answers, strict=True)]
        return [result() for result in begun]

    def _one(self, held: Held, job: ClaimedJob, pixels: Pixels, leaving: Leaving) -> Result:
        with about(job=job.id, attempt=job.attempt):
            return self._put(held, job, pixels, leaving)

    def _put(self, held: Held, job: ClaimedJob, pixels: Pixels, leaving: Leaving) -> Result:
        try:
            image, body, thumbnail = self._encode(job, pixels)
            pause = FIRST_PAUSE_SECONDS
            while True:
                try:
                    apart = self._compared(job, pixels, body)
                    self._store.put(image.key, body, job.recipe.kind.media_type, image.sha256)
                    if thumbnail is not None:
                        digest = hashlib.sha256(thumbnail).hexdigest()
                        self._store.put(image.thumbnail_key, thumbnail, "image/webp", digest)
                    return Result(job.id, job.attempt, Outcome.SUCCEEDED, image, difference=apart)
                except Unavailable as error:
                    log.warning("upload failed", error=error.message)
                    if held.lost or pause >= leaving.seconds_left:
                        return Result(job.id, job.attempt, Outcome.GIVEN_BACK)
                    if held.seconds + pause > self._patience:
                        raise
                Event().wait(pause)
                pause = min(pause * 2, LONGEST_PAUSE_SECONDS)
        except FarmError as error:
            outcome = Outcome.FAILED if isinstance(error, PermanentError) else Outcome.RETRY
            return Result(job.id, job.attempt, outcome, error_code=error.code, error_message=error.message)
        except Exception as error:
            log.exception("picture not stored")
            return Result(job.id, job.attempt, Outcome.RETRY, error_code="store", error_message=repr(error)[:2000])

    def _compared(self, job: ClaimedJob, pixels: Pixels, body: bytes) -> Difference | None:
        """How far a replay is from the original picture, which S3 has as long as its job is there."""
        if job.original is None:
            return None
        try:
            before = self._store.get(job.original)
        except NotFound as error:
            raise NotFound("the picture to compare with is gone: its job was deleted") from error
        # Of a format that loses pixels the two files are compared: they are all there is of the original.
        shown = pixels if job.recipe.lossless else decode(body, job.recipe)
        return difference(shown, decode(before, job.recipe))

    def _encode(self, job: ClaimedJob, pixels: Pixels) -> tuple[StoredImage, bytes, bytes | None]:
        """The picture's row, its file, and its thumbnail unless it is small enough to be its own."""
        recipe = job.recipe
        texts = metadata(recipe, names=job.names, labels=job.labels) if job.metadata else {}
        body = encode(pixels, recipe, texts=texts, png_level=self._settings.png_compress_level)
        still = pixels[0] if recipe.fps else pixels
        height, width, _ = still.shape
        sha256 = hashlib.sha256(body).hexdigest()
        key = small_key = image_key(job.project_id, job.id, job.attempt, sha256, recipe.kind.suffix)
        thumbnail = None
        if recipe.fps or max(width, height) > self._settings.thumbnail_pixels:
            thumbnail = encode_thumbnail(still, longer_side=self._settings.thumbnail_pixels)
            # Each object's key ends in its own hash; the API reads a thumbnail's from there.
            digest = hashlib.sha256(thumbnail).hexdigest()
            small_key = image_key(job.project_id, job.id, job.attempt, digest, "webp")
        image = StoredImage(
            key=key,
            thumbnail_key=small_key,
            sha256=sha256,
            bytes=len(body),
            width=width,
            height=height,
            thumbnail_bytes=len(body if thumbnail is None else thumbnail),
        )
        return image, body, thumbnail
