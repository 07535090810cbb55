"""How objects in S3 are called. A leaf: verbs name objects without reaching for the store."""

from uuid import UUID


def image_key(project_id: UUID, job_id: UUID, attempt: int, sha256: str, ext: str) -> str:
    """Where one attempt's picture lies.

    The two-hex spread comes from the random end of the job's id, so that a project's uploads fall on 256 prefixes.

    >>> image_key(UUID(int=1), UUID(int=0xAB), 2, "e3b0", "png")
    '00000000-0000-0000-0000-000000000001/ab/00000000-0000-0000-0000-0000000000ab/2-e3b0.png'
    """
    return f"{project_id}/{job_id.hex[-2:]}/{job_id}/{attempt}-{sha256}.{ext}"


def attempt_prefix(project_id: UUID, job_id: UUID, attempt: int) -> str:
    """What the keys of one attempt begin with; ends in `-`, as no key of an object does."""
    return image_key(project_id, job_id, attempt, "", "").removesuffix(".")


def upload_key(project_id: UUID, sha256: str) -> str:
    """Where a picture lies that a project sent.

    >>> upload_key(UUID(int=1), "e3b0")
    '00000000-0000-0000-0000-000000000001/uploads/e3/e3b0'
    """
    return f"{project_id}/uploads/{sha256[:2]}/{sha256}"
