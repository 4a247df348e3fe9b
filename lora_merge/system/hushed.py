"""Libraries kept from telling a terminal what a config says: their warnings are escaped and go to our own log.

A person who wants them listens to the logger `lora_merge` at level DEBUG. What makes a difference to a merge does not
come this way: it is an error, or the reason why there is no skeleton.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from lora_merge.errors import printable

LOGGERS = ("transformers", "huggingface_hub", "torch")
LOG = logging.getLogger("lora_merge")


class _Escaping(logging.Handler):
    """Passes every record on, escaped."""

    def emit(self, record: logging.LogRecord) -> None:
        LOG.debug("%s: %s", record.name, printable(record.getMessage()))


@contextmanager
def hushed() -> Iterator[None]:
    """Nothing of LOGGERS and of Python's warnings reaches a terminal. The libraries must be imported before."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [(logger.handlers, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = [_Escaping()], False
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            yield
    finally:
        for logger, (handlers, propagate) in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate = handlers, propagate
    for warning in told:
        LOG.debug("%s", printable(warning.message))
