"""Sizes as people write them: ``5GB`` is 5 * 10**9 bytes, ``5GiB`` is 5 * 2**30, as in transformers."""

import re

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]i?)?B?", re.IGNORECASE)


def parse_size(text: str | int) -> int:
    """Bytes that ``text`` stands for.

    Raises:
        ValueError: if it is not a positive number with an optional unit.
    """
    match = _SIZE.fullmatch(str(text).strip())
    if match is None:
        raise ValueError(f"{text!r} is not a size, expected for example 5GB or 500MiB")
    number, unit = match[1], (match[2] or "").upper()
    base = 1024 if unit.endswith("I") else 1000
    size = int(float(number) * base ** " KMGT".index(unit[:1] or " "))
    if size < 1:
        raise ValueError(f"{text!r} is no size, expected at least one byte")
    return size


def format_size(size: float) -> str:
    """``size`` bytes with a decimal unit and three digits: 538 MB, 1.35 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
