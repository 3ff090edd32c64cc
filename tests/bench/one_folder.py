"""An archive in one folder: what it takes to list it and to write its manifest, by how many files lie there.

    python tests/bench/one_folder.py FOLDER 1000 10000 100000

Files are slices of 32x32 pixels in the Figshare layout, each different. Each figure comes from a process of its own: CPU
microseconds a file, and its peak memory in MB, imports included. Linear is what stays as it is from column to column.
"""

import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np

from brainseg import manifest


def png(number: int) -> bytes:
    """A grey image of noise that no other number gives."""
    pixels = np.random.default_rng(number).integers(0, 256, (32, 32), np.uint8)
    rows = np.pad(pixels, ((0, 0), (1, 0))).tobytes()  # before each row its filter: none
    head = struct.pack(">IIBBBBB", 32, 32, 8, 0, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(rows, 1)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


def make(folder: Path, files: int) -> Path:
    """So many images and nothing else in a folder; those that are there already are kept."""
    place = folder / f"of-{files}"
    place.mkdir(parents=True, exist_ok=True)
    for number in range(len(list(place.iterdir())) + 1, files + 1):
        (place / f"{number}.png").write_bytes(png(number))
    return place


def commands(place: Path) -> dict[str, list[str]]:
    """What each step is, as a command."""
    index = ["-m", "brainseg.cli", "index", str(place), "--out", f"{place}.parquet"]
    return {
        "list": ["-c", f"from brainseg import storage; assert sum(1 for _ in storage.list_files({str(place)!r})) > 0"],
        "index --no-hash": [*index, "--no-hash"],
        "index": index,
    }


def measured(words: list[str]) -> tuple[float, float]:
    """CPU seconds of a process and its peak memory in MB."""
    started = subprocess.Popen([sys.executable, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, code, used = os.wait4(started.pid, 0)
    if code:
        raise SystemExit(f"{' '.join(words)} ended with {os.waitstatus_to_exitcode(code)}")
    return used.ru_utime + used.ru_stime, used.ru_maxrss / 1000


def main() -> None:
    sizes = [int(size) for size in sys.argv[2:]]
    places = {size: make(Path(sys.argv[1]), size) for size in sizes}
    print(f"{'CPU us a file, peak MB':24}" + "".join(f"{size:>16,}" for size in sizes))
    for step in ("list", "index --no-hash", "index"):
        line = f"{step:24}"
        for size, place in places.items():
            seconds, peak = measured(commands(place)[step])
            line += f"{seconds / size * 1e6:>10.0f}, {peak:.0f}"
        print(line, flush=True)
    for size, place in places.items():
        rows = manifest.read_manifest(f"{place}.parquet").num_rows
        print(f"{size:,} files: {rows:,} rows in the manifest")


if __name__ == "__main__":
    main()
