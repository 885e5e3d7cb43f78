"""How long a folder of many files takes until it is split and ready, and how much memory that needs.

    python scripts/bench_listing.py [--files 60000 1000000] [--classes 1000] [--where FOLDER]

Draws class folders with empty files in a temporary folder, reads them in a fresh process, and removes them
again. The fresh process's peak memory includes Python and every library that is imported.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

READ = """
import json, resource, sys, time
start = time.perf_counter()
from vit_finetune import load_splits
from vit_finetune.recipe import DataConfig
imported, config = time.perf_counter(), DataConfig(path=sys.argv[1])
imports_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
first = {name: len(split) for name, split in load_splits(config).items()}
print(json.dumps({
    "splits": first,
    "import_seconds": imported - start,
    "seconds": time.perf_counter() - imported,
    "import_mib": imports_kib / 1024,
    "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
}))
"""


def draw(root: Path, files: int, classes: int) -> None:
    """Empty files in class folders, as evenly as they go."""
    for number in range(classes):
        folder = root / f"class_{number:04}"
        folder.mkdir()
        for index in range(files * number // classes, files * (number + 1) // classes):
            os.close(
                os.open(f"{folder}/image_{index:07}.jpg", os.O_CREAT | os.O_WRONLY)
            )  # quicker than a Path


def main() -> None:
    """Draws, reads, prints one line per size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, nargs="+", default=[60_000, 1_000_000])
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--where", type=Path, help="where to draw; the system's temporary folder if left out")
    options = parser.parse_args()
    print(f"{'files':>9}  {'drawn':>7}  {'imports':>16}  {'split and ready':>15}  {'peak memory':>11}")
    for files in options.files:
        with tempfile.TemporaryDirectory(dir=options.where) as name:
            start = time.perf_counter()
            draw(Path(name), files, options.classes)
            drawn = time.perf_counter() - start
            answer = subprocess.run([sys.executable, "-c", READ, name], stdout=subprocess.PIPE, check=True)
            facts = json.loads(answer.stdout)
            if sum(facts["splits"].values()) != files:
                sys.exit(f"{files} files drawn, but the splits hold {facts['splits']}")
            print(
                f"{files:>9,}  {drawn:>5.1f} s  {facts['import_seconds']:>4.1f} s "
                f"{facts['import_mib']:>5.0f} MiB  {facts['seconds']:>13.2f} s  "
                f"{facts['peak_mib']:>7.0f} MiB",
                flush=True,
            )


if __name__ == "__main__":
    main()
