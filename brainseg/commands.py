"""Commands: what stands behind each word of the command line and behind each job of `jobs/`."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from brainseg import manifest as manifests
from brainseg import shipped, storage
from brainseg.aggregate import Rule
from brainseg.audit import Audit, audit_folds
from brainseg.card import CARD, ModelCard, refuse_unaccepted
from brainseg.config import How, SegmentConfig, TrainConfig, build, override, read_yaml
from brainseg.console import Bar, Voice
from brainseg.contents import with_contents
from brainseg.errors import PreflightError, StorageError, UsageError
from brainseg.folds import FoldPlan
from brainseg.heartbeat import Progress
from brainseg.layouts import Inventory
from brainseg.loggers import targets
from brainseg.presets import PRESETS
from brainseg.presets import preset as choose
from brainseg.results import describe_model, evaluation_lines, recipe_line
from brainseg.watch import Price, Watcher

DEFAULT_PRESETS = {
    "lgg": "lgg-strong",
    "figshare": "figshare-strong",
    "pictures": "figshare-strong",
    "brats": "brats-strong",
    "h5slices": "brats-strong",
}


def index(
    archive: str, out: str, voice: Voice, plan: FoldPlan | None = None, *, hashes: bool = True, **options: Any
) -> dict[str, Any]:
    """Index an archive and write its manifest; says what was found, what was not placed, and what the audit of the folds found.

    Without `hashes` no file is read, and the audit does not compare contents.
    """
    source, target = _source(archive), _target_file(out)
    stock = manifests.take_stock(source, plan or FoldPlan(), **options)
    table = with_contents(stock.manifest, voice.say) if hashes else stock.manifest
    audit = audit_folds(table, contents_compared=hashes)
    manifests.write_manifest(target, table, audit)
    rows = table.drop_columns(["sources"]).to_pylist()
    problems = [r for r in rows if r["problem_code"]]
    body = {
        "manifest": out,
        "layout": rows[0]["layout"],
        "scans": len(rows),
        "patients": len({r["patient_id"] for r in rows if r["patient_id"]}),
        "labelled": sum(r["has_label"] for r in rows),
        "problems": [f"{r['scan_id']}: {r['problem_code']}: {r['problem']}" for r in problems],
        "ignored_files": len(stock.inventory.ignored),
        "folds": stock.folds,
        "stratified_by": stock.stratified_by,
        "audit": audit.to_json(),
    }
    _say_index(body, stock.inventory, audit, voice)
    voice.result(
        body, f"{body['scans']} scans of {body['patients'] or 'unknown'} patients, {body['labelled']} with a label -> {out}"
    )
    return body


def _say_index(body: Mapping[str, Any], inventory: Inventory, audit: Audit, voice: Voice) -> None:
    for line in body["problems"]:
        voice.say(f"problem: {line}")
    for line in inventory.warnings:
        voice.say(f"warning: {line}")
    for reason, names in _by_reason(inventory.ignored).items():
        voice.say(f"ignored: {len(names)} file(s): {reason}, such as {storage.name_of(names[0])}")
    voice.say(f"folds: {body['folds']}")
    for line in audit.lines():
        voice.say(line)


def _by_reason(ignored: Sequence[tuple[str, str]]) -> dict[str, list[str]]:
    out: dict[str, list[str]] = {}
    for uri, reason in ignored:
        out.setdefault(reason, []).append(uri)
    return out


def recipe(
    manifest: str,
    *,
    preset: str | None,
    config: str | None,
    assignments: Sequence[str],
    fold: int | None,
    accept_leakage: bool,
    pretrained: str | None = None,
    accept_noncommercial: bool = False,
) -> TrainConfig:
    """Build the training config: a preset, a YAML file or a pretrained model's own, then `--set`, then what has an option.

    Raises UsageError where the licence of pretrained weights allows no commercial use and nobody has accepted that.
    """
    if preset and config:
        raise UsageError("give --preset or --config, not both")
    values: Mapping[str, Any]
    if config:
        values, source = read_spec(config), config
    elif pretrained and not preset:
        from brainseg.pretrained import recipe_of

        values, source = recipe_of(_model(pretrained)), f"the recipe of {pretrained}"
    else:
        name = preset or _default_preset(manifest)
        values, source = choose(name).model_dump(mode="json"), f"preset {name}"
    words: dict[str, Any] = {} if fold is None else {"folds_held_out": fold}
    if accept_leakage:
        words["accept_leakage"] = True
    if pretrained:
        words["pretrained"] = pretrained
    built = build(TrainConfig, {**override(values, assignments), **words}, source)
    if built.pretrained is None:
        return built
    place = _model(built.pretrained)
    from brainseg.pretrained import any_card

    refuse_unaccepted(any_card(place), accepted=accept_noncommercial)
    return built.model_copy(update={"pretrained": place})


def _default_preset(manifest: str) -> str:
    layouts = set(manifests.read_manifest(_source(manifest))["layout"].to_pylist())
    return DEFAULT_PRESETS.get(layouts.pop(), "brats-strong") if len(layouts) == 1 else "brats-strong"


def train(
    manifest: str,
    out: str,
    config: TrainConfig,
    voice: Voice,
    *,
    workers: int | str | None = None,
    log_to: Sequence[str] = (),
    price: Price | None = None,
) -> ModelCard:
    """Train and say what the model scores on the patients kept back, beside its baselines."""
    source, place, loggers = _source(manifest), _target(out), targets(log_to)
    from brainseg.train import train_model

    with voice.bar("train") as bar:
        watcher = Watcher(partial(_show, bar) if voice.has_bars else None, loggers, price)
        card = train_model(source, place, config, workers=workers, say=voice.say, watcher=watcher)
    voice.result(
        {"model": out, "metrics": card.metrics, "baselines": card.baselines, "training": card.training},
        describe_model(card, out),
    )
    return card


def _show(bar: Bar, progress: Progress) -> None:
    """One epoch as a bar: the steps done of those it has."""
    epoch = f"epoch {progress.epoch + 1:>3}/{progress.epochs}"
    bar.update(progress.step, progress.steps, progress.line(), epoch)


def priced(price_per_hour: float | None, currency: str) -> Price | None:
    """What an hour costs, where somebody said so; UsageError for what is no price."""
    if price_per_hour is None:
        return None
    if not price_per_hour >= 0 or price_per_hour == float("inf"):
        raise UsageError(f"--price-per-hour {price_per_hour}: expected a price of 0 or more")
    return Price(price_per_hour, currency)


def picked_folds(cv: bool, folds: str | None, fold: int | None) -> tuple[int, ...] | None:
    """The folds that `--folds 0,2` names; None for all. UsageError where the words contradict each other."""
    if folds is not None and not cv:
        raise UsageError("--folds goes with --cv; one model alone takes --fold")
    if cv and fold is not None:
        raise UsageError("--cv keeps every fold back in turn; give --folds to pick some, not --fold")
    if folds is None:
        return None
    words = [word.strip() for word in folds.split(",")]
    if not all(word.isdecimal() for word in words):
        raise UsageError(f"--folds {folds}: expected numbers with commas, such as 0,2")
    return tuple(int(word) for word in words)


def cross_validate(
    manifest: str,
    out: str,
    config: TrainConfig,
    voice: Voice,
    *,
    folds: Sequence[int] | None = None,
    workers: int | str | None = None,
    log_to: Sequence[str] = (),
    price: Price | None = None,
) -> dict[str, Any]:
    """Train the folds and say what their models score on the scans that each kept back."""
    source, place, loggers = _source(manifest), _target(out), targets(log_to)
    from brainseg import cross_validation
    from brainseg.report.folds import write_folds_page

    with voice.bar("train") as bar:
        watcher = Watcher(partial(_show, bar) if voice.has_bars else None, loggers, price)
        body = cross_validation.cross_validate(
            source, place, config, folds=folds, workers=workers, say=voice.say, watcher=watcher
        )
    write_folds_page(place)
    voice.result({"models": out, **body}, cross_validation.describe(body, out))
    return body


def segment(
    source: str,
    models: str | Sequence[str],
    out: str,
    voice: Voice,
    how: How,
    assignments: Sequence[str] = (),
    precision: str | None = None,
) -> dict[str, Any]:
    """Bulk-segment and say the counts. `precision`, where given, goes before an assignment."""
    words = {} if precision is None else {"precision": precision}
    settings = build(SegmentConfig, {**override({}, assignments), **words}, "segment")
    named = [models] if isinstance(models, str) else models
    archive, folders, run = _source(source), [_model(model) for model in named], _target(out)
    from brainseg.observe import Ear
    from brainseg.segment import segment_archive

    with voice.bar("segment") as bar:
        ear = Ear(voice.say, lambda p: bar.update(p.done, p.total, p.line()), voice.note)
        counts = segment_archive(archive, folders, run, settings, how, ear)
    if how.dry_run:
        voice.result({"run": out, "forecast": counts}, "nothing was written")
    else:
        done = f"{counts['ok']} of {counts['found']} scans segmented, {counts['failed']} failed, {counts['evaluated']} scored"
        voice.result({"run": out, "counts": counts}, f"{done} -> {out}")
    return counts


def evaluate(
    run: str, voice: Voice, *, labels: str | None, training: str | None, baselines: bool, compare: str | None, rule: Rule
) -> int:
    """Score a run's stored masks anew and say what came of it; returns how many labels could not be used."""
    from brainseg.evaluate import compare_evaluations, evaluate_run
    from brainseg.report import summary

    place = _source(run)
    other = _source(compare) if compare else None
    named = [_source(uri) if uri else None for uri in (labels, training)]
    body = evaluate_run(place, labels=named[0], training=named[1], baselines=baselines, say=voice.say)
    figures = summary([place], rule=rule)
    kept = {name: figures[name] for name in ("rule", "counts", "alerts", "headline", "groups", "baselines")}
    comparison = compare_evaluations(place, other) if other else None
    voice.result({"run": run, **body, **kept, "comparison": comparison}, "\n".join(evaluation_lines(figures, comparison)))
    for problem in body["problems"]:
        voice.say(f"label not used: {problem['code']}: {problem['message']}")
    return len(body["problems"])


