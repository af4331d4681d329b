"""Makes experiments as the logger leaves them, and runs the command on them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import pickle
import re
import resource
import signal
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
DEADLINE = 60  # seconds, for a process that a test waits for
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# The forms of lines on standard error, so that noise of the interpreter or a library is noticed.
MESSAGES = r"(warning|error|hint|QA lines|entries|model): .+|wrote .+| {2,}.+|reading QA lines from the terminal.+"
USAGE = r"usage: .+|[-\w.]+: error: argument .+|[-\w.]+: error: the following arguments are required: .+"
DEBUGGING = r".+:\d+: .+"


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
    """A new store as the logger leaves it: for each prompt (or key, as bytes) a pickle, or the bytes given as such."""
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


@contextlib.contextmanager
def process_state_kept() -> Iterator[None]:
    """Undoes what the command changes in its process, for runs within the tests' own."""
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    root, levels = logging.getLogger(), (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR)
    names, root_handlers, root_level = [logging.getLevelName(level) for level in levels], root.handlers[:], root.level
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        resource.setrlimit(resource.RLIMIT_DATA, limits)
        root.handlers[:] = root_handlers
        root.setLevel(root_level)
        for level, name in zip(levels, names):
            logging.addLevelName(level, name)


def set_stop_signals(ignored: int = 0) -> None:
    """Sets what a new process inherits, whatever the tests were started with, which may be nohup."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN if number == ignored else signal.SIG_DFL)


class Result(SimpleNamespace):
    """What a run left: exit code, standard output, standard error, and the output's lines if there is one."""

    def counts(self) -> dict[str, int]:
        """The numbers in the summary: `QA lines` and its parts."""
        said = re.search(r"^QA lines: ([\d,]+)(?: \((.*)\))?$", self.err, re.MULTILINE)
        assert said, self.err
        parts = [part.split(" ", 1) for part in re.split(r", (?=[\d,]+ [a-z])", said[2] or "") if part]
        numbers = {"QA lines": said[1]} | {name: number for number, name in parts}
        return {name: int(number.replace(",", "")) for name, number in numbers.items()}

    def generations(self) -> list[str]:
        return [line["generation"] for line in self.lines]

    def warnings(self) -> list[str]:
        return [line.removeprefix("warning: ") for line in self.err.splitlines() if line.startswith("warning: ")]

    def error(self) -> str:
        """The error, with the lines that belong to it."""
        assert "error: " in self.err, self.err
        return str(self.err[self.err.index("error: ") + len("error: ") :])

    def proposals(self) -> list[str]:
        """The options that a hint proposes, each line as it would be pasted."""
        return [line.strip() for line in self.err.splitlines() if line.startswith("  --prompt_template")]


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

    def arguments(self, qa: Any = None, lmdb: Any = None, output: Any = None) -> list[str]:
        """The three paths as options, those of this experiment unless others are given."""
        names = ["--qa_output_path", "--lmdb_path", "--output_path"]
        given = [(qa, self.qa), (lmdb, self.lmdb), (output, self.output)]
        paths = [usual if path is None else path for path, usual in given]
        return [os.fspath(word) for pair in zip(names, paths) for word in pair]

    def files(self) -> dict[str, bytes]:
        """All files below the folder, and what is in them."""
        return {str(path): path.read_bytes() for path in sorted(self.folder.rglob("*")) if path.is_file()}

    def run(self, *options: str, code: int = 0, qa: Any = None, lmdb: Any = None, output: Any = None) -> Result:
        """Runs the command within this process, which is quick."""
        import reconstruct_inference  # only here: the benchmark uses this file without the module

        self._capsys.readouterr()
        with process_state_kept():
            try:
                given: Any = reconstruct_inference.main([*self.arguments(qa, lmdb, output), *options])
            except SystemExit as stop:
                given = stop.code
        return self._result(options, code, given, *self._capsys.readouterr())

    def start(self, *options: str, qa: Any = None, lmdb: Any = None, output: Any = None, **how: Any) -> Any:
        """Starts the command as a process, by default one that ignores no signal; `how` is for Popen."""
        command = [sys.executable, str(SCRIPT), *self.arguments(qa, lmdb, output), *options]
        usual = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "preexec_fn": set_stop_signals}
        return subprocess.Popen(command, **{**usual, **how})

    def run_process(self, *options: str, code: int = 0, stdin: bytes = b"", **how: Any) -> Result:
        """Runs the command as a process; `how` is for `start`."""
        with self.start(*options, stdin=subprocess.PIPE, **how) as process:
            return self.end(process, *options, code=code, stdin=stdin)

    def end(self, process: Any, *options: str, code: int = 0, stdin: bytes | None = None) -> Result:
        """Waits for a process that was started, and gives what it left."""
        try:
            out, err = process.communicate(stdin, timeout=DEADLINE)
        finally:
            process.kill()
        return self._result(options, code, process.returncode, *((text or b"").decode() for text in (out, err)))

    def run_as(self, user: int, *options: str, code: int = 0, output: Any = None) -> Result:
        """Runs the command as another user, in a fork: that user may not even be let to this Python."""
        import reconstruct_inference

        said = self.folder / "stderr"
        said.touch()
        os.chown(said, user, user)
        child = os.fork()
        if child == 0:
            given = 99
            try:
                os.setgroups([])
                os.setgid(user)
                os.setuid(user)
                with said.open("w") as sys.stderr:
                    given = reconstruct_inference.main([*self.arguments(output=output), *options])
            finally:
                os._exit(given)
        given = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        err = said.read_text()
        said.unlink()
        return self._result(options, code, given, "", err)

    def _result(self, options: tuple[str, ...], code: int, given: int, out: str, err: str) -> Result:
        assert given == code, f"exit code {given}, not {code}:\n{err}"
        forms = [MESSAGES] + [USAGE] * (code == 2) + [DEBUGGING] * ("--verbose" in options)
        for line in err.splitlines():
            assert any(re.fullmatch(form, line) for form in forms), f"unknown form: {line!r}"
        lines = read_lines(self.output) if self.output.is_file() else None
        return Result(code=given, out=out, err=err, lines=lines)


@contextlib.contextmanager
def writer_to(store: Path) -> Iterator[None]:
    """A logger in another process that goes on committing to a store as fast as it can."""
    code = f"""
import sys
sys.path[:0] = {sys.path!r}
import lmdb, pickle
from helpers import key_of, logged
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


def bash(command: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs a line as it would be pasted, in a folder, with this Python as `python` and `python3`."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **variables}
    how: dict[str, Any] = {"cwd": folder, "env": environment, "timeout": DEADLINE}
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, **how)
