"""Report: the Parquet of one or more runs becomes one self-contained HTML page. The archive is not needed any more.

`facts.py` reads, `cohort.py` counts, `figures.py` draws, `gallery.py` picks and shows scans, `page.py` puts it together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from brainseg import storage
from brainseg.aggregate import Rule
from brainseg.report.cohort import summarise, summary
from brainseg.report.facts import load
from brainseg.report.page import render

__all__ = ["ReportSummary", "build_report", "summary"]


@dataclass(frozen=True)
class ReportSummary:
    """What was written, and the figures a terminal shows: `dice` is the mean per region over the split `headline`."""

    uri: str
    size_bytes: int
    counts: Mapping[str, int]
    headline: str | None
    dice: Mapping[str, float | None]


def build_report(run_uris: Sequence[str], out: str, *, rule: Rule = "exclude") -> ReportSummary:
    """Write the report on some runs to `out`, one HTML file; reads `run.json` and `scans/*.parquet` only.

    Raises UsageError where a place is no run folder.
    """
    cohort = load(run_uris)
    figures = summarise(cohort, rule=rule)
    page = render(cohort, figures).encode("utf-8")
    target = storage.absolute(out)
    storage.write_bytes(target, page)
    lead = next((group for group in figures["groups"] if group["split"] == figures["headline"]), None)
    dice = {region["region"]: region["dice"]["mean"] for region in lead["regions"]} if lead else {}
    return ReportSummary(target, len(page), figures["counts"], figures["headline"], dice)
