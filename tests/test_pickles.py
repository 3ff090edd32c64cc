"""Pickles are told by their bytes, whatever holds them; nothing else is taken for one; nothing is ever loaded."""

import io
import os
import pickle
import zipfile

import numpy as np
import pytest
from crafted import h5, nii, picture, tif
from hypothesis import given, settings
from hypothesis import strategies as st

from brainseg.formats.pickles import holds_pickle

plain = st.none() | st.integers() | st.floats() | st.text(max_size=20) | st.binary(max_size=20)
things = st.recursive(
    plain, lambda inner: st.lists(inner, min_size=1) | st.dictionaries(st.text(max_size=5), inner, min_size=1)
)


class Boom:
    def __reduce__(self):
        return os.mkdir, ("UNPICKLED",)


def in_zip(**members):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name.replace("_", "."), data)
    return out.getvalue()


@given(thing=st.lists(things, min_size=1, max_size=3), protocol=st.integers(2, pickle.HIGHEST_PROTOCOL))
@settings(max_examples=25, deadline=None)
def test_a_pickle_is_one_alone_and_in_a_zip(thing, protocol):
    data = pickle.dumps(thing, protocol)
    assert holds_pickle(data)
    assert holds_pickle(in_zip(a_txt=b"words", b_bin=data))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_nothing_is_loaded_to_find_out(protocol, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = pickle.dumps(Boom(), protocol)
    assert holds_pickle(data)
    assert holds_pickle(data + b"more")
    assert holds_pickle(in_zip(data_pkl=data))
    assert not list(tmp_path.iterdir())


def saved(**arrays):
    out = io.BytesIO()
    np.savez_compressed(out, **arrays)
    return out.getvalue()


def test_an_archive_of_objects_is_told_from_one_of_numbers():
    assert holds_pickle(saved(numbers=np.arange(5), objects=np.array([{}], object)))
    assert holds_pickle(saved(records=np.zeros(3, [("a", "f8"), ("b", object)])))
    assert not holds_pickle(saved(numbers=np.arange(5), words=np.array(["|O"])))


@pytest.mark.parametrize(
    "data", [nii(), h5(), tif(), picture("PNG"), picture("JPEG"), in_zip(readme_txt=b"words."), b"", b".", b"PK\3\4"]
)
def test_what_is_no_pickle_is_not_taken_for_one(data):
    assert not holds_pickle(data)


@given(st.text(alphabet="abcdefghijklmnopqrstuvwxyz ,", min_size=20, max_size=300))
@settings(max_examples=100, deadline=None)
def test_a_sentence_in_brackets_is_no_pickle(words):
    assert not holds_pickle(f"({words}).".encode())
