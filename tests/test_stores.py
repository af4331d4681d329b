"""Whatever state the stores are in, the command recovers what is there and calls what went wrong by its name."""

from __future__ import annotations

import fcntl
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import helpers
import lmdb
import pytest
from helpers import Experiment, Result, key_of, logged, prompt_of, table, write_store, writer_to

from reconstruct_inference import ReconstructionError, reconstruct_inference

PAGE = 4096
QUESTIONS = [f"question {n}" for n in range(120)]
# Short, middling and long responses: on leaf pages, on one overflow page, and on several.
ENTRIES = [logged(q, f" response {n}" + " and so on" * (n // 20) ** 4) for n, q in enumerate(QUESTIONS)]
ENTRIES.append(ENTRIES[-1])  # so that the header of the commit before has as many
ANSWERS = {question: entry["response"] for question, entry in zip(QUESTIONS, ENTRIES)}
GOOD = logged("q")
SAMPLES = [(key_of(GOOD["prompt"]) + b"_request-%d" % n, GOOD) for n in range(3)]
KEY, number = key_of(prompt_of("question 7")), struct.Struct("<Q").pack  # as in the header: entries, root and last page
DAMAGES = ["bytes flipped", "pages swapped", "pages zeroed", "bad header", "no header"]


def log_first(store: Path, number: int, **options: Any) -> None:
    write_store(store, [(entry["prompt"], entry) for entry in ENTRIES[:number]], sync=False, **options)


@pytest.fixture
def alone(experiment: Experiment) -> Experiment:
    """A metadata store, logged one request at a time, so that freed pages with old copies lie about."""
    experiment.ask(*QUESTIONS)
    log_first(experiment.metadata, 121, commit_each=True)
    return experiment


@pytest.fixture
def both(alone: Experiment) -> Experiment:
    entries = [(entry["prompt"], {"data": {**entry, "timestamp": None}}) for entry in ENTRIES]
    write_store(alone.lmdb, entries, sync=False)
    return alone


def answers(result: Result) -> dict[str, str]:
    return {line["prompt"]: line["generation"] for line in result.lines}


def whole_in(store: Path) -> dict[str, str]:
    """The answers whose entries lie whole in a store's file, whatever leads to them."""
    content = (store / "data.mdb").read_bytes()
    return {q: ANSWERS[q] for q, entry in zip(QUESTIONS, ENTRIES) if pickle.dumps(entry) in content}


def damage_store(store: Path, damage: str, seed: int = 0) -> None:
    content, rng = bytearray((store / "data.mdb").read_bytes()), random.Random(f"{damage} {seed}")
    for start in rng.sample(range(2 * PAGE, len(content), PAGE), len(content) // PAGE // 4):
        page, other = slice(start, start + PAGE), slice(2 * PAGE, 3 * PAGE)
        if damage == "bytes flipped":
            content[start + rng.randrange(PAGE)] ^= rng.randint(1, 255)
        elif damage == "pages swapped":
            content[page], content[other] = content[other], content[page]
        elif damage == "pages zeroed":
            content[page] = bytes(PAGE)
        elif damage == "bad header":
            content[start % 199], content[PAGE + start % 199] = rng.randbytes(2)
    if damage == "no header":
        content[: 2 * PAGE] = bytes(2 * PAGE)
    (store / "data.mdb").write_bytes(content)


def change(store: Path, before: bytes, after: bytes) -> None:
    """Changes bytes in a store's file, in the place. What was before is a regular expression."""
    content = re.sub(before, lambda match: after, (store / "data.mdb").read_bytes(), flags=re.DOTALL)
    (store / "data.mdb").write_bytes(content)


@table(
    "typed, stores, answering",
    {
        "its path, one store inside the other": ("p", {"p": "qw", "p/_metadata": "q"}, ["p/_metadata", "p"]),
        "its path, another run's store inside": ("p", {"p_metadata": "q", "p/_metadata": "qw"}, ["p_metadata"]),
        "a symbolic link to it": ("link", {"p_metadata": "q", "p": "qw"}, ["p_metadata", "p"]),
        "the metadata store": ("p_metadata/", {"p_metadata": "q", "p": "qw"}, ["p_metadata", "p"]),
        "the metadata store's lock.mdb": ("p_metadata/lock.mdb", {"p_metadata": "q", "p": "qw"}, ["p_metadata", "p"]),
        "the metadata store's data.mdb": ("p_metadata/data.mdb", {"p_metadata": "q", "p": "qw"}, ["p_metadata", "p"]),
        "its data.mdb from there": ("data.mdb", {"../here_metadata": "q", ".": "qw"}, ["../here_metadata", "."]),
        "a path that is called data.mdb": ("data.mdb", {"data.mdb_metadata": "q"}, ["data.mdb_metadata"]),
        "its path, without a metadata store": ("p", {"p": "qw"}, ["p", "p"]),
    },
)
def test_the_stores_are_found_from(experiment: Any, monkeypatch: Any, typed: str, stores: Any, answering: Any) -> None:
    experiment.ask("q", "w")
    (experiment.folder / "here" / "p").mkdir(parents=True)
    monkeypatch.chdir(experiment.folder / "here")
    Path("link").symlink_to("p")
    for name, questions in stores.items():
        write_store(Path(name), [(prompt_of(q), logged(q, name)) for q in questions])
    assert experiment.run(lmdb=typed).generations() == answering


def test_a_store_that_is_a_single_file_is_read_and_its_lock_file_kept(asked: Experiment) -> None:
    (asked.metadata / "data.mdb").rename(asked.folder / "renamed")
    assert asked.run(lmdb=asked.folder / "renamed").warnings() == []
    asked.ask("q", "w")
    write_store(asked.folder / "b_metadata", [(GOOD["prompt"], GOOD)], subdir=False)
    write_store(asked.folder / "b", [(prompt_of(q), logged(q, "from activations")) for q in "qw"], subdir=False)
    assert asked.run(lmdb=asked.folder / "b").generations() == [" An answer.", "from activations"]
    assert "b-lock" in asked.run(lmdb=asked.folder / "b", output=asked.folder / "b-lock", code=1).error()


def test_two_paths_to_one_store_are_no_second_store(asked: Experiment) -> None:
    asked.ask("q", "w", "v")
    asked.log(logged("q"), logged("w", response=None))
    asked.lmdb.symlink_to(asked.metadata)
    assert asked.run().counts() == {"QA lines": 3, "matched": 1, "without an entry": 1, "corrupted": 1}


@table(
    "metadata, activations, damage",
    {
        "nothing is missing": (120, 120, "no header"),
        "it is damaged and had as many": (100, 100, "pages zeroed"),
        "it has one more": (100, 101, ""),
        "it is damaged and cannot say how many it had": (5, 120, "no header"),
    },
)
def test_activations_are_opened_only_if_need_be(experiment: Any, metadata: int, activations: int, damage: str) -> None:
    experiment.ask(*QUESTIONS)
    log_first(experiment.metadata, metadata)
    log_first(experiment.lmdb, activations)
    damage_store(experiment.lmdb, damage)
    result = experiment.run()
    assert len(result.lines) == activations
    assert (f" in {experiment.lmdb}\n" in result.err) == (activations > metadata)
    assert [str(experiment.lmdb) in warning for warning in result.warnings()] == [True] * 2 * (metadata == 5)


def test_a_corrupted_entry_is_replaced_from_the_activations_store_or_counted_once(experiment: Experiment) -> None:
    experiment.ask("q", "w", "v", "u")
    experiment.log(*[logged(q, response=None) for q in "qwu"], logged("v", "from metadata"))
    experiment.log_activations(logged("q", response=None), logged("w", "from activations"), logged("u", response=None))
    result = experiment.run()
    assert result.generations() == ["from activations", "from metadata"]
    assert result.counts() == {"QA lines": 4, "matched": 2, "corrupted": 2}


@table("damage, seed", {f"{damage} {seed}": (damage, seed) for damage in DAMAGES for seed in (1, 2)})
def test_damage_loses_nothing_that_is_whole_in_either_store(both: Experiment, damage: str, seed: int) -> None:
    damage_store(both.metadata, damage, seed)
    whole = whole_in(both.metadata)
    assert list(answers(both.run())) == QUESTIONS
    shutil.rmtree(both.lmdb)
    result = both.run()
    changes_letters = damage in ("bytes flipped", "pages swapped")  # and of what is lost, an old copy may be whole
    assert answers(result) == whole or (changes_letters and len(whole.keys() - answers(result).keys()) <= 1)


def test_what_a_damaged_metadata_store_lost_is_looked_for_in_a_smaller_one(alone: Experiment) -> None:
    damage_store(alone.metadata, "pages zeroed")
    lost = set(QUESTIONS) - whole_in(alone.metadata).keys()
    write_store(alone.lmdb, [(prompt_of(question), logged(question, ANSWERS[question])) for question in lost])
    assert answers(alone.run()) == ANSWERS


def test_a_metadata_store_without_entries_is_called_so_and_costs_only_the_timestamps(both: Experiment) -> None:
    write_store(both.metadata, SAMPLES)
    result = both.run()
    assert answers(result) == ANSWERS
    assert {line["timestamp"] for line in result.lines} == {None}
    assert re.search(f"{both.metadata} are not prompt hashes.*something else.*multi-sample", result.warnings()[0])


@pytest.mark.parametrize(("number", "share"), [(120, 0.25), (120, 0.5), (120, 0.9), (10, 0.85), (10, 0.9)])
def test_an_incomplete_copy_is_called_so_and_what_is_lost_counted(alone: Experiment, number: int, share: float) -> None:
    log_first(alone.metadata, number)
    size = (alone.metadata / "data.mdb").stat().st_size
    os.truncate(alone.metadata / "data.mdb", int(size * share))
    whole, result = whole_in(alone.metadata), alone.run()
    assert answers(result) == whole
    kept, lost = len(whole), f"{number - len(whole)} of {number} lost"
    found = rf"\n.*: {kept} entr.* recovered\n(.*\n)*entries: {kept} in .* \({lost}"
    assert re.search(rf"incomplete.* {int(size * share):,} .* {size:,} .* {number} entries.*{found}", result.err)


@table(
    "before, after, word",
    {
        "a branch page with one child": (b"\0\0\1\0[^@]\0", b"\0\0\1\0\x12\0", "damaged"),
        "a key that is no hash any more": (KEY, KEY[:-1] + b"g", "damaged"),
        "fewer entries than it says": (number(120), number(121), "damaged"),
        "more entries than it says": (number(120), number(119), "damaged"),
        "an absurd number of entries": (number(120), number(1 << 60), "damaged"),
        "an absurd size": (number(120) + b".{16}", number(120) + number(1 << 49) + number(1 << 50), "damaged"),
        "a root behind the end": (number(120) + b".{16}", number(120) + number(5000) + number(6000), "incomplete"),
    },
)
def test_what_lmdb_would_miss_or_die_of_is_salvaged(alone: Any, before: bytes, after: bytes, word: str) -> None:
    change(alone.metadata, before, after)
    limit = (resource.RLIMIT_CORE, (resource.RLIM_INFINITY,) * 2)
    result = alone.run_process(cwd=alone.folder, preexec_fn=lambda: resource.setrlimit(*limit))
    assert answers(result) == ANSWERS
    assert not list(alone.folder.glob("core*"))
    assert [word in result.warnings()[0], "120 entries" in result.warnings()[1]] == [True, True]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_salvage_finds_an_entry_wherever_it_begins_and_however_long_it_is(asked: Experiment, protocol: int) -> None:
    questions = [f"question {n} of {'many words' * 500}" for n in range(30)]
    content = bytes(PAGE)
    for start, question in enumerate(questions, PAGE - 20):  # around the end of a page
        content += (bytes(start) + pickle.dumps(logged(question, question[:12]), protocol)).ljust(4 * PAGE, b"\0")
    (asked.metadata / "data.mdb").write_bytes(content)
    asked.ask(*questions)
    assert asked.run().generations() == [question[:12] for question in questions]


def test_of_several_versions_salvage_takes_the_newest_that_is_usable(asked: Experiment) -> None:
    times: list[Any] = [5.0, 9, 7.0, None, "tomorrow", True, float("nan"), float("inf"), 10**12, -20.0]
    versions = [logged("q", f"version {n}", timestamp=stamp) for n, stamp in enumerate(times)]
    versions += [logged("q", response=None, timestamp=99.0), logged("q", "\0" * 512, timestamp=99.0)]
    (asked.metadata / "data.mdb").write_bytes(b"".join(pickle.dumps(each).ljust(1500, b"\0") for each in versions))
    result = asked.run()
    assert result.generations() == ["version 1"]
    assert ": 1 entry recovered" in result.warnings()[1]


@pytest.mark.skipif(int(lmdb.__version__.split(".")[0]) < 3, reason="this lmdb cannot write such stores")
@pytest.mark.parametrize("damage", ["", "pages zeroed", "no header"])
def test_a_store_of_lmdb_1_0_is_read_and_salvaged_only_if_need_be(alone: Experiment, damage: str) -> None:
    log_first(alone.metadata, 120, lib_version=1)
    damage_store(alone.metadata, damage)
    result = alone.run()
    assert answers(result) == whole_in(alone.metadata)
    assert bool(result.warnings()) == bool(damage)


def test_a_block_that_cannot_be_read_costs_only_the_entry_that_needs_it(asked: Experiment, monkeypatch: Any) -> None:
    asked.ask("q", "w", "v")
    values = {"q": logged("q", "a" * 20_000), "w": {"data": logged("w", activations=b"b" * 99_000)}, "v": logged("v")}
    write_store(asked.metadata, [(prompt_of(question), value) for question, value in values.items()])
    damage_store(asked.metadata, "no header")
    content, pread = (asked.metadata / "data.mdb").read_bytes(), os.pread
    bad_blocks = [content.index(letter * 9999) // PAGE * PAGE + PAGE for letter in (b"a", b"b")]

    def read_around(file: int, size: int, start: int) -> bytes:
        if start // PAGE * PAGE in bad_blocks:
            raise OSError(5, "Input/output error")
        return pread(file, min(size, *[block - start if block > start else size for block in bad_blocks]), start)

    monkeypatch.setattr(os, "pread", read_around)
    result = asked.run()
    assert list(answers(result)) == ["w", "v"]
    assert ["Input/output error" in warning for warning in result.warnings()] == [False, True, False]


@table(
    "content, words",
    {
        "nothing": ({}, "cannot read .*/a.lmdb: No such file"),
        "another folder": ({"a.lmdb/notes": b"", "a.lmdb/activations": b""}, "no `data.mdb`.*`activations`, `notes`"),
        "a Zarr group": ({"a.lmdb/.zgroup": b"{}"}, "no `data.mdb`.*Zarr"),
        "a newer Zarr store": ({"a.lmdb/zarr.json": b"{}"}, "no `data.mdb`.*Zarr"),
        "an empty data.mdb": ({"a.lmdb/data.mdb": b""}, "data.mdb is empty"),
        "a Git LFS pointer": ({"a.lmdb/data.mdb": b"version https://git-lfs"}, "data.mdb is not an LMDB file.*git-lfs"),
        "a gzip file": ({"a.lmdb": b"\x1f\x8b\x08\x00" + bytes(99)}, r"a.lmdb is not an LMDB file.*\\x1f\\"),
        "the QA file": ({"a.lmdb": b'{"prompt": "q"}\n'}, "a.lmdb is not an LMDB file.*hint: are .* swapped"),
    },
)
def test_a_path_without_entries_is_called_by_its_name(experiment: Experiment, content: Any, words: str) -> None:
    experiment.ask("q")
    for name in content:
        (experiment.folder / name).parent.mkdir(exist_ok=True)
        (experiment.folder / name).write_bytes(content[name])
    result = experiment.run(code=1)
    assert re.search(words, result.error(), re.DOTALL)
    assert not re.search("damaged|recovered" if "swapped" in words else "damaged|recovered|swapped", result.err)


def test_beside_entries_multi_sample_keys_are_mentioned_and_not_counted(asked: Experiment) -> None:
    asked.ask("q", "w")
    write_store(asked.metadata, [(GOOD["prompt"], GOOD), (prompt_of("w"), b""), *SAMPLES, (b"settings", b"x")])
    result = asked.run()
    assert result.counts() == {"QA lines": 2, "matched": 1, "corrupted": 1}  # the one without a value
    assert "multi-sample" in result.warnings()[0]
    assert "entries: 2 in " in result.err


@pytest.mark.parametrize("modes", [{"data.mdb": 0o444, "lock.mdb": 0o444, "": 0o555}, {"": 0}, {"data.mdb": 0}])
def test_a_read_only_store_is_read_and_a_closed_one_called_so(alone: Experiment, capsys: Any, modes: Any) -> None:
    is_closed = 0 in modes.values()
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are closed to other users
        shutil.copytree(alone.folder, folder, dirs_exist_ok=True)
        os.chmod(folder, 0o777)
        experiment = Experiment(Path(folder), capsys)
        for name, mode in modes.items():
            (experiment.metadata / name).chmod(mode)
        result = experiment.run(code=is_closed) if os.geteuid() else experiment.run_as(helpers.NOBODY, code=is_closed)
    assert is_closed or (answers(result), result.warnings()) == (ANSWERS, [])
    assert ("a.lmdb_metadata: Permission denied" in result.err) == is_closed


@table(
    "prepare",
    {
        "an empty lock file": lambda lock, other: lock.write_bytes(b""),
        "a lock file of other content": lambda lock, other: lock.write_bytes(b"\xde\xc0\xef\xbe" * 3000),
        "a lock file that is a symbolic link": lambda lock, other: (lock.unlink(), lock.symlink_to(other)),
        "an address space smaller than the map": lambda *_: resource.setrlimit(resource.RLIMIT_AS, (1 << 31,) * 2),
        "a caller that ignores SIGCHLD": lambda *_: signal.signal(signal.SIGCHLD, signal.SIG_IGN),
    },
)
def test_a_store_whose_name_is_not_utf_8_is_read_with(experiment: Experiment, prepare: Any) -> None:
    experiment.ask(*QUESTIONS)
    log_first(experiment.metadata, 120, map_size=1 << 36)
    (other := experiment.folder / "mine").write_text("mine")
    experiment.metadata.rename(store := experiment.folder / os.fsdecode(b"caf\xe9_metadata"))
    result = experiment.run_process(lmdb=store, preexec_fn=lambda: prepare(store / "lock.mdb", other))
    assert (answers(result), result.warnings(), other.read_text()) == (ANSWERS, [], "mine")


def test_without_dev_fd_a_store_is_read(asked: Experiment, monkeypatch: Any) -> None:
    monkeypatch.setattr(os.path, "isdir", lambda path, isdir=os.path.isdir: path != "/dev/fd" and isdir(path))
    monkeypatch.setattr(os, "listdir", Mock(side_effect=FileNotFoundError))
    assert asked.run().warnings() == []


@pytest.mark.parametrize("name", ["a.lmdb", "a.lmdb_metadata"])
def test_a_store_that_the_process_has_open_is_not_opened_twice(both: Experiment, name: str) -> None:
    log_first(both.metadata, 119)
    with lmdb.open(str(both.folder / name)), pytest.raises(ReconstructionError, match=f"{name}/.*open"):
        reconstruct_inference(both.qa, both.lmdb, both.output)
    assert not both.output.exists()


def test_values_that_are_json_objects_are_read_alike(experiment: Experiment) -> None:
    experiment.ask("q", "w", "v")
    values = {"q": json.dumps(GOOD), "w": json.dumps({"data": logged("w")}), "v": "{1}"}
    write_store(experiment.lmdb, [(prompt_of(question), value.encode()) for question, value in values.items()])
    assert answers(experiment.run()) == {"q": " An answer.", "w": " An answer."}


def run_meanwhile(experiment: Experiment, act: Any, code: int = 0) -> Result:
    """Runs the command, and calls `act` when the store is open and the first line is awaited, from a pipe."""

    def feed() -> None:
        with pipe.open("wb") as file:
            act()
            file.write(experiment.qa.read_bytes())

    os.mkfifo(pipe := experiment.folder / "pipe")
    threading.Thread(target=feed, daemon=True).start()
    return experiment.run(qa=pipe, code=code)


@pytest.mark.filterwarnings("error")  # of a fork beside a thread
def test_the_command_limits_its_memory_and_leaves_room_for_the_longest_value(asked: Experiment) -> None:
    limits: list[int] = []
    run_meanwhile(asked, lambda: limits.extend(resource.getrlimit(resource.RLIMIT_DATA)))
    assert 1 << 32 < limits[0] < 1 << 33


def test_an_entry_that_lmdb_can_no_longer_read_is_corrupted(alone: Experiment) -> None:
    (alone.metadata / "lock.mdb").unlink()  # so that each line has a transaction of its own
    pages = (number(120) + b".{8}", number(120) + number(5000))
    assert "120 QA lines" in run_meanwhile(alone, lambda: change(alone.metadata, *pages), code=1).error()


def test_without_a_lock_what_a_logger_overwrites_meanwhile_is_still_found(alone: Experiment) -> None:
    (alone.metadata / "lock.mdb").unlink()
    log_more = writer_to(alone.metadata)(lambda: None)  # a context manager that decorates
    assert answers(run_meanwhile(alone, log_more)) == ANSWERS


def test_a_logger_at_work_costs_nothing_under_a_lock_and_never_makes_a_wrong_answer(alone: Experiment) -> None:
    with writer_to(alone.metadata):
        locked = alone.run()
        with lmdb.open(str(alone.metadata)) as env:
            assert env.readers() == "(no active readers)\n"
        (alone.metadata / "lock.mdb").unlink()
        unlocked = alone.run()
    assert (answers(locked), locked.warnings()) == (ANSWERS, [])
    assert answers(unlocked).items() <= ANSWERS.items()


@pytest.mark.parametrize("number", helpers.STOP_SIGNALS)
@pytest.mark.parametrize("is_checking", [True, False])
def test_a_stopped_run_leaves_no_reader_with_a_live_logger(experiment: Any, number: int, is_checking: bool) -> None:
    write_store(experiment.metadata, [(b"%064x" % n, b"x") for n in range(is_checking * 200_000)], subdir=is_checking)
    with lmdb.open(str(experiment.metadata), subdir=is_checking, max_readers=500) as env:
        with experiment.start(qa="-", stdin=subprocess.PIPE) as process:
            deadline = time.monotonic() + helpers.DEADLINE
            while ("pid" if is_checking else str(process.pid)) not in env.readers():
                assert (process.poll(), time.monotonic() < deadline) == (None, True)
                time.sleep(0.002)
            process.send_signal(number)
            experiment.end(process, code=128 + number)
        assert env.readers() == "(no active readers)\n"


def test_a_lock_that_is_never_granted_is_done_without(both: Experiment, monkeypatch: Any) -> None:
    monkeypatch.setattr("reconstruct_inference.LOCK_PATIENCE", 1)
    monkeypatch.setattr(os.path, "getsize", lambda path, size=os.path.getsize: os.system("sleep 1.2") or size(path))
    both.ask(*QUESTIONS, "never asked")
    locks = [os.open(store / "lock.mdb", os.O_RDWR) for store in (both.metadata, both.lmdb)]
    for lock in locks:
        fcntl.lockf(lock, fcntl.LOCK_EX, 1)
    release = threading.Timer(helpers.DEADLINE, list, [map(os.close, locks)])
    release.start()
    result = both.run()
    assert (answers(result), result.warnings(), release.is_alive()) == (ANSWERS, [], True)
    release.cancel()


def test_a_fork_that_fails_ends_the_run_and_leaves_no_signal_blocked(both: Experiment, monkeypatch: Any) -> None:
    monkeypatch.setattr(os, "fork", Mock(side_effect=BlockingIOError(11, "Resource temporarily unavailable")))
    result = both.run(code=1)
    assert (result.warnings(), signal.pthread_sigmask(signal.SIG_BLOCK, [])) == ([], set())
    assert "process: Resource temporarily unavailable" in result.error()
