"""Whatever state the stores are in, the command ends in plain words and recovers what is there."""

from __future__ import annotations

import os
import pickle
import random
import resource
import shutil
import signal
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lmdb
import pytest
from helpers import NOBODY, Experiment, key_of, logged, table, with_activations, write_store, writer_to

PAGE = 4096
QUESTIONS = [f"question {n}" for n in range(120)]
# Short, middling and long responses: on leaf pages, on one overflow page, and on several.
ENTRIES = [logged(q, f" response {n}" + " and so on" * (n % 6) ** 4) for n, q in enumerate(QUESTIONS)]
RESPONSES = [entry["response"] for entry in ENTRIES]
GOOD, OTHER = logged("q"), logged("w")


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both stores, logged one request at a time, so that freed pages with old versions lie about."""
    folder = tmp_path_factory.mktemp("pristine")
    write_store(folder / "a.lmdb_metadata", [(entry["prompt"], entry) for entry in ENTRIES], commit_each=True)
    write_store(folder / "a.lmdb", [(entry["prompt"], with_activations(entry)) for entry in ENTRIES])
    return folder


@pytest.fixture
def both(experiment: Experiment, pristine: Path) -> Experiment:
    """The pristine stores, to be damaged, and all their questions."""
    experiment.ask(*QUESTIONS)
    for name in ("a.lmdb", "a.lmdb_metadata"):
        shutil.copytree(pristine / name, experiment.folder / name)
    return experiment


@pytest.fixture
def alone(both: Experiment) -> Experiment:
    """The pristine metadata store, without an activations store."""
    shutil.rmtree(both.lmdb)
    return both


def generations(result: Any) -> list[str]:
    return [line["generation"] for line in result.lines]


DAMAGES = ["bytes flipped", "pages zeroed", "pages of noise", "pages swapped", "end cut off"]
DAMAGES += ["meta pages ruined", "meta pages zeroed"]
each_damage = table("damage, seed", {f"{damage} {seed}": (damage, seed) for damage in DAMAGES for seed in range(2)})


def damage_store(store: Path, damage: str, seed: int = 0) -> set[int]:
    """Gives the numbers of the pages that are no longer what they were."""
    before = (store / "data.mdb").read_bytes()
    content, size, rng = bytearray(before), len(before), random.Random(f"{damage} {seed}")
    pages = [slice(start, start + PAGE) for start in range(0, size, PAGE)]
    chosen = rng.sample(pages[2:], len(pages) // 4)
    if damage == "bytes flipped":
        for _ in range(rng.randint(1, 40)):
            content[rng.randrange(2 * PAGE, size)] ^= rng.randint(1, 255)
    elif damage == "pages zeroed":
        for page in chosen:
            content[page] = bytes(PAGE)
    elif damage == "pages of noise":
        for page in chosen:
            content[page] = rng.randbytes(PAGE)
    elif damage == "pages swapped":
        for one, other in zip(chosen[::2], chosen[1::2]):
            content[one], content[other] = content[other], content[one]
    elif damage == "end cut off":
        del content[rng.randrange(size // 2, size) :]
    elif damage == "meta pages ruined":
        for _ in range(rng.randint(1, 400)):
            content[rng.choice((0, PAGE)) + rng.randrange(200)] = rng.randrange(256)
    elif damage == "meta pages zeroed":
        content[: 2 * PAGE] = bytes(2 * PAGE)
    assert content != before
    (store / "data.mdb").write_bytes(content)
    return {number for number, page in enumerate(pages) if content[page] != before[page]}


def pages_of_entries(store: Path, as_logged: Callable[[dict], dict] = dict) -> list[set[int]]:
    """For each entry, all pages on which its key or its value lies, old copies included."""
    content = (store / "data.mdb").read_bytes()
    pages: list[set[int]] = [set() for _ in ENTRIES]
    for entry, own_pages in zip(ENTRIES, pages):
        for part in (key_of(entry["prompt"]), pickle.dumps(as_logged(entry))):
            start = content.find(part)
            while start >= 0:
                own_pages.update(range(start // PAGE, (start + len(part) - 1) // PAGE + 1))
                start = content.find(part, start + 1)
    return pages


@each_damage
def test_no_damage_to_the_metadata_store_loses_a_generation(both: Experiment, damage: str, seed: int) -> None:
    damage_store(both.metadata, damage, seed)
    result = both.run()
    assert [line["prompt"] for line in result.lines] == QUESTIONS
    assert "QA lines: 120 (120 matched)\n" in result.err


@each_damage
def test_of_one_store_each_entry_on_intact_pages_is_recovered(alone: Experiment, damage: str, seed: int) -> None:
    pages = pages_of_entries(alone.metadata)
    hit = damage_store(alone.metadata, damage, seed)
    result = alone.run()
    found = {line["prompt"]: line["generation"] for line in result.lines}
    for entry, question, own_pages in zip(ENTRIES, QUESTIONS, pages):
        if not own_pages & hit:
            assert found[question] == entry["response"]
    assert f"QA lines: 120 ({len(found)} matched" in result.err


@table(
    "ruin",
    {
        "missing": shutil.rmtree,
        "without data.mdb": lambda store: (store / "data.mdb").unlink(),
        "empty": lambda store: (store / "data.mdb").write_bytes(b""),
        "cut within the second page": lambda store: os.truncate(store / "data.mdb", PAGE + 50),
        "cut down to the meta pages": lambda store: os.truncate(store / "data.mdb", 2 * PAGE),
        "zeros only": lambda store: (store / "data.mdb").write_bytes(b"\x00" * 99999),
    },
)
def test_a_metadata_store_that_is_gone_costs_only_the_timestamps(both: Experiment, ruin: Any) -> None:
    ruin(both.metadata)
    result = both.run()
    assert generations(result) == RESPONSES
    assert "timestamps: null in 120 lines from the activations store" in result.err
    assert result.err.startswith(f"warning: {both.metadata}")


def test_damage_to_both_stores_loses_only_what_is_damaged_in_both(both: Experiment) -> None:
    pages = [pages_of_entries(both.metadata), pages_of_entries(both.lmdb, with_activations)]
    hit = [damage_store(store, "pages of noise") for store in (both.metadata, both.lmdb)]
    found = {line["prompt"] for line in both.run().lines}
    for question, of_metadata, of_activations in zip(QUESTIONS, *pages):
        if not of_metadata & hit[0] or not of_activations & hit[1]:
            assert question in found


def test_a_damaged_activations_store_that_has_no_more_entries_goes_unmentioned(both: Experiment) -> None:
    both.ask(*QUESTIONS, "never asked")
    damage_store(both.lmdb, "pages of noise")
    result = both.run()
    assert result.err.startswith("QA lines: 121 (120 matched, 1 without an entry)\nentries: 120 in ")
    assert str(both.lmdb) + "\n" not in result.err


def test_a_damaged_activations_store_of_more_entries_is_salvaged(both: Experiment) -> None:
    write_store(both.metadata, [(entry["prompt"], entry) for entry in ENTRIES[:20]])
    damage_store(both.lmdb, "bytes flipped")
    assert len(both.run().lines) > 100


def test_of_several_versions_salvage_takes_the_newest(asked: Experiment) -> None:
    versions = [logged("q", f"version {n}", timestamp=stamp) for n, stamp in enumerate([5.0, 9.0, 7.0, None])]
    write_store(asked.metadata, [(v["prompt"], v) for v in versions], commit_each=True)
    damage_store(asked.metadata, "meta pages zeroed")
    assert generations(asked.run()) == ["version 1"]


@pytest.mark.skipif(lmdb.__version__ < "3", reason="this lmdb cannot write files of LMDB 1.0")
@table("damage, fewest", {"sound": ("", 120), "cut": ("end cut off", 10), "no meta pages": ("meta pages zeroed", 120)})
def test_stores_of_lmdb_1_0_are_read(experiment: Experiment, damage: str, fewest: int) -> None:
    experiment.ask(*QUESTIONS)
    write_store(experiment.metadata, [(entry["prompt"], entry) for entry in ENTRIES], lib_version=1)
    if damage:
        damage_store(experiment.metadata, damage)
    result = experiment.run()
    assert len(result.lines) >= fewest
    assert set(generations(result)) <= set(RESPONSES)


def change(store: Path, to: Callable[[Any], tuple[Any, ...]]) -> None:
    """Changes numbers in a file whose root page is a branch page: `to` gives where, their struct format, and which."""
    # In a meta page: flags at 92, entries at 120, root page at 128, last page at 136; in others, pointers end at 12.
    content = bytearray((store / "data.mdb").read_bytes())
    at = SimpleNamespace()
    at.meta = max(0, PAGE, key=lambda page: struct.unpack_from("<Q", content, page + 144))  # by transaction
    at.root = struct.unpack_from("<Q", content, at.meta + 128)[0] * PAGE
    at.child = at.root + struct.unpack_from("<H", content, at.root + 16)[0]
    at.leaf = struct.unpack_from("<I", content, at.child)[0] * PAGE
    at.pointers = struct.unpack_from("<HH", content, at.leaf + 16)
    where, layout, *numbers = to(at)
    struct.pack_into(layout, content, where, *numbers)
    (store / "data.mdb").write_bytes(content)


@table(
    "to",
    {
        "a branch page with one child": lambda at: (at.root + 12, "<H", 18),
        "an empty leaf page under a branch": lambda at: (at.leaf + 12, "<H", 16),
        "a tree that is a circle": lambda at: (at.child, "<I", at.root // PAGE),
        "keys out of order": lambda at: (at.leaf + 16, "<HH", *at.pointers[::-1]),
        "fewer entries than it says": lambda at: (at.meta + 120, "<Q", 121),
        "more entries than it says": lambda at: (at.meta + 120, "<Q", 119),
        "a root page beyond the end of the file": lambda at: (at.meta + 128, "<QQ", 50_000, 60_000),
    },
)
def test_a_file_in_which_lmdb_would_miss_entries_or_die_is_salvaged_with_a_warning(alone: Experiment, to: Any) -> None:
    change(alone.metadata, to)
    result = alone.run()
    assert generations(result) == RESPONSES
    assert result.err.splitlines()[:2] == [
        f"warning: {alone.metadata} is damaged, or not for this lmdb: its file is searched for entries",
        f"warning: {alone.metadata}: 120 entries recovered",
    ]


@table(
    "key, value, cut",
    {
        "a key that is no hash any more": (b"g" * 64, b"x", 0),
        "an entry without a value": (b"f" * 64, b"", 0),
        "a value beyond the end of the file": (b"f" * 64, bytes(50 * PAGE), 25 * PAGE),
    },
)
def test_a_file_with_what_no_logger_keeps_is_salvaged(asked: Experiment, key: bytes, value: bytes, cut: int) -> None:
    write_store(asked.metadata, [(GOOD["prompt"], GOOD), (key, value)])
    os.truncate(asked.metadata / "data.mdb", (asked.metadata / "data.mdb").stat().st_size - cut)
    result = asked.run()
    assert (result.code, len(result.lines)) == (0, 1)
    assert "its file is searched for entries" in result.err


def long_value_node(entry: dict[str, Any], page: int) -> bytes:
    return struct.pack("<IHH", len(pickle.dumps(entry)), 1, 64) + key_of(entry["prompt"]) + struct.pack("<Q", page)


@pytest.mark.parametrize("page_size", [512, 4096, 16384, 65536])
def test_salvage_works_whatever_the_page_size(asked: Experiment, page_size: int) -> None:
    content = bytes(2 * page_size)
    for entry in ENTRIES[:20]:
        page = len(content) // page_size + 1
        content += long_value_node(entry, page).ljust(page_size, b"\0")
        content += struct.pack("<QQ", page, 0) + pickle.dumps(entry)
        content += bytes(-len(content) % page_size)
    (asked.metadata / "data.mdb").write_bytes(content)
    asked.ask(*QUESTIONS[:20])
    assert generations(asked.run()) == RESPONSES[:20]


def test_an_entry_whose_value_is_nowhere_is_corrupted_and_not_one_that_was_never_logged(asked: Experiment) -> None:
    (asked.metadata / "data.mdb").write_bytes(bytes(2 * PAGE) + long_value_node(GOOD, 77))
    assert f"{asked.qa}:1: corrupted entry, skipped" in asked.run().err


def test_beside_entries_samples_are_counted_and_not_read_and_other_keys_are_no_damage(asked: Experiment) -> None:
    asked.ask("q", "w")
    samples = [(key_of(OTHER["prompt"]) + b"_request-%d" % n, OTHER) for n in range(3)]
    write_store(asked.metadata, [(GOOD["prompt"], GOOD), *samples, (b"settings", b""), (b"z" * 100, b"x")])
    result = asked.run()
    assert result.err.startswith(f"warning: {asked.metadata}: 3 samples of prompts asked several times, not read\nQA")
    assert f"QA lines: 2 (1 matched, 1 without an entry)\nentries: 1 in {asked.metadata}\n" in result.err


def test_long_values_of_activations_are_not_read(experiment: Experiment) -> None:
    """There is memory for what the unpickler makes, `bytes` or `bytearray`, but not for what it would read into it."""
    experiment.ask("q", "w")
    entries = [logged("q", activations=bytes(60_000_000)), logged("w", activations=bytearray(60_000_000))]
    write_store(experiment.lmdb, [(e["prompt"], pickle.dumps({"data": e}, protocol=5)) for e in entries], sync=False)
    result = experiment.run(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (10**8, 10**8)))
    assert len(result.lines) == 2
    assert "damaged" not in result.err


def test_a_store_that_a_live_logger_writes_to_is_read_under_a_lock(alone: Experiment) -> None:
    with writer_to(alone.metadata):
        result = alone.run()
    assert generations(result) == RESPONSES
    assert result.err.startswith("QA lines: 120 (120 matched)\n")
    with lmdb.open(str(alone.metadata)) as env:
        assert env.readers() == "(no active readers)\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_leaves_no_reader_in_a_live_loggers_lock_table(experiment: Experiment, number: int) -> None:
    write_store(experiment.metadata, [(b"%064x" % n, b"x") for n in range(200_000)])
    with lmdb.open(str(experiment.metadata), max_readers=500) as env:
        process = experiment.start()
        while "no active readers" in env.readers():
            assert process.poll() is None
            time.sleep(0.002)
        process.send_signal(number)
        _, err = process.communicate(timeout=30)
        assert env.readers() == "(no active readers)\n"
    assert process.returncode == 128 + number
    assert b"Traceback" not in err


@pytest.fixture
def readable_only(alone: Experiment) -> Iterator[Experiment]:
    """A store of root's that others may read but not write, in a folder that they may write."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    folder = Path(tempfile.mkdtemp())  # pytest's own folders are closed to others
    shutil.copytree(alone.metadata, folder / "a.lmdb_metadata")
    shutil.copy(alone.qa, folder)
    folder.chmod(0o777)
    yield Experiment(folder, None)
    shutil.rmtree(folder)


