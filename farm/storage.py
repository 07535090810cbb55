"""Objects in S3: one code path for SeaweedFS, MinIO and AWS.

Every upload names its sha256 and the server checks it; keys are written once, so repeating an upload is harmless.
boto3's own errors never leave this module: a missing object is NotFound, everything else Unavailable.
"""

import hashlib
import os
from base64 import b64encode
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache, cached_property
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import quote

import boto3
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from urllib3.exceptions import HTTPError

from farm.errors import NotFound, Unavailable
from farm.settings import Settings

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

CONNECT_SECONDS = 3
READ_SECONDS = 30
ATTEMPTS = 4
"""Tries of one request, with botocore's jittered pauses between them."""
DOWNLOAD_ATTEMPTS = 5
"""Connections one download may use; each goes on where the last one broke."""
CONNECTIONS = 32
"""Connections kept open: no less than the threads of one process that talk to S3."""
CHUNK_BYTES = 1024 * 1024
PART_BYTES = 64 * 1024 * 1024
"""Files over this size go up in parts, which is what lets them pass S3's 5 GiB for one PUT."""
DELETED_AT_ONCE = 1000
"""S3's own limit for one DeleteObjects."""
MISSING = frozenset({"404", "NoSuchKey", "NotFound"})
_MAKING = Lock()


