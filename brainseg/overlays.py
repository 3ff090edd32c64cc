"""Overlays: the same few validation slices every few epochs, label and prediction drawn over the image.

A mean says little about what a network still does wrong; a look does. Chosen once and by rule, so that nobody picks the
pretty ones: patients from the largest tumour to the smallest, and one slice without any. The pictures show patients: they
carry no name but the manifest's scan ids, and they must not travel further than the images they were made from.
"""

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray
from PIL import Image

from brainseg import storage
from brainseg.card import ModelCard
from brainseg.geometry import to_canonical
from brainseg.model import Model
from brainseg.outlines import loops
from brainseg.regions import label_map
from brainseg.scans import Scan
from brainseg.thumbnails import make_thumbnail, preferred_modality

FOLDER = "overlays"
MOST_TILES, COLUMNS = 12, 4
MOST_CANDIDATES = 64
"""Scans that are looked at, a patient's turn at a time, before the slices are chosen."""
LABEL, PREDICTION = "#56b4e9", "#ff9544"
"""As in the report: told apart by those who see no red or no green; the label's line is thick, the prediction's thin."""
DASHES: tuple[tuple[float, tuple[float, float]], ...] = ((0, (1, 0)), (0, (4, 2)), (0, (1, 1.6)))
"""Solid, dashed, dotted: the regions, as in the report."""
PAPER, INK, SOFT = "#10151a", "#e8edf2", "#a3b0bd"
LONGEST_NAME = 30
Masks = NDArray[np.bool_]


@dataclass(frozen=True)
class Candidate:
    """One scan that could be shown: its place on the shelf, its patient, pixels of label and of head by slice."""

    number: int
    patient: str
    areas: NDArray[np.int64]
    head: NDArray[np.int64]

    @property
    def largest(self) -> int:
        """The slice with the most label."""
        return int(self.areas.argmax())


@dataclass(frozen=True)
class Tile:
    """One slice of the picture: grey image (H, W), masks of label and prediction (R, H, W), Dice by region.

    `index` is None where the scan is a single image, a Dice where label and prediction are both empty.
    """

    scan_id: str
    index: int | None
    image: NDArray[np.uint8]
    label: Masks
    prediction: Masks
    dice: tuple[float | None, ...]


def file_of(epoch: int) -> str:
    """The picture's place below a work or model folder; `epoch` counts from 0, the name from 1."""
    return f"{FOLDER}/epoch-{epoch + 1:03d}.png"


def kept(names: Iterable[str], best_epoch: int) -> list[str]:
    """Of all pictures of a training, by name: the first, the best and the last."""
    there = sorted(names)
    wanted = {*there[:1], *there[-1:], name_of(best_epoch)}
    return [name for name in there if name in wanted]


def name_of(epoch: int) -> str:
    """The picture's name alone."""
    return file_of(epoch).rpartition("/")[2]


def candidate(number: int, patient: str, scan: Scan, card: ModelCard) -> Candidate | None:
    """What a validation scan has to show; None without a label or a modality that the model needs."""
    if scan.label is None or not set(card.modalities) <= set(scan.modalities):
        return None
    masks: Masks = np.any(label_map(card.label_map).masks(scan.label, card.regions), axis=0)
    channel = preferred_modality(scan.modalities)
    head = np.zeros(scan.grid.shape, bool)
    # Above the mean, so that the noise of air around a head is none of it
    head[tuple(slice(*ends) for ends in scan.box)] = scan.image[channel] > scan.image[channel].mean()
    volumes: tuple[Masks, Masks] = (masks, head)
    areas, heads = (np.count_nonzero(to_canonical(v, scan.grid), axis=(1, 2)) for v in volumes)
    return Candidate(number, patient, areas, heads)


def in_turn(patients: Sequence[str]) -> list[int]:
    """Places in the order in which every patient has a turn before any has a second; at most `MOST_CANDIDATES`."""
    seen: dict[str, int] = {}
    turns = []
    for number, patient in enumerate(patients):
        seen[patient] = seen.get(patient, -1) + 1
        turns.append((seen[patient], number))
    return [number for _, number in sorted(turns)][:MOST_CANDIDATES]


