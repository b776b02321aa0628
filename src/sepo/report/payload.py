"""The report's data as one compressed block inside the page.

Layout before compression (gzip, then base64 for the page):

    uint32 length of the header | header, JSON in UTF-8 | arrays

The header's `arrays` names each array's type, offset and length. The bytes of an array are stored plane by
plane (all first bytes, all second bytes, ...), because the high bytes of similar numbers compress well together.
Base64 has no `<`, so no text of a dataset can close the HTML element around the block.
"""

from __future__ import annotations

import base64
import gzip
import json
import math
from collections.abc import Mapping

import numpy as np

_TYPES = {"u1": "uint8", "u2": "uint16", "u4": "uint32", "f4": "float32", "f8": "float64"}


def jsonable(value: object) -> object:
    """Turn values that JSON lacks into text: NaN, infinities, dates, paths.

    >>> jsonable({"loss": float("nan"), 1: (2, None)})
    {'loss': 'nan', '1': [2, None]}
    """
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, str | bool | int | float) else str(value)


def smallest_unsigned(values: np.ndarray) -> np.ndarray:
    """Cast non-negative integers to the narrowest of uint8, uint16 and uint32."""
    highest = int(values.max(initial=0))
    return values.astype(np.uint8 if highest < 2**8 else np.uint16 if highest < 2**16 else np.uint32)


def pack(header: Mapping[str, object], arrays: Mapping[str, np.ndarray]) -> str:
    """Pack a JSON header and flat arrays (uint8, uint16, uint32, float32, float64) as base64 text."""
    places = {}
    blocks = []
    offset = 0
    for name, array in arrays.items():
        kind = array.dtype.str[1:]
        little_endian = np.ascontiguousarray(array, dtype=f"<{kind}")
        planes = little_endian.view(np.uint8).reshape(-1, array.itemsize).T.tobytes()
        places[name] = {"type": _TYPES[kind], "offset": offset, "length": len(array)}
        blocks.append(planes)
        offset += len(planes)
    text = json.dumps({**header, "arrays": places}, allow_nan=False, separators=(",", ":")).encode()
    raw = len(text).to_bytes(4, "little") + text + b"".join(blocks)
    return base64.b64encode(gzip.compress(raw, compresslevel=6, mtime=0)).decode("ascii")


def unpack(block: str) -> tuple[dict, dict[str, np.ndarray]]:
    """The inverse of `pack`."""
    raw = gzip.decompress(base64.b64decode(block))
    size = int.from_bytes(raw[:4], "little")
    header = json.loads(raw[4 : 4 + size])
    arrays = {}
    for name, place in header.pop("arrays").items():
        dtype = np.dtype(place["type"]).newbyteorder("<")
        start = 4 + size + place["offset"]
        planes = np.frombuffer(raw, np.uint8, place["length"] * dtype.itemsize, start)
        arrays[name] = np.ascontiguousarray(planes.reshape(dtype.itemsize, -1).T).view(dtype).reshape(-1)
    return header, arrays
