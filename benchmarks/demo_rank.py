"""One rank of those that others started: trains the plans of a folder, one after the other.

    python -m benchmarks.demo_rank FOLDER STEPS

Every plan FOLDER/N.toml leaves its run in FOLDER/N.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from pipermoe.specs.documents import load
from pipermoe.specs.plan import Plan
from pipermoe.training.launch import launch
from pipermoe.training.run import Run


def main(folder: str, steps: str) -> None:
    first_port = int(os.environ["MASTER_PORT"])
    for path in sorted(Path(folder).glob("*.toml"), key=lambda path: int(path.stem)):
        # Ranks that have ended a run keep nothing open to those that begin the next one.
        os.environ["MASTER_PORT"] = str(first_port + int(path.stem))
        launch(load(path, Plan), Run(path.with_suffix(""), steps=int(steps), quiet=True))


if __name__ == "__main__":
    main(*sys.argv[1:])
