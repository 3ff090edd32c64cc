"""Phantom: synthetic heads with tumours, in any of the layouts, for the demo, the tests and the pictures.

`fields` draws smooth randomness in millimetres, `anatomy` and `lesions` lay tissues over one another, `scanner` turns
tissues into MR intensities, `head` puts the three together, `archive` writes heads as the published sets are laid out
and `breakage` spoils a few of them in the ways archives do.
"""

from brainseg.phantom.archive import LAYOUTS, write_archive
from brainseg.phantom.head import MODALITIES, Head, make_head

__all__ = ["LAYOUTS", "MODALITIES", "Head", "make_head", "write_archive"]
