"""Make a cohort's report as a spec says: `python jobs/report.py jobs/report-lgg.yaml`, here or by `ray job submit`."""

import sys

from brainseg.job import main

if __name__ == "__main__":
    sys.exit(main(["report", *sys.argv[1:]]))