def choose(candidates: Sequence[Candidate]) -> list[tuple[int, int]]:
    """Scan and slice of each tile: patients by the size of their tumour, then further slices, and one without."""
    by_patient: dict[str, Candidate] = {}
    for one in candidates:
        there = by_patient.get(one.patient)
        if one.areas.any() and (there is None or one.areas.max() > there.areas.max()):
            by_patient[one.patient] = one
    ranked = sorted(by_patient.values(), key=lambda c: (-int(c.areas.max()), c.number))
    empty = _without_tumour(candidates)
    room = MOST_TILES - len(empty)
    shown = ranked if len(ranked) <= room else [ranked[i] for i in np.linspace(0, len(ranked) - 1, room).round().astype(int)]
    picks = [(c.number, c.largest) for c in shown]
    further = [(c.number, index) for c in shown if (index := _half_as_large(c)) is not None]
    return sorted(picks + further[: room - len(picks)], key=lambda p: [c.number for c in shown].index(p[0])) + empty


def _half_as_large(one: Candidate) -> int | None:
    """The slice whose label is nearest to half of the largest one's; None where there is none but the largest and its next."""
    others = [i for i in np.flatnonzero(one.areas).tolist() if abs(i - one.largest) > 1]
    return min(others, key=lambda i: abs(2 * int(one.areas[i]) - int(one.areas.max())), default=None)


def _without_tumour(candidates: Sequence[Candidate]) -> list[tuple[int, int]]:
    """The largest slice of a head without any label, in the first scan that has a fair one."""
    for one in candidates:
        free = np.where(one.areas == 0, one.head, 0)
        if free.max() > one.head.max() / 2:
            return [(one.number, int(free.argmax()))]
    return []


def tiles(model: Model, scan: Scan, indices: Sequence[int]) -> list[Tile]:
    """Segment a scan and cut out the slices `indices`, in display order."""
    answer = model.predict([scan])[0].label
    meaning, regions = label_map(model.card.label_map), model.card.regions
    assert scan.label is not None, "candidates have labels"
    out = []
    for index in indices:
        small = make_thumbnail(
            scan.image, scan.box, scan.grid, scan.label, answer, scan.modalities, scan.background, index=index
        )
        image, label, prediction = (np.asarray(Image.open(io.BytesIO(small[n]))) for n in ("image", "label", "prediction"))
        whole = [meaning.masks(to_canonical(v, scan.grid)[index], regions) for v in (scan.label, answer)]
        dice = tuple(_dice(a, b) for a, b in zip(*whole, strict=True))
        shown = [meaning.masks(v, regions) for v in (label, prediction)]
        out.append(Tile(scan.scan_id, index if min(scan.grid.shape) > 1 else None, image, shown[0], shown[1], dice))
    return out


def _dice(one: Masks, other: Masks) -> float | None:
    total = int(one.sum()) + int(other.sum())
    return 2 * int((one & other).sum()) / total if total else None


class Album:
    """The pictures of one training: the same slices each time, chosen when the first is made.

    `patients` says whose scan stands at each place of a shelf, `scan_at` fetches it (None where it cannot be read).
    """

    def __init__(self, work: str, card: ModelCard, patients: Sequence[str], scan_at: Callable[[int], Scan | None]) -> None:
        self._work, self._card, self._patients, self._scan_at = work, card, patients, scan_at
        self._chosen: list[tuple[int, int]] | None = None

    def add(self, model: Model, epoch: int, title: str) -> None:
        """Draw the slices as `model` answers now and write the picture of this epoch; nothing where no scan can be shown."""
        if self._chosen is None:
            self._chosen = choose(list(self._candidates()))
        shown: list[Tile] = []
        for number, group in groupby(self._chosen, key=lambda pick: pick[0]):
            scan = self._scan_at(number)
            shown += tiles(model, scan, [index for _, index in group]) if scan else []
        if shown:
            storage.write_bytes(storage.join(self._work, file_of(epoch)), draw(shown, self._card.regions, title))

    def _candidates(self) -> Iterator[Candidate]:
        for number in in_turn(self._patients):
            scan = self._scan_at(number)
            found = scan and candidate(number, self._patients[number], scan, self._card)
            if found:
                yield found


