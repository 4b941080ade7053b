"""What the page of `attention_view` holds, read as its script reads it."""

from __future__ import annotations

import base64
import json
import re
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

STEPS = 254


class PageData:
    """`data` is the JSON; weights are read out of the packed bytes."""

    def __init__(self, html: str) -> None:
        found = dict(re.findall(r'<script type="[a-z/]+" id="(data|bytes)">(.*?)</script>', html, re.DOTALL))
        self.data: dict[str, Any] = json.loads(found["data"])
        self._bytes = np.frombuffer(zlib.decompress(base64.b64decode(found["bytes"])), np.uint8)

    def quantized(self, at: int, *shape: int) -> NDArray[np.uint8]:
        return self._bytes[at : at + int(np.prod(shape))].reshape(shape)

    def weights(self, at: int, *shape: int) -> NDArray[np.float64]:
        """As the page reads a byte."""
        found = self.quantized(at, *shape).astype(np.float64)
        return np.where(found > 0, ((found - 1) / STEPS) ** 2, 0.0)

    def integers(self, at: int, *shape: int) -> NDArray[np.int32]:
        return self._bytes[at : at + 4 * int(np.prod(shape))].view("<i4").reshape(shape)
