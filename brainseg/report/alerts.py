"""Alerts: what a reader must know before believing a figure; the page prints it in red, above everything else."""

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from brainseg.errors import Code
from brainseg.report.baselines import mean_dice, not_beaten
from brainseg.report.facts import Cohort, Run

MODALITY_ALERTS = {
    "modalities_missing": "lacked a modality that the model wants",
    "modalities_duplicated": "carried one modality twice under two names",
}

GRID_CONFLICTS = [Code.AFFINE_MISMATCH, Code.SHAPE_MISMATCH]


def alerts(
    cohort: Cohort, counts: Mapping[str, int], lead: Mapping[str, Any] | None, baselines: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Every alert on these runs, the gravest first. `lead` is the group of scans whose figures lead the page."""
    said = [_whose(cohort, run, line) for run in cohort.runs for line in _leakage(run, baselines)]
    said += _unlearnt(cohort, lead, baselines)
    said += [_whose(cohort, run, line) for run in cohort.runs for line in _model(run)]
    said += [_whose(cohort, run, line) for place, run in enumerate(cohort.runs) for line in _namesakes(cohort, place, run)]
    return said + _unread(cohort, counts) + _odd(cohort)


def _whose(cohort: Cohort, run: Run, line: str) -> str:
    """A line about one run; of several it says of which."""
    return line if len(cohort.runs) == 1 else f"{run.model.get('name')}, run {run.info.get('run_id')}: {line}"


def _leakage(run: Run, baselines: Sequence[Mapping[str, Any]]) -> list[str]:
    audit = run.model.get("audit") or {}
    found = [f"The leakage audit of the model's split says: {audit['reason']}."] if audit.get("verdict") == "leaks" else []
    if run.model.get("accept_leakage"):
        said = (
            "Leakage was accepted in training: patients may stand on both sides of the model's split, so no figure here says"
            " how the model does on a patient it has not seen."
        )
        found = [said, *_worth(baselines), *found]
    return found


def _worth(baselines: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the shared patients are worth: the score of a look-up table."""
    lines = []
    for entry in baselines:
        if entry["name"] == "nearest_training_mask" and entry["mean"] is not None:
            tumours = "" if entry["labelled_mean"] is None else f" ({entry['labelled_mean']:.3f} where there is a tumour)"
            lines.append(
                f"Copying the mask of the most similar training slice, with no model at all, scores Dice {entry['mean']:.3f}"
                f"{tumours} for {entry['region']} on these scans: they are near-copies of training scans."
            )
    return lines


def _unlearnt(cohort: Cohort, lead: Mapping[str, Any] | None, baselines: Sequence[Mapping[str, Any]]) -> list[str]:
    if lead is None or not baselines:
        return []
    if baselines[0]["measured"] == "evaluate":
        return not_beaten(baselines, {r["region"]: r["dice"]["mean"] for r in lead["regions"]})
    recorded = [((run.model.get("metrics") or {}).get("held_out") or {}) for run in cohort.runs[:1]]
    return not_beaten(baselines, {region: mean_dice(figures) for held_out in recorded for region, figures in held_out.items()})


def _model(run: Run) -> list[str]:
    model, said = run.model, []
    if model.get("selection_biased"):
        said.append("Selection bias: the fold reported as held out also chose the checkpoint.")
    if not any((model.get("split") or {}).get(side) for side in ("train", "validation", "test")):
        said.append("The model records no split: whether it was trained on these patients cannot be told.")
    terms = model.get("terms") or {}
    if terms and not terms["commercial"]:
        said.append(f"The model's weights are under {terms['licence']}: no commercial use, of these results neither.")
    threshold = run.info.get("threshold") or {}
    if threshold.get("chosen_on"):
        said.append(
            f"The threshold {threshold['value']:g} was chosen on the model's {threshold['chosen_on']} patients: their own "
            "figures are no evaluation."
        )
    if not run.info.get("finished_at"):
        said.append(f"Run {run.info.get('run_id')} has not finished: its figures will change.")
    return said


def _namesakes(cohort: Cohort, place: int, run: Run) -> list[str]:
    """Scans taken for those of the model's split by a name that pictures of somebody else may bear as well."""
    trained_on = run.model.get("manifest_fingerprint")
    column, sides = run.places()
    if column != "scan_id" or not trained_on or trained_on == run.info.get("manifest_fingerprint"):
        return []
    ids = cohort.scans["scan_id"].filter(pc.equal(cohort.scans["run"], place))
    number = _count(pc.is_in(ids, value_set=pa.array(list(sides), pa.string())))
    if not number:
        return []
    return [
        f"{_scans(number)} bear the id of one that the model met in training, in another manifest than its own. By the id "
        "alone, patients being unknown, they are told apart as train, validation and test: if they are other pictures, index "
        "them under another name (--dataset)."
    ]


def _unread(cohort: Cohort, counts: Mapping[str, int]) -> list[str]:
    """What stands in no figure, or in more than one."""
    said = [f"{uri} cannot be read: its scans are not in any figure here." for run in cohort.runs for uri in run.torn]
    if counts["missing"]:
        said.append(f"{counts['missing']} of {counts['found']} scans have no row yet: the run is unfinished, or lost a part.")
    if cohort.doubled:
        said.append(f"{_scans(cohort.doubled)} stood twice in one run; the row written last counts.")
    several = len(cohort.runs) > 1  # within one run they have been told apart already
    again = cohort.scans.num_rows - pc.count_distinct(cohort.scans["scan_id"]).as_py() if several else 0
    if again:
        said.append(f"{_scans(again)} of one run stand in another one too; each row counts.")
    for run in cohort.runs:
        problems = (run.evaluation or {}).get("problems") or ()
        if problems:
            said.append(
                f"The labels of {_scans(len(problems))} could not be used, the first: {problems[0]['code']}: "
                f"{problems[0]['message']}"
            )
    return said


def _odd(cohort: Cohort) -> list[str]:
    scans, said = cohort.scans, []
    for column, says in MODALITY_ALERTS.items():
        number = _count(pc.greater(pc.fill_null(pc.list_value_length(scans[column]), 0), 0))
        if number:
            said.append(f"{_scans(number)} {says}.")
    apart = _count(pc.is_in(scans["error_code"], value_set=pa.array([str(code) for code in GRID_CONFLICTS])))
    if apart:
        said.append(f"{_scans(apart)} failed: the files of a scan do not lie on one grid; see the quarantine.")
    nameless = _count(pc.and_(scans["evaluated"], pc.is_null(scans["patient_id"])))
    if nameless:
        said.append(f"{_scans(nameless)} with figures but without a patient: intervals take each for a patient of its own.")
    return said


def _count(column: Any) -> int:
    return int(pc.sum(column).as_py() or 0)


def _scans(number: int) -> str:
    return "1 scan" if number == 1 else f"{number:,} scans"
