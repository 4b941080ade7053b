"""What results.json holds: a run writes it; the table, the page and the card are made from it.

Keys that are not named here are the recipe's own settings; the page and the card list them as they are.
"""

from __future__ import annotations

from typing import Any, TypedDict


class Change(TypedDict):
    """What was done to the model.

    Attributes:
        kind: "pruning", "conversion", "swap", "fine-tuning", "adapters", or a word of the recipe's own.
        title: the same as a phrase for titles, such as "half of the attention heads removed".
        facts: numbers and names of the change.
    """

    kind: str
    title: str
    facts: dict[str, Any]


class _Model(TypedDict):
    name: str
    path: str
    model_type: str


class Model(_Model, total=False):
    """What the run started from.

    Attributes:
        name: short, for titles.
        path: on the hub, or "local".
        model_type: of the config.
        base_model: path on the hub of what a local checkpoint was made from, where that is known.
    """

    base_model: str | None


class Splits(TypedDict):
    """Names of the splits that were read; `None` where none was. Several are divided by commas."""

    train: str | None
    evaluation: str | None


class Data(TypedDict):
    """What the run read.

    Attributes:
        name: short, for titles.
        hub_path: data set on the hub, "local", or "demo" for data that this project makes.
        config: of the data set on the hub.
        language: code of ISO 639, if known.
        task_type: as the hub calls it.
        train_examples, evaluation_examples: how many were used; `None` where none was.
        is_benchmark: whether this is a task of GLUE.
        note: what else one must know of the numbers, such as that a part of the dev set was used.
    """

    name: str
    hub_path: str
    config: str | None
    splits: Splits
    language: str | None
    task_type: str
    train_examples: int | None
    evaluation_examples: int | None
    is_benchmark: bool
    note: str | None


class Actions(TypedDict):
    """What happened in the run."""

    trained: bool
    measured: bool
    predicted: bool


class Ratio(TypedDict):
    """Time of a stage's forward pass divided by that of the first stage."""

    median: float
    lower_quartile: float
    upper_quartile: float


class Milliseconds(TypedDict):
    """Of one forward pass."""

    median: float


class StageTime(TypedDict):
    """One stage of a timing."""

    stage: str
    ratio: Ratio
    milliseconds: Milliseconds


class Timing(TypedDict):
    """Forward passes of all stages, measured alternately at the end of the run."""

    batch_size: int
    sequence_length: int
    repeats: int
    device: str
    stages: list[StageTime]


Stage = dict[str, Any]  # "stage", "metrics", "parameters", "num_heads", "num_key_value_heads", costs, facts


class Load(TypedDict):
    """What loads or runs the saved model, see `hf_attnkit.export.loads_where`.

    Attributes:
        verdict: "yes", "no" or "not tried".
        why: what was tried, or the rule and its source.
    """

    where: str
    verdict: str
    why: str


class Required(TypedDict):
    """What every results.json has.

    Attributes:
        change: `None` where nothing was changed.
        stages: in the order in which they were measured.
        timing: `None` where no stages were timed.
        control: number of the stage that is the untouched model, trained as long; `None` without one.
        command: as a user types it.
    """

    task: str
    model: Model
    data: Data
    change: Change | None
    actions: Actions
    stages: list[Stage]
    timing: Timing | None
    control: int | None
    seed: int
    device: str
    command: str
    versions: dict[str, str]


class Results(Required, total=False):
    """results.json.

    Attributes:
        loads: what loads where; earlier versions did not write it.
        layer_costs: of a linearisation, by layer: what the outputs lose when that layer alone is linear.
        branches: of one with a window: `metric`, its value with `both` branches, with the `window` and with the
            `linear` one alone, and `linear_shares` of the output's energy by layer.
    """

    loads: list[Load]
    layer_costs: dict[str, float]
    branches: dict[str, Any]


# Not settings of the recipe.
COMMON = frozenset(Results.__annotations__) | {"train_samples", "command_digest"}
