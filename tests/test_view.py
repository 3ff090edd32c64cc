"""View: the page of one scan shows the stored mask slice by slice, and image and label where they can be reached."""

import base64
import io
import json
import re

import factory
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from rows_as_runs import GRID, SHAPE, Page, failed_row, scan_row, tumour, write_run

from brainseg import manifest, storage
from brainseg.errors import RunError, UsageError
from brainseg.formats.nifti import write_nifti
from brainseg.report.view import build_view
from brainseg.tables import MANIFEST

HOSTILE = '</script><script>alert(1)</script><img src=x onerror="alert(2)">'


def data_of(html):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S).group(1))


def see(run, scan_id, tmp_path):
    made = build_view(run, scan_id, str(tmp_path / "view.html"))
    return made, (tmp_path / "view.html").read_text("utf-8")


@pytest.fixture
def reachable(tmp_path):
    """A run of one scan whose image and label lie in an archive that its manifest names."""
    label, answer = tumour((2, 18, 16), 7), tumour((2, 18, 13), 6)
    image = np.random.default_rng(0).integers(1, 900, SHAPE).astype(np.int16)
    sources = []
    for name, role, volume in (("flair", "image", image), ("seg", "label", label)):
        place = tmp_path / f"{name}.nii.gz"
        place.write_bytes(write_nifti(volume, GRID))
        sources.append(
            {"uri": str(place), "role": role, "modality": "flair" if role == "image" else None, "index": None}
            | {"size_bytes": place.stat().st_size, "tag": "t", "sha256": None}
        )
    run = write_run(tmp_path / "run", [scan_row("one", patient="p", label=label, prediction=answer, sources=sources)])
    row = factory.make_row("one", "p", sources=sources, modalities=("flair",), label_map="brats2020", has_label=True)
    table = pa.Table.from_pylist([row], schema=MANIFEST)
    manifest.write_manifest(f"{run}/manifest.parquet", table)
    return run, tmp_path, label, answer


def area(path):
    """Pixels inside an outline, by Green's theorem."""
    total = 0
    for x, y, body in re.findall(r"M(\d+) (\d+)([^z]*)z", path):
        x, y = int(x), int(y)
        for letter, by in re.findall(r"([hv])(-?\d+)", body):
            if letter == "h":
                x += int(by)
            else:
                total += x * int(by)
                y += int(by)
    return abs(total)


def test_every_slice_shows_image_label_and_prediction(reachable):
    run, tmp_path, label, answer = reachable
    made, html = see(run, "one", tmp_path)
    data = data_of(html)
    assert made.remarks == ()
    assert data["depth"] == SHAPE[0] == len(data["images"][0])
    for kind, volume in (("label", label), ("prediction", answer)):
        whole = (volume > 0).sum(axis=(1, 2))
        assert data["areas"][kind] == whole.tolist()
        assert [sum(area(p) for p in paths[:1]) for paths in data[kind]] == whole.tolist()
    assert data["start"] == int((label > 0).sum(axis=(1, 2)).argmax())
    for picture in data["images"][0]:
        assert Image.open(io.BytesIO(base64.b64decode(picture))).format == "WEBP"


def test_without_the_archive_the_mask_stands_alone_and_the_page_says_so(reachable):
    run, tmp_path, _, answer = reachable
    for name in ("flair", "seg"):
        (tmp_path / f"{name}.nii.gz").unlink()
    made, html = see(run, "one", tmp_path)
    data = data_of(html)
    assert data["images"] == []
    assert data["label"] is None
    assert data["areas"]["prediction"] == (answer > 0).sum(axis=(1, 2)).tolist()
    assert "The image is not shown" in Page(html).text
    assert any("label is not shown" in line for line in made.remarks)


def test_a_label_outlives_its_image(reachable):
    run, tmp_path, label, _ = reachable
    (tmp_path / "flair.nii.gz").unlink()
    data = data_of(see(run, "one", tmp_path)[1])
    assert data["images"] == []
    assert data["areas"]["label"] == (label > 0).sum(axis=(1, 2)).tolist()


def test_files_that_have_changed_their_grid_are_not_laid_under_the_mask(reachable):
    run, tmp_path, _, _ = reachable
    for name in ("flair", "seg"):
        volume = np.ones((SHAPE[0], SHAPE[1], SHAPE[2] + 2), np.int16)
        volume[0, 0, 0] = 2
        (tmp_path / f"{name}.nii.gz").write_bytes(
            write_nifti(volume, type(GRID).of(volume.shape, np.array(GRID.affine).reshape(4, 4)))
        )
    made, html = see(run, "one", tmp_path)
    assert data_of(html)["images"] == []
    assert made.remarks


def test_a_failed_scan_says_why_and_what_to_do(tmp_path):
    run = write_run(tmp_path / "run", [failed_row("lost", patient="p", code="TIMEOUT")])
    text = Page(see(run, "lost", tmp_path)[1]).text
    assert "TIMEOUT" in text
    assert "found a stub" in text
    assert "--scan-seconds" in text


def test_a_scan_that_is_not_there_and_a_place_that_is_no_run_are_refused(tmp_path):
    run = write_run(tmp_path / "run", [failed_row("lost", patient="p")])
    with pytest.raises(UsageError, match="no scan 'nobody'"):
        build_view(run, "nobody", str(tmp_path / "view.html"))
    with pytest.raises(UsageError, match=r"no run\.json"):
        build_view(str(tmp_path), "lost", str(tmp_path / "view.html"))
    assert not (tmp_path / "view.html").exists()


def test_a_mask_that_is_not_the_one_that_was_hashed_is_refused(tmp_path):
    label = tumour((2, 18, 16), 6)
    run = write_run(tmp_path / "run", [scan_row("one", patient="p", label=label, prediction=label, mask_sha256="0" * 64)])
    with pytest.raises(RunError, match="sha256"):
        build_view(run, "one", str(tmp_path / "view.html"))


def test_a_hostile_name_stays_text(tmp_path):
    label = tumour((2, 18, 16), 6)
    evil = scan_row(
        HOSTILE, patient=HOSTILE, label=label, prediction=label, warnings=[HOSTILE], attributes=[(HOSTILE, HOSTILE)]
    )
    tame = scan_row("tame", patient="p", label=label, prediction=label, warnings=["w"], attributes=[("a", "b")])
    run = write_run(tmp_path / "run", [evil, tame], model={"name": HOSTILE}, run_id=HOSTILE)
    pages = [Page(see(run, name, tmp_path)[1]) for name in (HOSTILE, "tame")]
    assert pages[0].elements == pages[1].elements
    assert not [name for name, _ in pages[0].attributes if name.startswith("on")]
    assert HOSTILE in pages[0].text


def test_it_works_on_a_run_that_was_never_given_a_manifest(tmp_path):
    label = tumour((2, 18, 16), 6)
    run = write_run(tmp_path / "run", [scan_row("one", patient="p", label=label, prediction=label)])
    assert not storage.exists(f"{run}/manifest.parquet")
    made, html = see(run, "one", tmp_path)
    assert "no manifest" in made.remarks[0]
    assert data_of(html)["prediction"][2]
