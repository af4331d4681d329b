"""Whatever state the stores are in, the command ends in plain words and recovers what is there."""

from __future__ import annotations

import contextlib
import os
import pickle
import random
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lmdb
import pytest
from conftest import Experiment, key_of, logged, prompt_of, read_lines, write_store

import reconstruct_inference
from reconstruct_inference import ReconstructionError

PAGE = 4096
QUESTIONS = [f"question {n}" for n in range(120)]


def entry_of(number: int) -> dict[str, Any]:
    """Short, middling and long responses: on leaf pages, on one overflow page, and on several."""
    return logged(QUESTIONS[number], f" response {number}" + " and so on" * (number % 6) ** 4)


ENTRIES = [entry_of(number) for number in range(len(QUESTIONS))]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both stores, logged one request at a time, so that freed pages with old versions lie about."""
    folder = tmp_path_factory.mktemp("pristine")
    values = [(entry["prompt"], entry) for entry in ENTRIES]
    write_store(folder / "a.lmdb_metadata", values, commit_each=True)
    wrapped = [(prompt, {"data": {**entry, "all_layers_activations": [b"\x00" * 5000]}}) for prompt, entry in values]
    for _, value in wrapped:
        del value["data"]["timestamp"]
    write_store(folder / "a.lmdb", wrapped, commit_each=True)
    return folder


@pytest.fixture
def damaged(experiment: Experiment, pristine: Path) -> Experiment:
    """The pristine stores, to be damaged, and all their questions."""
    experiment.ask(*QUESTIONS)
    for name in ("a.lmdb", "a.lmdb_metadata"):
        shutil.copytree(pristine / name, experiment.folder / name)
    return experiment


# Kinds of damage. Each changes the content of a data.mdb and returns the numbers of the pages hit.

Damage = Callable[[random.Random, bytearray], set[int]]


def some_pages(rng: random.Random, content: bytearray) -> list[int]:
    pages = len(content) // PAGE
    return rng.sample(range(2, pages), rng.randint(1, pages // 4))


def flip_bytes(rng: random.Random, content: bytearray) -> set[int]:
    positions = [rng.randrange(2 * PAGE, len(content)) for _ in range(rng.randint(1, 40))]
    for position in positions:
        content[position] ^= rng.randint(1, 255)
    return {position // PAGE for position in positions}


def zero_pages(rng: random.Random, content: bytearray) -> set[int]:
    pages = some_pages(rng, content)
    for page in pages:
        content[page * PAGE : (page + 1) * PAGE] = bytes(PAGE)
    return set(pages)


def fill_pages_with_noise(rng: random.Random, content: bytearray) -> set[int]:
    pages = some_pages(rng, content)
    for page in pages:
        content[page * PAGE : (page + 1) * PAGE] = rng.randbytes(PAGE)
    return set(pages)


def swap_pages(rng: random.Random, content: bytearray) -> set[int]:
    pages = some_pages(rng, content)
    for one, other in zip(pages[::2], pages[1::2]):
        a, b = slice(one * PAGE, (one + 1) * PAGE), slice(other * PAGE, (other + 1) * PAGE)
        content[a], content[b] = content[b], content[a]
    return set(pages)


def cut_off_the_end(rng: random.Random, content: bytearray) -> set[int]:
    pages = range(len(content) // PAGE)
    del content[rng.randrange(2 * PAGE, len(content)) :]
    return set(pages[len(content) // PAGE :])


def ruin_the_meta_pages(rng: random.Random, content: bytearray) -> set[int]:
    for start in (0, PAGE):
        for _ in range(rng.randint(1, 200)):
            content[start + rng.randrange(200)] = rng.randrange(256)
    return set()


def zero_the_meta_pages(rng: random.Random, content: bytearray) -> set[int]:
    content[: 2 * PAGE] = bytes(2 * PAGE)
    return set()


def forge_a_meta_page(rng: random.Random, content: bytearray) -> set[int]:
    """A meta page with the highest transaction number and a random word anywhere else."""
    for start in (0, PAGE):
        word = start + 16 + 4 * rng.randrange(30)
        content[word : word + 4] = rng.choice([bytes(4), b"\xff" * 4, rng.randbytes(4), b"\x01\x00\x00\x00"])
    return set()


DAMAGES: list[Damage] = [
    flip_bytes,
    zero_pages,
    fill_pages_with_noise,
    swap_pages,
    cut_off_the_end,
    ruin_the_meta_pages,
    zero_the_meta_pages,
    forge_a_meta_page,
]
SEEDS = range(6)


def damage_store(store: Path, damage: Damage, seed: int) -> set[int]:
    content = bytearray((store / "data.mdb").read_bytes())
    pages = damage(random.Random(f"{damage.__name__} {seed}"), content)
    (store / "data.mdb").write_bytes(content)
    return pages


def pages_of_entries(store: Path) -> list[set[int]]:
    """For each entry, all pages on which its key or its value lies, old copies included."""
    content = (store / "data.mdb").read_bytes()
    return [
        {
            page
            for part in (key_of(entry["prompt"]), pickle.dumps(entry))
            for match in re.finditer(re.escape(part), content)
            for page in range(match.start() // PAGE, (match.end() - 1) // PAGE + 1)
        }
        for entry in ENTRIES
    ]


def run_as_a_process(experiment: Experiment, *options: str) -> tuple[int, str]:
    """The exit code and what was said: a crash on a signal must not take the tests along."""
    with experiment.start(*options) as process:
        _, err = process.communicate(timeout=120)
    assert process.returncode in (0, 1), err
    assert b"Traceback" not in err
    return process.returncode, err.decode()


def assert_the_numbers_add_up(err: str, lines: int) -> None:
    counts = [int(number) for number in re.findall(r": +(\d+)$", err, re.MULTILINE)]
    read, matched, without_entry, malformed, corrupted = counts[:5]
    assert read == len(QUESTIONS) == matched + without_entry + malformed + corrupted
    assert matched == lines


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_no_damage_to_the_metadata_store_loses_a_generation(damaged: Experiment, damage: Damage, seed: int) -> None:
    damage_store(damaged.metadata, damage, seed)
    code, err = run_as_a_process(damaged)
    assert code == 0, err
    lines = read_lines(damaged.output)
    assert [line["prompt"] for line in lines] == QUESTIONS
    assert_the_numbers_add_up(err, len(lines))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_of_the_metadata_store_alone_each_entry_on_intact_pages_is_recovered(
    damaged: Experiment, damage: Damage, seed: int
) -> None:
    shutil.rmtree(damaged.lmdb)
    pages = pages_of_entries(damaged.metadata)
    hit = damage_store(damaged.metadata, damage, seed)
    code, err = run_as_a_process(damaged)
    generations = {line["prompt"]: line["generation"] for line in read_lines(damaged.output)} if code == 0 else {}
    for question, entry, own_pages in zip(QUESTIONS, ENTRIES, pages):
        if not own_pages & hit:
            assert generations[question] == entry["response"]
    if code == 0:
        assert_the_numbers_add_up(err, len(generations))


@pytest.mark.parametrize("seed", SEEDS)
def test_damage_to_both_stores_ends_in_plain_words(damaged: Experiment, seed: int) -> None:
    rng = random.Random(seed)
    for store in (damaged.lmdb, damaged.metadata):
        for _ in range(rng.randint(1, 3)):
            with_pages_left = (store / "data.mdb").stat().st_size > 8 * PAGE
            damage_store(store, rng.choice(DAMAGES if with_pages_left else DAMAGES[-3:]), seed)
    code, err = run_as_a_process(damaged)
    if code == 0:
        assert_the_numbers_add_up(err, len(read_lines(damaged.output)))
    else:
        assert "reconstruct_inference.py: error: " in err


@pytest.mark.parametrize(
    "ruin",
    [
        pytest.param(lambda store: shutil.rmtree(store), id="missing"),
        pytest.param(lambda store: (store / "data.mdb").unlink(), id="without data.mdb"),
        pytest.param(lambda store: (store / "data.mdb").write_bytes(b""), id="empty"),
        pytest.param(lambda store: os.truncate(store / "data.mdb", 100), id="cut down to 100 bytes"),
        pytest.param(lambda store: os.truncate(store / "data.mdb", PAGE), id="cut down to a page"),
        pytest.param(lambda store: os.truncate(store / "data.mdb", PAGE + 50), id="cut within the second page"),
        pytest.param(lambda store: os.truncate(store / "data.mdb", 2 * PAGE), id="cut down to the meta pages"),
        pytest.param(lambda store: (store / "data.mdb").write_bytes(b"\x00" * 99999), id="zeros only"),
    ],
)
def test_a_metadata_store_that_is_gone_costs_only_the_timestamps(damaged: Experiment, ruin: Any) -> None:
    ruin(damaged.metadata)
    code, err = run_as_a_process(damaged)
    assert code == 0
    assert [line["generation"] for line in read_lines(damaged.output)] == [e["response"] for e in ENTRIES]
    assert err.count("no timestamp in 120 entries") == 1
    assert err.startswith(f"no metadata store {damaged.metadata}: ")


def test_a_cut_store_is_said_to_be_cut(damaged: Experiment) -> None:
    pages = (damaged.metadata / "data.mdb").stat().st_size // PAGE
    os.truncate(damaged.metadata / "data.mdb", (pages - 1) * PAGE)
    _, err = run_as_a_process(damaged)
    assert f"data.mdb: it is cut short: {pages - 1} of its {pages} pages are there; " in err
    assert "entries found by salvage" in err


def test_of_several_versions_salvage_takes_the_newest(experiment: Experiment) -> None:
    experiment.ask("q")
    versions = [logged("q", f"version {n}", timestamp=stamp) for n, stamp in enumerate([5.0, 9.0, 7.0, None])]
    write_store(experiment.metadata, [(v["prompt"], v) for v in versions], commit_each=True)
    damage_store(experiment.metadata, zero_the_meta_pages, 0)
    result = experiment.run()
    assert [line["generation"] for line in result.lines] == ["version 1"]


def test_an_entry_under_another_prompts_key_is_not_taken(experiment: Experiment) -> None:
    experiment.ask("q", "w")
    write_store(experiment.metadata, [(prompt_of("q"), logged("w")), (prompt_of("w"), logged("w"))])
    damage_store(experiment.metadata, zero_the_meta_pages, 0)
    result = experiment.run()
    assert [line["prompt"] for line in result.lines] == ["w"]
    assert 'its "prompt" is another one' in result.err


@pytest.mark.parametrize("damage", [None, cut_off_the_end, zero_the_meta_pages], ids=["sound", "cut", "no meta pages"])
def test_stores_of_lmdb_1_0_are_read(experiment: Experiment, damage: Damage | None) -> None:
    experiment.ask(*QUESTIONS)
    values = [(entry["prompt"], entry) for entry in ENTRIES]
    write_store(experiment.metadata, values, lib_version=1)
    if damage:
        damage_store(experiment.metadata, damage, 3)
    code, _ = run_as_a_process(experiment)
    assert code == 0
    found = len(read_lines(experiment.output))
    assert found == len(QUESTIONS) if damage is not cut_off_the_end else found > 0


# Files laid out by hand, as lmdb would not write them.


def node(entry: dict[str, Any], long_value_at: int | None = None) -> bytes:
    value = pickle.dumps(entry)
    start = struct.pack("<HHHH", len(value) & 0xFFFF, len(value) >> 16, long_value_at is not None, 64)
    return start + key_of(entry["prompt"]) + (value if long_value_at is None else struct.pack("<Q", long_value_at))


def page(number: int, flags: int, nodes: list[bytes], size: int = PAGE) -> bytes:
    offsets, end = [], size
    for content in nodes:
        end -= len(content) + len(content) % 2
        offsets.append(end)
    header = struct.pack(f"<QHHHH{len(nodes)}H", number, 0, flags, 16 + 2 * len(nodes), end, *offsets)
    body = b"".join(content + b"\0" * (len(content) % 2) for content in reversed(nodes))
    return header.ljust(end, b"\0") + body


def overflow_pages(number: int, value: bytes, size: int = PAGE) -> bytes:
    count = 1 + (15 + len(value)) // size
    return (struct.pack("<QHHI", number, 0, 4, count) + value).ljust(count * size, b"\0")


def meta_page(number: int, last_page: int, size: int = PAGE, flags: int = 0, **main: int) -> bytes:
    """A meta page whose transaction number is its page number; `main` are fields of its main database."""
    counts = [main.get(name, 0) for name in ("branch", "leaf", "overflow", "entries", "root")]
    content = struct.pack("<QHHI", number, 0, 8, 0) + struct.pack("<IIQQ", 0xBEEFC0DE, 1, 0, 1 << 20)
    content += struct.pack("<IHHQQQQQ", size, 8, 0, 0, 0, 0, 0, 2**64 - 1)
    content += struct.pack("<IHHQQQQQ", main.get("pad", 0), flags, main.get("depth", 1), *counts)
    return (content + struct.pack("<QQ", last_page, number)).ljust(size, b"\0")


def lay_out(experiment: Experiment, *pages: bytes) -> None:
    experiment.metadata.mkdir()
    (experiment.metadata / "data.mdb").write_bytes(b"".join(pages))


EMPTY = meta_page(0, 1, root=2**64 - 1, depth=0)


@pytest.mark.parametrize("page_size", [512, 4096, 16384, 65536])
@pytest.mark.parametrize("metas", ["the first left", "none left"])
def test_salvage_works_whatever_the_page_size(experiment: Experiment, page_size: int, metas: str) -> None:
    pages = [meta_page(0, 99, page_size) if metas == "the first left" else bytes(page_size), bytes(page_size)]
    for entry in ENTRIES[:20]:
        number = sum(map(len, pages)) // page_size
        pages.append(page(number, 2, [node(entry, number + 1)], page_size))
        pages.append(overflow_pages(number + 1, pickle.dumps(entry), page_size))
    lay_out(experiment, *pages)
    experiment.ask(*QUESTIONS[:20])
    assert [line["generation"] for line in experiment.run().lines] == [e["response"] for e in ENTRIES[:20]]


GOOD, OTHER = logged("q"), logged("w")
IN_ORDER = sorted([node(GOOD), node(OTHER)], key=lambda content: content[8:72])
TO_PAGE_3 = struct.pack("<HHHH", 3, 0, 0, 0)

DEADLY = {
    "a page of bare keys": [
        meta_page(1, 2, root=2, leaf=1, entries=1, pad=64),
        struct.pack("<QHHHH", 2, 64, 0x22, 18, PAGE).ljust(PAGE, b"\0")[:16]
        + key_of(GOOD["prompt"])
        + bytes(PAGE - 80),
    ],
    "a branch page with one child": [
        meta_page(1, 3, root=2, branch=1, leaf=1, entries=2, depth=2),
        page(2, 1, [TO_PAGE_3]),
        page(3, 2, IN_ORDER),
    ],
    "an empty leaf page": [meta_page(1, 2, root=2, leaf=1, entries=0), page(2, 2, [])],
    "a tree that is a circle": [
        meta_page(1, 3, root=2, branch=1, leaf=1, entries=2, depth=2),
        page(2, 1, [struct.pack("<HHHH", 2, 0, 0, 0), struct.pack("<HHHH", 2, 0, 0, 64) + b"5" * 64]),
        page(3, 2, IN_ORDER),
    ],
}


@pytest.mark.parametrize("question", ["q", "never asked"])
@pytest.mark.parametrize("pages", DEADLY.values(), ids=DEADLY)
def test_a_file_that_would_end_the_process_in_lmdb_does_not(
    experiment: Experiment, pages: list[bytes], question: str
) -> None:
    experiment.ask(question)
    lay_out(experiment, EMPTY, *pages)
    run_as_a_process(experiment)


@pytest.mark.parametrize("flags", [0x02, 0x04, 0x08], ids=["REVERSEKEY", "DUPSORT", "INTEGERKEY"])
def test_a_main_database_of_another_kind_is_salvaged(experiment: Experiment, flags: int) -> None:
    experiment.ask("q")
    meta = meta_page(1, 2, root=2, leaf=1, entries=1, flags=flags)
    lay_out(experiment, EMPTY, meta, page(2, 2, [node(GOOD)]))
    result = experiment.run()
    assert "its main database is of another kind; 1 entries found by salvage" in result.err
    assert len(result.lines) == 1


def test_a_sound_file_laid_out_by_hand_is_read_through_lmdb(experiment: Experiment) -> None:
    experiment.ask("q", "w")
    lay_out(experiment, EMPTY, meta_page(1, 2, root=2, leaf=1, entries=2), page(2, 2, IN_ORDER))
    result = experiment.run("--verbose")
    assert len(result.lines) == 2
    assert "sound, read through lmdb" in result.err


# Damage that leaves the tree in good form.


@pytest.mark.parametrize("bit", range(0, 64, 7))
@pytest.mark.parametrize("meta", [0, 1])
def test_a_flipped_bit_in_a_commits_number_hides_nothing(damaged: Experiment, meta: int, bit: int) -> None:
    shutil.rmtree(damaged.lmdb)
    content = bytearray((damaged.metadata / "data.mdb").read_bytes())
    content[meta * PAGE + 16 + 128 + bit // 8] ^= 1 << bit % 8
    (damaged.metadata / "data.mdb").write_bytes(content)
    assert len(damaged.run().lines) == len(QUESTIONS)


@pytest.mark.parametrize("changed", [0, 3], ids=["as if it had not been", "as if many had followed"])
def test_a_changed_number_of_the_only_commit_hides_nothing(experiment: Experiment, changed: int) -> None:
    experiment.ask(*QUESTIONS)
    experiment.log(*ENTRIES)
    content = bytearray((experiment.metadata / "data.mdb").read_bytes())
    content[PAGE + 16 + 128] = changed
    (experiment.metadata / "data.mdb").write_bytes(content)
    result = experiment.run()
    assert len(result.lines) == len(QUESTIONS)
    assert "its meta pages are not those of two commits in a row" in result.err


def test_no_flipped_bit_in_a_branch_pages_keys_hides_an_entry(damaged: Experiment) -> None:
    shutil.rmtree(damaged.lmdb)
    pristine = (damaged.metadata / "data.mdb").read_bytes()
    rng = random.Random(1)
    keys = [
        match.start() + 2
        for match in re.finditer(rb"@\0[0-9a-f]{64}", pristine)
        if pristine[match.start() // PAGE * PAGE + 10] == 1
    ]
    assert len(keys) > 10
    for start in rng.sample(keys, 10):
        content = bytearray(pristine)
        content[start + rng.randrange(4)] ^= 1 << rng.randrange(7)
        (damaged.metadata / "data.mdb").write_bytes(content)
        assert len(damaged.run().lines) == len(QUESTIONS)


def test_salvage_passes_over_holes(damaged: Experiment) -> None:
    shutil.rmtree(damaged.lmdb)
    damage_store(damaged.metadata, zero_the_meta_pages, 0)
    os.truncate(damaged.metadata / "data.mdb", 1 << 40)
    assert len(damaged.run().lines) == len(QUESTIONS)


@pytest.mark.parametrize("timestamp", [10**400, float("nan"), "yesterday", None])
def test_an_odd_timestamp_counts_as_the_oldest(experiment: Experiment, timestamp: Any) -> None:
    experiment.ask("q")
    versions = [logged("q", "odd", timestamp=timestamp), logged("q", "usual"), logged("q", "odd", timestamp=timestamp)]
    write_store(experiment.metadata, [(v["prompt"], v) for v in versions], commit_each=True)
    damage_store(experiment.metadata, zero_the_meta_pages, 0)
    assert experiment.run().lines[0]["generation"] == "usual"


def test_many_nodes_that_name_one_costly_value_cost_it_once(experiment: Experiment) -> None:
    costly = {**GOOD, "response": None, "messages": [[]] * 100_000}
    nodes = [node(costly, 3)] * 40
    lay_out(
        experiment, bytes(2 * PAGE), page(2, 2, nodes), overflow_pages(3, pickle.dumps(costly)), page(99, 2, IN_ORDER)
    )
    experiment.ask("q", "w")
    assert len(experiment.run().lines) == 2


# Stores that others use or own.

NOBODY = 65534

WRITER = """
import sys, time
sys.path[:0] = {path!r}
import lmdb, pickle
import reconstruct_inference
from conftest import key_of, logged
env = lmdb.open({folder!r}, map_size=1 << 30)
number = 0
print("open", flush=True)
while True:
    with env.begin(write=True) as transaction:
        entry = logged(f"later {{number}}", "x" * (number * 997 % 9000))
        transaction.put(key_of(entry["prompt"]), pickle.dumps(entry))
    number += 1
