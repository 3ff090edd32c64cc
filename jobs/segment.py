"""Segment an archive as a spec says: `python jobs/segment.py jobs/segment-lgg.yaml`, here or by `ray job submit`."""

import sys

from brainseg.job import main

if __name__ == "__main__":
    sys.exit(main(["segment", *sys.argv[1:]]))
