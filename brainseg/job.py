"""Job: what runs on the cluster for a spec: `python -m brainseg.job segment spec.yaml`. The scripts of jobs/ do the same.

Each function is a command of the command line with the spec's keys for its words.
"""

import sys
from collections.abc import Callable, Mapping, Sequence

from brainseg import commands
from brainseg.config import How, build
from brainseg.console import Voice
from brainseg.errors import ExitCode
from brainseg.specs import KINDS, ReportSpec, SegmentSpec, TrainSpec, run


def train(spec: TrainSpec) -> ExitCode:
    """Build the recipe, train, and say what the model or models score on the patients kept back."""
    recipe = commands.recipe(
        spec.manifest,
        preset=spec.preset,
        config=spec.config,
        assignments=spec.set,
        fold=spec.fold,
        accept_leakage=spec.accept_leakage,
        pretrained=spec.pretrained,
        accept_noncommercial=spec.accept_noncommercial,
    )
    folds, price = commands.picked_folds(spec.cv, spec.folds, spec.fold), commands.priced(spec.price_per_hour, spec.currency)
    if spec.cv:
        commands.cross_validate(
            spec.manifest, spec.out, recipe, Voice(), folds=folds, workers=spec.workers, log_to=spec.log_to, price=price
        )
    else:
        commands.train(spec.manifest, spec.out, recipe, Voice(), workers=spec.workers, log_to=spec.log_to, price=price)
    return ExitCode.OK


def segment(spec: SegmentSpec) -> ExitCode:
    """Segment every scan into the run folder; SOME_FAILED where the quarantine is not empty."""
    limit = None if spec.max_failures is None else str(spec.max_failures)
    kept = spec.model_dump(include=HOW)
    how = build(How, {"max_failures": limit, "mode": spec.plan, **kept}, "spec")
    counts = commands.segment(spec.source, spec.model, spec.out, Voice(), how, spec.set, spec.precision)
    return ExitCode.SOME_FAILED if counts.get("failed") else ExitCode.OK


def report(spec: ReportSpec) -> ExitCode:
    """Write the page; it needs the runs alone, neither archive nor model nor GPU."""
    kept = spec.model_dump(include={"rule", "where", "compare", "reference"})
    commands.report(spec.runs, spec.out, Voice(), **kept, format_=spec.format)
    return ExitCode.OK


HOW = {
    "actors",
    "decode_tasks",
    "scans_per_part",
    "scan_seconds",
    "price_per_hour",
    "currency",
    "dry_run",
    "accept_noncommercial",
}
"""Words of a spec that say how a run goes about it, as `How` has them."""
DOES: Mapping[str, Callable[..., ExitCode]] = {"train": train, "segment": segment, "report": report}


def main(words: Sequence[str]) -> int:
    """Run the named kind of job on a spec; returns the exit code."""
    if not words or words[0] not in DOES:
        sys.stderr.write(f"brainseg: expected a kind of job, {', '.join(DOES)}, and the path of a spec (YAML)\n")
        return int(ExitCode.USAGE)
    return run(KINDS[words[0]], DOES[words[0]], words[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
