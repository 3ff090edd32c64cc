"""Pixels: what pictures of every format have in common: how large they may be, what becomes of alpha and of palettes."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from brainseg.errors import Code
from brainseg.formats import MAX_SLICE_BYTES, Notes


def require_size(width: int, height: int, channels: int, bits: int, notes: Notes) -> None:
    """Refuse a picture without pixels, or one that claims more bytes than a slice may take."""
    if width < 1 or height < 1:
        raise notes.error(Code.CORRUPT, f"found a picture of {width}x{height} pixels, expected at least one")
    if width * height * channels * max(bits, 8) > MAX_SLICE_BYTES * 8:
        found = f"a claim of {width}x{height} pixels of {channels} x {bits} bits"
        raise notes.error(Code.TOO_LARGE, f"found {found}, expected at most {MAX_SLICE_BYTES:,} bytes")


def without_alpha(array: NDArray[Any], notes: Notes) -> NDArray[Any]:
    """Drop the last channel; anything but full opacity is worth a warning."""
    alpha = array[..., -1]
    opaque = np.iinfo(alpha.dtype).max if alpha.dtype.kind == "u" else 1
    if (alpha != opaque).any():
        notes.warn(Code.ALPHA, "found an alpha channel that is not opaque throughout; it was dropped")
    colours = array[..., :-1]
    return colours[..., 0] if colours.shape[2] == 1 else colours


def grey_palette(rgb: NDArray[Any], notes: Notes) -> NDArray[Any]:
    """Note that colours came from a palette; return `(H, W)` where red, green and blue are equal throughout."""
    notes.warn(Code.PALETTE, "found palette indices; they were replaced by the palette's values")
    grey = rgb.ndim == 3 and bool((rgb == rgb[..., :1]).all())
    return rgb[..., 0] if grey else rgb
