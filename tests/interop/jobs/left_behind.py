"""all_reduce.py, whose hanging rank has started other processes by then.

Usage, below torchrun: left_behind.py HANGING_RANK WHERE
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path

HANGS = os.environ["RANK"] == sys.argv[1] and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"

if __name__ == "__main__":
    if HANGS:
        subprocess.Popen(["sleep", "600"])
        # A shell and its child; one in a session of its own; one whose parent has ended.
        subprocess.Popen(["sh", "-c", "sleep 601; true"])
        subprocess.Popen(["sleep", "602"], start_new_session=True)
        subprocess.run(["sh", "-c", "sleep 603 &"], check=True)
        # As a DataLoader's worker.
        context = multiprocessing.get_context("fork")
        context.Process(target=time.sleep, args=(604,), daemon=True).start()
    runpy.run_path(str(Path(__file__).with_name("all_reduce.py")), run_name="__main__")
