"""Weights: tensors and JSON out of files that a stranger may have made. Measured before they are read, never executed.

Only safetensors and JSON are read. What is in a file must be exactly what the network that it is for consists of: the same
names, shapes and kinds of number, all of them finite.
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from torch import Tensor, nn

from brainseg import storage
from brainseg.errors import PreflightError, StorageError, one_line
from brainseg.formats.pickles import holds_pickle
from brainseg.storage.place import translated

MOST_BYTES = 512 << 20
"""Of weights: 128 million numbers, four times as many as a U-Net of the usual widest kind has."""
MOST_JSON_BYTES = 32 << 20
MOST_JSON_GROUPS = 200_000
MOST_JSON_DEPTH = 40
"""Of a card, which is read on every node: enough for the ids of half a million scans."""


def read_limited(uri: str, most_bytes: int) -> bytes:
    """A whole file, unless it is larger than this. StorageError says so, before a byte is read."""
    size = _size_of(uri)
    if size > most_bytes:
        raise StorageError(f"{uri} has {size:,} bytes; expected {most_bytes:,} at most")
    return storage.read_bytes(uri)


def _size_of(uri: str) -> int:
    """Size of a file; 0 where it cannot be told, which reading will then explain."""
    if not storage.is_remote(uri):
        with translated("read", uri):
            return Path(uri).stat().st_size
    return next((e.size_bytes for e in storage.list_files(storage.parent_of(uri)) if e.uri == uri), 0)


def read_json(uri: str, *, finite: bool = True) -> Any:
    """What a JSON file holds: bounded in size and depth, numbers within 64 bits and `finite`. StorageError if not."""
    data = read_limited(uri, MOST_JSON_BYTES)
    try:
        if data.count(b"[") + data.count(b"{") > MOST_JSON_GROUPS:
            raise ValueError(f"it nests more than {MOST_JSON_GROUPS:,} lists and objects")  # noqa: TRY301
        body = json.loads(data)
        _check_json(body, finite)
    except (ValueError, RecursionError) as error:
        raise StorageError(one_line(f"could not read as JSON {uri}: {error}")[:500]) from error
    return body


def _check_json(body: Any, finite: bool) -> None:
    """ValueError for what no honest card holds. Walks without recursion."""
    todo: list[tuple[Any, int]] = [(body, 1)]
    while todo:
        value, depth = todo.pop()
        if isinstance(value, dict | list):
            if depth > MOST_JSON_DEPTH:
                raise ValueError(f"it nests deeper than {MOST_JSON_DEPTH}")
            todo += ((one, depth + 1) for one in (value.values() if isinstance(value, dict) else value))
        elif finite and isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"it holds the number {value}")
        elif isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError("it holds a whole number of more than 64 bits")


def tensors_of(data: bytes, where: str) -> dict[str, Tensor]:
    """The tensors in the bytes of a safetensors file. PreflightError where they are something else."""
    try:
        return load_tensors(data)
    except Exception as error:  # a foreign decoder on foreign bytes
        if holds_pickle(data):
            found = "a Python pickle, or an archive with one in it, which runs code when it is loaded"
        else:
            found = f"something else ({one_line(str(error))[:200]})"
        raise PreflightError(f"{where}: expected safetensors, found {found}") from error


def blueprint(make: Callable[[], nn.Module], where: str) -> dict[str, Tensor]:
    """Names, shapes and kinds of a network's numbers, without one of them in memory. PreflightError where it is too large."""
    try:
        with torch.device("meta"):
            wanted = make().state_dict()
        size = sum(v.numel() * v.element_size() for v in wanted.values())
    except (RuntimeError, OverflowError, TypeError, ValueError) as error:
        raise PreflightError(f"{where}: no network can be built from this architecture") from error
    if size > MOST_BYTES:
        raise PreflightError(f"{where}: its network would take {size:,} bytes; expected {MOST_BYTES:,} at most")
    return dict(wanted)


def check_fit(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], where: str) -> None:
    """PreflightError where tensors are not exactly those of a network, or hold what is no number."""
    astray = sorted(tensors.keys() ^ wanted.keys())
    if astray:
        what = "is missing" if astray[0] in wanted else "belongs to no layer"
        more = f", and {len(astray) - 1} more" if len(astray) > 1 else ""
        raise PreflightError(f"{where}: does not fit the architecture: {one_line(astray[0])[:100]} {what}{more}")
    for name, tensor in tensors.items():
        _check_tensor(name, tensor, wanted[name], where)


def _check_tensor(name: str, tensor: Tensor, like: Tensor, where: str) -> None:
    if tensor.shape != like.shape:
        shapes = f"{name} is {list(tensor.shape)}, expected {list(like.shape)}"
        raise PreflightError(f"{where}: does not fit the architecture: {shapes}")
    if tensor.is_floating_point() != like.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise PreflightError(f"{where}: does not fit the architecture: {name} is {tensor.dtype}, expected {like.dtype}")
    numbers = tensor.float() if tensor.is_floating_point() else tensor
    if not bool(torch.isfinite(numbers).all()):
        raise PreflightError(f"{where}: {name} holds NaN or infinity: the training failed, or the file was changed")
    if name.endswith("running_var") and bool((numbers < 0).any()):
        raise PreflightError(f"{where}: {name} holds a variance below 0")
