"""What a file says about a person stays in the file: no text of any format reaches a row, a warning, an error or a log.

Every file here holds a word wherever its format has room for text, whole and damaged in many ways, and takes the way of a
scan up to the bytes of its table. `test_canary.py` looks for the like in all that a run leaves behind.
"""

import gzip
import io
import logging
import pickle
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from crafted import PICTURE, VOLUME, chunk, h5, nii, picture, png, png_rows, tif
from factory import make_card, make_model, make_row, tiny_config
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from test_more_bad_inputs import Kind, image, label, packed, row_of, slice_h5, tiff, volume

from brainseg import stages
from brainseg.config import SegmentConfig
from brainseg.stages import Job
from brainseg.tables import SCANS

CANARY = "CANARY-123"
WORD = CANARY.encode()
TEXTS = dict.fromkeys(("descrip", "aux_file", "intent_name", "db_name"), WORD)
SETTINGS = SegmentConfig(threshold=0.12)


def damages(data: bytes) -> Iterator[bytes]:
    """The file itself, and the file wrong in many ways: each takes another way through the code."""
    yield data
    yield data[: len(data) // 2]
    yield data[:-3]
    yield data + WORD
    yield WORD + data
    for place in range(4, min(len(data), 600), 19):
        yield data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :]


def niftis() -> Iterator[Kind]:
    extension = struct.pack("<ii", 32, 6) + WORD.ljust(24, b"\0")
    for fields in ({}, {"datatype": 128}, {"dim": (4, 7, 6, 5, 2, 1, 1, 1)}, {"slope": float("inf")}, {"magic": b"CANA"}):
        data = nii(**TEXTS, **fields)
        yield volume("text fields", data, "")
        yield packed("text fields, packed", gzip.compress(data), "")
    plain = nii(**TEXTS, vox_offset=352 + 32)
    extended = plain[:348] + b"\1\0\0\0" + extension + plain[352:]
    yield volume("an extension", extended, "")
    yield volume("an extension of a wrong size", extended.replace(extension, b"\x07" + extension[1:]), "")
    yield packed(
        "gzip with name and comment", b"\x1f\x8b\x08\x18" + bytes(6) + (WORD + b"\0") * 2 + gzip.compress(plain)[10:], ""
    )
    yield label("a label", nii((VOLUME > 500) * np.uint8(7), **TEXTS), "")
    yield packed("a pickle", pickle.dumps({CANARY: CANARY}), "")
    yield packed("words", WORD * 100, "")
    for data in damages(nii(**TEXTS)):
        yield volume("text fields, damaged", data, "")


def pictures() -> Iterator[Kind]:
    info = PngInfo()
    info.add_text("Patient", CANARY)
    info.add_text(CANARY, CANARY, zip=True)
    info.add_itxt("Name", CANARY, "de", CANARY)
    exif = Image.Exif()
    exif[0x010E] = exif[0x013B] = exif[0x0131] = CANARY
    for data in damages(picture("PNG", pnginfo=info, exif=exif, icc_profile=WORD * 20)):
        yield image("png", data, "")
    words = b"II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x0b\0\0\0\x1a\0\0\0\0\0\0\0" + WORD + b"\0"
    yield image("png, a name for a turn", png(before=chunk(b"eXIf", words)), "")
    yield image("png, a name as a chunk that is needed", png(before=chunk(b"CANA", WORD)), "")
    yield image("png, a name after the pixels", png(data=zlib.compress(png_rows()) + WORD, end=WORD), "")
    for kind in ("JPEG", "GIF"):
        for data in damages(picture(kind, comment=CANARY, **({"exif": exif} if kind == "JPEG" else {}))):
            yield image(kind, data, "", file="x.jpg")


def tiffs() -> Iterator[Kind]:
    texts = [(tag, 2, 0, CANARY, True) for tag in (269, 271, 272, 285, 315, 316, 33432, 65000)]
    for options in ({}, {"compression": "deflate"}, {"photometric": "miniswhite"}):
        for data in damages(tif(description=CANARY, software=CANARY, extratags=texts, **options)):
            yield tiff("tiff", data, "")
    yield tiff("tiff, two pages", tif(np.stack([PICTURE] * 2), photometric="minisblack", description=CANARY), "")


def hdf5s() -> Iterator[Kind]:
    def say(file: h5py.File) -> None:
        file.attrs["patient"] = file.attrs[CANARY] = CANARY
        dataset = file.create_dataset("image", data=np.moveaxis(np.stack([VOLUME[2]] * 4), 0, -1).swapaxes(0, 1) * 1.0)
        dataset.attrs["name"] = CANARY
        dataset.dims[0].label = CANARY

    for data in damages(h5(say)):
        yield slice_h5("hdf5", data, "")
    yield slice_h5("hdf5, of words", h5(lambda file: file.create_dataset("image", data=[CANARY])), "")
    fields = np.dtype([(CANARY, "f8")])
    yield slice_h5("hdf5, of fields so called", h5(lambda file: file.create_dataset("image", (2, 2), fields)), "")
    for link in (h5py.ExternalLink(f"/home/{CANARY}.h5", CANARY), h5py.SoftLink(f"/{CANARY}")):
        yield slice_h5("hdf5, a link to a place so called", h5(lambda file, link=link: file.__setitem__("image", link)), "")


@pytest.mark.parametrize("family", [niftis, pictures, tiffs, hdf5s], ids=lambda family: family.__name__)
def test_no_text_of_a_file_leaves_it(family, tmp_path, caplog, capfd):
    kinds = list(family())  # writing them, other people's code tells the log what they say
    model = make_model(tmp_path / "model", make_card(tiny_config(modalities=("t1",))), SETTINGS)
    job = Job("run", "model", SETTINGS, "run-1", 1, model.fingerprint, "config", model.card)
    caplog.set_level(logging.DEBUG)
    capfd.readouterr()
    statuses, carried = [], 0
    for number, kind in enumerate(kinds):
        carried += WORD in b"".join(unpacked(data) for _, data, *_ in kind.files)
        row = make_row(**{**row_of(kind, tmp_path), "scan_id": f"scan-{number}"})
        done = stages.finish(stages.predict(model, [stages.decode(row, with_label=True)])[0], job)
        statuses.append(done["status"])
        assert CANARY not in told(done), kind.name
    assert carried > 0.8 * len(statuses)
    assert {"ok", "failed"} <= set(statuses)
    out, err = capfd.readouterr()
    assert CANARY not in caplog.text + out + err


def told(done: dict[str, Any]) -> str:
    """All that a row says, its mask unpacked: as Parquet holds it, and as Python shows it."""
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([done], schema=SCANS), sink, compression="none", use_dictionary=False)
    return f"{done!r}{(sink.getvalue() + unpacked(done.get('mask') or b'')).decode('latin-1')}"


def unpacked(data: bytes) -> bytes:
    """The bytes, and what they hold if they are gzip."""
    try:
        return data + gzip.decompress(data)
    except (OSError, EOFError, zlib.error):
        return data


def test_the_search_finds_what_it_looks_for(tmp_path: Path):
    row = make_row(**{**row_of(volume("good", nii(), ""), tmp_path), "scan_id": CANARY})
    model = make_model(tmp_path / "model", make_card(tiny_config(modalities=("t1",))), SETTINGS)
    job = Job("run", "model", SETTINGS, "run-1", 1, model.fingerprint, "config", model.card)
    assert CANARY in told(stages.finish(stages.predict(model, [stages.decode(row, with_label=False)])[0], job))