@table("lock_file", {"with a lock file": True, "without one": False})
def test_another_users_store_is_read(readable_only: Experiment, lock_file: bool) -> None:
    if not lock_file:
        (readable_only.metadata / "lock.mdb").unlink()
    result = readable_only.run(user=NOBODY)
    assert result.err.startswith("QA lines: 120 (120 matched)\n")
    assert generations(result) == RESPONSES


def test_another_users_store_with_a_live_logger_is_read_and_said_to_have_changed(readable_only: Experiment) -> None:
    readable_only.ask(*QUESTIONS * 30)
    with writer_to(readable_only.metadata):
        result = readable_only.run(user=NOBODY)
    assert result.code == 0
    assert f"warning: {readable_only.metadata} changed while it was read: run this again" in result.err
    assert set(generations(result)) <= set(RESPONSES)


def test_a_store_that_may_not_be_read_is_one_plain_line(readable_only: Experiment) -> None:
    (readable_only.metadata / "data.mdb").chmod(0o600)
    result = readable_only.run(user=NOBODY)
    assert result.code == 1
    assert result.err.splitlines()[-1].startswith("error: ")
    assert "data.mdb is empty, or cannot be read" in result.err


@table(
    "put",
    {
        "empty": lambda lock_file, other: lock_file.write_bytes(b""),
        "of other content": lambda lock_file, other: lock_file.write_bytes(b"\xde\xc0\xef\xbe" + b"x" * 9000),
        "a symbolic link": Path.symlink_to,
        "a hard link": Path.hardlink_to,
    },
)
def test_an_odd_lock_file_does_not_matter_and_is_not_written_through(asked: Experiment, put: Any) -> None:
    other = asked.folder / "mine"
    other.write_text("mine")
    (asked.metadata / "lock.mdb").unlink()
    put(asked.metadata / "lock.mdb", other)
    assert asked.run().err.startswith("QA lines: 1 (1 matched)\n")
    assert other.read_text() == "mine"
