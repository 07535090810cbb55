"""Every setting is documented, with its real default; nothing else is."""

import re
from datetime import timedelta
from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError

from farm.settings import Settings

ROOT = Path(__file__).parents[2]
ROWS = dict(re.findall(r"^\| `FARM_(\w+)` \| (.+?) \|", (ROOT / "docs/settings.md").read_text(), re.MULTILINE))
UNITS = {"MiB": 1024**2, "GiB": 1024**3}


def test_every_setting_is_documented_and_nothing_else() -> None:
    assert {name.upper() for name in Settings.model_fields} == set(ROWS)


@pytest.mark.parametrize("name", sorted(Settings.model_fields))
def test_the_documented_default_is_the_default(name: str) -> None:
    field = Settings.model_fields[name]
    written = ROWS[name.upper()].strip("`")
    if field.is_required():
        assert written == "required"
    elif field.default is None:
        assert written == "unset"
    elif isinstance(field.default, timedelta):
        assert float(written) == field.default.total_seconds()
    elif written.endswith(tuple(UNITS)):
        number, unit = written.split()
        assert int(number) * UNITS[unit] == field.default
    else:
        assert written == str(field.default)


def secure(**changed: str | SecretStr) -> Settings:
    given = {"database_url": "postgresql://farm:4f1c9be2@db/farm", "redis_url": "redis://:77ab90c1@redis/0"}
    return Settings.model_validate({**given, **changed})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("database_url", "postgresql://farm:postgres@db/farm"),
        ("redis_url", "redis://:changeme@redis/0"),
        ("flower_password", "Password"),
    ],
)
def test_a_placeholder_secret_is_refused_outside_development(name: str, value: str) -> None:
    with pytest.raises(ValidationError, match="placeholder"):
        secure(**{name: value})
    assert secure(**{name: value}, environment="development").environment == "development"


def test_settings_are_frozen_and_hide_their_secrets() -> None:
    settings = secure()
    with pytest.raises(ValidationError, match="frozen"):
        settings.pool = "other"  # type: ignore[misc]
    assert "4f1c9be2" not in repr(settings)
