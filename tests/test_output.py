"""The output appears whole or not at all, whatever happens, and no input is ever changed."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
from helpers import DEADLINE, SCRIPT, STOP_SIGNALS, Experiment, bash, logged, read_lines, set_stop_signals

from reconstruct_inference import reconstruct_inference

OLD, LINE = b'{"old": true}\n', b'{"prompt": "q"}\n'
STOPPED: dict[int, int] = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129, signal.SIGKILL: -9}
CLOSED = ["<&-", ">&-", "2>/dev/full", "<&- >&- 2>&-", "--output_path=- <&- 2>&- >out.jsonl"]
CLOSED_AND_NEEDED = ["--output_path=- <&- >&-", "--qa_output_path=- <&- >&- 2>&-"]
FILES = ["a.lmdb_metadata", "out.jsonl", "qa.jsonl"]
INPUTS = ["qa.jsonl", "a.lmdb_metadata/data.mdb", "a.lmdb_metadata/lock.mdb", "a.lmdb/data.mdb", "a.lmdb/lock.mdb"]


def state_of(asked: Experiment) -> dict[str, Any]:
    """All files but the output, and what is in them; of lock files, only the sizes."""
    files = {name: data for name, data in asked.files().items() if name != str(asked.output)}
    return {name: len(data) if name.endswith("lock.mdb") else data for name, data in files.items()}


@contextlib.contextmanager
def halfway(asked: Experiment, ignored: int = 0) -> Iterator[Any]:
    """A run that has begun to write its output, and waits for its second QA line."""
    asked.output.write_bytes(OLD)
    with asked.start(qa="-", stdin=subprocess.PIPE, bufsize=0, preexec_fn=lambda: set_stop_signals(ignored)) as process:
        process.stdin.write(LINE)
        deadline = time.monotonic() + DEADLINE
        while len(os.listdir(asked.folder)) == 3:
            assert (process.poll(), time.monotonic() < deadline) == (None, True)
            time.sleep(0.01)
        yield process


@pytest.mark.parametrize("number", STOPPED)
def test_a_stopped_run_says_so_and_leaves_what_was_there(asked: Experiment, number: int) -> None:
    with halfway(asked) as process:
        process.send_signal(number)
        result = asked.end(process, code=STOPPED[number])
    assert asked.output.read_bytes() == OLD
    if number != signal.SIGKILL:
        assert result.err == f"error: stopped; {asked.output} is unchanged\n"
        assert sorted(os.listdir(asked.folder)) == FILES


def test_two_signals_at_once_are_one_stop(asked: Experiment) -> None:
    with halfway(asked) as process:
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGHUP)
        assert process.communicate(timeout=DEADLINE)[1].decode() == f"error: stopped; {asked.output} is unchanged\n"


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_that_the_caller_ignores_as_nohup_does_stays_ignored(asked: Experiment, number: int) -> None:
    with halfway(asked, ignored=number) as process:
        process.send_signal(number)
        result = asked.end(process, stdin=LINE)
    assert len(result.lines) == 2


def test_the_function_leaves_signals_descriptors_and_hooks_as_they_are(asked: Experiment) -> None:
    def state() -> Any:
        handlers = [signal.getsignal(number) for number in (*STOP_SIGNALS, signal.SIGALRM, signal.SIGCHLD)]
        return handlers, signal.pthread_sigmask(signal.SIG_BLOCK, []), set(os.listdir("/dev/fd")), sys.excepthook

    before = state()
    reconstruct_inference(asked.qa, asked.lmdb, asked.output)
    assert state() == before


@pytest.mark.parametrize("limit", ["-d 300000 -v 2000000", "-f 100"])
def test_too_long_a_line_or_a_full_disk_is_one_plain_error_and_costs_no_old_output(asked: Any, limit: str) -> None:
    asked.qa.write_bytes(LINE * 2_000)
    asked.output.write_bytes(OLD)
    qa, message = (None, f"cannot write {asked.output}: File too large")
    if "-v" in limit:
        qa, message = "/dev/zero", "out of memory"
    said = bash(f"ulimit {limit}; python {SCRIPT} {shlex.join(asked.arguments(qa))}", asked.folder)
    assert (said.returncode, said.stderr) == (1, f"error: {message}\n")
    assert (sorted(os.listdir(asked.folder)), asked.output.read_bytes()) == (FILES, OLD)


@pytest.mark.parametrize("qa", ["", '{"prompt": "not asked"}', "no JSON", '{"prompt": "bad"}', '{"n": 1}'])
def test_a_run_without_a_match_leaves_the_old_output_and_makes_no_folder(asked: Experiment, qa: str) -> None:
    asked.log(logged("q"), logged("bad", None))
    asked.qa.write_text(f"{qa}\n")
    asked.output.write_bytes(OLD)
    assert ("JSON object" in asked.run(code=1).error()) == (qa == "no JSON")
    asked.run(output=asked.folder / "new" / "out.jsonl", code=1)
    assert (sorted(os.listdir(asked.folder)), asked.output.read_bytes()) == (FILES, OLD)


@pytest.mark.parametrize("questions", [["q", "w", "never asked"], ["never asked"]])
@pytest.mark.parametrize("missing", ["lock.mdb", "a.lmdb", "nothing"])
def test_reading_changes_nothing_but_lock_files_and_makes_none(asked: Experiment, missing: str, questions: Any) -> None:
    asked.ask(*questions)
    if missing != "a.lmdb":
        asked.log_activations(logged("q"), logged("w"))
    for lock in asked.folder.glob(f"*/{missing}"):
        lock.unlink()
    before = state_of(asked)
    asked.run(code=questions[0] != "q")
    assert state_of(asked) == before


def test_an_output_that_was_there_is_replaced_by_an_ordinary_new_file_and_that_is_said(asked: Experiment) -> None:
    assert "replaced" not in asked.run().err
    asked.output.write_bytes(OLD)
    with asked.output.open("rb") as old:
        result = asked.run_process(umask=0o027)
        assert old.read() == OLD  # a reader of the old file keeps it
    assert f"wrote 1 line to {asked.output} (replaced the old file)\n" in result.err
    assert (stat.S_IMODE(asked.output.stat().st_mode), len(result.lines)) == (0o640, 1)


def test_a_symbolic_link_stays_and_its_target_is_made_with_its_folders(asked: Experiment) -> None:
    asked.output.symlink_to("elsewhere/and/target.jsonl")
    asked.run()
    assert (asked.output.is_symlink(), len(read_lines(asked.folder / "elsewhere/and/target.jsonl"))) == (True, 1)


def test_an_output_that_cannot_be_is_one_plain_line(asked: Experiment) -> None:
    messages = dict.fromkeys(["qa.jsonl/out.jsonl", "qa.jsonl/new/out.jsonl"], "Not a directory")
    messages |= dict.fromkeys(["a.lmdb_metadata", "new/"], "it is a folder")
    for output, message in {**messages, "x" * 256: "File name too long"}.items():
        path = os.path.join(asked.folder, output)  # which keeps a slash at the end
        assert asked.run(output=path, code=1).err == f"error: cannot write {path}: {message}\n"
    assert sorted(os.listdir(asked.folder)) == ["a.lmdb_metadata", "qa.jsonl"]


@pytest.mark.parametrize("name", INPUTS)
def test_an_output_that_is_an_input_by_whatever_path_or_link_is_refused(asked: Experiment, name: str) -> None:
    asked.log_activations(logged("q"))
    target, symbolic, hard = asked.folder / name, asked.folder / "symbolic", asked.folder / "hard"
    symbolic.symlink_to(target)
    hard.hardlink_to(target)
    before = asked.files()
    for output in (target, asked.folder / "a.lmdb" / ".." / name, symbolic, hard):
        assert asked.run(output=output, code=1).error() == f"refusing to overwrite the input {target}\n"
    assert asked.files() == before


@pytest.mark.parametrize(("qa", "output"), [("-", "-"), ("/dev/stdin", "/dev/stdout")])
def test_standard_streams_are_read_and_written_and_appended_to(asked: Experiment, qa: str, output: str) -> None:
    with asked.output.open("wb", buffering=0) as file:
        file.write(OLD)
        result = asked.run_process(qa=qa, output=output, stdin=b"\n\n[]\n" + LINE, stdout=file)
    assert result.counts() == {"QA lines": 2, "matched": 1, "malformed": 1}
    assert result.warnings()[0].startswith("/dev/stdin:3: ")
    assert "wrote 1 line to /dev/stdout\n" in result.err
    assert [line.get("generation") for line in result.lines] == [None, " An answer."]
    assert asked.run_process(output=output).out.count('"generation"') == 1


def test_a_reader_of_the_output_that_goes_away_ends_the_run_quietly(asked: Experiment) -> None:
    asked.qa.write_bytes(LINE * 10_000)
    with asked.start(output="-") as process:
        process.stdout = process.stdout.close()
        assert asked.end(process, code=141).err == ""


def test_standard_input_that_is_a_terminal_says_what_it_waits_for(asked: Experiment) -> None:
    terminal, its_end = os.openpty()
    with asked.start(qa="-", stdin=its_end) as process:
        os.write(terminal, LINE + b"\x04")
        result = asked.end(process)
    os.close(terminal)
    os.close(its_end)
    assert result.err.startswith("reading QA lines from the terminal; Ctrl-D")
    assert len(result.lines) == 1


def test_a_device_that_is_full_is_one_plain_line_and_stays_a_device(asked: Experiment) -> None:
    path = asked.folder / "full"
    if os.getuid():
        path.symlink_to("/dev/full")
    else:  # of its own, because root could replace the machine's
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 7))
    assert asked.run(output=path, code=1).err == f"error: cannot write {path}: No space left on device\n"
    assert stat.S_ISCHR(path.stat().st_mode)


@pytest.mark.parametrize("words", CLOSED + CLOSED_AND_NEEDED)
def test_a_closed_stream_is_no_other_file(asked: Experiment, words: str) -> None:
    asked.log_activations(logged("q"))
    before = state_of(asked)
    said = bash(f"python {SCRIPT} {shlex.join(asked.arguments())} {words}", asked.folder)
    is_written = words in CLOSED
    assert (said.returncode, said.stdout, "recovered" in said.stderr) == (not is_written, "", False)
    assert asked.output.exists() == is_written
    assert not is_written or [line["generation"] for line in read_lines(asked.output)] == [" An answer."]
    assert state_of(asked) == before
