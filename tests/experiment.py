"""An experiment as the logger leaves it, for the tests to run the command on."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lmdb
import pytest

SCRIPT = Path(__file__).parent.parent / "reconstruct_inference.py"
SAMPLE = Path(__file__).parent / "sample"
NOBODY = 65534


def table(names: str, cases: dict[str, Any]) -> pytest.MarkDecorator:
    """Parametrizes a test by the values of a table, whose keys name the cases."""
    return pytest.mark.parametrize(names, list(cases.values()), ids=list(cases))


def prompt_of(question: str) -> str:
    return f"user: Answer in one sentence. Q:{question}\n A:"


def key_of(prompt: str) -> bytes:
    return hashlib.sha256(prompt.encode()).hexdigest().encode()


def logged(question: str, response: Any = " An answer.", **fields: Any) -> dict[str, Any]:
    """The fields that the logger keeps of a question asked in the usual way."""
    usual = {"input_length": 12, "model": "a-model", "timestamp": 1750000000.25}
    return {"prompt": prompt_of(question), "response": response, **usual, **fields}


def write_store(folder: Path, values: Iterable[tuple[Any, Any]], commit_each: bool = False, **options: Any) -> Path:
    """A store as the logger leaves it: for each prompt (or key, as bytes) a pickle, or the bytes given as such.

    What lay there before is gone.
    """
    for name in ("data.mdb", "lock.mdb"):
        (folder / name).unlink(missing_ok=True)
    with lmdb.open(str(folder), **{"map_size": 1 << 28, **options}) as env:
        transaction = env.begin(write=True)
        for key, value in values:
            key = key if isinstance(key, bytes) else key_of(key)
            transaction.put(key, value if isinstance(value, bytes) else pickle.dumps(value))
            if commit_each:
                transaction.commit()
                transaction = env.begin(write=True)
        transaction.commit()
    return folder


def with_activations(entry: dict[str, Any]) -> dict[str, Any]:
    """An entry as the activations store has it: under `data`, without a timestamp."""
    data = {name: value for name, value in entry.items() if name != "timestamp"}
    return {"data": data | {"all_layers_activations": [b"\x80hidden" * 10_000] * 2}, "metadata": {}}


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    assert len(pairs) == len(dict(pairs))
    return dict(pairs)


def read_lines(path: Path) -> list[Any]:
    text = path.read_text(encoding="utf-8")
    assert text.endswith("\n")
    return [json.loads(line, object_pairs_hook=unique) for line in text.removesuffix("\n").split("\n")]


class Experiment:
    """An experiment's folder, in which both stores and the QA file have their usual names."""

    def __init__(self, folder: Path, capsys: Any) -> None:
        self.folder = folder
        self.qa, self.lmdb, self.output = folder / "qa.jsonl", folder / "a.lmdb", folder / "out.jsonl"
        self.metadata = folder / "a.lmdb_metadata"
        self._capsys = capsys

    def ask(self, *questions: Any) -> None:
        """Writes the QA file: a line for each question, or for each object given as such."""
        lines = [{"prompt": question} if isinstance(question, str) else question for question in questions]
        self.qa.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")

    def log(self, *entries: dict[str, Any]) -> None:
        write_store(self.metadata, [(entry["prompt"], entry) for entry in entries])

    def log_prompts(self, *prompts: str, **fields: Any) -> None:
        """Logs prompts of any form."""
        self.log(*[{"prompt": prompt, "response": f"response {n}", **fields} for n, prompt in enumerate(prompts)])

    def log_activations(self, *entries: dict[str, Any]) -> None:
        write_store(self.lmdb, [(entry["prompt"], with_activations(entry)) for entry in entries])

    def arguments(self, **changes: Any) -> list[str]:
        paths = {"qa_output_path": self.qa, "lmdb_path": self.lmdb, "output_path": self.output} | changes
        return [word for name, value in paths.items() for word in (f"--{name}", str(value))]

    def files(self) -> dict[str, bytes]:
        """All files below the folder, and what is in them."""
        return {str(path): path.read_bytes() for path in sorted(self.folder.rglob("*")) if path.is_file()}

    def start(self, *options: str, paths: dict[str, Any] | None = None, **how: Any) -> Any:
        """Starts the command as a process; `how` is for Popen."""
        command = [sys.executable, str(SCRIPT), *self.arguments(**paths or {}), *options]
        return subprocess.Popen(command, **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **how})

    def run(self, *options: str, as_process: bool = False, stdin: bytes = b"", user: int = 0, **how: Any) -> Any:
        """Runs the command here, as a process, or as another user; gives exit code, what is said, the output's lines.

        Further arguments are those of `start`, or paths to use in place of the usual ones.
        """
        paths = {name: how.pop(name) for name in list(how) if name.endswith("_path")}
        if user:
            code, out, said = self._run_as(user, [*self.arguments(**paths), *options])
        elif as_process or how or stdin:
            with self.start(*options, paths=paths, stdin=subprocess.PIPE, **how) as process:
                out, said = ((text or b"").decode() for text in process.communicate(stdin, timeout=120))
            code = process.returncode
        else:
            code, out, said = self._run_here([*self.arguments(**paths), *options])
        assert "Traceback" not in said
        lines = read_lines(self.output) if self.output.is_file() else None
        return SimpleNamespace(code=code, out=out, err=said, lines=lines)

    def _run_here(self, argv: list[str]) -> tuple[Any, str, str]:
        import reconstruct_inference  # only here: the benchmark uses this file without the module

        self._capsys.readouterr()
        try:
            code: Any = reconstruct_inference.main(argv)
        except SystemExit as stop:  # argparse
            code = stop.code
        return code, *self._capsys.readouterr()

    def _run_as(self, user: int, argv: list[str]) -> tuple[int, str, str]:
        """A new process could not do: another user may not even be let to this Python."""
        import reconstruct_inference

        said = self.output.with_name("stderr")
        child = os.fork()
        if child == 0:
            code = 99
            try:
                os.setgroups([])
                os.setgid(user)
                os.setuid(user)
                with said.open("w") as sys.stderr:
                    code = reconstruct_inference.main(argv)
            finally:
                os._exit(code)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), "", said.read_text()


def proposals(err: str) -> list[str]:
    """The options that a hint proposes, each as it would be pasted."""
    return [line.strip() for line in err.splitlines() if line.startswith("  --prompt_template")]


@contextlib.contextmanager
def writer_to(store: Path) -> Iterator[None]:
    """A logger in another process that goes on committing to a store as fast as it can."""
    code = f"""
import sys
sys.path[:0] = {sys.path!r}
import lmdb, pickle
from experiment import key_of, logged
with lmdb.open({str(store)!r}, map_size=1 << 30) as env:
    for number in range(10**9):
        with env.begin(write=True) as transaction:
            entry = logged(f"later {{number}}", "x" * (number * 997 % 9000))
            transaction.put(key_of(entry["prompt"]), pickle.dumps(entry))
        if number == 100:
            print("writing", flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as writer:
        assert writer.stdout
        assert writer.stdout.readline() == b"writing\n"
        try:
            yield
            assert writer.poll() is None
        finally:
            writer.kill()
