"""Whatever the OpenAPI document allows, and what it does not, no operation answers with a failure of ours."""

import os
from contextlib import suppress

from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as effort
from hypothesis.errors import Unsatisfiable

from tests.api.conftest import Api, operations

EXAMPLES = int(os.environ.get("SCHEMATHESIS_EXAMPLES", "3"))
"""Requests for each operation and each way of making them: as documented, and not so. docs/security.md says how to make
more."""


def test_no_operation_fails_whatever_it_is_sent(api: Api) -> None:
    # Each test process would import it for this one test, which takes seconds.
    import schemathesis
    from schemathesis import GenerationMode

    headers = {"Authorization": f"Bearer {api.key}"}
    schema = schemathesis.openapi.from_url(f"{api.url}/api/v1/openapi.json", headers=headers)
    answered: dict[str, int] = {}
    for found in schema.get_all_operations():
        operation = found.ok()
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            strategy = operation.as_strategy(generation_mode=mode)

            @effort(
                max_examples=EXAMPLES,
                deadline=None,
                database=None,
                phases=(Phase.generate,),
                suppress_health_check=list(HealthCheck),
            )
            @given(case=strategy)
            def send(case: schemathesis.Case) -> None:
                answer = case.call(base_url=api.url, headers=headers, timeout=30)
                assert answer.status_code < 500 or "/health/" in case.path, (case.method, case.path, answer.text)
                assert answer.status_code != 401
                answered[case.operation.label] = answered.get(case.operation.label, 0) + 1

            # An operation without parameters and body cannot be sent otherwise than documented.
            with suppress(*([Unsatisfiable] if mode is GenerationMode.NEGATIVE else [])):
                send()
    assert len(answered) == len(operations(api))
