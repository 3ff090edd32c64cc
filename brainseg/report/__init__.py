"""Report: the Parquet of one or more runs becomes one self-contained HTML page. The archive is not needed any more.

`facts.py` reads, `columns.py` picks, `cohort.py` counts, `charts.py` draws, `gallery.py` shows scans, `page.py` puts it
together; `texts.py` says the same numbers as JSON, CSV and Markdown. `view.py` makes the page of one scan.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from brainseg import storage
from brainseg.aggregate import Rule
from brainseg.report.cohort import gather, summarise, summary
from brainseg.report.page import render
from brainseg.report.texts import as_text

__all__ = ["Format", "ReportSummary", "build_report", "summary"]

Format = Literal["html", "json", "csv", "md"]


@dataclass(frozen=True)
class ReportSummary:
    """What was written, and the figures a terminal shows: `dice` is the mean per region over the split `headline`."""

    uri: str
    size_bytes: int
    counts: Mapping[str, int]
    headline: str | None
    dice: Mapping[str, float | None]


def build_report(
    run_uris: Sequence[str],
    out: str,
    *,
    rule: Rule = "exclude",
    where: str | None = None,
    compare: str | None = None,
    reference: str | None = None,
    format_: Format = "html",
) -> ReportSummary:
    """Write the report on some runs to `out`; reads what runs hold, no archive.

    `where`: a condition that picks scans (`where.py`); `compare`: a run to compare with pair by pair; `reference`: a run from
    which drift is seen. Raises UsageError where a place is no run folder or the condition names what is not there.
    """
    cohort, other, base = gather(run_uris, where, compare, reference)
    figures = summarise(cohort, other, base, rule=rule)
    text = render(cohort, figures, other, base) if format_ == "html" else as_text(figures, format_)
    page = text.encode("utf-8")
    target = storage.absolute(out)
    storage.write_bytes(target, page)
    lead = next((group for group in figures["groups"] if group["split"] == figures["headline"]), None)
    dice = {region["region"]: region["dice"]["mean"] for region in lead["regions"]} if lead else {}
    return ReportSummary(target, len(page), figures["counts"], figures["headline"], dice)
