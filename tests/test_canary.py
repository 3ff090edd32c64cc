"""Canary: what a file's header says of a person, and what opens a store, stand in nothing that brainseg writes or says."""

import gzip
import json
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import factory
import nibabel as nib
import pytest
from object_stores import BUCKET, moto_server, s3, surroundings

from brainseg import runs, storage
from brainseg.card import load_card
from brainseg.cli import main
from brainseg.phantom import write_archive

CANARY = "CANARY"
MODALITIES = ("flair", "t1", "t1c", "t2")
SECRETS = {"AWS_ACCESS_KEY_ID": "AKIACANARYKEY", "AWS_SECRET_ACCESS_KEY": "CANARYsecret", "AWS_SESSION_TOKEN": "CANARYtoken"}


def tell(path):
    """Put a person's name wherever a NIfTI file has room for text, and into the wrapping."""
    image = nib.Nifti1Image.from_bytes(gzip.decompress(path.read_bytes()))
    for name in ("descrip", "aux_file", "db_name", "intent_name"):
        image.header[name] = f"{CANARY}^{name}"[: image.header[name].dtype.itemsize].encode()
    for code in ("comment", "dicom", "afni"):
        image.header.extensions.append(nib.nifti1.Nifti1Extension(code, f"PatientName {CANARY}^JANE".encode()))
    with path.open("wb") as file, gzip.GzipFile(f"{CANARY}.nii", "wb", fileobj=file) as wrapped:
        wrapped.write(image.to_bytes())


def spoil(archive):
    """Damage one image of each of four scans in a different way, all of them after the header's text."""
    scans = sorted(folder for folder in archive.rglob("*") if folder.is_dir() and list(folder.glob("*.nii.gz")))
    for number, folder in enumerate(scans[:4]):
        path = next(p for p in sorted(folder.glob("*.nii.gz")) if "seg" not in p.name)
        plain = bytearray(gzip.decompress(path.read_bytes()))
        if number == 0:
            plain[70:72] = (2048).to_bytes(2, "little")  # a type of voxel that is not supported
        elif number == 1:
            del plain[-500:]
        elif number == 2:
            plain[344:348] = b"xxx\0"
        elif number == 3:
            plain[40:42] = (9).to_bytes(2, "little")  # dimensions
        path.write_bytes(gzip.compress(bytes(plain)))


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    place = tmp_path_factory.mktemp("archive")
    write_archive(place, "brats", scans=8, shape=(6, 48, 48), seed=2)
    for path in place.rglob("*.nii.gz"):
        tell(path)
    spoil(place)
    return place


def make_model(folder):
    card = factory.make_card(factory.tiny_config(modalities=MODALITIES, regions=("WT",)), label_map="brats2020")
    factory.make_model(folder, card)
    return str(folder)


