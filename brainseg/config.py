"""Job configs: frozen, strict values made in one place and passed by argument.

Every config is a pydantic model that refuses unknown keys, so a misspelt `learning_rte` never trains with the default.
They are read from YAML, overridden by `--set a.b=c`, and fingerprinted: two jobs with one fingerprint do the same thing.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from brainseg.errors import ConfigError

Share = Annotated[float, Field(ge=0, le=1)]
Width = Annotated[int, Field(ge=1)]
PatchSide = Annotated[int, Field(ge=4, le=256)]
LesionPreset = Literal["glioma", "meningioma", "metastasis"]
C = TypeVar("C", bound="Config")


class Config(BaseModel):
    """A frozen value that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    added_later: ClassVar[frozenset[str]] = frozenset()
    """Keys that earlier versions did not have: at their default they change nothing, so fingerprints leave them out then."""

    def fingerprint(self) -> str:
        """A sha256 over every setting, in canonical JSON."""
        unchanged = {k for k in self.added_later if getattr(self, k) == type(self).model_fields[k].default}
        text = json.dumps(self.model_dump(mode="json", exclude=unchanged), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


class NetworkConfig(Config):
    """The U-Net: everything needed to rebuild it, given the number of modalities and regions."""

    dimensions: Literal[2, 3] = 2
    """2: slice by slice. 3: by patches of the volume (`prepare.patch`), slices and all."""
    widths: Annotated[tuple[Width, ...], Field(min_length=2, max_length=10)] = (16, 32, 64, 128, 256)
    """Channels of each level, finest first; each level after the first halves height and width, and in 3D depth."""
    norm: Literal["batch", "instance", "group", "none"] = "batch"
    activation: Literal["relu", "leaky_relu"] = "relu"
    dropout: Annotated[float, Field(ge=0, lt=1, description="after each block of the lower half of the levels")] = 0.0
    residual: bool = False
    context_slices: Annotated[int, Field(ge=0, le=5, description="neighbouring slices on either side, as further channels")] = 0
    deep_supervision: Annotated[int, Field(ge=0, description="coarser levels with a head of their own in training")] = 0
    """Levels on the way up, below the finest, that are taught directly; they answer nothing afterwards."""

    @property
    def stride(self) -> int:
        """How many pixels of the model grid become one on the coarsest level."""
        return int(2 ** (len(self.widths) - 1))

    @model_validator(mode="after")
    def _widths_fit_groups(self) -> Self:
        if self.norm == "group" and any(w % 8 for w in self.widths):
            raise ValueError("norm 'group' uses 8 groups: every width must be a multiple of 8")
        return self

    @model_validator(mode="after")
    def _context_is_of_slices(self) -> Self:
        if self.dimensions == 3 and self.context_slices:
            raise ValueError("context_slices must be 0 with dimensions 3: a patch holds its slices' neighbours already")
        return self

    @model_validator(mode="after")
    def _supervised_levels_exist(self) -> Self:
        most = len(self.widths) - 2
        if self.deep_supervision > most:
            levels = len(self.widths)
            raise ValueError(f"deep_supervision is {self.deep_supervision}; {levels} levels have {most} below the finest")
        return self


class PrepareConfig(Config):
    """How a scan's slices become what the network eats. The same for training and inference."""

    size: Annotated[int, Field(ge=16, le=1024, description="height and width of the model grid in pixels")] = 128
    frame: Literal["full", "head"] = "full"
    """`full`: the whole slice, padded to a square. `head`: a square around the head, so that heads come equally large."""
    normalise: Literal["zscore", "volume_max", "slice_max"] = "zscore"
    """`zscore`: per scan and modality over its non-background voxels. The other two divide by a maximum."""
    patch: tuple[PatchSide, PatchSide, PatchSide] | None = None
    """For a 3D network: slices, rows and columns that go through together. Rows and columns are pixels of the model grid,
    slices are the scan's own."""


def misfit(network: NetworkConfig, prepare: PrepareConfig) -> str | None:
    """Why a network cannot work on what it would be given; None where it can."""
    need = f"{len(network.widths)} levels need a multiple of {network.stride}, at least {2 * network.stride}"
    if network.dimensions == 2:
        if prepare.patch is not None:
            return "prepare.patch is for network.dimensions 3 alone"
        return None if _fits(prepare.size, network.stride) else f"prepare.size is {prepare.size}; {need}"
    if prepare.patch is None:
        return "network.dimensions 3 needs prepare.patch, such as [64, 64, 64]"
    if not all(_fits(side, network.stride) for side in prepare.patch):
        return f"prepare.patch is {list(prepare.patch)}; {need}"
    if max(prepare.patch[1:]) > prepare.size:
        return f"prepare.patch is {list(prepare.patch)}; its rows and columns must fit in prepare.size, {prepare.size}"
    return None


def _fits(side: int, stride: int) -> bool:
    return side % stride == 0 and side >= 2 * stride


class AugmentConfig(Config):
    """Random changes to training samples, each drawn first and applied after."""

    rotate_degrees: Annotated[float, Field(ge=0, le=180)] = 0.0
    log_scale: Annotated[float, Field(ge=0, le=1, description="zoom by exp(uniform(-x, x))")] = 0.0
    shift: Annotated[float, Field(ge=0, le=0.5, description="share of the field of view")] = 0.0
    flip: bool = False
    intensity: Annotated[float, Field(ge=0, le=1, description="per-modality gain 1 +- x and offset +- x")] = 0.0
    gamma: Annotated[float, Field(ge=0, le=1, description="contrast exponent exp(uniform(-x, x))")] = 0.0
    noise: Annotated[float, Field(ge=0, description="largest standard deviation of added Gaussian noise")] = 0.0
    blur: Share = 0.0
    """Share of the samples that are smoothed."""
    elastic: Share = 0.0
    """Share of the samples that are bent, smoothly and differently from place to place."""
    elastic_shift: Annotated[float, Field(ge=0, le=0.1)] = 0.05
    """How far a place may be bent, as share of the field of view. Up to 0.1 nothing folds over itself."""
    low_resolution: Share = 0.0
    """Share of the samples whose image loses detail, as if acquired with pixels up to twice as wide."""
    modality_dropout: Share = 0.0
    """Share of the samples in which one modality is replaced by another, so that a missing one is survivable."""


class LossConfig(Config):
    """Per region, then averaged over the regions."""

    kind: Literal["dice", "bce", "bce_dice"] = "bce_dice"
    dice_over: Literal["batch", "sample"] = "batch"
    """`batch`: one Dice over all samples of the global batch (stable when most slices are empty). `sample`: the mean of each
    one's."""


class OptimiserConfig(Config):
    kind: Literal["adam", "adamw"] = "adamw"
    learning_rate: Annotated[float, Field(gt=0)] = 2e-3
    weight_decay: Annotated[float, Field(ge=0)] = 1e-2
    schedule: Literal["constant", "cosine"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    clip_norm: Annotated[float, Field(ge=0, description="largest gradient norm; 0 switches clipping off")] = 1.0


class TrainConfig(Config):
    """One recipe: from a manifest to a model."""

    added_later = frozenset({"choose", "flip_answers", "overlays_every", "coarse_size", "coarse_share", "pretrained"})

    name: str = "unet"
    modalities: tuple[str, ...] = ()
    """Empty: what every scan of the manifest has, in the manifest's order."""
    regions: Annotated[tuple[str, ...], Field(min_length=1, max_length=8)] = ("tumor",)
    network: NetworkConfig = NetworkConfig()
    prepare: PrepareConfig = PrepareConfig()
    augment: AugmentConfig = AugmentConfig()
    loss: LossConfig = LossConfig()
    optimiser: OptimiserConfig = OptimiserConfig()
    epochs: Annotated[int, Field(ge=1)] = 30
    batch_size: Annotated[int, Field(ge=1, description="slices of one optimiser step over all workers together")] = 16
    micro_batch: Annotated[int | None, Field(ge=1)] = None
    """Largest number of slices that one worker puts through at once, for less memory; null: its whole share of the batch. The
    gradient stays that of the whole batch, except that batch norm normalises by what goes through together."""
    foreground_share: Share = 0.5
    """Share of each batch that is taken from slices with tumour; 0: slices as they come."""
    samples_per_epoch: Annotated[int | None, Field(ge=1)] = None
    """None: as many as there are slices to choose from."""
    coarse_size: Annotated[int | None, Field(ge=16, le=1024)] = None
    """Training begins on slices of so many pixels a side, less than `prepare.size`: more steps in the same time; null: no. What
    is validated is always the network at its full size, so that Dice leaps where the fine epochs begin."""
    coarse_share: Annotated[float, Field(gt=0, lt=1, description="with coarse_size: share of the epochs that is coarse")] = 0.6
    validate_every: Annotated[int, Field(ge=1, description="epochs between validations")] = 1
    patience: Annotated[int | None, Field(ge=1)] = None
    """Validations without a better Dice before stopping; null: never."""
    overlays_every: Annotated[int | None, Field(ge=1)] = 5
    """Epochs between pictures of some validation slices; the first, the best and the last stay in the model folder. null: no
    picture of a patient is ever made."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Moving average of the weights per step; 0 switches it off."""
    validation_share: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the training patients kept for early stopping. 0: the held-out fold itself serves for it, and the model says
    `selection_biased: true`."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    choose: bool = False
    """Choose threshold and smallest component on the validation patients once the best weights are found, and measure the
    held-out fold a second time as chosen. The plain figures stay beside it."""
    flip_answers: Annotated[bool, Field(description="with `choose`: average with the left-right mirrored slice there")] = False
    pretrained: str | None = None
    """A model to begin with the weights of (fine-tuning): its folder, the name of one that ships, or the folder of a
    cross-validation, of which each fold begins with the model that kept it back. Network, modalities and regions must be those
    of this recipe. null: weights drawn from `seed`."""
    seed: Annotated[int, Field(ge=0)] = 0
    folds_held_out: int = 0
    """The manifest's fold that is never trained on and that the model's figures are about."""
    accept_leakage: bool = False

    @model_validator(mode="after")
    def _parts_fit_together(self) -> Self:
        problem = misfit(self.network, self.prepare) or self._coarse_misfit()
        if problem:
            raise ValueError(problem)
        for name in ("modalities", "regions"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"{name} must differ from each other")
        return self

    def _coarse_misfit(self) -> str | None:
        size = self.coarse_size
        if size is None:
            return None
        if self.network.dimensions == 3:
            return "coarse_size is for network.dimensions 2 alone"
        if size >= self.prepare.size:
            return f"coarse_size is {size}; it must be less than prepare.size, {self.prepare.size}"
        problem = misfit(self.network, self.prepare.model_copy(update={"size": size}))
        return problem and problem.replace("prepare.size", "coarse_size")

    def size_in(self, epoch: int) -> int:
        """Pixels a side of what the network is taught with in an epoch, counted from 0."""
        if self.coarse_size is None or epoch >= round(self.epochs * self.coarse_share):
            return self.prepare.size
        return self.coarse_size


class SegmentConfig(Config):
    """Everything that changes a run's answers, and nothing that does not."""

    added_later = frozenset({"smallest_component", "members"})

    threshold: Annotated[float, Field(gt=0, lt=1)] | Literal["chosen"] = 0.5
    """`chosen`: what a sweep over the model's validation patients has recorded in the model."""
    smallest_component: Annotated[int, Field(ge=0, strict=True)] | Literal["largest", "chosen"] = 0
    """Components of a region with fewer voxels of the native grid are dropped; `largest`: all but the largest one of each
    region; `chosen`: as the same sweep recorded; 0: none."""
    flip: Annotated[bool, Field(description="average with the left-right mirrored slice (test-time augmentation)")] = False
    members: Literal["all", "out-of-fold"] = "all"
    """Of several models, which ones answer a scan: `all`, or `out-of-fold`: those that never trained on its patient nor were
    chosen by it. Somebody whom none of them met is answered by all."""
    precision: Literal["auto", "fp32", "bf16"] = "fp32"
    thumbnails: bool = True
    score: Annotated[bool, Field(description="score against labels where the manifest has them")] = True
    lesion_preset: Annotated[
        LesionPreset,
        Field(description="which tumour's BraTS 2023 rule the lesion-wise figures follow: dilation and the smallest lesion"),
    ] = "glioma"


class How(Config):
    """How a bulk run goes about it; none of it changes an answer."""

    max_failures: Annotated[str | None, Field(description="stop once more scans failed than this: 50, or 5%")] = None
    mode: Annotated[
        Literal["fused", "apart"] | None, Field(description="where decoding happens; null: by what the cluster has")
    ] = None
    actors: Annotated[int | None, Field(ge=1, description="inference processes; null: one per GPU, or one per core")] = None
    decode_tasks: Annotated[
        int | None, Field(ge=1, description="decoding tasks at once, where they are apart; null: by what was measured")
    ] = None
    scans_per_part: Annotated[int | None, Field(ge=1, description="scans a part; null: by their number and what they take")] = (
        None
    )
    scan_seconds: Annotated[float, Field(gt=0, description="reading one scan may take this long before it is given up")] = 300.0
    price_per_hour: Annotated[float | None, Field(ge=0, description="of the whole cluster, for a dry run's forecast")] = None
    currency: Annotated[str, Field(max_length=10)] = "EUR"
    dry_run: bool = False
    accept_noncommercial: Annotated[
        bool, Field(description="this use is none that a licence without commercial use forbids")
    ] = False


class Crew(Config):
    """How many workers train together: as many as given, or whatever the cluster has between two numbers."""

    fewest: Annotated[int, Field(ge=1)]
    most: Annotated[int, Field(ge=1)]

    @property
    def is_elastic(self) -> bool:
        return self.fewest < self.most

    def __str__(self) -> str:
        return f"{self.fewest} to {self.most}" if self.is_elastic else str(self.most)


def read_crew(text: str | int) -> Crew:
    """Workers as a person writes them: `4`, or `2..8`; ConfigError for anything else."""
    found = re.fullmatch(r"([1-9]\d{0,3})(?:\.\.([1-9]\d{0,3}))?", str(text).strip())
    if found is None or (found[2] and int(found[2]) < int(found[1])):
        raise ConfigError(f"workers {str(text)[:40]!a}: expected a number such as 4, or a range such as 2..8")
    return Crew(fewest=int(found[1]), most=int(found[2] or found[1]))


def read_yaml(text: str, source: str) -> dict[str, Any]:
    """Parse a YAML mapping; ConfigError where it is anything else."""
    try:
        body = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not YAML: {' '.join(str(error).split())}") from error
    if body is None:
        return {}
    if not isinstance(body, dict):
        raise ConfigError(f"{source}: found a {type(body).__name__}, expected a mapping of keys to values")
    return body


def build(kind: type[C], values: Mapping[str, Any], source: str) -> C:
    """Make a config from plain values; ConfigError names the key and lists the valid ones."""
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        raise ConfigError(f"{source}: {_first_problem(kind, error)}") from error


def _first_problem(kind: type[Config], error: ValidationError) -> str:
    first = error.errors()[0]
    if first["type"] != "extra_forbidden":
        where = _key(kind, first["loc"])
        said = dict.fromkeys(e["msg"] for e in error.errors() if _key(kind, e["loc"]) == where)
        return f"{where}: {', or: '.join(said)}" if where else first["msg"]
    where = ".".join(str(p) for p in first["loc"])
    owner: type[BaseModel] = kind
    for part in first["loc"][:-1]:
        annotation = owner.model_fields[str(part)].annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            owner = annotation
    return f"unknown key '{where}'; valid here: {', '.join(owner.model_fields)}"


def _key(kind: type[BaseModel], loc: Sequence[int | str]) -> str:
    """The dotted key of an error's place, without the arm of a union that pydantic appends to it."""
    out: list[str] = []
    owner: object = kind
    for part in loc:
        fields = owner.model_fields if isinstance(owner, type) and issubclass(owner, BaseModel) else {}
        if isinstance(part, str) and part not in fields:
            break
        out.append(str(part))
        owner = fields[part].annotation if isinstance(part, str) else None
    return ".".join(out)


def override(values: Mapping[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Apply `a.b=c` assignments (values read as YAML) to nested plain values; ConfigError on a malformed one."""
    out: dict[str, Any] = json.loads(json.dumps(values))
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals or not path:
            raise ConfigError(f"--set {assignment}: expected KEY=VALUE, such as optimiser.learning_rate=0.001")
        *parents, last = path.split(".")
        node = out
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ConfigError(f"--set {assignment}: '{parent}' is a value, not a group of keys")
        try:
            node[last] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {assignment}: the value is not YAML: {' '.join(str(error).split())}") from error
    return out
