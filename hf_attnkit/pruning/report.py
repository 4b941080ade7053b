"""What a pruning did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hf_attnkit.common.text_table import text_table
from hf_attnkit.editing.last_change import ChangeReport
from hf_attnkit.refitting import report as refits
from hf_attnkit.refitting.report import RefitReport, refit_line


@dataclass(frozen=True)
class PruningReport(ChangeReport):
    """What a pruning did; prints as a table.

    Attributes:
        removed: `{layer: (head, ...)}`, heads counted as before the pruning.
        refit: what the refit reached; `None` without one.
        bytes_before, bytes_after: of the key/value cache per token, all layers.
    """

    removed: Mapping[int, tuple[int, ...]]
    refit: RefitReport | None
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        reached = {} if self.refit is None else self.refit.cells()
        rows: list[tuple[str, ...]] = [("layer", "heads", "key/value heads", "removed", *refits.HEADINGS)]
        for index, (before, after) in enumerate(zip(self.heads_before, self.heads_after, strict=True)):
            heads, groups = (f"{old} -> {new}" for old, new in zip(before, after, strict=True))
            removed = ",".join(map(str, self.removed.get(index, ())))
            rows.append((str(index), heads, groups, removed, *reached.get(index, refits.BLANK)))
        totals = [str(sum(heads for heads, _ in pairs)) for pairs in (self.heads_before, self.heads_after)]
        cache = f"cache {self.bytes_before:,} -> {self.bytes_after:,} bytes per token"
        return f"{text_table(rows)}\n{' -> '.join(totals)} heads; {cache}; {refit_line(self.refit)}"
