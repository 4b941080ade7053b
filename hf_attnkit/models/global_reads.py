"""A warning of Transformers that does not hold for configs whose layers have different numbers of heads.

Transformers' check of a config and its classes read the global numbers of heads once, and it warns of that: a model
might be built with the wrong numbers. Here its projections are cut to each layer's numbers before any weight is loaded.
"""

from __future__ import annotations

import logging

_LOGGER = logging.getLogger("transformers.integrations.heterogeneity.configuration_utils")
_START = "Reading global config value for per-layer attribute "
_NUMBERS = ("`num_attention_heads`", "`num_key_value_heads`")


def expect_global_reads() -> None:
    """Leave this warning out for the numbers of heads, and no other message."""
    if _is_other not in _LOGGER.filters:
        _LOGGER.addFilter(_is_other)


def _is_other(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return not message.startswith(tuple(_START + number for number in _NUMBERS))
