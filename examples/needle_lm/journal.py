"""When the run began, and what it says."""

from __future__ import annotations

import time
from pathlib import Path

START = time.monotonic()  # at the import of this module: the budget counts what is imported after it


class Log:
    """Prints lines with the elapsed seconds and keeps them in a file."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("a", encoding="utf-8")

    def __call__(self, text: str) -> None:
        line = f"[{time.monotonic() - START:6.1f}s] {text}"
        print(line, flush=True)
        self.file.write(line + "\n")
        self.file.flush()
