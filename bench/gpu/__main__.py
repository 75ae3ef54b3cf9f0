from __future__ import annotations

import sys

from bench.gpu.schedule import main

if __name__ == "__main__":
    sys.exit(main())
