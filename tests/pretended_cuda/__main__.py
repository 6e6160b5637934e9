"""Run Python on the pretended GPU, such as ``python -m tests.pretended_cuda -m pytest -n 0 tests/test_cuda.py``."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from tests.pretended_cuda import build, environment

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder))
        sys.exit(subprocess.run([sys.executable, *sys.argv[1:]], env=environment(Path(folder))).returncode)
