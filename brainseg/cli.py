"""The command line: each command reads its words, calls one function, says what came of it. No logic here.

Heavy imports stand inside the commands, so that `brainseg --help` answers at once.
"""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from brainseg import __version__, cli_jobs, cli_models
from brainseg.environment import prepare_environment
from brainseg.errors import BrainsegError, ExitCode, UsageError
from brainseg.events import LOG_FORMAT, LogFormat, choose_log_format, last_words

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Brain tumour segmentation in MRI on a Ray cluster, from training to the cohort's report. Research use only.",
)

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Say nothing but errors.")]
Log = Annotated[
    LogFormat | None,
    typer.Option("--log-format", envvar=LOG_FORMAT, help="`json`: what is said becomes a line of JSON each, for collectors."),
]
Price = Annotated[
    float | None,
    typer.Option(min=0, help="What an hour of all the machines costs: the training page adds it up, a dry run forecasts it."),
]
BothEmpty = Annotated[
    Literal["exclude", "brats"], typer.Option(help="What becomes of scans where label and prediction are both empty.")
]
Currency = Annotated[str, typer.Option(help="Of that price.")]
NonCommercial = Annotated[
    bool,
    typer.Option("--accept-noncommercial", help="Your use is no commercial one, which some models' licences do not allow."),
]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="Override a config key, such as epochs=10 or optimiser.learning_rate=1e-3.")
]


