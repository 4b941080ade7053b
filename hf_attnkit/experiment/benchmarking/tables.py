"""The benchmark's measurements as tables, for the console and for documents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hf_attnkit.experiment.benchmarking.candidates import PARTS, candidates

Grid = tuple[str, list[str], list[list[str]]]  # title, header, rows


def cost_tables(results: dict[str, Any]) -> list[Grid]:
    """For each part a table of times and one of peak memory; a dash where a candidate was not measured."""
    found = {(r["part"], r["candidate"], r["length"]): r for r in results["measurements"]}
    records = results["measurements"] + results["left_out"]
    # What ran nowhere has no row; `notes` says why.
    labels = [label for label in candidates(1) if any(label == r["candidate"] for r in results["measurements"])]
    lengths = sorted({r["length"] for r in records})
    baseline, tables = results["arguments"]["baseline"], []
    for part, name in PARTS.items():
        if not any(r["part"] == part for r in records):
            continue
        header = ["", *(f"{length:,}" for length in lengths)]
        times = [[label, *(_time(found.get((part, label, n))) for n in lengths)] for label in labels]
        memory = [[label, *(_memory(found.get((part, label, n)), "peak_bytes") for n in lengths)] for label in labels]
        times_title = f"{name}: median ms (interquartile range) and ratio to {baseline}, over tokens"
        tables.append((times_title, header, times))
        tables.append((f"{name}: peak memory in MiB, inputs not counted, over tokens", header, memory))
        if part == "decode":
            kept = [[label, *(_memory(found.get((part, label, n)), "kept_bytes") for n in lengths)] for label in labels]
            tables.append((f"{name}: keys and values or state that a model keeps, in MiB, over tokens", header, kept))
    return tables


def _time(record: dict[str, Any] | None) -> str:
    if record is None:
        return "-"
    lower, upper = record["quartiles_seconds"]
    ratio = record["ratio_to_baseline"]
    text = f"{record['median_seconds'] * 1e3:,.3g} ({(upper - lower) * 1e3:.2g})"
    return text if ratio is None else f"{text} {ratio:.2f}x"


def _memory(record: dict[str, Any] | None, name: str) -> str:
    return "-" if record is None or record[name] is None else f"{record[name] / 2**20:,.3g}"


def quantity_table(results: dict[str, Any]) -> Grid:
    """One row a bar."""
    rows = []
    for found in results["quantities"]:
        lower, upper = found["ratio_quartiles"]
        verdict = {True: "pass", False: "MISS", None: "-"}[found["is_met"]]
        cells = (f"{found['ratio']:.3g}", f"{lower:.3g} to {upper:.3g}", found["bar"] or "-", verdict)
        rows.append([found["what"], *cells])
    return "ratios", ["what", "ratio", "quartiles", "bar", ""], rows


def notes(results: dict[str, Any]) -> list[str]:
    """Each reason for which something was left out, with the rows it holds for."""
    reasons: dict[str, list[str]] = {}
    for record in results.get("left_out", []):
        labels = reasons.setdefault(record["reason"], [])
        labels += [record["candidate"]] if record["candidate"] not in labels else []
    return [f"not measured: {', '.join(labels)}: {reason}" for reason, labels in reasons.items()]


def as_markdown(tables: Sequence[Grid], results: dict[str, Any]) -> str:
    """The tables for a document, under a line that says where they come from."""
    lines = [where(results), ""]
    for title, header, rows in tables:
        lines += [f"**{title}**", "", f"| {' | '.join(header)} |", "| --- |" + " ---: |" * (len(header) - 1)]
        lines += [f"| {' | '.join(row)} |" for row in rows] + [""]
    lines += [f"- {note}" for note in notes(results)]
    return "\n".join([*lines, "", f"`{results['command']}`"]) + "\n"


def where(results: dict[str, Any]) -> str:
    """Device, threads and versions in a line."""
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    return f"{results['device']['name']} ({results['device']['type']}), {results['threads']} threads, {versions}"
