"""GLUE's files in each task's own layout, all made here, and a tiny model that reads them."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from hf_attnkit.experiment.glue.tasks import TASKS

# Quotes that do not pair up, doubled spaces, and characters at which str.splitlines would cut.
ODD = 'a "quote \u2028 b \x0b c \x85 d \x1c e  f ,"" '

MNLI_START = (
    "index,promptID,pairID,genre,sentence1_binary_parse,sentence2_binary_parse,sentence1_parse,"
    "sentence2_parse,sentence1,sentence2"
)
HEADER_LINES = {
    "sst2": "sentence,label",
    "mrpc": "Quality,#1 ID,#2 ID,#1 String,#2 String",
    "stsb": "index,genre,filename,year,old_index,source1,source2,sentence1,sentence2,score",
    "qqp": "id,qid1,qid2,question1,question2,is_duplicate",
    "mnli": f"{MNLI_START},label1,gold_label",
    "qnli": "index,question,sentence,label",
    "rte": "index,sentence1,sentence2,label",
    "wnli": "index,sentence1,sentence2,label",
}
HEADERS = {"cola": None, **{name: line.split(",") for name, line in HEADER_LINES.items()}}
MNLI_DEV_HEADER = f"{MNLI_START},label1,label2,label3,label4,label5,gold_label".split(",")
TEST_HEADERS = {
    "cola": "index,sentence",
    "sst2": "index,sentence",
    "mrpc": "index,#1 ID,#2 ID,#1 String,#2 String",
    "stsb": "index,genre,filename,year,old_index,source1,source2,sentence1,sentence2",
    "qqp": "id,question1,question2",
    "mnli": MNLI_START,
    "qnli": "index,question,sentence",
    "rte": "index,sentence1,sentence2",
    "wnli": "index,sentence1,sentence2",
    "ax": "index,sentence1,sentence2",
}
WRITTEN: dict[str, tuple[list[str], list]] = {
    "stsb": (["0.000", "3.8", "5"], [0.0, 3.8, 5.0]),
    "mnli": (["contradiction", "entailment", "neutral"], [2, 0, 1]),
    "qnli": (["not_entailment", "entailment", "entailment"], [1, 0, 0]),
    "rte": (["not_entailment", "entailment", "entailment"], [1, 0, 0]),
}


def texts_of(name: str, split: str, count: int = 3) -> dict[str, list[str]]:
    """The text columns of a split; texts of several lengths, and as different as numbers make them."""
    return {
        column: [
            f"{split} {column} {i} {' '.join(str((i * i + k * (3 * i + 5)) % 100) for k in range(7 * i % 9))} {ODD}"
            for i in range(count)
        ]
        for column in TASKS[name].text_columns
    }


def rows_of(name: str, split: str, count: int = 3) -> tuple[list[list[str]], dict[str, list]]:
    """The rows of a file (the header first, if any), and the columns to be read from them."""
    labelled = not split.startswith("test")
    header = MNLI_DEV_HEADER if split.startswith("validation_") else HEADERS.get(name)
    fields = TASKS[name].tsv.text_fields
    if not labelled:
        header, fields = TEST_HEADERS[name].split(","), TASKS[name].tsv.test_fields or fields
    written, labels = WRITTEN.get(name, (["1", "0", "1"], [1, 0, 1]))
    texts = texts_of(name, split, count)
    rows = []
    for i in range(count):
        if header is None:
            rows.append(["src1", written[i % 3], "*", texts["sentence"][i]])
            continue
        row = [str(i) if j == 0 else f"other {j}" for j in range(len(header))]
        for field, column in zip(fields, texts, strict=True):
            row[header.index(field)] = texts[column][i]
        if labelled:
            row[header.index(TASKS[name].tsv.label_field)] = written[i % 3]
        rows.append(row)
    columns: dict[str, list] = dict(texts)
    if labelled:
        columns["label"] = [labels[i % 3] for i in range(count)]
    return ([header] if header else []) + rows, columns


def write(path: Path, rows: list[list[str]], end: str = "\n", start: str = "") -> None:
    path.write_bytes((start + "".join("\t".join(row) + end for row in rows)).encode("utf-8"))


def write_task(folder: Path, name: str, count: int = 3, **style: str) -> dict[str, dict[str, list]]:
    """The labelled files of a task; returns what has to be read from them, by split."""
    tsv, splits = TASKS[name].tsv, ("train", *TASKS[name].dev_splits)
    return _write_splits(folder, name, splits, (tsv.train_file, *tsv.dev_files), count, **style)


def write_test(folder: Path, name: str, count: int = 15) -> dict[str, dict[str, list]]:
    """The test files of a task; returns what has to be read from them, by split."""
    return _write_splits(folder, name, TASKS[name].test_splits, TASKS[name].tsv.test_files, count)


def _write_splits(
    folder: Path, name: str, splits: tuple[str, ...], files: tuple[str, ...], count: int, **style: str
) -> dict[str, dict[str, list]]:
    folder.mkdir(parents=True, exist_ok=True)
    expected = {}
    for split, file in zip(splits, files, strict=True):
        rows, expected[split] = rows_of(name, split, count)
        write(folder / file, rows, **style)
    return expected


def write_glue(root: Path, *names: str) -> Path:
    """Labelled and test files of these tasks in the folder of all tasks, which is returned."""
    for name in names:
        write_task(root / TASKS[name].folder, name, 12)
        write_test(root / TASKS[name].folder, name)
    return root


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word or mark, the numbers from 0 to 99 among them."""
    words = (
        "train validation test matched mismatched sentence sentence1 sentence2 question question1 question2 premise "
    )
    words += "hypothesis again a b c d e f quote _ ,"
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", '"', *words.split(), *map(str, range(100))]
    inner = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = {"special_tokens": [("[CLS]", 2), ("[SEP]", 3)]}
    inner.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", **special)
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
                                   sep_token="[SEP]")  # fmt: skip


def tiny_checkpoint(folder: Path) -> Path:
    """A random BERT of one layer without a classifier, and its tokenizer."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                        num_attention_heads=4, max_position_embeddings=96, initializer_range=0.5)  # fmt: skip
    model = BertModel(config)
    with torch.no_grad():  # only numbers count, so that answers differ from text to text
        for name, table in model.embeddings.named_children():
            if name.endswith("embeddings"):
                table.weight[: len(tokenizer) - 100 if name == "word_embeddings" else None] = 0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