@app.command()
def demo(
    out: Annotated[str, typer.Option(help="Where archive, manifest, model, run and report go.")] = "demo",
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """The whole way on synthetic heads, in minutes on a laptop: index, train, segment, report."""
    from brainseg.console import Voice
    from brainseg.demo import run_demo

    raise typer.Exit(run_demo(out, Voice(quiet=quiet, as_json=json_)))


@app.command()
def index(
    archive: Annotated[str, typer.Argument(help="A folder or s3:// prefix of stored MRI.")],
    out: Annotated[str, typer.Option(help="The manifest to write (Parquet).")],
    layout: Annotated[
        str | None,
        typer.Option(help="Folder convention, where names leave it open: lgg, figshare, brats, h5slices, dicom, pictures."),
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="A name for the set; by default its layout's.")] = None,
    label_map: Annotated[
        str | None, typer.Option(help="What label values mean: binary, brats2013, brats2020, brats2023, brats2024.")
    ] = None,
    folds: Annotated[int, typer.Option(min=2, help="How many folds the patients are dealt into.")] = 5,
    seed: Annotated[int, typer.Option(help="Decides which patient lands in which fold.")] = 0,
    stratify: Annotated[
        str,
        typer.Option(
            metavar="ATTRIBUTE",
            help="Deal evenly within each value of this attribute. `auto`: tumour type, site or grade, whichever comes first "
            "and has few enough values; `none`: not at all.",
        ),
    ] = "auto",
    folds_by: Annotated[
        Literal["patient", "scan"], typer.Option(help="What stays together. `scan` divides patients: --accept-leakage.")
    ] = "patient",
    folds_from: Annotated[
        str | None, typer.Option(metavar="CSV", help="Take the folds from this table: scan_id or patient_id, and fold.")
    ] = None,
    unit: Annotated[
        Literal["scan", "slice"], typer.Option(help="What becomes a row. `slice`: every slice of a stack on its own.")
    ] = "scan",
    accept_leakage: Annotated[
        bool, typer.Option("--accept-leakage", help="Write folds that share patients all the same.")
    ] = False,
    no_hash: Annotated[
        bool, typer.Option("--no-hash", help="Read no file: the leakage audit will not compare contents.")
    ] = False,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Take stock of an archive: one row a scan, folds by patient, what could not be placed, what leaks between folds."""
    from brainseg import commands
    from brainseg.console import Voice
    from brainseg.folds import FoldPlan

    commands.index(
        archive,
        out,
        Voice(quiet=quiet, as_json=json_),
        FoldPlan(folds, seed, stratify, folds_by, folds_from, accept_leakage),
        hashes=not no_hash,
        layout=layout,
        dataset=dataset,
        label_map=label_map,
        unit=unit,
    )


@app.command()
def train(
    manifest: Annotated[str, typer.Argument(help="The manifest (Parquet) that `index` wrote.")],
    out: Annotated[str, typer.Option(help="The model folder to make.")],
    preset: Annotated[
        str | None,
        typer.Option(help="A recipe by name; `brainseg presets` lists them. Default: the strong one for the dataset."),
    ] = None,
    config: Annotated[str | None, typer.Option(help="A recipe of your own (YAML).")] = None,
    set_: Set = None,
    pretrained: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Fine-tune: begin with this model's weights; its folder, or the name of one that ships. Without --preset or "
            "--config its own recipe is gone on with, at a quarter of the learning rate.",
        ),
    ] = None,
    fold: Annotated[int | None, typer.Option(help="The fold that is kept back and reported on.")] = None,
    cv: Annotated[
        bool, typer.Option("--cv", help="Cross-validate: keep every fold back in turn, a model each, and sum up.")
    ] = False,
    folds: Annotated[str | None, typer.Option(help="With --cv: train these folds only now, such as 0,2.")] = None,
    workers: Annotated[
        str | None,
        typer.Option(
            metavar="N|A..B",
            help="Processes that train together; 2..8 takes what the cluster has. Default: one per GPU, or one.",
        ),
    ] = None,
    accept_leakage: Annotated[
        bool,
        typer.Option("--accept-leakage", help="Train although patients may stand on both sides; every report will say so."),
    ] = False,
    accept_noncommercial: NonCommercial = False,
    log_to: Annotated[
        list[str] | None,
        typer.Option(help="Log to TensorBoard or MLflow as well: tensorboard[:DIR], mlflow[:URI]. Both are extras to install."),
    ] = None,
    price_per_hour: Price = None,
    currency: Currency = "EUR",
    log_format: Log = None,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a U-Net on a manifest with Ray Train and leave a model folder, or with --cv one a fold and their figures."""
    from brainseg import commands
    from brainseg.console import Voice

    choose_log_format(log_format)
    picked = commands.picked_folds(cv, folds, fold)
    recipe = commands.recipe(
        manifest,
        preset=preset,
        config=config,
        assignments=set_ or [],
        fold=fold,
        accept_leakage=accept_leakage,
        pretrained=pretrained,
        accept_noncommercial=accept_noncommercial,
    )
    voice, price = Voice(quiet=quiet, as_json=json_), commands.priced(price_per_hour, currency)
    if cv:
        commands.cross_validate(manifest, out, recipe, voice, folds=picked, workers=workers, log_to=log_to or [], price=price)
    else:
        commands.train(manifest, out, recipe, voice, workers=workers, log_to=log_to or [], price=price)


@app.command()
def segment(
    source: Annotated[str, typer.Argument(metavar="ARCHIVE|MANIFEST", help="An archive, or a manifest of one.")],
    model: Annotated[
        list[str],
        typer.Option(
            help="A model folder, or the name of a model that ships (`brainseg models`). Several, or the folder of a "
            "cross-validation, are an ensemble: their probabilities are averaged."
        ),
    ],
    out: Annotated[str, typer.Option(help="The run folder. An unfinished run of the same kind is taken up again.")],
    max_failures: Annotated[
        str | None, typer.Option(help="Stop with exit code 4 once more scans failed than this: 50, or 5%.")
    ] = None,
    set_: Set = None,
    actors: Annotated[
        int | None, typer.Option(min=1, help="Inference processes. Default: one per GPU, or one per core.")
    ] = None,
    plan: Annotated[
        str | None, typer.Option(help="`fused` or `apart`: where decoding happens. Default: by what the cluster has.")
    ] = None,
    precision: Annotated[
        Literal["auto", "bf16", "fp32"] | None,
        typer.Option(help="`auto`: bf16 where the hardware gains by it. Default: fp32, as trained and measured."),
    ] = None,
    scan_seconds: Annotated[float, typer.Option(help="Give a scan up, as TIMEOUT, whose files take longer to read.")] = 300.0,
    decode_tasks: Annotated[
        int | None, typer.Option(min=1, help="Decoding tasks at once, where they are apart. Default: by what was measured.")
    ] = None,
    scans_per_part: Annotated[
        int | None, typer.Option(min=1, help="Default: at most 32, and what takes an actor about 20 s; fewer towards the end.")
    ] = None,
    accept_noncommercial: NonCommercial = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, take a few scans the whole way, say what a run would take.")
    ] = False,
    price_per_hour: Price = None,
    currency: Currency = "EUR",
    log_format: Log = None,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Segment an archive with Ray Data into masks and metrics in Parquet. Exit code 3 if some scans failed."""
    from brainseg import commands
    from brainseg.config import How, build
    from brainseg.console import Voice

    choose_log_format(log_format)
    words = {"max_failures": max_failures, "mode": plan, "actors": actors, "scan_seconds": scan_seconds, "dry_run": dry_run}
    words |= {"decode_tasks": decode_tasks, "scans_per_part": scans_per_part, "accept_noncommercial": accept_noncommercial}
    words |= {"price_per_hour": price_per_hour, "currency": currency}
    voice, how = Voice(quiet=quiet, as_json=json_), build(How, words, "segment")
    if commands.segment(source, model, out, voice, how, set_ or [], precision).get("failed"):
        raise typer.Exit(ExitCode.SOME_FAILED)


@app.command()
def evaluate(
    run: Annotated[str, typer.Argument(help="A finished run folder; with --threshold-sweep also a model folder.")],
    labels: Annotated[
        str | None, typer.Option(help="A manifest whose labels count, joined by scan_id. Default: the run's own.")
    ] = None,
    training: Annotated[
        str | None,
        typer.Option(help="A manifest that holds the model's training patients, for the nearest-mask baseline."),
    ] = None,
    baselines: Annotated[bool, typer.Option("--baselines/--no-baselines", help="Score the two baselines too.")] = True,
    compare: Annotated[str | None, typer.Option(help="Another run: this one minus it, on the scans both have.")] = None,
    rule: BothEmpty = "exclude",
    threshold_sweep: Annotated[
        bool,
        typer.Option(
            "--threshold-sweep",
            help="Instead: choose the model's threshold and smallest component on its validation patients.",
        ),
    ] = False,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="With --threshold-sweep: how the network answers, such as flip=true.")
    ] = None,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Score a run's stored masks anew, beside the baselines. Exit code 3 if some labels could not be used."""
    from brainseg import commands
    from brainseg.console import Voice

    voice = Voice(quiet=quiet, as_json=json_)
    if threshold_sweep:
        commands.sweep(run, labels, voice, set_ or [])
        return
    if commands.evaluate(run, voice, labels=labels, training=training, baselines=baselines, compare=compare, rule=rule):
        raise typer.Exit(ExitCode.SOME_FAILED)


@app.command()
def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="One or more finished runs.")],
    out: Annotated[str | None, typer.Option(help="Where it goes. Default: report.html in the first run, or .json ...")] = None,
    rule: BothEmpty = "exclude",
    where: Annotated[
        str | None,
        typer.Option(
            metavar="CONDITION", help="Only these scans, such as \"site = 'A' and fold in (0, 1)\": columns and attributes."
        ),
    ] = None,
    compare: Annotated[str | None, typer.Option(metavar="RUN", help="Another run on the same scans: pair by pair.")] = None,
    reference: Annotated[
        str | None, typer.Option(metavar="RUN", help="A run to see drift from: volumes, trust, spacing. No label needed.")
    ] = None,
    format_: Annotated[
        Literal["html", "json", "csv", "md"], typer.Option("--format", help="A page, or its numbers as a text.")
    ] = "html",
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make the cohort's report from a run's Parquet: one self-contained HTML page."""
    from brainseg import commands
    from brainseg.console import Voice

    voice = Voice(quiet=quiet, as_json=json_)
    commands.report(runs, out, voice, rule=rule, where=where, compare=compare, reference=reference, format_=format_)


@app.command()
def view(
    run: Annotated[str, typer.Argument(help="A run folder.")],
    scan_id: Annotated[str, typer.Argument(help="One of its scans.")],
    out: Annotated[str | None, typer.Option(help="Where the page goes. Default: view-SCAN.html in the current folder.")] = None,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make the page of one scan: all slices of its mask, over image and label as far as they can be reached."""
    from brainseg import commands
    from brainseg.console import Voice

    commands.view(run, scan_id, out, Voice(quiet=quiet, as_json=json_))


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="A run folder.")],
    out: Annotated[str, typer.Option(help="Folder for the masks.")],
    format_: Annotated[Literal["nifti", "png"], typer.Option("--format", help="What each mask is written as.")] = "nifti",
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write the masks of a run as files."""
    from brainseg import commands
    from brainseg.console import Voice

    commands.export(run, out, format_, Voice(quiet=quiet, as_json=json_))


@app.command()
def verify(run: Annotated[str, typer.Argument(help="A run folder.")], json_: Json = False, quiet: Quiet = False) -> None:
    """Prove a run: every scan exactly once, every mask readable and as hashed, nothing foreign. Exit code 1 if not."""
    from brainseg import commands
    from brainseg.console import Voice

    if commands.verify(run, Voice(quiet=quiet, as_json=json_)):
        raise typer.Exit(ExitCode.CRASH)


@app.command()
def clean(
    run: Annotated[str, typer.Argument(help="A run folder; or OUT.work of a training that shall not go on.")],
    older_than: Annotated[
        str, typer.Option(help="How old a temporary file or an upload must be: 90s, 30m, 1h, 2d. Younger ones may be at work.")
    ] = "1h",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, remove nothing.")] = False,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Remove what interrupted jobs left in a run: temporary files, unended uploads, parts set aside. Never a result."""
    from brainseg import commands
    from brainseg.console import Voice

    commands.clean(run, older_than, Voice(quiet=quiet, as_json=json_), dry_run=dry_run)


