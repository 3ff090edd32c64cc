"""Make a cohort's report as a spec says: `python jobs/report.py jobs/report-lgg.yaml`, here or by `ray job submit`."""

import sys

from brainseg import commands
from brainseg.console import Voice
from brainseg.errors import ExitCode
from brainseg.specs import ReportSpec, run


def report(spec: ReportSpec) -> ExitCode:
    """Write the page; it needs the runs alone, neither archive nor model nor GPU."""
    commands.report(spec.runs, spec.out, Voice(), rule=spec.rule)
    return ExitCode.OK


if __name__ == "__main__":
    sys.exit(run(ReportSpec, report, sys.argv[1:]))
