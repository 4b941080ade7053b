"""recipes/attention_view.py: texts, a target, a picture, before and after."""

from __future__ import annotations

import sys
from pathlib import Path

import attention_view as recipe
import pytest
from PIL import Image
from support.models import build
from support.page_data import PageData
from transformers import AutoModel, ViTImageProcessor

from hf_attnkit import prune_heads


def page(monkeypatch: pytest.MonkeyPatch, output: Path, *arguments: str) -> PageData:
    monkeypatch.setattr(sys, "argv", ["attention_view.py", *arguments, "--output_file", str(output)])
    recipe.main()
    return PageData(output.read_text(encoding="utf-8"))


@pytest.mark.parametrize("checkpoint", ["bert"], indirect=True)
def test_texts_before_and_after(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = prune_heads(AutoModel.from_pretrained(checkpoint), {0: [1]})
    changed.save_pretrained(tmp_path / "changed")
    (tmp_path / "texts.txt").write_text("the keys are here .\n\nthe key is here .\nanother\n")
    more = ("--text", "a key", "--text_file", str(tmp_path / "texts.txt"), "--num_texts", "2", "--importance",
            "magnitude", "--compare", str(tmp_path / "changed"))  # fmt: skip
    found = page(monkeypatch, tmp_path / "new" / "page.html", str(checkpoint), *more)
    assert [len(each["sequences"][0]["labels"]) for each in found.data["examples"]] == [4, 7, 7]
    assert found.data["examples"][1]["sequences"][0]["labels"][0] == "[CLS]"
    assert found.data["examples"][0]["differences"][0]["matched"] == [0, None, 1, 2]
    assert len(found.data["importance"]) == 2 and found.data["names"] == ["before", "after"]
    (tmp_path / "nothing.txt").write_text("\n")
    with pytest.raises(SystemExit) as error:
        page(monkeypatch, tmp_path / "x.html", str(checkpoint), "--text_file", str(tmp_path / "nothing.txt"))
    assert error.value.code == 1


def test_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("vit")
    model.save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 12, "width": 16}).save_pretrained(tmp_path / "vit")
    Image.new("RGB", (64, 48), (200, 30, 30)).save(tmp_path / "red.png")
    found = page(monkeypatch, tmp_path / "page.html", str(tmp_path / "vit"), "--image", str(tmp_path / "red.png"))
    (sequence,) = found.data["examples"][0]["sequences"]
    assert (sequence["grid"]["rows"], sequence["grid"]["columns"]) == (3, 4)
    assert found.data["title"] == "Attention of vit"


def test_a_target(tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("t5", "base", vocab_size=len(tokenizer))
    model.save_pretrained(tmp_path / "t5")
    tokenizer.save_pretrained(tmp_path / "t5")
    more = ("--text", "the keys are here .", "--target", "a key")
    found = page(monkeypatch, tmp_path / "page.html", str(tmp_path / "t5"), *more)
    sequences = found.data["examples"][0]["sequences"]
    assert [len(each["labels"]) for each in sequences] == [7, 4] and all(each["is_text"] for each in sequences)


@pytest.mark.parametrize(
    "arguments, message",
    [((), "give --text, --text_file or --image"),
     (("--text", "a", "--max_length", "0"), "--max_length 0 must be at least 1"),
     (("--image", "a.png", "--target", "b"), "--target is for encoder-decoders")],
)  # fmt: skip
def test_bad_arguments(
    arguments: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        page(monkeypatch, tmp_path / "page.html", "model", *arguments)
    assert message in capsys.readouterr().err
