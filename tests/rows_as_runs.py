"""Runs made of rows: scans of the fact table with balls for tumours, run folders of them, a page as a browser would see it."""

import hashlib
from datetime import UTC, datetime
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa

from brainseg import report, storage, tables
from brainseg.formats.nifti import write_nifti
from brainseg.geometry import Grid
from brainseg.metrics import score_scan
from brainseg.regions import label_map
from brainseg.thumbnails import make_thumbnail

REGIONS = ("WT", "ET")
SIDES = ("train", "validation", "test")
SHAPE = (4, 40, 36)
GRID = Grid.of(SHAPE, np.diag([-1.0, -1.0, 2.0, 1.0]))
NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)


def ball(centre, radius):
    d, h, w = np.ogrid[tuple(slice(n) for n in SHAPE)]
    return (2 * (d - centre[0])) ** 2 + (h - centre[1]) ** 2 + (w - centre[2]) ** 2 <= radius**2


def tumour(centre, radius):
    label = np.zeros(SHAPE, np.uint8)
    label[ball(centre, radius)] = 2
    label[ball(centre, radius / 2)] = 4
    return label


def scan_row(scan_id, *, patient, label, prediction, seed=0, **changes):
    """One `ok` row of the fact table, measured and drawn from a label (or None) and a predicted label volume."""
    image = np.random.default_rng(seed).normal(600, 60, (1, *SHAPE))
    image = np.where(ball((2, 20, 18), 17), image, 0).astype(np.int16)
    mask = write_nifti(prediction, GRID)
    trust = {"mean_probability": 0.5 + seed % 50 / 100, "mean_entropy": 0.1, "outside_head_fraction": 0.0}
    entries = [{**e, **trust} for e in score_scan(label, prediction, label_map("brats2020"), REGIONS, GRID)]
    source = {
        "uri": f"/gone/{scan_id}.nii.gz",
        "role": "image",
        "modality": "flair",
        "index": None,
        "size_bytes": 9,
        "tag": "t",
    }
    sources = [source] if label is None else [source, {**source, "role": "label", "modality": None}]
    return {
        **common(scan_id, patient, sources),
        "status": "ok",
        "shape": list(SHAPE),
        "spacing_mm": list(GRID.spacing_mm),
        "affine": list(GRID.affine),
        "orientation": GRID.orientation,
        "modalities": ["flair"],
        "mask": mask,
        "mask_encoding": "nii.gz",
        "mask_sha256": hashlib.sha256(mask).hexdigest(),
        "regions": entries,
        "thumbnail": make_thumbnail(image, tuple((0, n) for n in SHAPE), GRID, label, prediction, ("flair",)),
        "seconds_decode": 0.25,
        "seconds_predict": 0.5,
        "seconds_finish": 0.125,
        **changes,
    }


def common(scan_id, patient, sources):
    return {
        "scan_id": scan_id,
        "patient_id": patient,
        "dataset": "synthetic",
        "label_map": "brats2020",
        "fold": 0,
        "sources": sources,
        "attributes": [("site", "A")],
        "warnings": [],
        "model_fingerprint": "f" * 64,
        "config_fingerprint": "c" * 64,
        "content_tag": "t" * 64,
        "run_id": "run-1",
        "node": "here",
        "attempt": 1,
        "finished_at": NOW,
    }


def failed_row(scan_id, *, patient, code="CORRUPT", stage="decode", labelled=True):
    source = {"uri": f"/gone/{scan_id}.nii.gz", "role": "label" if labelled else "image", "modality": None, "index": None}
    error = {
        "status": "failed",
        "error_code": code,
        "error_stage": stage,
        "error_message": f"{scan_id}: found a stub, expected a scan",
    }
    return {**common(scan_id, patient, [source]), **error}


def typical_rows(number=16):
    """Scans of every side of the split, each better than the one before; one missed, spurious, empty, unlabelled, failed."""
    rows = []
    for i in range(number):
        label, answer = tumour((2, 18, 16), 5 + i % 4), tumour((2, 18, 16 + (number - i) // 4), 5 + i % 4)
        rows.append(scan_row(f"scan-{i:03d}", patient=f"p{i:03d}", label=label, prediction=answer, seed=i))
    nothing, something = np.zeros(SHAPE, np.uint8), tumour((2, 20, 20), 6)
    special = {
        "missed": (something, nothing),
        "spurious": (nothing, something),
        "empty": (nothing, nothing),
        "blind": (None, something),
    }
    for name, (label, answer) in special.items():
        rows.append(scan_row(name, patient=name, label=label, prediction=answer))
    rows.append(failed_row("broken-1", patient="broken-1"))
    rows.append(failed_row("broken-2", patient="broken-2", code="INTERNAL", stage="predict"))
    rows.append(failed_row("broken-3", patient="broken-3", labelled=False))
    return rows


def by_three(rows):
    """A split that deals the rows' patients out in turn; every fourth is left outside."""
    split = {side: [] for side in SIDES}
    for i, row in enumerate(rows):
        if i % 4 < 3:
            split[SIDES[i % 4]].append(row["patient_id"])
    return split


def all_test(rows):
    return {"train": ["t1"], "validation": ["v1"], "test": [row["patient_id"] for row in rows]}


def write_run(folder, rows, *, split=None, rows_a_part=8, model=None, **info):
    """A run folder as `segment` leaves it."""
    card = {
        "name": "tiny-net",
        "dataset": "synthetic",
        "label_map": "brats2020",
        "regions": list(REGIONS),
        "modalities": ["flair"],
    }
    card |= {"fingerprint": "f" * 64, "split": split or all_test(rows), "selection_biased": False, "accept_leakage": False}
    card |= {"metrics": {"held_out": {"WT": {"dice_mean": 0.7, "num_scans": 9}}}, **(model or {})}
    body = {"run_id": "run-1", "brainseg_version": "0.1", "created_at": "2026-03-01T10:00:00+00:00", "source": "/gone"}
    body |= {
        "finished_at": "2026-03-01T12:00:00+00:00",
        "model": card,
        "counts": {"found": len(rows)},
        "timings": {"total_s": 7200.0},
    }
    storage.write_json(str(folder / "run.json"), body | info)
    for start in range(0, len(rows), rows_a_part):
        table = pa.Table.from_pylist(rows[start : start + rows_a_part], schema=tables.SCANS)
        storage.write_table(str(folder / "scans" / f"{start:05d}.parquet"), table)
    return str(folder)


class Page(HTMLParser):
    """What a browser would make of a page: its elements, its attributes, its visible text, the figures in it."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.attributes, self.words, self.values = [], [], [], []
        self._open = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.elements.append(tag)
        self.attributes += attrs
        self._open.append(tag)
        if tag == "data":
            self.values.append(dict(attrs)["value"])

    def handle_endtag(self, tag):
        if tag in self._open:
            while self._open.pop() != tag:
                pass

    def handle_data(self, data):
        if not {"script", "style"} & set(self._open):
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def make_page(run, tmp_path):
    out = tmp_path / "report.html"
    made = report.build_report([run], str(out))
    return made, out.read_text(encoding="utf-8")
