"""What heads own: rows of a parameter, and of all parameters of an attention."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Owners:
    """Rows of a parameter, along one dimension, and the heads that they belong to.

    Attributes:
        dim: the dimension along which the heads' rows lie.
        rows: by role ("query", "key", "value", "output"), bool `(heads of that role, size of the dimension)`: whether
            a row belongs to a head. A row may belong to a group of heads; one of all heads alike is in nobody's.
    """

    dim: int
    rows: dict[str, Tensor]

    def joined(self, other: Owners) -> Owners:
        """Both roles' rows of one parameter.

        Raises:
            ValueError: if they lie along different dimensions.
        """
        if self.dim != other.dim:
            raise ValueError(f"heads lie along dimension {self.dim} as well as along {other.dim}")
        return Owners(self.dim, self.rows | other.rows)

    def partition(self) -> tuple[int, ...] | None:
        """For each head, the number of the group that owns the same rows; `None` with several roles.

        Heads that own rows alone are groups of one, unless some rows are a group's: then the groups count.
        """
        if len(self.rows) != 1:
            return None
        (rows,) = self.rows.values()
        sets = {tuple(column) for column in rows.T.tolist() if any(column)}
        widest = max(sum(one) for one in sets)
        groups = sorted((one for one in sets if sum(one) == widest), reverse=True)
        numbers = [next((g for g, one in enumerate(groups) if one[head]), -1) for head in range(len(rows))]
        return None if -1 in numbers else tuple(numbers)

    def kept(self, heads: dict[str, list[int]]) -> Tensor:
        """Numbers of the rows that stay when these heads of each role do: theirs and nobody's."""
        owned = torch.stack([rows.any(0) for rows in self.rows.values()]).any(0)
        keep = ~owned
        for role, rows in self.rows.items():
            keep = keep | rows[heads[role]].any(0)
        return keep.nonzero()[:, 0]

    def of(self, role: str, head: int) -> Tensor:
        """Numbers of the rows of one head."""
        return self.rows[role][head].nonzero()[:, 0]


def owners_of(role: str, table: list[list[Tensor]]) -> Owners | str | None:
    """What the touched rows of each head say.

    Args:
        table: for each head, for each dimension of the parameter, bool: which rows the head's gradient touches.

    Returns:
        The owners along the first dimension along which heads differ in disjoint (or nested) rows; `None` where all
        heads touch the same; a reason where they overlap.
    """
    problem = None
    for dim in range(len(table[0])):
        rows = torch.stack([head[dim] for head in table]).cpu()
        used = rows.any(0)
        if bool((rows == used).all()):
            continue
        common = rows.all(0)
        own = rows & ~common
        if _is_nested(own):
            return Owners(dim, {role: own})
        problem = f"rows of different {role} heads overlap along dimension {dim}"
    return problem


def _is_nested(rows: Tensor) -> bool:
    """Whether any two rows' sets of heads are disjoint, equal, or one inside the other."""
    sets = [frozenset(column.nonzero()[:, 0].tolist()) for column in torch.unique(rows, dim=1).T if column.any()]
    return all(not (a & b) or a <= b or b <= a for i, a in enumerate(sets) for b in sets[:i])


@dataclass(frozen=True)
class Ownership:
    """What belongs to the heads of an attention, by the parameters' names in its module.

    Attributes:
        owned: rows (along one dimension) by head; other rows of these parameters stay.
        shared: parameters that all heads touch alike.
        coupled: parameters that cannot be cut, and why; nothing can be cut where there is one.
        key_heads: for each key/value head, as keys arrive, the number of the key/value head whose parameters make it:
            a module may repeat its keys before it attends. `(0, 1, 2, ...)` where it does not.
        output: path of the output projection in the model, or `None`, which `coupled` then explains.
        matrices: the owned parameters that have more than one dimension.
        reached: weights and biases of matrix products, with the output rows that each head depends on: its own, and
            those that it shares, such as the keys of multi-query attention.
    """

    owned: dict[str, Owners]
    shared: tuple[str, ...]
    coupled: dict[str, str]
    key_heads: tuple[int, ...]
    output: str | None
    matrices: frozenset[str] = frozenset()
    reached: dict[str, Owners] = field(default_factory=dict)

    @property
    def num_key_value_heads(self) -> int:
        """Key/value heads that have parameters of their own."""
        return max(self.key_heads) + 1

    def key_head_of(self, head: int, num_heads: int) -> int:
        """The key/value head, by its parameters, of a query head."""
        return self.key_heads[head * len(self.key_heads) // num_heads]

    def rows_per_head(self, role: str) -> int:
        """How many rows of matrices each head of a role owns."""
        return sum(
            int(one.rows[role][0].sum())
            for name, one in self.owned.items()
            if role in one.rows and name in self.matrices
        )

    @property
    def problem(self) -> str:
        """Why heads cannot be cut, or nothing."""
        return "; ".join(f"{name}: {why}" for name, why in self.coupled.items())
