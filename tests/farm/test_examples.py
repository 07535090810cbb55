"""Examples in docstrings of the core do what they say."""

import doctest
from types import ModuleType

import pytest

from farm import backoff, jsontext, objects, recipe


@pytest.mark.parametrize("module", [backoff, jsontext, objects, recipe], ids=lambda module: module.__name__)
def test_examples_in_docstrings(module: ModuleType) -> None:
    found = doctest.testmod(module)
    assert found.attempted
    assert not found.failed
