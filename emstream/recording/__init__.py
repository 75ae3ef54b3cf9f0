"""Recordings: what `emstream record` writes, and what a replay reads. This is the layout.

::

    /                        NXroot   emstream_recording = 1, default = entry, part = 1, 2, ...,
                                    recording_id: that of all parts
      entry                  NXentry  default = raw
        raw                  NXdata   signal = frames, axes = [number, ., .]
          frames (N, H, W)   as the camera's pixels, one chunk a frame, bitshuffle and LZ4
          number (N)         the frame's number in its series
          timestamp_ns (N)   when the camera took it [ns since the Unix epoch], -1 where it does not say
          arrived_ns (N)     when the recorder got it
          header             every header as it came, msgpack, one behind the other
          header_end (N)     where in `header` that of frame i ends
          complete           rows that are whole; what lies beyond was cut off in mid-write
        denoised             the same, float32 [expected electrons per pixel], and
          raw_row (N)        the row in `raw` of the very frame, -1 where that was lost
        engine               NXprocess: name, sha256, device (E), from denoised row first_row (E) on
        gaps                 ranges (G, 3): first and last number missing, and the raw row before which;
                             -1 in a row whose frames came late after all
        marks                the starts and ends of series: message, message_end, before_row (M)
        ledger               the service's counters as of the last frame
        recorder             what was recorded and lost, and how it ended: empty while it grows

All of it is there before the first frame, nothing is of variable length and nothing ever
shrinks: that is what HDF5's SWMR mode asks of a file that is read while it grows. `complete`
is written after all that it vouches for, so that a reader never sees half a frame, and a
recorder that is killed leaves a file that ends with its last commit.

``h5py.File(path, "r", swmr=True)`` opens a recording that grows, one whose recorder was
killed, and a finished one; without ``swmr=True`` h5py refuses the first two.
"""

from __future__ import annotations

from emstream.recording.layout import VERSION
from emstream.recording.reader import Recording, Track, is_recording

__all__ = ["VERSION", "Recording", "Track", "is_recording"]
