"""``python -m bench.speed``: the losses on the CPU."""

import os
import sys

from bench.speed.cpu import MALLOC, main

if any(os.environ.get(name) != value for name, value in MALLOC.items()):
    os.execve(sys.executable, [sys.executable, "-m", "bench.speed", *sys.argv[1:]], os.environ | MALLOC)
sys.exit(main())
