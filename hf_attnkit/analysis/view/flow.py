"""Attention flow (Abnar and Zuidema 2020, arXiv 2005.00928): how much can flow from an output token to an input token.

The attentions are a network: a node for each token after each layer, an edge from it to each token that it takes from,
whose capacity is the weight, a mean over heads with the residual as in rollout. The flow to input token j is the
maximum flow from the output token's node to j's, found by NetworkX.

    layer 2   t            flow(t, j) = maximum flow from t to j
             /|\\
    layer 1  o o o
             |X X|
    input    o j o
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_attnkit.analysis.view.maps import Example
from hf_attnkit.analysis.view.rollout import step_of

Node = tuple[int, int, int]  # sequence, how many attentions of it have run, token


@dataclass(frozen=True)
class Flow:
    """What can flow from one token, after each attention of its sequence, to input tokens.

    Attributes:
        queries, keys: numbers of the sequences.
        token: the unit of `queries` that it is of.
        steps: names of the attentions, in running order.
        flows: `(steps, columns)` in [0, 1].
    """

    queries: int
    keys: int
    token: int
    steps: tuple[str, ...]
    flows: Tensor


def network(example: Example) -> tuple[Any, dict[int, list[str]]]:
    """The network, a `networkx.DiGraph`, and by sequence the names of its attentions.

    Raises:
        ValueError: if an attention has no weights.
    """
    import networkx as nx  # here, since importing hf_attnkit is not to wait for it

    graph = nx.DiGraph()
    steps: dict[int, list[str]] = {number: [] for number in range(len(example.sequences))}
    for each in example.maps:
        if each.missing == "no head is left":
            continue
        if each.missing:
            raise ValueError(f"{each.name}: {each.missing}, so nothing can be said of what flows through it")
        own, taken = step_of(each)
        before, other = len(steps[each.queries]), len(steps[each.keys])
        for row, weights in enumerate(taken.tolist()):
            node, residual = (each.queries, before + 1, row), (each.queries, before, row)
            capacities = {(each.keys, other, column): weight for column, weight in enumerate(weights) if weight > 0}
            capacities[residual] = capacities.get(residual, 0.0) + float(own[row])
            graph.add_edges_from((node, key, {"capacity": weight}) for key, weight in capacities.items())
        steps[each.queries].append(each.name)
    return graph, steps


def attention_flow(example: Example, queries: int, token: int, *, every_step: bool = True) -> list[Flow]:
    """Flows from a token of one sequence to the inputs of all sequences that it can take from.

    Args:
        token: a unit of the sequence.
        every_step: whether from the token after each attention, or after the last alone.

    Raises:
        ValueError: as `network`; if the sequence has no attention of its own.
    """
    import networkx as nx
    from networkx.algorithms.flow import build_residual_network, shortest_augmenting_path

    graph, steps = network(example)
    names = steps[queries]
    if not names:
        raise ValueError(f"no attention has its queries in sequence {queries} ({example.sequences[queries].name})")
    shown = range(1, len(names) + 1) if every_step else range(len(names), len(names) + 1)
    flows = {number: torch.zeros(len(shown), sequence.units) for number, sequence in enumerate(example.sequences)}
    for place, step in enumerate(shown):
        source = (queries, step, token)
        below = nx.descendants(graph, source) | {source}
        residual = build_residual_network(graph.subgraph(below), "capacity")
        for number, flow in flows.items():
            for column in range(flow.shape[1]):
                if (number, 0, column) in below:
                    target = (number, 0, column)
                    solved = shortest_augmenting_path(residual, source, target, residual=residual, two_phase=True)
                    flow[place, column] = float(solved.graph["flow_value"])
    return [
        Flow(queries, number, token, tuple(names[step - 1] for step in shown), flow)
        for number, flow in flows.items()
        if flow.any()
    ]
