"""The IDX format of the MNIST family: a header with the shape, then the elements.

Two zero bytes, one byte for the element type, one for the number of dimensions, then each
dimension as a big-endian 32-bit integer (http://yann.lecun.com/exdb/mnist describes it).
"""

import math
import struct

import numpy as np
from numpy.typing import NDArray

from fmnist_dist.errors import DataDamagedError

_UINT8 = 0x08
_MAGIC_BYTES = 4


def parse(content: NDArray[np.uint8], *, name: str) -> NDArray[np.uint8]:
    """Return the elements, uint8 in the header's shape, as a view of `content` (uint8 [bytes]).

    Raises:
        DataDamagedError: `content` is no whole IDX file of bytes; `name` names it in the error.
    """
    magic = bytes(content[:_MAGIC_BYTES])
    if len(magic) < _MAGIC_BYTES or magic[:3] != bytes((0, 0, _UINT8)) or magic[3] == 0:
        raise DataDamagedError(
            f"{name} is no IDX file of bytes: it begins with 0x{magic.hex()}, expected 0x000008 "
            "and the number of dimensions"
        )
    num_dimensions = magic[3]
    start = _MAGIC_BYTES + 4 * num_dimensions
    if content.size < start:
        raise DataDamagedError(f"{name} ends inside its header: found {content.size} bytes")
    shape = struct.unpack(f">{num_dimensions}I", bytes(content[_MAGIC_BYTES:start]))
    expected = start + math.prod(shape)
    if content.size != expected:
        raise DataDamagedError(
            f"{name} is no whole IDX file: found {content.size} bytes, expected {expected} for "
            f"its shape {shape}"
        )
    return content[start:].reshape(shape)
