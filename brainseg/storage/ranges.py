"""Ranges: a file on an object store that pyarrow can seek in, of which only the asked-for pieces travel."""

import bisect
import io
from collections.abc import Callable, Iterable

GAP_BYTES = 64 << 10
"""Two pieces this near each other come in one request: bytes cost less than a way there and back."""


class RangedFile(io.RawIOBase):
    """A seekable file of known size. `fetch(start, end)` brings the bytes [start, end); what came once is kept."""

    def __init__(self, size_bytes: int, fetch: Callable[[int, int], bytes], tail: bytes = b"") -> None:
        super().__init__()
        self.size_bytes, self._fetch, self._place = size_bytes, fetch, 0
        self._tail, self._pieces = tail, {size_bytes - len(tail): tail}

    def prefetch(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Bring these ranges [start, end), joined where they are near each other."""
        for start, end in coalesced(ranges):
            self._bytes_at(start, end)

    def forget(self) -> None:
        """Keep nothing but the tail of what came."""
        self._pieces = {self.size_bytes - len(self._tail): self._tail}

    def _bytes_at(self, start: int, end: int) -> bytes:
        begins = sorted(self._pieces)
        for begin in begins[: bisect.bisect_right(begins, start)]:
            piece = self._pieces[begin]
            if end <= begin + len(piece):
                return piece[start - begin : end - begin]
        self._pieces[start] = self._fetch(start, end)
        return self._pieces[start]

    def read(self, size: int | None = -1) -> bytes:
        """Return the next `size` bytes; fewer at the end."""
        end = self.size_bytes if size is None or size < 0 else min(self.size_bytes, self._place + size)
        data = self._bytes_at(self._place, end) if end > self._place else b""
        self._place += len(data)
        return data

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a place, counted from the beginning, from here, or from the end."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self.size_bytes}[whence]
        self._place = max(0, base + offset)
        return self._place

    def tell(self) -> int:
        """Return the place where the next read begins."""
        return self._place

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True


def coalesced(ranges: Iterable[tuple[int, int]], gap_bytes: int = GAP_BYTES) -> list[tuple[int, int]]:
    """The fewest ranges that cover these, where gaps up to `gap_bytes` may be covered too; sorted, none touching another."""
    out: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if out and start <= out[-1][1] + gap_bytes:
            out[-1] = (out[-1][0], max(end, out[-1][1]))
        else:
            out.append((start, end))
    return out
