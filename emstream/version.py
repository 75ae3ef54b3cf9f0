"""Which emstream this is."""

from importlib.metadata import PackageNotFoundError, version

try:
    VERSION = version("emstream")
except PackageNotFoundError:  # run from a source tree that was never installed
    VERSION = "0+unknown"
