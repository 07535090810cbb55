"""The core of the farm: words, rows and verbs. Imports no torch, knows neither the API nor the workers."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("lcm-farm")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+source"
