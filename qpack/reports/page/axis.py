"""Where the lines of an axis stand."""

import math


def round_numbers(low: float, high: float) -> list[float]:
    """Round numbers that span ``low`` to ``high``, at most eight."""
    span = max(high - low, high * 0.02, 1e-6)
    rough = span / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [index * step for index in range(first, max(last, first + 1) + 1)]
