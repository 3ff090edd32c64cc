"""Commands: what stands behind each word of the command line and behind each job of `jobs/`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from brainseg import manifest as manifests
from brainseg import storage
from brainseg.config import How, SegmentConfig, TrainConfig, build, override, read_yaml
from brainseg.console import Voice
from brainseg.errors import PreflightError, StorageError, UsageError
from brainseg.model import ModelCard
from brainseg.presets import PRESETS, preset

DEFAULT_PRESETS = {"lgg": "lgg-strong", "figshare": "figshare-strong", "brats": "brats-strong", "h5slices": "brats-strong"}


def index(archive: str, out: str, voice: Voice, **options: Any) -> dict[str, Any]:
    """Index an archive and write its manifest; says what was found and what was not placed."""
    table, inventory = manifests.index_archive(storage.absolute(archive), **options)
    manifests.write_manifest(storage.absolute(out), table)
    rows = table.drop_columns(["sources"]).to_pylist()
    problems = [r for r in rows if r["problem_code"]]
    body = {
        "manifest": out,
        "layout": rows[0]["layout"],
        "scans": len(rows),
        "patients": len({r["patient_id"] for r in rows if r["patient_id"]}),
        "labelled": sum(r["has_label"] for r in rows),
        "problems": [f"{r['scan_id']}: {r['problem_code']}: {r['problem']}" for r in problems],
        "ignored_files": len(inventory.ignored),
    }
    for line in body["problems"]:
        voice.say(f"problem: {line}")
    for reason, names in _by_reason(inventory.ignored).items():
        voice.say(f"ignored: {len(names)} file(s): {reason}, such as {storage.name_of(names[0])}")
    voice.result(
        body, f"{body['scans']} scans of {body['patients'] or 'unknown'} patients, {body['labelled']} with a label -> {out}"
    )
    return body


def _by_reason(ignored: Sequence[tuple[str, str]]) -> dict[str, list[str]]:
    out: dict[str, list[str]] = {}
    for uri, reason in ignored:
        out.setdefault(reason, []).append(uri)
    return out


def recipe(
    manifest: str, *, preset: str | None, config: str | None, assignments: Sequence[str], fold: int | None, accept_leakage: bool
) -> TrainConfig:
    """Build the training config: a preset or a YAML file, then `--set`, then the options that have words of their own."""
    if preset and config:
        raise UsageError("give --preset or --config, not both")
    values: Mapping[str, Any]
    if config:
        values, source = read_spec(config), config
    else:
        name = preset or _default_preset(manifest)
        values, source = _preset_values(name), f"preset {name}"
    words: dict[str, Any] = {} if fold is None else {"folds_held_out": fold}
    if accept_leakage:
        words["accept_leakage"] = True
    return build(TrainConfig, {**override(values, assignments), **words}, source)


def _preset_values(name: str) -> dict[str, Any]:
    return preset(name).model_dump(mode="json")


def _default_preset(manifest: str) -> str:
    layouts = set(manifests.read_manifest(storage.absolute(manifest))["layout"].to_pylist())
    return DEFAULT_PRESETS.get(layouts.pop(), "brats-strong") if len(layouts) == 1 else "brats-strong"


def train(manifest: str, out: str, config: TrainConfig, voice: Voice, *, workers: int | None = None) -> ModelCard:
    """Train and say what the model scores on the patients kept back, beside its baselines."""
    from brainseg.train import train_model

    card = train_model(storage.absolute(manifest), storage.absolute(out), config, workers=workers, say=voice.say)
    voice.result(
        {"model": out, "metrics": card.metrics, "baselines": card.baselines, "training": card.training},
        describe_model(card, out),
    )
    return card


def describe_model(card: ModelCard, out: str) -> str:
    """A trained model in a few lines: its held-out figures and those of the baselines, with their rule."""
    lines = [f"model '{card.name}' -> {out}"]
    for region, s in card.metrics.get("held_out", {}).items():
        lines.append(f"held-out fold, {region}: {_figures(s)} ({s['rule']}, {s['num_scans']} scans)")
        for name, summaries in card.baselines.items():
            if region in summaries:
                lines.append(f"  baseline {name.replace('_', ' ')}: {_figures(summaries[region])}")
    if card.selection_biased:
        lines.append("selection_biased: the held-out fold also chose the checkpoint")
    return "\n".join(lines)


def _figures(s: Mapping[str, Any]) -> str:
    mean, median = (f"{s[k]:.4f}" if s[k] is not None else "none" for k in ("dice_mean", "dice_median"))
    return f"Dice mean {mean}, median {median}; missed {s['states']['missed']}, spurious {s['states']['spurious']}"


def segment(source: str, model: str, out: str, voice: Voice, how: How, assignments: Sequence[str] = ()) -> dict[str, int]:
    """Bulk-segment and say the counts."""
    from brainseg.segment import Ear, segment_archive

    settings = build(SegmentConfig, override({}, assignments), "segment")
    places = [storage.absolute(place) for place in (source, model, out)]
    with voice.bar("segment") as bar:
        ear = Ear(voice.say, lambda p: bar.update(p.done, p.total, p.line()))
        counts = segment_archive(places[0], places[1], places[2], settings, how, ear)
    if not how.dry_run:
        done = f"{counts['ok']} of {counts['found']} scans segmented, {counts['failed']} failed, {counts['evaluated']} scored"
        voice.result({"run": out, "counts": counts}, f"{done} -> {out}")
    return counts


def report(runs: Sequence[str], out: str | None, voice: Voice) -> str:
    """Make the page; says where it is."""
    from brainseg.report import build_report

    uris = [storage.absolute(r) for r in runs]
    place = storage.absolute(out) if out else storage.join(uris[0], "report.html")
    summary = build_report(uris, place)
    voice.result({"report": place, "summary": summary}, f"report -> {out or place}")
    return place


def export(run: str, out: str, format_: Literal["nifti", "png"], voice: Voice) -> int:
    """Write the masks of a run as files."""
    from brainseg.export import export_run

    written = export_run(storage.absolute(run), storage.absolute(out), format=format_)
    voice.result({"out": out, "files": written}, f"{written} files -> {out}")
    return written


def verify(run: str, voice: Voice) -> list[str]:
    """Check a run and say what is wrong, if anything."""
    from brainseg.segment import verify_run

    place = storage.absolute(run)
    if not storage.exists(storage.join(place, "run.json")):
        raise PreflightError(f"{run} is not a run folder: it has no run.json")
    problems = verify_run(place)
    voice.result(
        {"run": run, "problems": problems}, "\n".join(problems) or f"{run}: every scan exactly once, every mask as hashed"
    )
    return problems


def presets(voice: Voice) -> None:
    """List the recipes."""
    body = {name: p.model_dump(mode="json") for name, p in PRESETS.items()}
    lines = [_recipe_line(p) for p in PRESETS.values()]
    voice.result(body, "\n".join(lines))


def _recipe_line(p: TrainConfig) -> str:
    eats = f"{p.prepare.size:>4} px  {', '.join(p.modalities) or 'any modality':<22}"
    return f"{p.name:<16} {eats} {', '.join(p.regions):<12} {p.loss.kind}, {p.optimiser.kind}, {p.epochs} epochs"


def phantom(out: str, layout: str, scans: int, broken: int, seed: int, voice: Voice) -> list[tuple[str, str]]:
    """Write synthetic heads; says which were damaged and how."""
    from brainseg.phantom import write_archive

    damaged = write_archive(Path(storage.absolute(out)), layout, scans=scans, broken=broken, seed=seed)
    for name, how in damaged:
        voice.say(f"broken on purpose: {name}: {how}")
    voice.result({"archive": out, "broken": dict(damaged)}, f"{scans} synthetic scans -> {out}")
    return damaged


def read_spec(path: str) -> dict[str, Any]:
    """A YAML file as plain values; UsageError where it cannot be read."""
    try:
        return read_yaml(storage.read_text(storage.absolute(path)), path)
    except StorageError as error:
        raise UsageError(f"{path}: {error}") from error
