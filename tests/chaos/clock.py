"""A wall clock that is wrong, for one process. Monotonic time stays right, as where a clock was set wrongly."""

import datetime as dt
import sys
import time
from typing import Any

_right = dt.datetime
_time = time.time


def set_wrong(seconds: float) -> None:
    """From now on every module of this process that is loaded reads a wall clock that is `seconds` ahead."""
    by = dt.timedelta(seconds=seconds)

    class Meta(type):
        def __instancecheck__(cls, instance: object) -> bool:
            return isinstance(instance, _right)

    class Wrong(_right, metaclass=Meta):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return _right.now(tz) + by

        @classmethod
        def utcnow(cls) -> Any:
            return _right.now(dt.UTC).replace(tzinfo=None) + by

    def wrong_time() -> float:
        return _time() + seconds

    for module in (module for module in list(sys.modules.values()) if module is not sys.modules[__name__]):
        for name, value in list(vars(module).items()):
            if value is _right:
                setattr(module, name, Wrong)
            elif value is _time:
                setattr(module, name, wrong_time)