def sweep(place: str, labels: str | None, voice: Voice, assignments: Sequence[str] = ()) -> dict[str, Any]:
    """Choose threshold and smallest component of a model, or of a run's model, on its validation patients; says which."""
    from brainseg.sweep import sweep_model

    settings = build(SegmentConfig, override({}, assignments), "--threshold-sweep")
    model, manifest = _swept(_source(place), place, _source(labels) if labels else None)
    chosen = sweep_model(model, manifest, settings=settings, say=voice.say)
    flip = " --set flip=true" if settings.flip else ""
    said = (
        f"threshold {chosen['threshold']:g}, smallest component {chosen['smallest_component']}, chosen on "
        f"{chosen['num_scans']} validation scans ({chosen['rule']}): Dice "
        f"{chosen['mean']:.4f}, by default {chosen['default_mean']:.4f}; it is written into {model}; `brainseg segment "
        f"--set threshold=chosen --set smallest_component=chosen{flip}` uses it"
    )
    voice.result({"model": model, "chosen": chosen}, said)
    return chosen


def _swept(place: str, said: str, labels: str | None) -> tuple[str, str]:
    """The model that a run or a model folder means, and the manifest with its validation patients."""
    if storage.exists(storage.join(place, "model.json")):
        if labels is None:
            raise UsageError(f"{said} is a model: give the manifest that it was trained on with --labels")
        return place, labels
    if not storage.exists(storage.join(place, "run.json")):
        raise PreflightError(f"{said} is neither a run folder nor a model: it has no run.json and no model.json")
    model = storage.read_json(storage.join(place, "run.json"))["model"]["uri"]
    if not isinstance(model, str):
        raise PreflightError(f"{said} was made by several models; give one of them, and its manifest with --labels")
    return model, labels or storage.join(place, "manifest.parquet")


