"""Segment an archive as a spec says: `python jobs/segment.py jobs/segment-lgg.yaml`, here or by `ray job submit`."""

import sys

from brainseg import commands
from brainseg.config import How, build
from brainseg.console import Voice
from brainseg.errors import ExitCode
from brainseg.specs import SegmentSpec, run


def segment(spec: SegmentSpec) -> ExitCode:
    """Segment every scan into the run folder; SOME_FAILED where the quarantine is not empty."""
    limit = None if spec.max_failures is None else str(spec.max_failures)
    kept = spec.model_dump(include={"actors", "scan_seconds", "dry_run"})
    how = build(How, {"max_failures": limit, "mode": spec.plan, **kept}, "spec")
    counts = commands.segment(spec.source, spec.model, spec.out, Voice(), how, spec.set)
    return ExitCode.SOME_FAILED if counts.get("failed") else ExitCode.OK


if __name__ == "__main__":
    sys.exit(run(SegmentSpec, segment, sys.argv[1:]))
