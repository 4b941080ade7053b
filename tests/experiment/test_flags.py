"""Flags that recipes share: spellings, what is refused, and no secret in the published command."""

from __future__ import annotations

import finetune_glue
import pytest
from support.recipe_runs import flags, run

from hf_attnkit.experiment.arguments import REFUSED, parse_arguments
from hf_attnkit.experiment.record import command

only_bert = pytest.mark.parametrize("checkpoint", ["bert"], indirect=True)


@pytest.mark.parametrize("given", [["--hub_token", "secret", "--seed", "1"], ["--hub_token=secret", "--seed", "1"]])
def test_the_command_holds_no_token(given) -> None:
    shown = command(["x.py", *given])
    assert "secret" not in shown and "--hub_token" in shown and shown.endswith("--seed 1")


def test_flags_mean_the_same_in_each_spelling(tmp_path) -> None:
    (training,) = parse_arguments(argv=["--output-dir", str(tmp_path), "--do-eval", "--learning-rate=1e-3"])
    assert (training.do_train, training.do_eval, training.learning_rate) == (False, True, 1e-3)


def test_shortened_flags_are_refused(tmp_path) -> None:
    """A shortened --hub_token would be in the published command."""
    with pytest.raises(ValueError, match="--hub_to"):
        parse_arguments(argv=["--output_dir", str(tmp_path), "--hub_to", "secret"])


@pytest.mark.parametrize("name", [*REFUSED, "eval_do_concat_batches"])
def test_flags_that_would_spoil_the_run_are_refused(name, tmp_path, capsys) -> None:
    value = "false" if name == "eval_do_concat_batches" else "true"
    with pytest.raises(SystemExit):
        parse_arguments(argv=["--output_dir", str(tmp_path), "--use_cpu", f"--{name}", value])
    assert f"--{name}" in capsys.readouterr().err


def test_the_interval_of_logs_can_be_given(tmp_path) -> None:
    (training,) = parse_arguments(argv=["--output_dir", str(tmp_path), "--logging_steps", "500"])
    assert training.logging_steps == 500


@only_bert
@pytest.mark.parametrize(
    ("wrong", "message"),
    [(("--entropy_every_n_steps", "-1"), "entropy_every_n_steps -1 must be"),
     (("--entropy_every_n_steps", "5", "--do_eval"), "entropy_every_n_steps 5 has no effect")],
)  # fmt: skip
def test_intervals_that_cannot_be_honoured_are_named(wrong, message, checkpoint, tmp_path, monkeypatch) -> None:
    with pytest.raises(ValueError, match=message):
        run(finetune_glue, monkeypatch, flags(checkpoint, tmp_path / "out", *wrong))
    assert not (tmp_path / "out").exists()