"""


@contextlib.contextmanager
def writer_to(store: Path) -> Iterator[None]:
    """A logger in another process that goes on committing to the store as fast as it can."""
    code = WRITER.format(path=sys.path, folder=str(store))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as writer:
        assert writer.stdout
        writer.stdout.readline()
        time.sleep(0.2)
        try:
            yield
            assert writer.poll() is None
        finally:
            writer.kill()


@pytest.mark.parametrize("attempt", range(5))
def test_a_store_that_a_live_logger_writes_to_is_read_whole(damaged: Experiment, attempt: int) -> None:
    shutil.rmtree(damaged.lmdb)
    with writer_to(damaged.metadata):
        code, err = run_as_a_process(damaged, "--verbose")
    assert code == 0
    assert "sound, read through lmdb with a reader lock" in err
    assert [line["generation"] for line in read_lines(damaged.output)] == [e["response"] for e in ENTRIES]


@pytest.fixture
def readable_only(damaged: Experiment) -> Iterator[Experiment]:
    """Stores of root's that others may read but not write, and an output folder of nobody's."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    folder = Path(tempfile.mkdtemp())  # pytest's own folders are closed to others
    for name in ("a.lmdb", "a.lmdb_metadata"):
        shutil.copytree(damaged.folder / name, folder / name)
    shutil.copy(damaged.qa, folder)
    (folder / "out").mkdir()
    os.chown(folder / "out", NOBODY, NOBODY)
    folder.chmod(0o755)
    experiment = Experiment(folder, lambda argv: None)
    experiment.output = folder / "out" / "out.jsonl"
    yield experiment
    shutil.rmtree(folder)


