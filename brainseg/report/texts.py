"""Texts: the numbers of a report for programs (JSON, CSV) and for people who paste (Markdown). They are the page's own."""

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

SPREADSHEET_STARTS = ("=", "+", "-", "@", "\t", "\r")
"""A text that starts like this is run as a formula by a spreadsheet; an apostrophe before it stops that."""


def as_text(summary: Mapping[str, Any], format_: Literal["json", "csv", "md"]) -> str:
    """The summary in one of the formats."""
    if format_ == "json":
        return json.dumps(summary, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    return _csv(summary) if format_ == "csv" else _markdown(summary)


# --- CSV ------------------------------------------------------------------------------------------------------------


def _csv(summary: Mapping[str, Any]) -> str:
    """Two columns, `figure` and `value`: every leaf of the summary under its path. Scan by scan stands in metrics.parquet."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["figure", "value"])
    for path, value in leaves({key: inner for key, inner in summary.items() if key != "scans"}):
        writer.writerow([_inert(path), _inert(value) if isinstance(value, str) else value])
    return out.getvalue()


def leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every number and text of nested plain data with its path, such as `groups.test.regions.WT.dice.mean`."""
    if isinstance(node, Mapping):
        for key, inner in node.items():
            yield from leaves(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(node, Sequence) and not isinstance(node, str):
        names = [_name(inner, number) for number, inner in enumerate(node)]
        twice = {name for name, times in Counter(names).items() if times > 1}
        for number, (name, inner) in enumerate(zip(names, node, strict=True)):
            yield from leaves(inner, f"{path}.{name}/{number}" if name in twice else f"{path}.{name}")
    else:
        yield path, node


def _name(entry: Any, number: int) -> str:
    """What tells an entry of a list from its neighbours: its name where it has one, its number otherwise."""
    names = ("split", "column", "value", "region", "stage", "code", "name", "figure") if isinstance(entry, Mapping) else ()
    named = [str(entry[key]) for key in names if isinstance(entry.get(key), str)]
    return "/".join(named) if named else str(number)


def _inert(text: str) -> str:
    return f"'{text}" if text.startswith(SPREADSHEET_STARTS) else text


# --- Markdown -------------------------------------------------------------------------------------------------------


def _markdown(s: Mapping[str, Any]) -> str:
    parts = [_heading(s), _counts(s), *(_split(g) for g in s["groups"] if g["evaluated"])]
    parts += [_baselines(s), *(_subgroup(c) for c in s["subgroups"]), _agreement(s), _comparison(s), _drift(s)]
    parts += [_trust(s), _quarantine(s), _pace(s)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _heading(s: Mapping[str, Any]) -> str:
    lines = ["# Cohort report"]
    for run in s["runs"]:
        lines.append(f"- model {_md(run['model']['name'])}, run {_md(run['run_id'])}, finished {_md(run['finished'])}")
    lines += [f"- only scans where `{_md(s['where'])}`"] if s["where"] else []
    lines += [f"- rule `{s['rule']}`; headline: {_md(s['headline'] or 'no scan was evaluated')}"]
    return "\n".join(lines + [f"- **before you believe a figure:** {_md(alert)}" for alert in s["alerts"]])


def _counts(s: Mapping[str, Any]) -> str:
    return _table(list(s["counts"]), [list(s["counts"].values())])


def _split(group: Mapping[str, Any]) -> str:
    rows = [
        [
            *(r["region"], r["num_scored"], r["num_patients_scored"], r["dice"]["mean"], *r["dice_interval"]),
            *(r["dice"]["median"], r["dice_mean_failed_as_zero"]),
            *(r["states"][k] for k in ("missed", "spurious", "both_empty")),
            (r["hd95_mm"] if r["hd95_mm"]["num"] else r["hd95_px"])["median"],
        ]
        for r in group["regions"]
    ]
    head = ["region", "scans", "patients", "mean Dice", "95 % from", "to", "median", "failed as 0", "missed", "spurious"]
    return f"## {_md(group['split'])}\n\n" + _table([*head, "both empty", "median HD95"], rows)


def _baselines(s: Mapping[str, Any]) -> str:
    rows = [[b["name"], b["region"], b["mean"], b["median"], b["scans"]] for b in s["baselines"]]
    return _titled("Baselines", ["baseline", "region", "mean Dice", "median", "scans"], rows)


def _subgroup(column: Mapping[str, Any]) -> str:
    rows = [
        [v["value"], r["region"], r["scored"], r["dice"]["mean"], *r["dice_interval"], r["dice"]["median"], r["missed"]]
        for v in column["values"]
        for r in v["regions"]
        if "dice" in r
    ]
    head = [column["column"], "region", "scans", "mean Dice", "95 % from", "to", "median", "missed"]
    return _titled(f"By {_md(column['column'])}", head, rows)


def _agreement(s: Mapping[str, Any]) -> str:
    rows = [[a["region"], a["unit"], a["scans"], a["bias"], *a["bias_interval"], *a["limits"]] for a in s["volume_agreement"]]
    head = ["region", "unit", "scans", "bias", "95 % from", "to", "lower limit", "upper limit"]
    return _titled("Predicted minus label volume", head, rows)


def _comparison(s: Mapping[str, Any]) -> str:
    if s["comparison"] is None:
        return ""
    rows = [
        [r["region"], what, c["num_pairs"], c["num_patients"], c["difference"], *c["interval"], c["wilcoxon_p"]]
        for r in s["comparison"]["regions"]
        for what, c in (("Dice", r["dice"]), ("HD95", r["hd95"]))
    ]
    head = ["region", "figure", "pairs", "patients", "difference", "95 % from", "to", "Wilcoxon p"]
    return _titled(f"Against {_md(', '.join(s['comparison']['with']))}", head, rows)


def _drift(s: Mapping[str, Any]) -> str:
    if s["drift"] is None:
        return ""
    rows = [
        [
            *(f["region"] or "scan", f["title"], f["here"]["n"], f["here"]["median"], f["there"]["n"], f["there"]["median"]),
            *(f["ks"], f["p"], f["words"]),
        ]
        for f in s["drift"]["figures"]
    ]
    head = ["region", "figure", "n here", "median here", "n there", "median there", "KS", "p", "in words"]
    return _titled(f"Drift against {_md(', '.join(s['drift']['reference']))}", head, rows)


def _trust(s: Mapping[str, Any]) -> str:
    names = [key for key in (s["trust"][0] if s["trust"] else ()) if key != "region"]
    return _titled(
        "Without labels",
        ["region", *(n.replace("_", " ") for n in names)],
        [[t["region"], *(t[n] for n in names)] for t in s["trust"]],
    )


def _quarantine(s: Mapping[str, Any]) -> str:
    return _titled(
        "Quarantine", ["code", "scans", "what to do"], [[q["code"], q["count"], q["what_to_do"]] for q in s["quarantine"]]
    )


def _pace(s: Mapping[str, Any]) -> str:
    rows = [[t["stage"], t["scans"], t["median_s"], t["p95_s"], t["total_s"]] for t in s["timings"]]
    return _titled("Seconds", ["stage", "scans", "median", "95 % below", "sum"], rows)


def _titled(title: str, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    return f"## {title}\n\n{_table(head, rows)}" if rows else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *([_cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(_md(h) if n == 0 else h for h in line)} |" for n, line in enumerate(lines))


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}"
    return _md(value)


def _md(value: Any) -> str:
    """A text that stays one: no mark of Markdown or HTML in it is read as such."""
    text = " ".join(str(value).split())
    return "".join(f"\\{c}" if c in r"\`*_[]<>|#&" else c for c in text)
