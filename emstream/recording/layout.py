"""Names that writer and reader of a recording share."""

from __future__ import annotations

VERSION = 1
MARK = "emstream_recording"
"""The attribute of the root that tells a recording, and its version, from any other file."""
SUFFIXES = (".h5", ".hdf5", ".nxs")
TRACKS = ("raw", "denoised")
COUNTERS = ("received", "published", "dropped", "rejected", "failed", "in_flight", "missing")
UNKNOWN = -1
WRITE_ERROR = "write error"
"""How a recording ended that could not be written to its end."""
