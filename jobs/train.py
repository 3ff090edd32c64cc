"""Train a model as a spec says: `python jobs/train.py jobs/train-lgg.yaml`, here or by `ray job submit`."""

import sys

from brainseg.job import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
