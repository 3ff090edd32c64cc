"""Stages: what happens to one scan of a bulk run, as plain functions that a test calls without Ray.

decode (row -> Work) -> predict (Work -> Work with a prediction) -> finish (Work -> a row of the `scans` table).
A scan that fails in a stage carries its failure onward and becomes a quarantine row; the others never notice.
"""

import hashlib
import json
import logging
import math
import socket
import struct
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from brainseg.card import ModelCard
from brainseg.config import SegmentConfig
from brainseg.errors import Code, ScanError, StorageError
from brainseg.geometry import Grid
from brainseg.masks import encode_mask
from brainseg.model import OnDevice, Prediction, Segmenter
from brainseg.runs import content_tag
from brainseg.scans import Scan, load_scan
from brainseg.scoring import score_regions, with_trust
from brainseg.thumbnails import make_thumbnail
from brainseg.time_limit import TimeLimit

LOG = logging.getLogger(__name__)
PACKAGE = Path(__file__).parent
VOXELS_TOGETHER = 24_000_000
"""Scans share forward batches until their crops hold this many voxels: keeps memory flat whatever a part's size."""
INTENSITY_VOXELS = 200_000
"""How bright a scan is, is taken from about so many voxels: a mean needs no more."""

LENGTH = struct.Struct("<Q")
ALIGNED = 64
"""Arrays begin at a multiple of so many bytes, as Arrow's buffers do."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Job:
    """What every worker of a run must know. Plain values; travels to the workers once."""

    run: str
    model: str
    settings: SegmentConfig
    run_id: str
    attempt: int
    model_fingerprint: str
    config_fingerprint: str
    card: ModelCard
    lease: int | None = None
    """The driver's generation (`lease`); None: nobody else can be at the run."""
    scan_seconds: float = 300.0
    suspects: frozenset[str] = frozenset()
    """Scans that were in flight when an earlier driver died."""
    other_models: tuple[str, ...] = ()
    """Whose probabilities are averaged with the model's."""


@dataclass(frozen=True)
class Failure:
    code: str
    stage: str
    message: str


@dataclass(frozen=True)
class Work:
    """One scan on its way: its manifest row and what has been made of it so far."""

    row: Row
    scan: Scan | None = None
    prediction: Prediction | None = None
    failure: Failure | None = None
    seconds_decode: float = 0.0
    seconds_predict: float = 0.0


def guarded(stage: str, scan_id: str, call: Callable[[], Work], row: Row) -> Work:
    """Run one stage of one scan; whatever goes wrong becomes that scan's failure. One scan may fail; the job may not."""
    try:
        return call()
    except ScanError as error:
        return Work(row, failure=Failure(error.code, stage, error.message))
    except StorageError as error:
        return Work(row, failure=Failure(Code.UNREADABLE, stage, str(error)))
    except (MemoryError, torch.OutOfMemoryError):
        return Work(row, failure=Failure(Code.OUT_OF_MEMORY, stage, f"{scan_id}: not enough memory"))
    except Exception as error:  # noqa: BLE001  a fault of ours in one scan must not end a run of a million
        LOG.error("%s: fault while doing stage %s\n%s", scan_id, stage, frames_of(error))  # noqa: TRY400  without its values
        message = f"{scan_id}: {type(error).__name__} inside brainseg ({innermost(error)}); please report it"
        return Work(row, failure=Failure(Code.INTERNAL, stage, message))


