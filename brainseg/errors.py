"""What can go wrong, drawn in one place: the exception tree, the codes of the quarantine, the exit codes.

BrainsegError
├── UsageError                what a person typed or configured cannot work; nothing was written      exit 2
│   ├── ConfigError           an unknown key, a value out of range
│   ├── PreflightError        a path, a model, a cluster that cannot serve this job
│   └── LeakageError          a split that would share patients
├── ScanError                 one scan cannot be used; it becomes a quarantine row, the job goes on     exit 3
├── StorageError              an object could not be listed, read or written
├── RunError                  a run folder contradicts itself or belongs to another model or config     exit 2
├── ClusterError              Ray, or a machine under it, died or stands still                          exit 1
└── FailureLimitError         more scans failed than `--max-failures` allows                            exit 4

Foreign exceptions (nibabel, Pillow, tifffile, h5py, botocore, pyarrow) are translated where they arise: in
`formats/` and `storage/`. Callers know only the ones above.
"""

from enum import IntEnum, StrEnum


class ExitCode(IntEnum):
    """What a shell or a scheduler learns from a finished command."""

    OK = 0
    CRASH = 1
    USAGE = 2
    SOME_FAILED = 3
    FAILURE_LIMIT = 4


class Code(StrEnum):
    """Why a scan was refused, or accepted with a warning. Stable: stored in Parquet and queried."""

    AFFINE_MISMATCH = "AFFINE_MISMATCH"
    ALPHA = "ALPHA"
    BAD_AFFINE = "BAD_AFFINE"
    BAD_DATATYPE = "BAD_DATATYPE"
    BAD_HEADER = "BAD_HEADER"
    BAD_ID = "BAD_ID"
    BAD_LABELS = "BAD_LABELS"
    BAD_MAGIC = "BAD_MAGIC"
    BAD_SCALE = "BAD_SCALE"
    BAD_SPACING = "BAD_SPACING"
    CORRUPT = "CORRUPT"
    CORRUPT_GZIP = "CORRUPT_GZIP"
    DUPLICATE_CONTENT = "DUPLICATE_CONTENT"
    DUPLICATE_ID = "DUPLICATE_ID"
    DUPLICATE_SLICE = "DUPLICATE_SLICE"
    EMPTY_FILE = "EMPTY_FILE"
    EMPTY_MASK = "EMPTY_MASK"
    EMPTY_VOLUME = "EMPTY_VOLUME"
    EXIF_ROTATION = "EXIF_ROTATION"
    INTERNAL = "INTERNAL"
    INVERTED = "INVERTED"
    LOSSY = "LOSSY"
    MASK_NOT_INTEGER = "MASK_NOT_INTEGER"
    MISSING_FILE = "MISSING_FILE"
    MISSING_KEY = "MISSING_KEY"
    MISSING_MODALITY = "MISSING_MODALITY"
    MISSING_SLICE = "MISSING_SLICE"
    MIXED_SERIES = "MIXED_SERIES"
    MODALITY_SUSPECT = "MODALITY_SUSPECT"
    MULTI_PAGE = "MULTI_PAGE"
    NO_CHECKSUM = "NO_CHECKSUM"
    NO_GEOMETRY = "NO_GEOMETRY"
    NO_ORIENTATION = "NO_ORIENTATION"
    NON_FINITE = "NON_FINITE"
    NOT_3D = "NOT_3D"
    NOT_A_FILE = "NOT_A_FILE"
    NOT_DICOM = "NOT_DICOM"
    NOT_GREY = "NOT_GREY"
    NOT_HDF5 = "NOT_HDF5"
    NOT_IMAGE = "NOT_IMAGE"
    NOT_NIFTI = "NOT_NIFTI"
    OUT_OF_MEMORY = "OUT_OF_MEMORY"
    OUTLIER = "OUTLIER"
    OUTSIDE_ROOT = "OUTSIDE_ROOT"
    PALETTE = "PALETTE"
    PHI = "PHI"
    PREAMBLE = "PREAMBLE"
    SHAPE_MISMATCH = "SHAPE_MISMATCH"
    SPACING = "SPACING"
    TIMEOUT = "TIMEOUT"
    TOO_LARGE = "TOO_LARGE"
    TRAILING_DATA = "TRAILING_DATA"
    TRUNCATED = "TRUNCATED"
    UNREADABLE = "UNREADABLE"
    UNSAFE_PICKLE = "UNSAFE_PICKLE"
    UNSUPPORTED = "UNSUPPORTED"
    WORKER_DIED = "WORKER_DIED"
    WRONG_EXTENSION = "WRONG_EXTENSION"


MAX_LINE = 2000
"""Characters of one line about a scan; names of 300 characters must not make a table of megabytes."""


def one_line(text: str) -> str:
    """Text as one line that is safe in a terminal, a log, JSON and Parquet: control characters and odd bytes escaped."""
    line = visible(" ".join(text.split()))
    return line if len(line) <= MAX_LINE else line[: MAX_LINE - 3] + "..."


def visible(line: str) -> str:
    """A line as it can be shown: control characters, escape sequences and marks that turn text round appear as `\\x1b`."""
    return line if line.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


class BrainsegError(Exception):
    """Everything brainseg raises on purpose."""

    exit_code = ExitCode.CRASH


class UsageError(BrainsegError):
    """What a person typed or configured cannot work; nothing was written."""

    exit_code = ExitCode.USAGE


class ConfigError(UsageError):
    """An unknown key or a value out of range."""


class PreflightError(UsageError):
    """A path, a model or a cluster that cannot serve this job."""


class LeakageError(UsageError):
    """A split that would share patients between its sides, or cannot prove that it does not."""


class StorageError(BrainsegError):
    """An object could not be listed, read or written."""


class RunError(BrainsegError):
    """A run folder contradicts itself, or belongs to another model or config."""

    exit_code = ExitCode.USAGE


class ClusterError(BrainsegError):
    """Ray, or a machine under it, died or stands still. What was finished stays finished."""


class FailureLimitError(BrainsegError):
    """More scans failed than `--max-failures` allows."""

    exit_code = ExitCode.FAILURE_LIMIT


class ScanError(BrainsegError):
    """One scan cannot be used. `str()` is one line: what was found, what was expected.

    The message names files by their base name and never carries a header's text fields or a DICOM tag's value.
    """

    exit_code = ExitCode.SOME_FAILED

    def __init__(self, code: Code, message: str) -> None:
        self.code = code
        self.message = one_line(message)
        super().__init__(self.message)

    def __reduce__(self) -> tuple[type["ScanError"], tuple[Code, str]]:
        return type(self), (self.code, self.message)
