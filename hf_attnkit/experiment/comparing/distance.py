"""How far changed models are from the untouched one, on training sentences that nothing else of a comparison reads."""

from __future__ import annotations

from transformers import PreTrainedModel

from hf_attnkit.experiment.glue.run import GlueRun
from hf_attnkit.observing.batches import to_device
from hf_attnkit.observing.outputs import OutputDistance

HELP = (
    "Measure too how far each model's outputs are from the untouched model's, on so many sentences from the end of the "
    "training data: the mean squared difference of the logits, relative to their variance."
)


class Distance:
    """To the model that the run has when this is made."""

    def __init__(self, run: GlueRun, size: int, used: int) -> None:
        """
        Args:
            size: sentences; 0 measures nothing.
            used: how many of the first ones are used otherwise.

        Raises:
            ValueError: if there are not so many sentences besides those.
        """
        there = len(run.train_data)
        if size < 0 or used + size > there:
            raise ValueError(
                f"--distance_samples {size} must be from 0 to {max(there - used, 0)}: of {there} training sentences "
                f"the first {used} are used for scores and calibration"
            )
        model = run.model.to(run.training.device)
        batches = run.batches_of(range(there - size, there)) if size else ()
        self._distance = OutputDistance(model, [to_device(batch, model) for batch in batches]) if size else None

    def facts(self, model: PreTrainedModel) -> dict[str, float]:
        """What results.json says of a model."""
        if self._distance is None:
            return {}
        return {"distance": float(self._distance.now(model).sum() / self._distance.counts.sum())}