def innermost(error: BaseException) -> str:
    """Where in brainseg an exception arose or passed last, such as `formats/nifti.py:88`. No value, no path of the machine."""
    places = [(Path(frame.filename), frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    ours = [f"{path.relative_to(PACKAGE)}:{line}" for path, line in places if path.is_relative_to(PACKAGE)]
    return ours[-1] if ours else "outside of it"


def frames_of(error: BaseException) -> str:
    """The traceback of an exception and of what caused it, without what they say: that may quote a file or a header."""
    earlier = error.__cause__ or error.__context__
    before = f"{frames_of(earlier)}which led to\n" if earlier else ""
    return f"{before}{''.join(traceback.format_tb(error.__traceback__))}{type(error).__name__}\n"


def lost(row: Row, stage: str) -> Work:
    """What becomes of a scan over which processes died again and again."""
    text = f"{row['scan_id']}: every process that tried it died: killed, out of memory, or a fault in a decoder"
    return Work(row, failure=Failure(Code.WORKER_DIED, stage, text))


def decode(row: Row, *, with_label: bool, limit: TimeLimit | None = None, fetched: Row | None = None) -> Work:
    """Read, decode, check, crop; within a time limit, if there is one. `fetched` is the row with its files on their way."""
    started = time.perf_counter()
    stage = "list" if row["problem_code"] else "decode"

    def load() -> Work:
        return Work(row, load_scan(fetched or row, with_label=with_label))

    work = guarded(stage, row["scan_id"], load if limit is None else lambda: limit.call(load, row["scan_id"]), row)
    return replace(work, seconds_decode=time.perf_counter() - started)


def predict(model: Segmenter, works: Sequence[Work], on_device: OnDevice = nullcontext) -> list[Work]:
    """Segment scans together; if that fails, one by one, so that only the guilty fails.

    What the model's device does for them happens inside `on_device()`, each time that it is tried.
    """
    ready = [w for w in works if w.scan is not None]
    try:
        scans, whose = [w.scan for w in ready if w.scan is not None], [w.row["patient_id"] for w in ready]
        answers = iter(model.predict(scans, whose, on_device)) if ready else iter(())
    except Exception:  # noqa: BLE001  whoever caused it is found, and named, by trying each scan alone
        if len(works) > 1:
            return [one for w in works for one in predict(model, [w], on_device)]
        return [_predict_alone(model, works[0], on_device)]
    return [replace(w, prediction=(p := next(answers)), seconds_predict=p.seconds) if w.scan is not None else w for w in works]


def _predict_alone(model: Segmenter, work: Work, on_device: OnDevice) -> Work:
    def call() -> Work:
        assert work.scan is not None
        answer = model.predict([work.scan], [work.row["patient_id"]], on_device)[0]
        return replace(work, prediction=answer, seconds_predict=answer.seconds)

    done = guarded("predict", work.row["scan_id"], call, work.row)
    return replace(done, seconds_decode=work.seconds_decode)


def finish(work: Work, job: Job) -> dict[str, Any]:
    """Score, encode, and write down: the finished row of the `scans` table."""
    started = time.perf_counter()
    row = _identity(work.row, job) | {"seconds_decode": work.seconds_decode, "seconds_predict": work.seconds_predict}
    done = guarded("finish", work.row["scan_id"], lambda: _measured(work, row, job), work.row) if work.failure is None else work
    if done.failure is not None:
        row |= {"error_code": done.failure.code, "error_stage": done.failure.stage, "error_message": done.failure.message}
    return row | {"seconds_finish": time.perf_counter() - started, "finished_at": datetime.now(UTC)}


def _identity(row: Row, job: Job) -> dict[str, Any]:
    """The columns that every row has, failed until proven otherwise."""
    kept = {k: row[k] for k in ("scan_id", "patient_id", "dataset", "label_map", "fold", "sources", "attributes")}
    return {
        **kept,
        "status": "failed",
        "warnings": [],
        "modalities_missing": [m for m in job.card.modalities if m not in row["modalities"]],
        "model_fingerprint": job.model_fingerprint,
        "config_fingerprint": job.config_fingerprint,
        "content_tag": content_tag(row),
        "run_id": job.run_id,
        "node": socket.gethostname(),
        "attempt": job.attempt,
    }


def _measured(work: Work, row: dict[str, Any], job: Job) -> Work:
    """Fill in an `ok` row: grid, mask, regions, thumbnail."""
    scan, prediction = work.scan, work.prediction
    assert scan is not None
    assert prediction is not None
    meaning, lesions = str(work.row["label_map"]), job.settings.lesion_preset
    entries = score_regions(scan.label, meaning, prediction.label, scan.grid, job.card, lesions=lesions)
    mask, encoding = encode_mask(prediction.label, scan.grid)
    if job.settings.thumbnails:
        masks = (scan.label, prediction.label)
        row["thumbnail"] = make_thumbnail(scan.image, scan.box, scan.grid, *masks, scan.modalities, scan.background)
    row |= {
        "warnings": list(scan.warnings),
        "shape": list(scan.grid.shape),
        "spacing_mm": None if scan.grid.spacing_mm is None else list(scan.grid.spacing_mm),
        "affine": None if scan.grid.affine is None else list(scan.grid.affine),
        "orientation": scan.grid.orientation,
        "modalities": list(job.card.modalities),
        "modalities_duplicated": list(scan.duplicated),
        "intensities": intensities(scan),
        "mask": mask,
        "mask_encoding": encoding,
        "mask_sha256": hashlib.sha256(mask).hexdigest(),
        "regions": with_trust(entries, prediction),
        "status": "ok",
    }
    return work


def intensities(scan: Scan) -> list[dict[str, Any]]:
    """Mean and standard deviation of each modality inside the head, as stored: entries of `tables.INTENSITY`."""
    found: list[dict[str, Any]] = []
    for name, volume, nothing in zip(scan.modalities, scan.image, scan.background, strict=True):
        step = next(n for n in count(max(1, volume.size // INTENSITY_VOXELS)) if math.gcd(n, volume.size) == 1)
        sample = volume.reshape(-1)[::step]  # a step that shares no factor with the shape comes by every row and column
        head = sample[sample != nothing].astype(np.float64)
        known = {"mean": float(head.mean()), "sd": float(head.std())} if head.size else {"mean": None, "sd": None}
        found.append({"modality": name, **known})
    return found


def in_groups(works: Iterable[Work]) -> Iterator[list[Work]]:
    """Gather scans until their crops hold VOXELS_TOGETHER voxels.

    Where another as large as the last would be too much, it is not waited for: it would be held while these are segmented.
    """
    group: list[Work] = []
    voxels = 0
    for work in works:
        size = 0 if work.scan is None else work.scan.image.size
        if group and voxels + size > VOXELS_TOGETHER:
            yield group
            group, voxels = [], 0
        group.append(work)
        voxels += size
        del work
        if voxels + size > VOXELS_TOGETHER:
            yield group
            group, voxels = [], 0
    if group:
        yield group


def pack(work: Work) -> pa.Buffer:
    """A Work without its manifest row as bytes: a JSON header, then the raw arrays, each copied once. Undone by `unpack`."""
    scan, prediction = work.scan, work.prediction
    arrays: list[NDArray[Any]] = [] if scan is None else [scan.image, *([scan.label] if scan.label is not None else [])]
    arrays += [prediction.label] if prediction is not None else []
    head = {
        "failure": work.failure.__dict__ if work.failure else None,
        "seconds": [work.seconds_decode, work.seconds_predict],
        "arrays": [[a.dtype.str, list(a.shape)] for a in arrays],
        "scan": None if scan is None else _describe(scan),
        "prediction": None if prediction is None else {"trust": prediction.trust, "seconds": prediction.seconds},
    }
    text = json.dumps(head).encode()
    text = text.ljust(-(-(LENGTH.size + len(text)) // ALIGNED) * ALIGNED - LENGTH.size)
    offset = LENGTH.size + len(text)
    buffer = pa.allocate_buffer(offset + sum(a.nbytes for a in arrays))
    room = np.frombuffer(buffer, np.uint8)
    room[:offset] = np.frombuffer(LENGTH.pack(len(text)) + text, np.uint8)
    for array in arrays:
        np.copyto(np.frombuffer(buffer, array.dtype, array.size, offset).reshape(array.shape), array)
        offset += array.nbytes
    return buffer


def column(packed: Iterable[pa.Buffer]) -> pa.ChunkedArray:
    """Packed works as a column of large binaries, where they are."""
    kind = pa.large_binary()
    chunks = [pa.Array.from_buffers(kind, 1, [None, _ends(buffer.size), buffer]) for buffer in packed]
    return pa.chunked_array(chunks, kind)


def values(packed: pa.ChunkedArray) -> Iterator[pa.Buffer]:
    """The bytes of a `column`, where they are; pyarrow itself would copy each."""
    for chunk in packed.chunks:
        _, ends, data = chunk.buffers()
        places = np.frombuffer(ends, np.int64)[chunk.offset : chunk.offset + len(chunk) + 1].tolist()
        yield from (data.slice(begin, end - begin) for begin, end in pairwise(places))


def _ends(size: int) -> pa.Buffer:
    """Where the one value of an Arrow array of binaries begins and ends."""
    return pa.py_buffer(np.array([0, size], np.int64))


def _describe(scan: Scan) -> dict[str, Any]:
    """A scan without its arrays, as JSON takes it."""
    plain = {n: getattr(scan, n) for n in ("scan_id", "modalities", "background", "box", "duplicated", "warnings")}
    return {**plain, "shape": scan.grid.shape, "affine": scan.grid.affine, "labelled": scan.label is not None}


def unpack(data: pa.Buffer, row: Row) -> Work:
    """Undo `pack`; arrays are views into the bytes."""
    (length,) = LENGTH.unpack_from(data)
    offset = LENGTH.size + length
    head, arrays = json.loads(data[LENGTH.size : offset].to_pybytes()), []
    for kind, shape in head["arrays"]:
        size = int(np.prod(shape))
        arrays.append(np.frombuffer(data, np.dtype(kind), size, offset).reshape(shape))
        offset += size * np.dtype(kind).itemsize
    s, p = head["scan"], head["prediction"]
    return Work(
        row,
        None if s is None else _described(s, arrays[0], arrays[1] if s["labelled"] else None),
        None if p is None else Prediction(arrays[-1], tuple(p["trust"]), p["seconds"]),
        Failure(**head["failure"]) if head["failure"] else None,
        *head["seconds"],
    )


def _described(s: Mapping[str, Any], image: NDArray[Any], label: NDArray[np.uint8] | None) -> Scan:
    """Undo `_describe`."""
    (a, b), (c, d), (e, f) = s["box"]
    return Scan(
        scan_id=s["scan_id"],
        modalities=tuple(s["modalities"]),
        image=image,
        background=tuple(s["background"]),
        grid=Grid(tuple(s["shape"]), None if s["affine"] is None else tuple(s["affine"])),
        box=((a, b), (c, d), (e, f)),
        label=label,
        duplicated=tuple(s["duplicated"]),
        warnings=tuple(s["warnings"]),
    )