def run_as_nobody(experiment: Experiment) -> tuple[int, str]:
    """Runs the command in a copy of this process that is another user's; gives exit code and stderr."""
    said = experiment.output.with_name("stderr")
    child = os.fork()
    if child == 0:
        code = 99
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            with said.open("w") as sys.stderr:
                code = reconstruct_inference.main([*experiment.arguments(), "--verbose"])
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said.read_text()


@pytest.mark.parametrize("lock_file", [True, False], ids=["with a lock file", "without one"])
def test_another_users_stores_are_read(readable_only: Experiment, lock_file: bool) -> None:
    if lock_file:
        (readable_only.metadata / "lock.mdb").write_bytes(b"")
    code, err = run_as_nobody(readable_only)
    assert code == 0
    assert "sound, read through lmdb without a reader lock" in err
    assert [line["generation"] for line in read_lines(readable_only.output)] == [e["response"] for e in ENTRIES]


@pytest.mark.parametrize("attempt", range(5))
def test_another_users_store_that_a_live_logger_writes_to_is_read_whole(
    readable_only: Experiment, attempt: int
) -> None:
    shutil.rmtree(readable_only.lmdb)
    with writer_to(readable_only.metadata):
        code, err = run_as_nobody(readable_only)
    assert code == 0, err
    assert [line["generation"] for line in read_lines(readable_only.output)] == [e["response"] for e in ENTRIES]


