"""Run Python elsewhere: what a user without this package, a fresh process, or several processes together see.

A process is forked from one that has imported PyTorch, Transformers and what the recipes need of other packages, but
nothing of this project: to import these takes most of the time of a short process. It has no state besides.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import runpy
import socket
import sys
import tempfile
import textwrap
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support import slow

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([
    "torch", "torch.distributed", "transformers.trainer", "transformers.models.auto.modeling_auto",
    "transformers.models.bert.modeling_bert", "transformers.models.llama.modeling_llama",
    "accelerate", "peft", "datasets", "evaluate", "sklearn.metrics",
])  # fmt: skip
TIMEOUT = 300


@dataclass(frozen=True)
class Done:
    """As of `subprocess`: the negative number of a signal that ended it."""

    returncode: int
    stdout: str
    stderr: str


def run_python(code: str, *arguments: object) -> str:
    """Standard output of a process that runs `code` with `arguments` in sys.argv[1:]."""
    done = finished_python(code, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def finished_python(code: str, *arguments: object) -> Done:
    (done,) = together([(run_code, (textwrap.dedent(code), [str(word) for word in arguments]))])
    return done


def launched(count: int, main: Callable[..., Any], *arguments: Any, environment: Mapping[str, str] = {}) -> list[Done]:
    """`main(*arguments)` in `count` processes that find each other by the variables which `torchrun` sets."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count),
              "LOCAL_WORLD_SIZE": str(count), **environment}  # fmt: skip
    own = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    return together([(main, arguments)] * count, own)


def together(
    calls: Sequence[tuple[Callable[..., Any], Sequence[Any]]], environments: Sequence[Mapping[str, str]] | None = None
) -> list[Done]:
    """Each call in a process of its own, all at the same time. Where one fails the others are ended."""
    slow.only_if_slow("starts a Python process")
    with tempfile.TemporaryDirectory() as folder:
        places = [Path(folder) / str(number) for number in range(len(calls))]
        processes = [
            FORKS.Process(target=_forked, args=(str(place), os.getcwd(), dict(environment), main, tuple(arguments)))
            for place, environment, (main, arguments) in zip(
                places, environments or [{}] * len(calls), calls, strict=True
            )
        ]
        for process in processes:
            process.start()
        waiting = {process.sentinel: process for process in processes}
        while waiting:
            ended = multiprocessing.connection.wait(list(waiting), TIMEOUT)
            now = [waiting.pop(sentinel) for sentinel in ended]
            for process in now:
                process.join()
            if not now or any(process.exitcode for process in now):
                for process in waiting.values():
                    process.kill()
        return [
            Done(process.exitcode or 0, Path(f"{place}.out").read_text(), Path(f"{place}.err").read_text())
            for place, process in zip(places, processes, strict=True)
        ]


def _forked(place: str, folder: str, environment: dict[str, str], main: Callable[..., Any], arguments: Any) -> None:
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(f"{place}.{name}", os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    os.chdir(folder)
    os.environ.update(environment)
    main(*arguments)


def run_code(code: str, arguments: list[str]) -> None:
    """As `python -c` does."""
    sys.argv = ["-c", *arguments]
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    exec(compile(code, "<string>", "exec"), main.__dict__)


def run_script(script: str, arguments: list[str]) -> None:
    """As `python script` does."""
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")
