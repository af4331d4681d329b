"""The tests' data, made the way the logger makes it, and the two ways of running the script."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lmdb
import pytest

SCRIPT = Path(__file__).parent.parent / "reconstruct_inference.py"
SAMPLE = Path(__file__).parent / "sample"


def prompt_of(question: str) -> str:
    return f"user: Answer in one sentence. Q:{question}\n A:"


def key_of(prompt: str) -> bytes:
    return hashlib.sha256(prompt.encode()).hexdigest().encode()


def logged(question: str, response: Any = " An answer.", **fields: Any) -> dict[str, Any]:
    """The fields that the logger keeps of a question asked in the usual way."""
    return {
        "prompt": prompt_of(question),
        "response": response,
        "input_length": 12,
        "model": "a-model",
        "timestamp": 1750000000.25,
        **fields,
    }


def write_store(folder: Path, values: Iterable[tuple[str, Any]], commit_each: bool = False, **options: Any) -> Path:
    """A store as the logger leaves it: under each prompt's hash a pickle, or the bytes given as such."""
    env = lmdb.open(str(folder), **{"map_size": 1 << 28, **options})
    transaction = env.begin(write=True)
    for prompt, value in values:
        transaction.put(key_of(prompt), value if isinstance(value, bytes) else pickle.dumps(value))
        if commit_each:
            transaction.commit()
            transaction = env.begin(write=True)
    transaction.commit()
    env.close()
    (folder / "lock.mdb").unlink()
    return folder


def write_qa(path: Path, questions: Iterable[Any]) -> Path:
    """A QA file: a line for each question, or for each object given as such."""
    with path.open("w", encoding="utf-8") as file:
        for question in questions:
            line = {"prompt": question} if isinstance(question, str) else question
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    return path


def read_lines(path: Path) -> list[Any]:
    text = path.read_text(encoding="utf-8")
    assert text.endswith("\n")
    return [json.loads(line) for line in text.removesuffix("\n").split("\n")]


class Experiment:
    """An experiment's folder, in which both stores and the QA file have their usual names."""

    def __init__(self, folder: Path, run_main: Callable[[list[str]], SimpleNamespace]) -> None:
        self.folder = folder
        self.qa, self.lmdb, self.output = folder / "qa.jsonl", folder / "a.lmdb", folder / "out.jsonl"
        self.metadata = folder / "a.lmdb_metadata"
        self._run_main = run_main

    def ask(self, *questions: Any) -> None:
        write_qa(self.qa, questions)

    def log(self, *entries: dict[str, Any]) -> None:
        write_store(self.metadata, [(entry["prompt"], entry) for entry in entries])

    def log_activations(self, *entries: dict[str, Any]) -> None:
        """Logs into the activations store, where entries lie under `data` and have no timestamp."""
        values = []
        for entry in entries:
            data = {name: value for name, value in entry.items() if name != "timestamp"}
            activations = {"all_layers_activations": [b"\x80hidden" * 100] * 3}
            values.append((entry["prompt"], {"data": data | activations, "metadata": {}}))
        write_store(self.lmdb, values)

    def arguments(self, **changes: Any) -> list[str]:
        paths = {"qa_output_path": self.qa, "lmdb_path": self.lmdb, "output_path": self.output} | changes
        return [word for name, value in paths.items() for word in (f"--{name}", str(value))]

    def run(self, *options: str, **changes: Any) -> SimpleNamespace:
        """Runs the command in this process; gives its exit code, its output's lines and its stderr."""
        result = self._run_main([*self.arguments(**changes), *options])
        result.lines = read_lines(self.output) if self.output.is_file() else None
        return result

    def start(self, *options: str, **settings: Any) -> subprocess.Popen[bytes]:
        """Starts the command as a process of its own."""
        changes = settings.pop("changes", {})
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | settings
        return subprocess.Popen([sys.executable, str(SCRIPT), *self.arguments(**changes), *options], **pipes)


@pytest.fixture
def run_main(capsys: pytest.CaptureFixture[str]) -> Callable[[list[str]], SimpleNamespace]:
    import reconstruct_inference  # not above: the benchmark uses this file without the module

    def run(argv: list[str]) -> SimpleNamespace:
        capsys.readouterr()
        try:
            code = reconstruct_inference.main(argv)
        except SystemExit as stop:  # argparse
            code = stop.code
        said = capsys.readouterr()
        assert said.out == "", "standard output belongs to the data"
        assert "Traceback" not in said.err
        return SimpleNamespace(code=code, err=said.err)

    return run


@pytest.fixture
def experiment(tmp_path: Path, run_main: Callable[[list[str]], SimpleNamespace]) -> Experiment:
    return Experiment(tmp_path, run_main)


@pytest.fixture
def files_before(tmp_path: Path) -> Callable[[], dict[str, bytes]]:
    """Reads all files below the test's folder, to be compared later."""

    def read() -> dict[str, bytes]:
        found = {}
        for folder, _, names in os.walk(tmp_path):
            for name in names:
                path = Path(folder, name)
                found[str(path.relative_to(tmp_path))] = path.read_bytes()
        return found

    return read
