"""The output appears whole or not at all, and no input is ever changed."""

from __future__ import annotations

import os
import resource
import signal
import stat
import subprocess
import sys
import time

import pytest
from helpers import SCRIPT, Experiment, logged, read_lines, table

OLD = b'{"old": true}\n'
INPUTS = ["qa.jsonl", "a.lmdb_metadata/data.mdb", "a.lmdb_metadata/lock.mdb", "a.lmdb/data.mdb", "a.lmdb/lock.mdb"]


@pytest.fixture
def long_run(experiment: Experiment) -> Experiment:
    """A run of some tenths of a second, over an output that is there already."""
    questions = [f"question {n}" for n in range(100)]
    experiment.log(*map(logged, questions))
    experiment.ask(*questions * 100)
    experiment.output.write_bytes(OLD)
    return experiment


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_stopped_in_mid_run_the_old_output_stays(asked: Experiment, number: int, code: int) -> None:
    asked.output.write_bytes(OLD)
    before = set(os.listdir(asked.folder))
    with asked.start(paths={"qa_output_path": "/dev/stdin"}, stdin=subprocess.PIPE) as process:
        process.stdin.write(b'{"prompt": "q"}\n')
        process.stdin.flush()
        while set(os.listdir(asked.folder)) == before:
            time.sleep(0.01)
        process.send_signal(number)
        _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (code, b"")
    assert asked.output.read_bytes() == OLD
    if number != signal.SIGKILL:
        assert set(os.listdir(asked.folder)) == before


def test_signals_are_handled_as_before_once_the_command_is_done(asked: Experiment) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    asked.run()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_full_disk_leaves_the_old_output(long_run: Experiment) -> None:
    before = set(os.listdir(long_run.folder))
    result = long_run.run(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)))
    assert (result.code, result.err) == (1, f"error: cannot write {long_run.output}: File too large\n")
    assert long_run.output.read_bytes() == OLD
    assert set(os.listdir(long_run.folder)) == before


def test_a_reader_of_the_output_that_goes_away_is_one_plain_line(long_run: Experiment) -> None:
    with long_run.start(paths={"output_path": "/dev/stdout"}) as process:
        process.stdout.close()
        err = process.stderr.read()
    assert process.wait(30) == 1
    assert err == b"error: cannot write /dev/stdout: Broken pipe\n"


@pytest.mark.parametrize("closed", ["2>&-", "2>/dev/full", "<&-", ">&-"])
def test_closed_standard_streams_do_not_matter(asked: Experiment, closed: str) -> None:
    command = ["bash", "-c", f'exec "$@" {closed}', "bash", sys.executable, str(SCRIPT), *asked.arguments()]
    assert subprocess.run(command, timeout=30, check=False, capture_output=True).returncode == 0
    assert len(read_lines(asked.output)) == 1


def test_the_new_output_takes_the_old_ones_place_as_an_ordinary_new_file(asked: Experiment) -> None:
    asked.output.write_bytes(OLD)
    result = asked.run(umask=0o027)
    assert stat.S_IMODE(asked.output.stat().st_mode) == 0o640
    assert [line["prompt"] for line in result.lines] == ["q"]


def test_a_symbolic_link_stays_and_its_target_is_made_with_its_folders(asked: Experiment) -> None:
    asked.output.symlink_to("elsewhere/target.jsonl")
    assert asked.run().code == 0
    assert asked.output.is_symlink()
    assert len(read_lines(asked.folder / "elsewhere" / "target.jsonl")) == 1


@table(
    "output, message",
    {
        "below a file": ("a_file/out.jsonl", "File exists"),
        "too long a name": ("x" * 256, "File name too long"),
        "a folder": ("a_folder", "it is a folder"),
        "a folder with a slash": ("a_folder/", "it is a folder"),
        "a folder that is not there": ("new/", "it is a folder"),
        "a full device": ("/dev/full", "No space left on device"),
    },
)
def test_an_output_that_cannot_be_is_one_plain_line(asked: Experiment, output: str, message: str) -> None:
    (asked.folder / "a_file").touch()
    (asked.folder / "a_folder").mkdir()
    before = set(os.listdir(asked.folder))
    path = os.path.join(asked.folder, output)  # which keeps a slash at the end
    result = asked.run(output_path=path)
    assert (result.code, result.err) == (1, f"error: cannot write {path}: {message}\n")
    assert set(os.listdir(asked.folder)) == before


@pytest.mark.parametrize("name", INPUTS)
def test_an_output_that_is_an_input_by_whatever_path_or_link_is_refused(asked: Experiment, name: str) -> None:
    asked.log_activations(logged("q"))
    target, symbolic, hard = asked.folder / name, asked.folder / "symbolic", asked.folder / "hard"
    symbolic.symlink_to(target)
    hard.hardlink_to(target)
    before = asked.files()
    for output in (target, asked.folder / "a.lmdb" / ".." / name, symbolic, hard):
        result = asked.run(output_path=output)
        assert result.code == 1
        assert result.err.endswith(f"the output {output} is an input, {target}: nothing was touched\n")
    assert asked.files() == before


def test_an_output_that_would_become_a_stores_file_is_refused(asked: Experiment) -> None:
    (asked.metadata / "lock.mdb").unlink()
    for name in ("a.lmdb/data.mdb", "a.lmdb_metadata/lock.mdb"):
        assert asked.run(output_path=asked.folder / name).code == 1
        assert not (asked.folder / name).exists()
