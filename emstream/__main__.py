"""``python -m emstream``, and the ``emstream`` command."""

from __future__ import annotations

import signal


def main() -> None:
    """Run the commands."""
    # Until they are imported, Ctrl-C would leave nothing but a traceback.
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    # Not above: processes that this one starts import this module, too.
    from emstream.cli import main as run

    signal.signal(signal.SIGINT, before)
    run()


if __name__ == "__main__":
    main()