def test_what_was_read_while_its_commit_was_written_over_is_read_again(
    damaged: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_env = reconstruct_inference.Store._open_env

    def cannot_lock(store: reconstruct_inference.Store, lock: bool) -> None:
        open_env(store, lock=False)
        if lock:
            lmdb.open(str(damaged.folder / "nowhere"), create=False)  # fails, as for another user

    def read_late(value: Any, prompt: str) -> dict[str, Any]:
        """Reads what a logger has meanwhile put in the entry's place, two commits on."""
        monkeypatch.undo()
        content = bytearray((damaged.metadata / "data.mdb").read_bytes())
        for meta in (0, PAGE):
            content[meta + 16 + 128] += 2
        (damaged.metadata / "data.mdb").write_bytes(content)
        return {**reconstruct_inference.read_entry(value, prompt), "generation": "of another time"}

    monkeypatch.setattr(reconstruct_inference, "lock_is_held", lambda path: True)
    monkeypatch.setattr(reconstruct_inference.Store, "_open_env", cannot_lock)
    monkeypatch.setattr(reconstruct_inference, "read_entry", read_late)
    result = damaged.run()
    assert "cannot be locked" in result.err
    assert [line["generation"] for line in result.lines] == [entry["response"] for entry in ENTRIES]


def test_a_link_in_the_place_of_the_lock_file_is_not_written_through(damaged: Experiment) -> None:
    one, other = damaged.folder / "one", damaged.folder / "other"
    one.write_text("mine")
    other.write_text("mine")
    (damaged.metadata / "lock.mdb").symlink_to(one)
    (damaged.lmdb / "lock.mdb").hardlink_to(other)
    damaged.ask(*QUESTIONS, "never asked")
    code, err = run_as_a_process(damaged, "--verbose")
    assert code == 0
    assert err.count("without a reader lock") == 2
    assert (one.read_text(), other.read_text()) == ("mine", "mine")


@pytest.mark.parametrize("content", [b"", b"\xde\xc0\xef\xbe" + b"x" * 9000], ids=["empty", "of other content"])
def test_a_lock_file_that_nobody_holds_is_not_touched(damaged: Experiment, content: bytes) -> None:
    for store in (damaged.metadata, damaged.lmdb):
        (store / "lock.mdb").write_bytes(content)
    damaged.ask(*QUESTIONS, "never asked")
    assert damaged.run().code == 0
    for store in (damaged.metadata, damaged.lmdb):
        assert (store / "lock.mdb").read_bytes() == content


@pytest.mark.parametrize("link", [Path.symlink_to, Path.hardlink_to])
def test_an_activations_store_that_is_the_metadata_store_is_not_opened_twice(damaged: Experiment, link: Any) -> None:
    shutil.rmtree(damaged.lmdb)
    damaged.lmdb.mkdir()
    link(damaged.lmdb / "data.mdb", damaged.metadata / "data.mdb")
    damaged.ask("never asked", *QUESTIONS)
    assert len(damaged.run().lines) == len(QUESTIONS)


def test_a_store_that_this_process_has_open_is_said_to_be(damaged: Experiment) -> None:
    with lmdb.open(str(damaged.metadata)):
        with pytest.raises(ReconstructionError, match="is open in this process already; close it"):
            reconstruct_inference.reconstruct_inference(damaged.qa, damaged.lmdb, damaged.output)
        assert damaged.run().code == 1
    assert damaged.run().code == 0


def test_an_entry_that_is_corrupted_in_a_sound_store_is_taken_from_a_page_given_back(experiment: Experiment) -> None:
    experiment.ask("q")
    write_store(experiment.metadata, [(prompt_of("q"), GOOD), (prompt_of("q"), b"corrupted")], commit_each=True)
    result = experiment.run("--verbose")
    assert "sound, read through lmdb" in result.err
    assert [line["generation"] for line in result.lines] == [GOOD["response"]]
