"""Label values and regions: the only place that knows what 1, 2, 3 and 4 mean.

A dataset *declares* its label map; nothing guesses it. ET is 4 in BraTS up to 2021 and 3 from 2023, so a map's name is
written into every manifest row (`label_map`) and into every model. Sources: the BraTS challenge data descriptions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from brainseg.errors import Code, ConfigError, ScanError


@dataclass(frozen=True)
class LabelMap:
    """A dataset's label values, the regions they form, and how a prediction is written back in those values.

    `regions`: region name -> the label values whose union it is. `aliases`: values found in files -> the value meant
    (255 in an 8-bit mask is 1). `paint`: (region, value) from the widest region to the narrowest; each overwrites.
    """

    name: str
    values: Mapping[int, str]
    regions: Mapping[str, tuple[int, ...]]
    paint: tuple[tuple[str, int], ...]
    aliases: Mapping[int, int] = field(default_factory=dict)

    def check(self, label: NDArray[np.generic], source: str) -> NDArray[np.uint8]:
        """Return an integer label as uint8 in this map's values (aliases applied), any shape.

        Raises ScanError BAD_LABELS naming the unknown value and the file.
        """
        found = np.unique(label)
        unknown = [int(v) for v in found if int(v) not in self.values and int(v) not in self.aliases]
        if unknown:
            known = sorted({*self.values, *self.aliases})
            raise ScanError(
                Code.BAD_LABELS,
                f"{source}: label value {unknown[0]} is not in the label map '{self.name}', which knows {known}",
            )
        out = label.astype(np.uint8)
        for value, meant in self.aliases.items():
            if value in found:
                out[label == value] = meant
        return out

    def masks(self, label: NDArray[np.uint8], names: Sequence[str]) -> NDArray[np.bool_]:
        """Return the boolean masks `(R, *label.shape)` of the named regions."""
        masks = np.empty((len(names), *label.shape), np.bool_)
        for mask, name in zip(masks, names, strict=True):
            first, *others = self._region(name)
            np.equal(label, first, out=mask)
            for value in others:
                mask |= label == value
        return masks

    def _region(self, name: str) -> tuple[int, ...]:
        if name not in self.regions:
            raise ConfigError(f"region '{name}' is not one of label map '{self.name}': {', '.join(self.regions)}")
        return self.regions[name]

    def paint_label(self, masks: NDArray[np.bool_], names: Sequence[str]) -> NDArray[np.uint8]:
        """Write region masks `(R, ...)` as one label volume in this map's values.

        Narrow regions overwrite wide ones, so a voxel of ET counts as TC and WT when read back with `masks`: the stored
        mask, not the raw network output, is what every metric is computed from.
        """
        label = np.zeros(masks.shape[1:], np.uint8)
        for region, value in self.paint:
            if region in names:
                label[masks[list(names).index(region)]] = value
        return label


def _brats(name: str, core: tuple[int, ...], enhancing: int, values: Mapping[int, str]) -> LabelMap:
    whole = (*core, 2)
    return LabelMap(
        name=name,
        values=values,
        regions={"WT": whole, "TC": core, "ET": (enhancing,), "tumor": whole},
        paint=(("tumor", 2), ("WT", 2), ("TC", 1), ("ET", enhancing)),
    )


_NAMES_2024 = {0: "background", 1: "non-enhancing core", 2: "FLAIR hyperintensity", 3: "enhancing", 4: "resection cavity"}
LABEL_MAPS: Mapping[str, LabelMap] = {
    m.name: m
    for m in (
        LabelMap("binary", {0: "background", 1: "tumor"}, {"tumor": (1,), "WT": (1,)}, (("WT", 1), ("tumor", 1)), {255: 1}),
        _brats("brats2013", (1, 3, 4), 4, {0: "background", 1: "necrosis", 2: "oedema", 3: "non-enhancing", 4: "enhancing"}),
        _brats("brats2020", (1, 4), 4, {0: "background", 1: "necrotic core", 2: "oedema", 4: "enhancing"}),
        _brats("brats2023", (1, 3), 3, {0: "background", 1: "necrotic core", 2: "oedema", 3: "enhancing"}),
        _brats("brats2024", (1, 3), 3, _NAMES_2024),
    )
}
"""`binary` serves 0/1 and 0/255 masks; `brats2020` the releases 2017 to 2021; `brats2024` the post-treatment glioma set."""


def label_map(name: str) -> LabelMap:
    """Look a label map up by name; ConfigError lists the known ones."""
    if name not in LABEL_MAPS:
        raise ConfigError(f"unknown label map '{name}'; known: {', '.join(LABEL_MAPS)}")
    return LABEL_MAPS[name]
