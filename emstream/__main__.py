"""``python -m emstream``, and the ``emstream`` command."""

from __future__ import annotations

from emstream.signals import end_on_signals


def main() -> None:
    """Run the commands."""
    # Not above: processes that this one starts import this module, too.
    with end_on_signals():
        from emstream.cli import main as run
    run()


if __name__ == "__main__":
    main()
