"""The output appears whole or not at all, and no input is ever changed."""

from __future__ import annotations

import os
import random
import resource
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import SCRIPT, Experiment, logged, read_lines

OLD = b'{"old": true}\n'


@pytest.fixture
def asked(experiment: Experiment) -> Experiment:
    experiment.ask("q")
    experiment.log(logged("q"))
    return experiment


@pytest.fixture
def long_run(experiment: Experiment) -> Experiment:
    """A run of some tenths of a second, over an output that is there already."""
    questions = [f"question {n}" for n in range(200)]
    experiment.log(*map(logged, questions))
    experiment.ask(*questions * 100)
    experiment.output.write_bytes(OLD)
    return experiment


# Whole or not at all.


def test_the_new_output_takes_the_old_ones_place(asked: Experiment) -> None:
    asked.output.write_bytes(OLD)
    assert asked.run().code == 0
    assert [line["prompt"] for line in read_lines(asked.output)] == ["q"]


def files_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_stopped_at_any_moment_the_output_is_the_old_one_or_whole(
    long_run: Experiment, number: signal.Signals, seed: int
) -> None:
    before = files_in(long_run.folder)
    with long_run.start() as process:
        while files_in(long_run.folder) == before and process.poll() is None:
            time.sleep(0.001)
        time.sleep(random.Random(seed).uniform(0, 0.4))
        process.send_signal(number)
        _, err = process.communicate(timeout=30)
    assert b"Traceback" not in err
    if process.returncode == 0:
        assert len(read_lines(long_run.output)) == 20_000
    else:
        assert process.returncode in (128 + number, -number)
        assert long_run.output.read_bytes() in (OLD, expected_output(long_run))
    if number != signal.SIGKILL:
        assert files_in(long_run.folder) == before


def expected_output(experiment: Experiment) -> bytes:
    other = experiment.folder / "expected.jsonl"
    assert experiment.run(output_path=other).code == 0
    content = other.read_bytes()
    other.unlink()
    return content


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_while_it_waits_for_more_it_cleans_up(asked: Experiment, number: signal.Signals, code: int) -> None:
    before = files_in(asked.folder)
    with asked.start(changes={"qa_output_path": "/dev/stdin"}, stdin=subprocess.PIPE) as process:
        assert process.stdin
        process.stdin.write(b'{"prompt": "q"}\n')
        process.stdin.flush()
        while files_in(asked.folder) == before:
            time.sleep(0.01)
        process.send_signal(number)
        _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (code, b"")
    assert files_in(asked.folder) == before


def test_signals_are_handled_as_before_once_the_command_is_done(asked: Experiment) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    asked.run()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_full_disk_leaves_the_old_output(long_run: Experiment) -> None:
    before = files_in(long_run.folder)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    with long_run.start(preexec_fn=limit) as process:
        _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert err.decode() == f"reconstruct_inference.py: error: cannot write {long_run.output}: File too large\n"
    assert long_run.output.read_bytes() == OLD
    assert files_in(long_run.folder) == before


def test_a_full_device_is_one_plain_line(asked: Experiment) -> None:
    result = asked.run(output_path="/dev/full")
    assert result.code == 1
    assert result.err == "reconstruct_inference.py: error: cannot write /dev/full: No space left on device\n"


def test_a_reader_of_the_output_that_goes_away_is_one_plain_line(long_run: Experiment) -> None:
    with long_run.start(changes={"output_path": "/dev/stdout"}) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        err = process.stderr.read()
    assert process.wait(30) == 1
    assert err == b"reconstruct_inference.py: error: cannot write /dev/stdout: Broken pipe\n"


@pytest.mark.parametrize("closed", ["2>&-", "2>/dev/full", "<&-", ">&-"])
def test_closed_standard_streams_do_not_matter(asked: Experiment, closed: str) -> None:
    command = ["bash", "-c", f'exec "$@" {closed}', "bash", sys.executable, str(SCRIPT), *asked.arguments()]
    assert subprocess.run(command, timeout=30, check=False, capture_output=True).returncode == 0
    assert len(read_lines(asked.output)) == 1


