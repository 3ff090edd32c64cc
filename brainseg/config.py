"""Job configs: frozen, strict values made in one place and passed by argument.

Every config is a pydantic model that refuses unknown keys, so a misspelt `learning_rte` never trains with the default.
They are read from YAML, overridden by `--set a.b=c`, and fingerprinted: two jobs with one fingerprint do the same thing.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from brainseg.errors import ConfigError

Share = Annotated[float, Field(ge=0, le=1)]
Width = Annotated[int, Field(ge=1)]
LesionPreset = Literal["glioma", "meningioma", "metastasis"]
C = TypeVar("C", bound="Config")


class Config(BaseModel):
    """A frozen value that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    def fingerprint(self) -> str:
        """A sha256 over every setting, in canonical JSON."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


class NetworkConfig(Config):
    """The U-Net: everything needed to rebuild it, given the number of modalities and regions."""

    widths: Annotated[tuple[Width, ...], Field(min_length=2)] = (16, 32, 64, 128, 256)
    """Channels of each level, finest first; each level after the first halves height and width."""
    norm: Literal["batch", "instance", "group", "none"] = "batch"
    activation: Literal["relu", "leaky_relu"] = "relu"
    dropout: Annotated[float, Field(ge=0, lt=1, description="after each block of the lower half of the levels")] = 0.0
    residual: bool = False
    context_slices: Annotated[int, Field(ge=0, le=5, description="neighbouring slices on either side, as further channels")] = 0

    @property
    def stride(self) -> int:
        """How many pixels of the model grid become one on the coarsest level."""
        return int(2 ** (len(self.widths) - 1))

    @model_validator(mode="after")
    def _widths_fit_groups(self) -> Self:
        if self.norm == "group" and any(w % 8 for w in self.widths):
            raise ValueError("norm 'group' uses 8 groups: every width must be a multiple of 8")
        return self


class PrepareConfig(Config):
    """How a scan's slices become what the network eats. The same for training and inference."""

    size: Annotated[int, Field(ge=16, le=1024, description="height and width of the model grid in pixels")] = 128
    frame: Literal["full", "head"] = "full"
    """`full`: the whole slice, padded to a square. `head`: a square around the head, so that heads come equally large."""
    normalise: Literal["zscore", "volume_max", "slice_max"] = "zscore"
    """`zscore`: per scan and modality over its non-background voxels. The other two divide by a maximum."""


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
    foreground_share: Share = 0.5
    """Share of each batch that is taken from slices with tumour; 0: slices as they come."""
    samples_per_epoch: Annotated[int | None, Field(ge=1)] = None
    """None: as many as there are slices to choose from."""
    validate_every: Annotated[int, Field(ge=1, description="epochs between validations")] = 1
    patience: Annotated[int | None, Field(ge=1)] = None
    """Validations without a better Dice before stopping; null: never."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Moving average of the weights per step; 0 switches it off."""
    validation_share: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the training patients kept for early stopping. 0: the held-out fold itself serves for it, and the model says
    `selection_biased: true`."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    seed: Annotated[int, Field(ge=0)] = 0
    folds_held_out: int = 0
    """The manifest's fold that is never trained on and that the model's figures are about."""
    accept_leakage: bool = False

    @model_validator(mode="after")
    def _slices_fit_network(self) -> Self:
        size, stride = self.prepare.size, self.network.stride
        if size % stride or size < 2 * stride:
            levels = len(self.network.widths)
            raise ValueError(f"prepare.size is {size}; {levels} levels need a multiple of {stride}, at least {2 * stride}")
        for name in ("modalities", "regions"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"{name} must differ from each other")
        return self


class SegmentConfig(Config):
    """Everything that changes a run's answers, and nothing that does not."""

    threshold: Annotated[float, Field(gt=0, lt=1)] | Literal["chosen"] = 0.5
    """`chosen`: what a sweep over the model's validation patients has recorded in the model."""
    flip: Annotated[bool, Field(description="average with the left-right mirrored slice (test-time augmentation)")] = False
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
    scan_seconds: Annotated[float, Field(gt=0, description="reading one scan may take this long before it is given up")] = 300.0
    dry_run: bool = False


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
