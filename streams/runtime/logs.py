"""Logging: structlog lines on standard error, coloured for people and JSON for machines."""

from __future__ import annotations

import logging
import sys

import structlog

from streams.runtime.terminal import escaped


def configure_logging(level: str = "info") -> None:
    """Set up structlog and the standard library's root logger for this process. Call once, at the entry point."""
    threshold = getattr(logging, level.upper())
    renderers: list[structlog.typing.Processor] = (
        [_escape, structlog.dev.ConsoleRenderer()] if sys.stderr.isatty() else [structlog.processors.JSONRenderer()]
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            *renderers,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),  # looked up late: it may be redirected
        cache_logger_on_first_use=False,
    )
    logging.basicConfig(stream=sys.stderr, level=max(threshold, logging.WARNING), force=True)
    if threshold > logging.DEBUG:
        # they log every refused connection several times; our own errors name it once, with the setting
        for chatty in ("kafka", "aiokafka", "pymilvus"):
            logging.getLogger(chatty).setLevel(logging.CRITICAL)


def _escape(_: object, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Values of any origin are text to a terminal."""
    return {name: escaped(value, lines=True) if isinstance(value, str) else value for name, value in event.items()}