class Store:
    """The farm's bucket. Threads share it; clients are made on first use: the first of a process takes 0.1 s."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.bucket = settings.s3_bucket

    def put(self, key: str, data: bytes | Path, content_type: str, sha256: str) -> None:
        """Upload `data` whose sha256 is `sha256` (hex). Raises Unavailable, also when the bytes do not match."""
        with _translated(key):
            if isinstance(data, Path) and data.stat().st_size > PART_BYTES:
                self._put_parts(key, data, content_type)
                return
            self._client.put_object(
                Bucket=self.bucket,
                Key=key,
                Body=data if isinstance(data, bytes) else data.read_bytes(),
                ContentType=content_type,
                ChecksumSHA256=_base64(sha256),
            )

    def _put_parts(self, key: str, path: Path, content_type: str) -> None:
        self._client.upload_file(
            str(path),
            self.bucket,
            key,
            ExtraArgs={"ContentType": content_type, "ChecksumAlgorithm": "SHA256"},
            Config=TransferConfig(multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES, max_concurrency=4),
        )

    def get(self, key: str) -> bytes:
        """The whole object. Raises NotFound, Unavailable."""
        with _translated(key):
            return self._client.get_object(Bucket=self.bucket, Key=key)["Body"].read()

    def download(self, key: str, path: Path) -> str:
        """Stream the object into `path` (created or overwritten) and answer its sha256 (hex), computed on the way.

        A connection that breaks halfway is resumed at the same byte of the same object. Raises NotFound, Unavailable.
        """
        digest = hashlib.sha256()
        with path.open("wb") as file, _translated(key):
            etag, whole = "", -1
            for attempt in range(1, DOWNLOAD_ATTEMPTS + 1):
                try:
                    same = {"Range": f"bytes={file.tell()}-", "IfMatch": etag} if etag else {}
                    answer = self._client.get_object(Bucket=self.bucket, Key=key, **cast("Any", same))
                    if not etag:
                        etag, whole = answer["ETag"], answer["ContentLength"]
                    for chunk in answer["Body"].iter_chunks(CHUNK_BYTES):
                        file.write(chunk)
                        digest.update(chunk)
                except (BotoCoreError, HTTPError, ConnectionError):
                    if attempt == DOWNLOAD_ATTEMPTS:
                        raise
                if file.tell() == whole:
                    return digest.hexdigest()
        raise Unavailable(f"S3: {key} broke off {DOWNLOAD_ATTEMPTS} times")

    def exists(self, key: str) -> bool:
        try:
            with _translated(key):
                self._client.head_object(Bucket=self.bucket, Key=key)
        except NotFound:
            return False
        return True

    def delete_many(self, keys: Iterable[str]) -> None:
        """Delete objects; those already gone count as deleted. Raises Unavailable if any of them is still there."""
        every = list(keys)
        for start in range(0, len(every), DELETED_AT_ONCE):
            some = every[start : start + DELETED_AT_ONCE]
            with _translated(some[0]):
                answer = self._client.delete_objects(
                    Bucket=self.bucket, Delete={"Objects": [{"Key": key} for key in some], "Quiet": True}
                )
            failed = [error for error in answer.get("Errors", []) if error.get("Code") not in MISSING]
            if failed:
                first = failed[0]
                raise Unavailable(f"S3: {len(failed)} objects not deleted, first {first.get('Key')}: {first}")

    def keys_below(self, prefix: str) -> list[str]:
        """The keys that begin with a prefix. For prefixes of one attempt, which hold two objects at most."""
        with _translated(prefix):
            answer = self._client.list_objects_v2(Bucket=self.bucket, Prefix=prefix)
        return [found["Key"] for found in answer.get("Contents", [])]

    def listing(self, prefix: str, most: int) -> dict[str, int]:
        """Keys that begin with a prefix -> bytes; `most` at most, one more than that if there are more."""
        found: dict[str, int] = {}
        with _translated(prefix):
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix)
            for page in pages:
                for one in page.get("Contents", []):
                    found[one["Key"]] = one["Size"]
                    if len(found) > most:
                        return found
        return found

    def presign(self, key: str, filename: str, seconds: float | timedelta) -> str:
        """A URL that anyone may GET for `seconds`, saved under `filename`; it names the public endpoint."""
        lasting = seconds.total_seconds() if isinstance(seconds, timedelta) else seconds
        return self._public_client.generate_presigned_url(
            "get_object",
            Params={
                "Bucket": self.bucket,
                "Key": key,
                "ResponseContentDisposition": f"inline; filename*=UTF-8''{quote(filename, safe='')}",
            },
            ExpiresIn=int(lasting),
        )

    def ensure_bucket(self) -> None:
        """Create the bucket unless it is there; two processes may do so at once."""
        with _translated(self.bucket):
            try:
                self._client.head_bucket(Bucket=self.bucket)
            except ClientError as error:
                if _code(error) not in MISSING:
                    raise
                self._create_bucket()

    def _create_bucket(self) -> None:
        region = self._settings.s3_region
        # AWS refuses its default region as a constraint and wants every other one named.
        where: Any = {} if region == "us-east-1" else {"CreateBucketConfiguration": {"LocationConstraint": region}}
        try:
            self._client.create_bucket(Bucket=self.bucket, **where)
        except ClientError as error:
            if _code(error) not in {"BucketAlreadyOwnedByYou", "BucketAlreadyExists"}:
                raise

    def check(self) -> None:
        """Raises NotFound if there is no bucket, Unavailable if S3 does not answer or refuses us."""
        with _translated(self.bucket):
            self._client.head_bucket(Bucket=self.bucket)

    @cached_property
    def _client(self) -> "S3Client":
        return _make_client(self._settings, self._settings.s3_endpoint_url)

    @cached_property
    def _public_client(self) -> "S3Client":
        public = self._settings.s3_public_endpoint_url
        return _make_client(self._settings, public) if public else self._client


@cache
def _session() -> boto3.session.Session:
    """What S3 is, read once a process: for every client anew that takes ten times as long as the client."""
    return boto3.session.Session()


def _make_client(settings: Settings, endpoint: str | None) -> "S3Client":
    secret = settings.s3_secret_access_key
    # Clients may be used by several threads; making them may not.
    with _MAKING:
        client = _session().client(
            "s3",
            endpoint_url=endpoint,
            aws_access_key_id=settings.s3_access_key_id,
            aws_secret_access_key=secret.get_secret_value() if secret else None,
            region_name=settings.s3_region,
            config=Config(
                signature_version="s3v4",
                connect_timeout=CONNECT_SECONDS,
                read_timeout=READ_SECONDS,
                retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
                max_pool_connections=max(CONNECTIONS, (os.cpu_count() or 1) * 2),
                tcp_keepalive=True,
                # A server at an address of its own serves buckets as paths; AWS wants them as host names.
                s3={"addressing_style": "path" if endpoint else "virtual"},
                # We name the sha256 of every upload ourselves: no second checksum of botocore's choosing.
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            ),
        )
    # Asking "may I send?" first is a round trip per picture, and the answer is always yes.
    client.meta.events.register_last("before-call.s3.PutObject", _expect_nothing)
    return client


def _expect_nothing(params: dict[str, Any], **_: Any) -> None:
    params["headers"].pop("Expect", None)


def _base64(sha256: str) -> str:
    return b64encode(bytes.fromhex(sha256)).decode()


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


@contextmanager
def _translated(what: str) -> Iterator[None]:
    """boto3's errors as the farm's own."""
    try:
        yield
    except ClientError as error:
        if _code(error) in MISSING:
            raise NotFound(f"S3 has no {what}") from error
        raise Unavailable(f"S3, {what}: {error}") from error
    except (BotoCoreError, HTTPError, boto3.exceptions.Boto3Error, ConnectionError) as error:
        raise Unavailable(f"S3, {what}: {error}") from error