def report(
    runs: Sequence[str],
    out: str | None,
    voice: Voice,
    *,
    rule: Rule = "exclude",
    where: str | None = None,
    compare: str | None = None,
    reference: str | None = None,
    format_: Literal["html", "json", "csv", "md"] = "html",
) -> str:
    """Make the page, or its numbers as a text; says where it is."""
    from brainseg.report import build_report

    uris = [_source(r) for r in runs]
    named = [_source(uri) if uri else None for uri in (compare, reference)]
    place = _target_file(out or storage.join(uris[0], f"report.{format_}"))
    summary = build_report(uris, place, rule=rule, where=where, compare=named[0], reference=named[1], format_=format_)
    voice.result({"report": place, "summary": summary}, f"report -> {out or place}")
    return place


def view(run: str, scan_id: str, out: str | None, voice: Voice) -> str:
    """Make the page of one scan; says where it is, and what it could not show."""
    from brainseg.export import file_name
    from brainseg.report.view import build_view

    out = out or f"view-{file_name(scan_id)}.html"
    made = build_view(_source(run), scan_id, _target_file(out))
    for line in made.remarks:
        voice.say(line)
    voice.result({"view": made.uri, "size_bytes": made.size_bytes, "remarks": list(made.remarks)}, f"view -> {out}")
    return made.uri


