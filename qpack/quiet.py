"""Keep transformers and bitsandbytes from writing to the terminal while they work for us."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Turn off progress bars and log messages below errors, and restore both afterwards.

    bitsandbytes, for one, warns on import that it lacks a CPU inference kernel, which training never calls.
    """
    from transformers.utils import logging as transformers_logging

    bitsandbytes_logger = logging.getLogger("bitsandbytes")
    level, verbosity = bitsandbytes_logger.level, transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    bitsandbytes_logger.setLevel(logging.ERROR)
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        bitsandbytes_logger.setLevel(level)
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
