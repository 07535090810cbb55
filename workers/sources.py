"""The pictures that jobs draw from: fetched from S3, verified, decoded, and kept while there is room."""

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Any
from uuid import UUID

import numpy as np

from farm import imagefile
from farm.errors import IntegrityFailed, NotFound
from farm.jobs import ClaimedJob
from farm.objects import upload_key
from farm.settings import Settings
from farm.storage import Store
from workers.pictures import Pixels

KEPT_BYTES = 256 * 1024 * 1024
"""Decoded pictures kept: what a sweep over seeds or adapters starts from is the same again and again."""
THREADS = 8


class Sources:
    """Decoded uploads by project and hash. Any thread may ask."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store = store
        # Whatever was once taken is still read where the limit was lowered since.
        self._most_pixels = max(settings.max_image_pixels, 2**26)
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="sources")
        self._lock = Lock()
        self._kept: dict[tuple[UUID, str], Pixels] = {}
        self._bytes = 0

    def fetch(self, some: Sequence[ClaimedJob]) -> Mapping[str, Pixels]:
        """The pictures that these jobs name, by hash: uint8, height x width x 3, as they are seen.

        Raises NotFound for one that is gone, Unavailable when S3 is away, IntegrityFailed when it holds other bytes
        than were sent.
        """
        wanted = {(job.project_id, hash_) for job in some for hash_ in job.recipe.pictures}
        if not wanted:
            return {}
        asked = sorted(wanted, key=lambda one: one[1])
        return dict(zip([hash_ for _, hash_ in asked], self._threads.map(self._one, asked), strict=True))

    def _one(self, which: tuple[UUID, str]) -> Pixels:
        with self._lock:
            found = self._kept.pop(which, None)
            if found is not None:
                self._kept[which] = found
                return found
        project, hash_ = which
        try:
            data = self._store.get(upload_key(project, hash_))
        except NotFound as error:
            raise NotFound(f"the picture {hash_} that this job draws from is gone") from error
        if hashlib.sha256(data).hexdigest() != hash_:
            raise IntegrityFailed(f"upload {hash_}: S3 holds other bytes than were sent")
        with imagefile.read(data, self._most_pixels) as image:
            pixels: Pixels = np.asarray(image.convert("RGB"))
        self._keep(which, pixels)
        return pixels

    def _keep(self, which: tuple[UUID, str], pixels: Any) -> None:
        with self._lock:
            self._bytes += pixels.nbytes - (self._kept[which].nbytes if which in self._kept else 0)
            self._kept[which] = pixels
            while self._bytes > KEPT_BYTES and len(self._kept) > 1:
                oldest = next(iter(self._kept))
                self._bytes -= self._kept.pop(oldest).nbytes