# What the output is.


def test_the_output_has_an_ordinary_new_files_permissions(asked: Experiment) -> None:
    old_mask = os.umask(0o027)
    try:
        asked.run()
    finally:
        os.umask(old_mask)
    assert stat.S_IMODE(asked.output.stat().st_mode) == 0o640


@pytest.mark.parametrize("target_exists", [True, False])
def test_a_symbolic_link_stays_and_its_target_is_replaced(asked: Experiment, target_exists: bool) -> None:
    target = asked.folder / "elsewhere" / "target.jsonl"
    target.parent.mkdir()
    if target_exists:
        target.write_bytes(OLD)
    asked.output.symlink_to("elsewhere/target.jsonl")
    assert asked.run().code == 0
    assert asked.output.is_symlink()
    assert len(read_lines(target)) == 1


def test_a_name_as_long_as_the_file_system_takes_is_fine(asked: Experiment) -> None:
    assert asked.run(output_path=asked.folder / ("x" * 255)).code == 0


@pytest.mark.parametrize(
    ("output", "message"),
    [
        pytest.param("a_file/out.jsonl", "Not a directory", id="below a file"),
        pytest.param("loop", "Too many levels of symbolic links", id="a loop of links"),
        pytest.param("x" * 256, "File name too long", id="too long a name"),
        pytest.param("a_folder", "it is a folder", id="a folder"),
        pytest.param("a_folder/", "it is a folder", id="a folder with a slash"),
        pytest.param("new/", "it is a folder", id="a folder that is not there"),
    ],
)
def test_an_output_that_cannot_be_is_one_plain_line(asked: Experiment, output: str, message: str) -> None:
    (asked.folder / "a_file").touch()
    (asked.folder / "a_folder").mkdir()
    (asked.folder / "loop").symlink_to("loop")
    before = files_in(asked.folder)
    result = asked.run(output_path=f"{asked.folder}/{output}")
    assert result.code == 1
    assert result.err == f"reconstruct_inference.py: error: cannot write {asked.folder}/{output}: {message}\n"
    assert files_in(asked.folder) == before


# The inputs.

INPUTS = ["qa.jsonl", "a.lmdb_metadata/data.mdb", "a.lmdb_metadata/lock.mdb", "a.lmdb/data.mdb", "a.lmdb/lock.mdb"]


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("how", ["itself", "roundabout", "symbolic link", "hard link"])
def test_an_output_that_is_an_input_is_refused(asked: Experiment, files_before, name: str, how: str) -> None:
    asked.log_activations(logged("q"))
    target = asked.folder / name
    target.touch()
    output = asked.folder / "link"
    if how == "itself":
        output = target
    elif how == "roundabout":
        output = asked.folder / "a.lmdb" / ".." / name
    elif how == "symbolic link":
        output.symlink_to(target)
    else:
        output.hardlink_to(target)
    before = files_before()
    result = asked.run(output_path=output)
    assert result.code == 1
    assert result.err.endswith(f" is an input, {target}: nothing was touched\n")
    assert files_before() == before


def test_an_output_that_would_become_a_stores_file_is_refused(asked: Experiment) -> None:
    for name in ("a.lmdb/data.mdb", "a.lmdb_metadata/lock.mdb"):
        assert asked.run(output_path=asked.folder / name).code == 1
        assert not (asked.folder / name).exists()


def test_standard_input_that_is_redirected_from_the_output_is_refused(asked: Experiment) -> None:
    with asked.qa.open("r+b") as file:
        arguments = {"qa_output_path": "/dev/stdin", "output_path": "/dev/stdout"}
        with asked.start(changes=arguments, stdin=file, stdout=file) as process:
            _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert b"is an input" in err
