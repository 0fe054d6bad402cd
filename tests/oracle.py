"""NF4 in plain numpy: slow, written from the rule, sharing nothing with the Rust code.

The rule is bitsandbytes' CPU path (0.50, ``backends/default/ops.py`` and ``csrc/cpu_ops.cpp``); the tests check both
the Rust code and bitsandbytes against it.
"""

from functools import cache

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]

# QLoRA, arXiv 2305.14314, appendix E.
LEVELS = np.array(
    "-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635 -0.18477343022823334 "
    "-0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725 0.24611230194568634 0.33791524171829224 "
    "0.44070982933044434 0.5626170039176941 0.7229568362236023 1.0".split(),
    dtype=np.float32,
)


def quantize(values: F32, blocksize: int) -> tuple[U8, F32]:
    """Codes, two a byte, and the absmax of each block of the flat f32 ``values``."""
    midpoints = (LEVELS[:-1] + LEVELS[1:]) / np.float32(2)
    tiny = np.float32(1e-38)
    codes = np.empty(len(values), np.uint8)
    absmax = np.empty(-(-len(values) // blocksize), np.float32)
    for index in range(len(absmax)):
        block = values[index * blocksize : (index + 1) * blocksize]
        scale = np.abs(block).max()
        if len(block) == blocksize:
            scaled = block * (np.float32(1) / np.maximum(scale, tiny))
        else:
            scale = np.maximum(scale, tiny)
            scaled = block / scale
        absmax[index] = scale
        codes[index * blocksize : (index + 1) * blocksize] = (midpoints[None] < scaled[:, None]).sum(1)
    if len(codes) % 2:
        codes = np.append(codes, np.uint8(7))
    packed: U8 = (codes[::2] << 4 | codes[1::2]).astype(np.uint8)
    return packed, absmax


def dequantize(codes: U8, absmax: F32, elements: int, blocksize: int) -> F32:
    """The f32 values that codes and scales stand for."""
    unpacked = np.stack([codes >> 4, codes & 15], axis=1).reshape(-1)[:elements]
    return LEVELS[unpacked] * np.repeat(absmax, blocksize)[:elements]


def quantize_nested(absmax: F32, offset: np.float32, levels: F32) -> tuple[U8, F32]:
    """8-bit codes and second-level scales (one per 256) of block scales around ``offset``."""
    table = _nearest(levels.tobytes())
    centred = absmax - offset
    codes = np.empty(len(absmax), np.uint8)
    nested = np.empty(-(-len(absmax) // 256), np.float32)
    for index in range(len(nested)):
        block = centred[index * 256 : (index + 1) * 256]
        nested[index] = scale = np.abs(block).max()
        if scale == 0:
            codes[index * 256 : (index + 1) * 256] = 0
            continue
        scaled = np.clip(block * (np.float32(1) / scale), -1, 1)
        cell = ((scaled + np.float32(1)) * np.float32(0.5)) * np.float32(65535) + np.float32(0.5)
        codes[index * 256 : (index + 1) * 256] = table[cell.astype(np.int64)]
    return codes, nested


@cache
def _nearest(levels: bytes) -> U8:
    """The index of the level nearest to each of 65,536 values from -1 to 1."""
    cells = np.arange(65536, dtype=np.float32) / np.float32(65535) * np.float32(2) - np.float32(1)
    distances = np.abs(cells[:, None].astype(np.float64) - np.frombuffer(levels, np.float32)[None])
    nearest: U8 = distances.argmin(1).astype(np.uint8)
    return nearest