@app.command()
def presets(json_: Json = False) -> None:
    """List the training recipes that ship."""
    from brainseg import commands
    from brainseg.console import Voice

    commands.presets(Voice(as_json=json_))


@app.command()
def phantom(
    out: Annotated[str, typer.Argument(help="Folder to write.")],
    layout: Annotated[str, typer.Option(help="lgg, figshare, brats or h5slices")] = "lgg",
    scans: Annotated[int, typer.Option(min=1)] = 40,
    broken: Annotated[int, typer.Option(min=0, help="How many of them to damage.")] = 0,
    seed: int = 0,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write an archive of synthetic heads with tumours in one of the layouts."""
    from brainseg import commands
    from brainseg.console import Voice

    commands.phantom(out, layout, scans, broken, seed, Voice(quiet=quiet, as_json=json_))


@app.command()
def schemas(out: Annotated[str, typer.Option(help="Folder to write the contracts to.")] = "schemas") -> None:
    """Publish the contracts of tables and configs as JSON."""
    from brainseg.schemas import write_schemas

    write_schemas(Path(out))


app.command()(cli_jobs.submit)
app.add_typer(cli_jobs.jobs, name="jobs")
app.add_typer(cli_models.models, name="models")


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


def main() -> None:
    """Run the command line; our own errors become one line and their exit code."""
    prepare_environment(joins=cli_jobs.joins_a_cluster())
    try:
        app(standalone_mode=True)
    except BrainsegError as error:
        hint = "\nRun with --help for the words it knows." if type(error) is UsageError else ""
        sys.stderr.write(last_words(error, hint))
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