def draw(shown: Sequence[Tile], regions: Sequence[str], title: str) -> bytes:
    """Return a PNG: the tiles in rows, label and prediction outlined, each with its scan, slice and Dice."""
    columns = min(COLUMNS, max(1, len(shown)))
    rows = max(1, -(-len(shown) // columns))
    width, height = max(2.5 * columns, 5.0), 2.85 * rows + 0.75  # inches
    figure = Figure(figsize=(width, height), dpi=110, facecolor=PAPER)
    FigureCanvasAgg(figure)
    figure.text(0.1 / width, 1 - 0.14 / height, title, color=INK, fontsize=11, weight="bold", va="top", parse_math=False)
    _draw_key(figure, regions, (0.02 / width, 1 - 0.36 / height))
    sides = {"left": 0.1 / width, "right": 1 - 0.1 / width, "bottom": 0.08 / height, "top": 1 - 1.02 / height}
    grid = figure.add_gridspec(rows, columns, hspace=0.22, wspace=0.04, **sides)
    for place, tile in enumerate(shown):
        _draw_tile(figure.add_subplot(grid[place // columns, place % columns]), tile, regions)
    out = io.BytesIO()
    figure.savefig(out, format="png", facecolor=PAPER)
    return _small_png(out.getvalue())


def _draw_key(figure: Figure, regions: Sequence[str], corner: tuple[float, float]) -> None:
    handles = [Line2D([], [], color=LABEL, linewidth=3, label="label"), Line2D([], [], color=PREDICTION, label="prediction")]
    if len(regions) > 1:
        handles += [Line2D([], [], color=SOFT, linestyle=d, label=r) for r, d in zip(regions, DASHES, strict=False)]
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=corner,
        ncols=len(handles),
        fontsize=9,
        frameon=False,
        labelcolor=INK,
        handlelength=2.2,
        borderpad=0.2,
    )


def _draw_tile(axes: Axes, tile: Tile, regions: Sequence[str]) -> None:
    height, width = tile.image.shape
    axes.imshow(tile.image, cmap="gray", vmin=0, vmax=255, extent=(0, width, height, 0), interpolation="bicubic")
    for masks, colour, thickness in ((tile.label, LABEL, 2.1), (tile.prediction, PREDICTION, 1.1)):
        for mask, dashes in zip(masks, DASHES, strict=False):
            axes.add_collection(LineCollection(list(loops(mask)), colors=colour, linewidths=thickness, linestyles=[dashes]))
    axes.set_axis_off()
    where = "" if tile.index is None else f"slice {tile.index}: "
    words = f"{_shortened(tile.scan_id)}\n{where}{_words(tile, regions)}"
    axes.set_title(words, color=INK, fontsize=8, loc="left", pad=3, parse_math=False)


def _words(tile: Tile, regions: Sequence[str]) -> str:
    """The Dice of a slice, region by region; what has none is named."""
    if len(regions) == 1:
        return _state(tile, 0)
    return "  ".join(f"{region} {_state(tile, number)}" for number, region in enumerate(regions))


def _state(tile: Tile, number: int) -> str:
    dice, labelled = tile.dice[number], bool(tile.label[number].any())
    if dice is None:
        return "both empty" if len(tile.dice) == 1 else "–"
    if len(tile.dice) > 1:
        return f"{dice:.2f}"
    return f"Dice {dice:.3f}" if dice else f"Dice 0, {'missed' if labelled else 'spurious'}"


def _shortened(name: str) -> str:
    """A scan's id, its middle left out where it is too long for a tile."""
    plain = "".join(c if c.isprintable() else "?" for c in name)
    half = (LONGEST_NAME - 1) // 2
    return plain if len(plain) <= LONGEST_NAME else f"{plain[:half]}…{plain[-half:]}"


def _small_png(png: bytes) -> bytes:
    """The same picture in at most 256 colours: greys and two hues need no more, and three of them go into a page."""
    out = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
    return out.getvalue()