def export(run: str, out: str, format_: Literal["nifti", "png"], voice: Voice) -> int:
    """Write the masks of a run as files."""
    from brainseg.export import export_run

    written = export_run(_source(run), _target(out), format=format_)
    voice.result({"out": out, "files": written}, f"{written} files -> {out}")
    return written


def verify(run: str, voice: Voice) -> list[str]:
    """Check a run and say what is wrong, if anything; leftovers are named besides, being no part of the run."""
    from brainseg.clean import litter_of_run
    from brainseg.verify import verify_run

    place = _source(run)
    if not storage.exists(storage.join(place, "run.json")):
        raise PreflightError(f"{run} is not a run folder: it has no run.json")
    problems, left = verify_run(place), [one.uri for one in litter_of_run(place, 0)]
    for uri in left:
        voice.say(f"leftover, which `brainseg clean {run}` removes: {uri}")
    well = f"{run}: every scan exactly once, every mask as hashed, every byte as sealed"
    voice.result({"run": run, "problems": problems, "leftovers": left}, "\n".join(problems) or well)
    return problems


def clean(run: str, older_than: str, voice: Voice, *, dry_run: bool) -> int:
    """Remove what interrupted jobs left, or say what would go; returns how many things that were."""
    from brainseg.clean import clean_run, seconds_of

    age_s = seconds_of(older_than)
    litter = clean_run(_source(run), older_than_s=age_s, dry_run=dry_run)
    for one in litter:
        voice.say(one.line())
    listed = [{"uri": one.uri, "why": one.why, "size_bytes": one.size_bytes} for one in litter]
    size, did = sum(one.size_bytes for one in litter), "would remove" if dry_run else "removed"
    said = f"{did} {len(litter)} leftover(s), {size / 1e6:.1f} MB, from {run}"
    voice.result({"run": run, "dry_run": dry_run, "litter": listed}, said)
    return len(litter)


def presets(voice: Voice) -> None:
    """List the recipes."""
    body = {name: p.model_dump(mode="json") for name, p in PRESETS.items()}
    lines = [recipe_line(p) for p in PRESETS.values()]
    voice.result(body, "\n".join(lines))


def phantom(out: str, layout: str, scans: int, broken: int, seed: int, voice: Voice) -> list[tuple[str, str]]:
    """Write synthetic heads; says which were damaged and how."""
    from brainseg.phantom import write_archive

    damaged = write_archive(Path(storage.absolute(out)), layout, scans=scans, broken=broken, seed=seed)
    for name, how in damaged:
        voice.say(f"broken on purpose: {name}: {how}")
    voice.result({"archive": out, "broken": dict(damaged)}, f"{scans} synthetic scans -> {out}")
    return damaged


def _source(uri: str) -> str:
    """A place to read from, absolute; PreflightError, before any work, where nothing can be read there."""
    place = storage.absolute(uri)
    storage.check_readable(place)
    return place


def _model(uri: str) -> str:
    """A model folder, absolute, or the name of a model that ships; a folder of that name in sight goes before it."""
    if uri in shipped.names() and not storage.exists(storage.join(storage.absolute(uri), CARD)):
        return uri
    try:
        return _source(uri)
    except PreflightError as error:
        raise PreflightError(f"{error}; the models that ship are {', '.join(shipped.names()) or 'none'}") from error


def _target(uri: str) -> str:
    """A folder to write to, absolute; PreflightError, before any work, where nothing can be written."""
    place = storage.absolute(uri)
    storage.check_writable(place)
    return place


def _target_file(uri: str) -> str:
    """A file to write, absolute; PreflightError, before any work, where its folder takes none."""
    place = storage.absolute(uri)
    storage.check_writable(storage.parent_of(place))
    return place


def read_spec(path: str) -> dict[str, Any]:
    """A YAML file as plain values; UsageError where it cannot be read."""
    try:
        return read_yaml(storage.read_text(storage.absolute(path)), path)
    except StorageError as error:
        raise UsageError(f"{path}: {error}") from error