def call(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["brainseg", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


def plain_bytes(path):
    """Everything that a file holds, also what is compressed in it."""
    data = path.read_bytes()
    yield data
    if path.name.endswith(".gz"):
        yield gzip.decompress(data)
    if path.suffix == ".parquet":
        for row in storage.read_table(str(path)).to_pylist():
            yield repr(row).encode()
            if row.get("mask_encoding") == "nii.gz":
                yield gzip.decompress(row["mask"])


def files_with(text, folder):
    """The files below a folder that hold a text in whatever spelling."""
    wanted = [text.encode(), text.lower().encode(), text.encode("utf-16-le")]
    found = [p for p in Path(folder).rglob("*") if p.is_file() and not p.is_symlink()]
    return [p for p in found if any(one in data for data in plain_bytes(p) for one in wanted)]


def test_the_canary_would_be_found(archive, tmp_path):
    assert len(files_with(CANARY, archive)) == len(list(archive.rglob("*.nii.gz")))


def test_no_text_of_a_header_comes_out_anywhere(local_ray, archive, tmp_path, monkeypatch, capfd, caplog):
    """The whole way, on Ray: manifest, run, page, masks, what is said, what is logged, and what Ray keeps of its tasks."""
    import ray

    caplog.set_level(logging.DEBUG, logger="brainseg")
    monkeypatch.setenv("BRAINSEG_LOG_FORMAT", "json")  # all that is said, and what only logs are told
    manifest, run, model = tmp_path / "m.parquet", tmp_path / "run", make_model(tmp_path / "model")
    assert call(monkeypatch, "index", archive, "--out", manifest) == 0
    assert call(monkeypatch, "segment", manifest, "--model", model, "--out", run, "--actors", "1") == 3
    assert call(monkeypatch, "report", run) == 0
    assert call(monkeypatch, "export", run, "--out", tmp_path / "masks") == 0
    assert call(monkeypatch, "verify", run, "--json") == 0
    counts = storage.read_json(f"{run}/run.json")["counts"]
    assert (counts["ok"], counts["failed"]) == (4, 4)
    assert {p.name for p in run.iterdir()} >= {"report.html", "metrics.parquet", "scans", "_SUCCESS.json"}
    assert files_with(CANARY, tmp_path) == []
    out, err = capfd.readouterr()
    assert err.count('"event": "scan_failed"') == 4
    assert CANARY not in out + err + caplog.text
    session = Path(ray._private.worker._global_node.get_session_dir_path())
    assert list((session / "logs").iterdir())
    assert files_with(CANARY, session / "logs") == []


# ---- what opens a store ----------------------------------------------------------------------------------------------


def objects():
    listed = s3().list_objects_v2(Bucket=BUCKET).get("Contents", [])
    return {item["Key"]: s3().get_object(Bucket=BUCKET, Key=item["Key"])["Body"].read() for item in listed}


def test_no_key_of_a_store_stands_in_what_is_written_or_said(archive, tmp_path, monkeypatch, capfd, caplog):
    caplog.set_level(logging.DEBUG, logger="brainseg")
    at = f"s3://{BUCKET}"
    with moto_server() as endpoint, surroundings(endpoint, **SECRETS):
        s3().create_bucket(Bucket=BUCKET)
        for path in sorted(archive.rglob("*.*"))[:5]:
            storage.write_bytes(f"{at}/archive/{path.relative_to(archive)}", path.read_bytes())
        make_model(tmp_path / "model")
        for path in (tmp_path / "model").iterdir():
            storage.write_bytes(f"{at}/model/{path.name}", path.read_bytes())
        assert call(monkeypatch, "index", f"{at}/archive", "--out", f"{at}/m.parquet") == 0
        words = ["segment", f"{at}/m.parquet", "--model", f"{at}/model", "--out", f"{at}/run"]
        assert call(monkeypatch, *words, "--dry-run") == 0
        card = load_card(f"{at}/model")
        body = runs.open_run(
            f"{at}/run", runs.Identity("m", "w", "c"), {"source": f"{at}/archive", "model": card.model_dump(mode="json")}
        )
        runs.finish_run(f"{at}/run", body, {}, {})
        assert call(monkeypatch, "verify", f"{at}/run") == 1
        assert call(monkeypatch, "clean", f"{at}/run") == 0
        assert call(monkeypatch, "report", f"{at}/run") == 0
        assert call(monkeypatch, "segment", f"{at}/m.parquet", "--model", f"{at}/nothing", "--out", f"{at}/run2") == 2
        assert call(monkeypatch, "index", "s3://elsewhere/archive", "--out", f"{at}/m2.parquet") == 2
        kept = objects()
    assert {"m.parquet", "model/model.json", "run/run.json", "run/report.html"} <= kept.keys()
    assert [key for key, data in kept.items() for secret in SECRETS.values() if secret.encode() in data] == []
    dead = endpoint.replace("//", "//somebody:CANARYpassword@")
    with surroundings(dead, **SECRETS):
        assert call(monkeypatch, "verify", f"{at}/run") == 2
    out, err = capfd.readouterr()
    assert CANARY not in out + err + caplog.text


@pytest.mark.slow
def test_nor_in_what_a_whole_run_on_a_store_leaves_behind(archive, tmp_path):
    """Segmentation by a Ray of its own, whose logs are looked through too."""
    at = f"s3://{BUCKET}"
    place = tempfile.TemporaryDirectory(prefix="c", ignore_cleanup_errors=True)  # Ray's sockets need a short path
    with place as short, moto_server() as endpoint, surroundings(endpoint, **SECRETS):
        s3().create_bucket(Bucket=BUCKET)
        for path in archive.rglob("*.*"):
            if path.is_file():
                storage.write_bytes(f"{at}/archive/{path.relative_to(archive)}", path.read_bytes())
        make_model(tmp_path / "model")
        environment = {**{k: v for k, v in os.environ.items() if not k.startswith("RAY_")}, "RAY_TMPDIR": short}
        command = [sys.executable, "-m", "brainseg.cli", "segment", f"{at}/archive", "--model", str(tmp_path / "model")]
        done = subprocess.run(
            [*command, "--out", f"{at}/run", "--actors", "1", "--json"],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 3, done.stderr
        assert json.loads(done.stdout)["counts"]["ok"] == 4
        kept = {key: data for key, data in objects().items() if key.startswith("run/")}
        logs = {str(p): p.read_bytes() for p in Path(short).rglob("*") if p.is_file() and not p.is_symlink()}
    assert "run/_SUCCESS.json" in kept
    assert [key for key, data in kept.items() if CANARY.encode() in data] == []
    assert CANARY not in done.stdout + done.stderr
    assert logs
    assert [name for name, data in logs.items() if CANARY.encode() in data] == []
