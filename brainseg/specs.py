"""Specs: a job's YAML file. Its keys are the command's own words, so that a file and a command line say the same thing.

A job may run far from where it was submitted, in a folder that goes when it ends; so every place a spec names is an
absolute path that all nodes see, or an s3:// address. Only `config` may be relative: it travels with the code.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from brainseg import commands, shipped, storage
from brainseg.aggregate import Rule
from brainseg.config import Config, build
from brainseg.environment import prepare_environment
from brainseg.errors import BrainsegError, ConfigError, ExitCode, UsageError
from brainseg.events import LogFormat, choose_log_format, last_words

S = TypeVar("S", bound=Config)


def _seen_by_all(place: str) -> str:
    if not (place.startswith("/") or storage.is_remote(place)):
        raise PydanticCustomError(
            "place",
            "found '{found}', expected an absolute path or s3://..., because a job may run on another machine",
            {"found": place},
        )
    return place


def _seen_by_all_or_shipped(model: str) -> str:
    return model if model in shipped.names() else _seen_by_all(model)


Place = Annotated[str, AfterValidator(_seen_by_all), Field(json_schema_extra={"pattern": "^(/|s3://)"})]
ModelPlace = Annotated[
    str, AfterValidator(_seen_by_all_or_shipped), Field(json_schema_extra={"pattern": "^(/|s3://|[a-z0-9-]+$)"})
]
Overrides = Annotated[tuple[str, ...], Field(description="config keys to override, such as epochs=10")]
Log = Annotated[LogFormat | None, Field(description="what the job's log holds: sentences, or a line of JSON each")]


class TrainSpec(Config):
    """`jobs/train.py`: the words of `brainseg train`."""

    manifest: Annotated[Place, Field(description="what `brainseg index` wrote")]
    out: Annotated[Place, Field(description="the model folder to make")]
    preset: Annotated[
        str | None, Field(description="a recipe by name; null: the strong one for the layout, or that of `pretrained`")
    ] = None
    config: Annotated[str | None, Field(description="a recipe of your own (YAML), from the root of the package")] = None
    set: Overrides = ()
    pretrained: Annotated[
        ModelPlace | None,
        Field(
            description="a model to begin with the weights of: its folder, or the name of one that ships; null: from nothing"
        ),
    ] = None
    accept_noncommercial: Annotated[
        bool, Field(description="this use is none that the licence of those weights forbids where it allows no commercial use")
    ] = False
    fold: Annotated[int | None, Field(ge=0, description="the fold kept back and reported on")] = None
    workers: Annotated[
        int | str | None, Field(description="4, or 2..8 to take what the cluster has; null: one per GPU, or one")
    ] = None
    accept_leakage: bool = False
    cv: Annotated[bool, Field(description="keep every fold back in turn, or those of `folds`; `out` gets a model each")] = False
    folds: Annotated[str | None, Field(description="with cv: only these, such as 0,2")] = None
    log_to: Annotated[tuple[str, ...], Field(description="loggers besides: tensorboard[:DIR], mlflow[:URI]")] = ()
    price_per_hour: Annotated[
        float | None, Field(ge=0, description="what an hour of all the machines that train costs; null: nobody says")
    ] = None
    currency: Annotated[str, Field(description="of that price")] = "EUR"
    log_format: Log = None


class SegmentSpec(Config):
    """`jobs/segment.py`: the words of `brainseg segment`. Give `archive` or `manifest`."""

    archive: Annotated[Place | None, Field(description="a folder or s3:// prefix, indexed on the spot")] = None
    manifest: Annotated[Place | None, Field(description="what `brainseg index` wrote")] = None
    model: Annotated[
        ModelPlace | tuple[ModelPlace, ...],
        Field(
            description="the model folder, or the name of a model that ships; several, or a cross-validation's, are an ensemble"
        ),
    ]
    out: Annotated[Place, Field(description="the run folder; an unfinished run of the same kind is taken up again")]
    max_failures: Annotated[int | str | None, Field(description="stop once more scans failed than this: 50, or 5%")] = None
    set: Overrides = ()
    actors: Annotated[int | None, Field(ge=1, description="inference processes; null: one per GPU, or one per core")] = None
    plan: Annotated[str | None, Field(description="`fused` or `apart`; null: by what the cluster has")] = None
    decode_tasks: Annotated[
        int | None, Field(ge=1, description="decoding tasks at once, where they are apart; null: by what was measured")
    ] = None
    scans_per_part: Annotated[
        int | None, Field(ge=1, description="scans written together; null: by their number and what they take")
    ] = None
    precision: Annotated[
        Literal["auto", "bf16", "fp32"] | None, Field(description="auto: bf16 where the hardware gains by it; null: fp32")
    ] = None
    scan_seconds: Annotated[float, Field(gt=0, description="reading one scan may take this long before it is given up")] = 300.0
    price_per_hour: Annotated[float | None, Field(ge=0, description="of the whole cluster, for a dry run's forecast")] = None
    currency: Annotated[str, Field(description="of that price")] = "EUR"
    accept_noncommercial: Annotated[
        bool, Field(description="this use is none that a model's licence forbids where it allows no commercial use")
    ] = False
    dry_run: Annotated[bool, Field(description="take a few scans the whole way and say what a run would take")] = False
    log_format: Log = None

    @property
    def source(self) -> str:
        """The archive or the manifest; ConfigError unless there is exactly one of them."""
        given = [place for place in (self.archive, self.manifest) if place]
        if len(given) != 1:
            raise ConfigError(f"the spec names {len(given) or 'neither'} of archive and manifest; give one")
        return given[0]


class ReportSpec(Config):
    """`jobs/report.py`: the words of `brainseg report`."""

    runs: Annotated[tuple[Place, ...], Field(min_length=1, description="finished runs")]
    out: Annotated[Place | None, Field(description="the page; null: report.html (.json, .csv, .md) in the first run")] = None
    rule: Annotated[Rule, Field(description="what becomes of scans where label and prediction are both empty")] = "exclude"
    where: Annotated[str | None, Field(description="only these scans, such as: site = 'A' and fold in (0, 1)")] = None
    compare: Annotated[Place | None, Field(description="another run on the same scans, compared pair by pair")] = None
    reference: Annotated[Place | None, Field(description="a run to see drift from, without labels")] = None
    format: Annotated[Literal["html", "json", "csv", "md"], Field(description="a page, or its numbers as a text")] = "html"


Kind = Literal["train", "segment", "report"]
Spec = TrainSpec | SegmentSpec | ReportSpec
KINDS: Mapping[str, type[TrainSpec] | type[SegmentSpec] | type[ReportSpec]] = {
    "train": TrainSpec,
    "segment": SegmentSpec,
    "report": ReportSpec,
}


def made_by(spec: Spec) -> str:
    """The place that a job with this spec writes."""
    return spec.out or storage.join(spec.runs[0], f"report.{spec.format}") if isinstance(spec, ReportSpec) else spec.out


def read_spec(kind: type[S], path: str) -> S:
    """Read a job's YAML. ConfigError names an unknown key and lists the valid ones; UsageError where there is no file."""
    if not storage.exists(storage.absolute(path)):
        raise UsageError(f"{path}: there is no such spec")
    return build(kind, commands.read_spec(path), path)


def run(kind: type[S], job: Callable[[S], ExitCode], words: Sequence[str]) -> int:
    """Run a job on the spec that `words` name; our own errors become one line and their exit code, as on the command line."""
    prepare_environment()
    try:
        if len(words) != 1:
            raise UsageError(f"expected one word, the path of a spec (YAML); got {len(words)}")
        spec = read_spec(kind, words[0])
        choose_log_format(getattr(spec, "log_format", None))
        return int(job(spec))
    except BrainsegError as error:
        sys.stderr.write(last_words(error))
        return int(error.exit_code)
