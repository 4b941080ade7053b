"""Text for language modelling: from the hub or from files, cut into blocks of tokens as Transformers' run_clm.py does.

    document 1 | document 2 | document 3 ...      tokens of all documents, one after the other
    [ block  ][ block  ][ block  ] ...            every block has block_size tokens

The tokens after the last whole block are dropped.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

DATASET = ("Salesforce/wikitext", "wikitext-2-raw-v1")
SPLIT_PERCENTAGE = 5
PYTHON_DOCS = "python_docs"
# Documents that are tokenized together.
BATCH = 1000


@dataclass
class TextArguments:
    """Where the text comes from; the names are those of Transformers' run_clm.py."""

    dataset_name: str | None = field(default=None, metadata={"help": f"On the hub; by default {DATASET[0]}."})
    dataset_config_name: str | None = field(
        default=None, metadata={"help": f"Its configuration; by default {DATASET[1]} for {DATASET[0]}."}
    )
    train_file: str | None = field(
        default=None, metadata={"help": "A file of text instead, one document or paragraph a line."}
    )
    validation_file: str | None = field(default=None, metadata={"help": "The held-out text; needs --train_file."})
    text: str | None = field(
        default=None,
        metadata={
            "help": f"{PYTHON_DOCS}: Python's own language reference instead, long English text that is always there.",
            "choices": [PYTHON_DOCS],
        },
    )
    validation_split_percentage: int | None = field(
        default=None,
        metadata={
            "help": f"Per cent of the documents, from the end, that are held out. By default {SPLIT_PERCENTAGE}."
        },
    )
    block_size: int = field(default=512, metadata={"help": "Tokens of a block, which the model reads at once."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only so many blocks, the first ones."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only so many blocks, the first ones."})

    def __post_init__(self) -> None:
        if self.train_file and (self.dataset_name or self.dataset_config_name):
            raise ValueError(f"give --train_file {self.train_file} or a dataset of the hub, not both")
        if self.validation_file and not self.train_file:
            raise ValueError(f"--validation_file {self.validation_file} needs --train_file; add it")
        if self.text and (self.train_file or self.dataset_name or self.dataset_config_name):
            raise ValueError(f"give --text {self.text}, --train_file or a dataset of the hub, only one of them")
        percentage = self.validation_split_percentage
        if percentage is not None and self.validation_file:
            raise ValueError(
                f"--validation_split_percentage {percentage} has no effect with --validation_file; leave one of them"
            )
        if percentage is not None and not 0 < percentage < 100:
            raise ValueError(f"--validation_split_percentage {percentage} must be from 1 to 99")
        if self.block_size < 2:
            raise ValueError(f"--block_size {self.block_size} must be at least 2: a block's first token predicts")
        for name in ("max_train_samples", "max_eval_samples"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least 1")
        if self.dataset_name is None and self.train_file is None and self.text is None:
            self.dataset_name = DATASET[0]
            self.dataset_config_name = self.dataset_config_name or DATASET[1]


@dataclass(frozen=True)
class Text:
    """Documents to train on and, held out, to measure on.

    Attributes:
        name: short, for titles: the file or dataset.
        split: which documents are held out.
    """

    train: Sequence[str]
    validation: Sequence[str]
    name: str
    split: str


def load_text(arguments: TextArguments) -> Text:
    """
    Raises:
        FileNotFoundError: no such file, or the hub cannot be reached.
        ValueError: an empty or undecodable file, a dataset without text, or too few documents to hold some out.
    """
    if arguments.text is not None:
        from pydoc_data.topics import topics

        documents = [f"{topic.strip()}\n" for topic in topics.values()]
        return _held_out(documents, arguments, arguments.text, arguments.text)
    if arguments.train_file is None:
        return _from_hub(arguments)
    train = _read(arguments.train_file)
    if arguments.validation_file is not None:
        split = Path(arguments.validation_file).name
        return Text(train, _read(arguments.validation_file), Path(arguments.train_file).name, split)
    name = Path(arguments.train_file).name
    return _held_out(train, arguments, name, name)


def _read(path: str) -> list[str]:
    """The lines of a file that are not blank, each with its line break."""
    try:
        # Bytes, so that only a line break ends a line.
        lines = Path(path).read_bytes().decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8") from error
    documents = [f"{line.rstrip()}\n" for line in lines if line.strip()]
    if not documents:
        raise ValueError(f"{path} is empty: it needs text, one document or paragraph a line")
    return documents


def _from_hub(arguments: TextArguments) -> Text:
    name, config = arguments.dataset_name, arguments.dataset_config_name
    called = f"{name} {config}" if config else str(name)
    try:
        loaded = datasets.load_dataset(name, config)
    except (ConnectionError, FileNotFoundError) as error:
        raise FileNotFoundError(
            f"{called} could not be loaded from the hub ({error}): go online, or give --train_file, a text file with "
            "one document or paragraph a line"
        ) from error
    if "train" not in loaded:
        raise ValueError(f"{called} has no split 'train', only {list(loaded)}; name another dataset")
    texts = {split: rows[_column(rows, called)] for split, rows in loaded.items() if split in ("train", "validation")}
    if "validation" not in texts:
        return _held_out(texts["train"], arguments, called, _short(name))
    if arguments.validation_split_percentage is not None:
        raise ValueError(
            f"--validation_split_percentage {arguments.validation_split_percentage} has no effect, since {called} has "
            "a validation split; leave it out"
        )
    return Text(texts["train"], texts["validation"], _short(name), "validation")


def _short(name: str | None) -> str:
    return str(name).rpartition("/")[2]


def _column(rows: datasets.Dataset, called: str) -> str:
    names = [name for name, feature in rows.features.items() if feature == datasets.Value("string")]
    if "text" in names:
        return "text"
    if len(names) != 1:
        raise ValueError(f"{called} has no column 'text', and its columns of text are {names}; name another dataset")
    return str(names[0])


def _held_out(documents: Sequence[str], arguments: TextArguments, called: str, name: str) -> Text:
    percentage = arguments.validation_split_percentage or SPLIT_PERCENTAGE
    held = max(len(documents) * percentage // 100, 1)
    if held == len(documents):
        raise ValueError(f"{called} is one document, of which none can be held out; give --validation_file, or lines")
    return Text(documents[:-held], documents[-held:], name, f"the last {percentage}% of the documents")


class Blocks(Dataset[dict[str, Tensor]]):
    """Blocks of tokens: `input_ids` and the same as `labels`, `(block_size,)` each.

    Args:
        documents: texts; tokenized up to `limit` blocks, with the special tokens that the tokenizer adds to each.
        what: what the message for too little text calls it.

    Raises:
        ValueError: for less text than one block.
    """

    def __init__(self, documents: Sequence[str], tokenizer: Any, block_size: int, limit: int | None, what: str) -> None:
        parts: list[np.ndarray] = []
        total = 0
        for ids in _tokenized(documents, tokenizer):
            parts.append(ids)
            total += len(ids)
            if limit is not None and total >= limit * block_size:
                break
        number = total // block_size if limit is None else min(total // block_size, limit)
        if not number:
            raise ValueError(
                f"the {what} text has {total} tokens, fewer than one block of --block_size {block_size}; lower it, or "
                "give more text"
            )
        flat = np.concatenate(parts)[: number * block_size]
        self.tokens = torch.from_numpy(flat).view(number, block_size)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = self.tokens[index].long()
        return {"input_ids": ids, "labels": ids}


def _tokenized(documents: Sequence[str], tokenizer: Any) -> Iterator[np.ndarray]:
    for start in range(0, len(documents), BATCH):
        # Long documents are cut into blocks, so the tokenizer need not warn of their length.
        ids = tokenizer(list(documents[start : start + BATCH]), return_attention_mask=False, verbose=False)["input_ids"]
        yield np.fromiter(itertools.chain.from_iterable(ids), dtype=np.int32)
