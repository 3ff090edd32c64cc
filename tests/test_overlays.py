"""Overlays: the slices are chosen by rule, the same each time, and the picture shows what was labelled and predicted."""

import io

import numpy as np
import pytest
from factory import FEW, make_card, make_model, make_scan
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from brainseg import overlays
from brainseg.overlays import COLUMNS, MOST_CANDIDATES, MOST_TILES, Album, Candidate, Tile, candidate, choose, in_turn, kept


@st.composite
def shelves(draw):
    """Scans of some patients: pixels of label and of head, slice by slice."""
    found = []
    for number in range(draw(st.integers(0, 30))):
        areas = np.array(draw(st.lists(st.integers(0, 50), min_size=1, max_size=6)))
        patient = f"p{draw(st.integers(0, 14))}"
        found.append(Candidate(number, patient, areas, np.full(len(areas), 100)))
    return found


@FEW
@given(shelf=shelves())
def test_no_slice_is_shown_twice_and_there_is_room_for_all(shelf):
    picks = choose(shelf)
    assert len(set(picks)) == len(picks) <= MOST_TILES
    assert choose(shelf) == picks


@FEW
@given(shelf=shelves())
def test_every_patient_has_a_turn_before_any_has_a_second(shelf):
    known = {c.number: c for c in shelf}
    shown = [known[number].patient for number, index in choose(shelf) if known[number].areas[index]]
    labelled = {c.patient for c in shelf if c.areas.any()}
    if len(labelled) <= MOST_TILES - 1:
        assert set(shown) == labelled
    else:
        assert len(set(shown)) == len(shown) >= MOST_TILES - 1


@FEW
@given(shelf=shelves())
def test_one_slice_without_tumour_is_shown_where_there_is_one(shelf):
    known = {c.number: c for c in shelf}
    empty = [pick for pick in choose(shelf) if not known[pick[0]].areas[pick[1]]]
    assert len(empty) == any((c.areas == 0).any() for c in shelf)


def test_small_tumours_are_shown_beside_large_ones():
    shelf = [Candidate(n, f"p{n}", np.array([n + 1]), np.array([100])) for n in range(40)]
    areas = sorted(number + 1 for number, _ in choose(shelf))
    assert areas[0] == 1
    assert areas[-1] == 40
    assert max(np.diff(areas)) <= 5


@given(patients=st.lists(st.sampled_from("abcdef"), max_size=200))
def test_patients_are_looked_at_in_turn(patients):
    order = in_turn(patients)
    assert len(order) == min(len(patients), MOST_CANDIDATES)
    turns = [sum(patients[j] == patients[i] for j in range(i)) for i in order]
    assert turns == sorted(turns)


def test_the_noise_of_air_is_no_head():
    air = make_scan((4, 40, 40))
    image = air.image.copy()
    image[:, -1] = np.random.default_rng(0).integers(1, 9, image[:, -1].shape)
    noisy = make_scan((4, 40, 40), image=image, label=np.zeros(air.grid.shape, np.uint8))
    found = candidate(0, "p", noisy, make_card())
    assert found is not None
    [(_, index)] = choose([found])
    assert found.head[index] == found.head.max()


def test_a_scan_without_label_or_modality_is_not_shown():
    assert candidate(0, "p", make_scan(label=None), make_card()) is None
    assert candidate(0, "p", make_scan(modalities=("flair",)), make_card()) is None


@pytest.mark.parametrize(
    ("there", "best", "left"),
    [
        (["epoch-001.png", "epoch-005.png", "epoch-007.png", "epoch-010.png"], 6, [1, 7, 10]),
        (["epoch-001.png", "epoch-010.png"], 9, [1, 10]),
        (["epoch-003.png"], 2, [3]),
        ([], -1, []),
    ],
)
def test_the_first_the_best_and_the_last_are_kept(there, best, left):
    assert kept(there, best) == [f"epoch-{n:03d}.png" for n in left]


def square(size, at, shape=(60, 60)):
    mask = np.zeros(shape, bool)
    mask[at : at + size, at : at + size] = True
    return mask[None]


def near(pixels, colour):
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    return int((np.abs(pixels.astype(int) - wanted).max(axis=-1) < 40).sum())


def painted(*tiles, regions=("tumor",)):
    return np.asarray(Image.open(io.BytesIO(overlays.draw(tiles, regions, "epoch 1"))).convert("RGB"))


def test_label_and_prediction_are_outlined_in_their_colours():
    dark, nothing = np.full((60, 60), 40, np.uint8), np.zeros((1, 60, 60), bool)
    none = painted(Tile("s", 3, dark, nothing, nothing, (None,)))
    label = painted(Tile("s", 3, dark, square(20, 5), nothing, (0.0,)))
    both = painted(Tile("s", 3, dark, square(20, 5), square(20, 30), (0.0,)))
    blue = [near(p, overlays.LABEL) for p in (none, label, both)]
    orange = [near(p, overlays.PREDICTION) for p in (none, label, both)]
    assert blue[0] < blue[1] <= blue[2] + 30
    assert orange[0] < orange[2]
    assert abs(orange[1] - orange[0]) < 30


def test_a_prediction_upon_the_label_leaves_both_to_be_seen():
    tile = Tile("s", None, np.full((60, 60), 40, np.uint8), square(20, 20), square(20, 20), (1.0,))
    bare = Tile("s", None, tile.image, np.zeros((1, 60, 60), bool), np.zeros((1, 60, 60), bool), (None,))
    for colour in (overlays.LABEL, overlays.PREDICTION):
        assert near(painted(tile), colour) > near(painted(bare), colour) + 100


def test_names_as_foreign_as_they_come_are_drawn():
    tile = Tile("$x^{2$" + "\x1b[31m" + "ß" * 400, 0, np.zeros((9, 30), np.uint8), *[np.ones((3, 9, 30), bool)] * 2, (1.0,) * 3)
    assert painted(*[tile] * 5, regions=("WT", "TC", "ET")).shape[1] == COLUMNS * 275


def test_an_album_shows_the_same_slices_each_time(tmp_path):
    scans = {0: make_scan(name="a"), 1: None, 2: make_scan(name="b", seed=4)}
    card = make_card()
    model, asked = make_model(tmp_path / "model", card), []

    def fetch(number):
        asked.append(number)
        return scans[number]

    album = Album(str(tmp_path), card, ["p", "q", "r"], fetch)
    album.add(model, 0, "first")
    asked.clear()
    album.add(model, 4, "fifth")
    assert set(asked) == {0, 2}
    assert {p.name for p in (tmp_path / "overlays").iterdir()} == {"epoch-001.png", "epoch-005.png"}
    assert (tmp_path / "overlays/epoch-005.png").read_bytes().startswith(b"\x89PNG")


def test_an_album_of_nothing_is_no_picture(tmp_path):
    card = make_card()
    Album(str(tmp_path), card, ["p"], lambda _: None).add(make_model(tmp_path / "model", card), 0, "first")
    assert not (tmp_path / "overlays").exists()


def test_the_dice_of_a_tile_is_that_of_its_slice(tmp_path):
    scan, model = make_scan(), make_model(tmp_path / "model")
    answer = model.predict([scan])[0].label
    shown = overlays.tiles(model, scan, [0, 3])
    for tile in shown:
        one, other = scan.label[tile.index] > 0, answer[tile.index] > 0
        total = one.sum() + other.sum()
        assert tile.dice == (2 * (one & other).sum() / total if total else None,)
