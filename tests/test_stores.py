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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import helpers
import lmdb
import pytest
from helpers import Experiment, Result, key_of, logged, prompt_of, table, with_activations, write_store, writer_to

from reconstruct_inference import ReconstructionError, reconstruct_inference

PAGE = 4096
QUESTIONS = [f"question {n}" for n in range(120)]
# Short, middling and long responses: on leaf pages, on one overflow page, and on several.
ENTRIES = [logged(q, f" response {n}" + " and so on" * (n % 6) ** 4) for n, q in enumerate(QUESTIONS)]
ANSWERS = {question: entry["response"] for question, entry in zip(QUESTIONS, ENTRIES)}
GOOD = logged("q")
SAMPLES = [(key_of(GOOD["prompt"]) + b"_request-%d" % n, GOOD) for n in range(3)]
IS_LMDB_1 = int(lmdb.__version__.split(".")[0]) >= 3  # it reads and writes files of LMDB 1.0 too


def data(store: Path) -> Path:
    return store / "data.mdb"


def log_first(store: Path, number: int, **options: Any) -> None:
    write_store(store, [(entry["prompt"], entry) for entry in ENTRIES[:number]], **options)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both stores, logged one request at a time, so that freed pages with old copies lie about."""
    folder = tmp_path_factory.mktemp("pristine")
    log_first(folder / "a.lmdb_metadata", 120, commit_each=True)
    write_store(folder / "a.lmdb", [(entry["prompt"], with_activations(entry)) for entry in ENTRIES])
    return folder


@pytest.fixture
def both(experiment: Experiment, pristine: Path) -> Experiment:
    """The pristine stores, to be damaged, and all their questions."""
    experiment.ask(*QUESTIONS)
    shutil.copytree(pristine, experiment.folder, dirs_exist_ok=True)
    return experiment


@pytest.fixture
def alone(both: Experiment) -> Experiment:
    """The pristine metadata store, without an activations store."""
    shutil.rmtree(both.lmdb)
    return both


def answers(result: Result) -> dict[str, str]:
    return {line["prompt"]: line["generation"] for line in result.lines}


def entries(result: Result) -> dict[str, tuple[int, int]]:
    """For each store in the summary, how many entries it has, and how many are lost."""
    found = re.findall(r"^entries: (\d+) in .*/(\S+)(?: \((\d+) of \d+ lost\))?$", result.err, re.MULTILINE)
    return {name: (int(number), int(lost or 0)) for number, name, lost in found}


def whole_in(store: Path, as_logged: Callable[[Any], Any] = dict) -> dict[str, str]:
    """The answers whose entries lie whole in a store's file, whatever leads to them."""
    content = data(store).read_bytes()
    return {q: ANSWERS[q] for q, entry in zip(QUESTIONS, ENTRIES) if pickle.dumps(as_logged(entry)) in content}


RUINS: dict[str, Callable[[Path], object]] = {
    "gone": shutil.rmtree,
    "without data.mdb": lambda store: data(store).unlink(),
    "empty": lambda store: data(store).write_bytes(b""),
    "cut within the second page": lambda store: os.truncate(data(store), PAGE + 50),
    "cut down to the header": lambda store: os.truncate(data(store), 2 * PAGE),
    "something else": lambda store: write_store(store, [(b"setting %d" % n, b"x") for n in range(200)]),
}
DAMAGES = [
    "bytes flipped",
    "pages swapped",
    "pages zeroed",
    "pages of noise",
    "end cut off",
    "header ruined",
    "no header",
]


def damage_store(store: Path, damage: str, seed: int = 0) -> None:
    if damage in RUINS:
        RUINS[damage](store)
        return
    content, rng = bytearray(data(store).read_bytes()), random.Random(f"{damage} {seed}")
    pages = [slice(start, start + PAGE) for start in range(2 * PAGE, len(content), PAGE)]
    chosen = rng.sample(pages, len(pages) // 4)
    if damage == "bytes flipped":
        for place in rng.sample(range(2 * PAGE, len(content)), rng.randint(1, 40)):
            content[place] ^= rng.randint(1, 255)
    elif damage == "pages swapped":
        for one, other in zip(chosen[::2], chosen[1::2]):
            content[one], content[other] = content[other], content[one]
    elif damage == "end cut off":
        del content[rng.randrange(len(content) // 2, len(content)) :]
    elif damage == "header ruined":
        for place in rng.sample(range(200), rng.randint(1, 100)):
            content[place], content[PAGE + place] = rng.randbytes(2)
    elif damage == "no header":
        content[: 2 * PAGE] = bytes(2 * PAGE)
    else:
        for page in chosen:
            content[page] = bytes(PAGE) if damage == "pages zeroed" else rng.randbytes(PAGE)
    data(store).write_bytes(content)


@table(
    "typed, stores, answering",
    {
        "its path": ("p", {"p_metadata": "q", "p": "qw"}, ["p_metadata", "p"]),
        "its path, one store inside the other": ("p", {"p": "qw", "p/_metadata": "q"}, ["p/_metadata", "p"]),
        "a slash at the end": ("p/", {"p": "qw", "p/_metadata": "q"}, ["p/_metadata", "p"]),
        "two slashes, no store inside": ("p//", {"p": "qw", "p_metadata": "q"}, ["p_metadata", "p"]),
        "its path, another run's store inside": ("p", {"p_metadata": "q", "p/_metadata": "qw"}, ["p_metadata"]),
        "a slash, another run's store beside": ("p/", {"p_metadata": "qw", "p/_metadata": "q"}, ["p/_metadata"]),
        "the metadata store": ("p_metadata/", {"p_metadata": "q", "p": "qw"}, ["p_metadata", "p"]),
        "the metadata store inside": ("p/_metadata", {"p": "qw", "p/_metadata": "q"}, ["p/_metadata", "p"]),
        "its data.mdb": ("p/data.mdb", {"p_metadata": "q", "p": "qw"}, ["p_metadata", "p"]),
        "the metadata store's data.mdb": ("p_metadata/data.mdb", {"p_metadata": "q", "p": "qw"}, ["p_metadata", "p"]),
        "its data.mdb from there": ("data.mdb", {"../here_metadata": "q", ".": "qw"}, ["../here_metadata", "."]),
        "a dot": (".", {"../here_metadata": "q", ".": "qw"}, ["../here_metadata", "."]),
        "a path that is called data.mdb": ("data.mdb", {"data.mdb_metadata": "q"}, ["data.mdb_metadata"]),
        "its path, without a metadata store": ("p", {"p": "qw"}, ["p", "p"]),
    },
)
def test_the_stores_are_found_from(
    experiment: Experiment, monkeypatch: Any, typed: str, stores: dict[str, str], answering: list[str]
) -> None:
    experiment.ask("q", "w")
    (experiment.folder / "x" / "here" / "p").mkdir(parents=True)
    monkeypatch.chdir(experiment.folder / "x" / "here")
    for name, questions in stores.items():
        write_store(Path(name), [(prompt_of(q), logged(q, name)) for q in questions])
    assert experiment.run(lmdb=typed).generations() == answering


def test_stores_that_are_single_files_are_read_and_their_lock_files_kept(asked: Experiment) -> None:
    data(asked.metadata).rename(asked.folder / "renamed_metadata")
    assert asked.run(lmdb=asked.folder / "renamed_metadata").warnings() == []
    asked.ask("q", "w")
    write_store(asked.folder / "b_metadata", [(GOOD["prompt"], GOOD)], subdir=False)
    write_store(asked.folder / "b", [(prompt_of(q), logged(q, "from activations")) for q in "qw"], subdir=False)
    assert asked.run(lmdb=asked.folder / "b").generations() == [" An answer.", "from activations"]
    assert "b-lock" in asked.run(lmdb=asked.folder / "b", output=asked.folder / "b-lock", code=1).error()


@table(
    "in_metadata, in_activations, damage, is_opened, warnings",
    {
        "nothing is missing": (120, 120, "no header", False, 0),
        "it has fewer": (100, 50, "", False, 0),
        "it has as many": (100, 100, "", False, 0),
        "it is damaged and had as many": (100, 100, "pages of noise", False, 0),
        "it is gone": (100, 100, "without data.mdb", False, 0),
        "it holds something else": (100, 0, "something else", False, 1),
        "it has more": (100, 120, "", True, 0),
        "it is damaged and had more": (5, 120, "bytes flipped", True, 2),
        "it is damaged and cannot say how many it had": (5, 120, "no header", True, 2),
    },
)
def test_the_activations_store_is_opened_only_if_it_may_have_what_is_missing(
    experiment: Experiment, in_metadata: int, in_activations: int, damage: str, is_opened: bool, warnings: int
) -> None:
    experiment.ask(*QUESTIONS)
    log_first(experiment.metadata, in_metadata)
    log_first(experiment.lmdb, in_activations)
    if damage:
        damage_store(experiment.lmdb, damage)
    result = experiment.run()
    assert ("a.lmdb" in entries(result)) == is_opened
    assert len(result.lines) > 100 if is_opened else len(result.lines) == in_metadata
    assert [str(experiment.lmdb) in warning for warning in result.warnings()] == [True] * warnings


def test_a_corrupted_entry_is_replaced_from_the_activations_store_or_counted_once(experiment: Experiment) -> None:
    experiment.ask("q", "w", "v", "u")
    experiment.log(*[logged(q, response=None) for q in "qwu"], logged("v", "from metadata"))
    experiment.log_activations(logged("q", response=None), logged("w", "from activations"), logged("u", response=None))
    result = experiment.run()
    assert result.generations() == ["from activations", "from metadata"]
    assert result.counts() == {"QA lines": 4, "matched": 2, "corrupted": 2}


@table("damage, seed", {f"{damage} {seed}": (damage, seed) for damage in DAMAGES for seed in range(3)})
def test_damage_loses_nothing_that_lies_whole_in_the_file_or_in_the_activations_store(
    both: Experiment, damage: str, seed: int
) -> None:
    damage_store(both.metadata, damage, seed)
    whole, before = whole_in(both.metadata), both.files()
    assert list(answers(both.run())) == QUESTIONS
    changed = {Path(name).name for name, content in both.files().items() if before.get(name) != content}
    assert changed - {"lock.mdb"} == {"out.jsonl"}
    shutil.rmtree(both.lmdb)
    result = both.run()
    if damage in ("bytes flipped", "pages swapped"):  # which change letters of an answer, or move them
        assert whole.keys() <= answers(result).keys()
    else:
        assert answers(result) == whole
    assert result.counts()["matched"] == len(result.lines)


def test_damage_to_both_stores_loses_only_what_is_damaged_in_both(both: Experiment) -> None:
    damage_store(both.metadata, "pages of noise", 1)
    damage_store(both.lmdb, "pages of noise", 2)
    whole = whole_in(both.metadata) | whole_in(both.lmdb, with_activations)
    assert whole.items() <= answers(both.run()).items() <= ANSWERS.items()


@pytest.mark.parametrize("ruin", RUINS)
def test_a_metadata_store_that_is_gone_costs_only_the_timestamps(both: Experiment, ruin: str) -> None:
    damage_store(both.metadata, ruin)
    result = both.run()
    assert answers(result) == ANSWERS
    assert {line["timestamp"] for line in result.lines} == {None}
    assert str(both.metadata) in result.warnings()[0]


@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
def test_an_incomplete_copy_is_called_so_and_what_is_lost_is_counted(alone: Experiment, share: float) -> None:
    size = data(alone.metadata).stat().st_size
    os.truncate(data(alone.metadata), int(size * share))
    whole, content = whole_in(alone.metadata), data(alone.metadata).read_bytes()
    assert share > 0.5 or any(key_of(prompt_of(question)) not in content for question in whole)  # its leaf is cut off
    result = alone.run()
    assert answers(result) == whole
    for words in ("incomplete", f" {int(size * share):,} ", f" {size:,} ", " 120 entries"):
        assert words in result.warnings()[0]
    assert f": {len(whole)} entries recovered" in result.warnings()[1]
    assert entries(result) == {"a.lmdb_metadata": (len(whole), 120 - len(whole))}


def change(store: Path, to: Callable[[Any], tuple[Any, ...]]) -> None:
    """Changes numbers in a file whose root page is a branch page: `to` gives where, their struct format, and which."""
    # In a meta page: entries at 120, root page at 128, last page at 136; in others, pointers end at 12.
    content, at = bytearray(data(store).read_bytes()), SimpleNamespace()
    at.meta = max(0, PAGE, key=lambda page: struct.unpack_from("<Q", content, page + 144))  # by transaction
    at.root = struct.unpack_from("<Q", content, at.meta + 128)[0] * PAGE
    at.child = at.root + struct.unpack_from("<H", content, at.root + 16)[0]
    at.leaf = struct.unpack_from("<I", content, at.child)[0] * PAGE
    where, layout, *numbers = to(at)
    struct.pack_into(layout, content, where, *numbers)
    data(store).write_bytes(content)


@table(
    "to, word",
    {
        "a branch page with one child": (lambda at: (at.root + 12, "<H", 18), "damaged"),
        "an empty leaf page under a branch": (lambda at: (at.leaf + 12, "<H", 16), "damaged"),
        "a tree that is a circle": (lambda at: (at.child, "<I", at.root // PAGE), "damaged"),
        "fewer entries than it says": (lambda at: (at.meta + 120, "<Q", 121), "damaged"),
        "more entries than it says": (lambda at: (at.meta + 120, "<Q", 119), "damaged"),
        "an absurd number of entries": (lambda at: (at.meta + 120, "<Q", 1 << 60), "damaged"),
        "an absurd size": (lambda at: (at.meta + 128, "<QQ", 1 << 49, 1 << 50), "damaged"),
        "a root page behind the end": (lambda at: (at.meta + 128, "<QQ", 50_000, 60_000), "incomplete"),
    },
)
def test_a_file_in_which_lmdb_would_miss_entries_or_die_is_salvaged(alone: Experiment, to: Any, word: str) -> None:
    change(alone.metadata, to)
    before, limits = alone.files().keys(), (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    result = alone.run_process(cwd=alone.folder, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CORE, limits))
    assert (answers(result), entries(result)["a.lmdb_metadata"][0]) == (ANSWERS, 120)
    assert [each.startswith(str(alone.metadata)) for each in result.warnings()] == [True, True]
    assert word in result.warnings()[0]
    assert alone.files().keys() - before == {str(alone.output)}  # and no core file


@table("key, value", {"a key that is no hash any more": (b"g" * 64, b"x"), "no value": (b"f" * 64, b"")})
def test_a_file_with_what_no_logger_keeps_is_salvaged(asked: Experiment, key: bytes, value: bytes) -> None:
    write_store(asked.metadata, [(GOOD["prompt"], GOOD), (key, value)])
    assert ": 1 entry recovered" in asked.run().warnings()[1]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_salvage_finds_an_entry_wherever_it_begins_and_however_long_it_is(asked: Experiment, protocol: int) -> None:
    questions = [f"question {n} of {'many words' * 500}" for n in range(30)]
    content = bytes(PAGE)
    for start, question in enumerate(questions, PAGE - 20):  # around the end of a page
        content += (bytes(start) + pickle.dumps(logged(question, question[:12]), protocol)).ljust(4 * PAGE, b"\0")
    data(asked.metadata).write_bytes(content)
    asked.ask(*questions)
    assert asked.run().generations() == [question[:12] for question in questions]


def test_of_several_versions_salvage_takes_the_newest_that_is_usable(asked: Experiment) -> None:
    times: list[Any] = [5.0, 9, 7.0, None, "tomorrow", True, float("nan"), float("inf"), 10**12, -20.0]
    versions = [logged("q", f"version {n}", timestamp=stamp) for n, stamp in enumerate(times)]
    unusable = [logged("q", response=None, timestamp=99.0), logged("q", "\0" * 512, timestamp=99.0)]
    content = [pickle.dumps(version).ljust(1500, b"\0") for version in [unusable[0], *versions, unusable[1]]]
    data(asked.metadata).write_bytes(b"".join(content))
    result = asked.run()
    assert (result.generations(), entries(result)) == (["version 1"], {"a.lmdb_metadata": (1, 0)})


@pytest.mark.parametrize("damage", ["", "end cut off", "no header"])
def test_a_store_of_lmdb_1_0_is_read_and_salvaged_only_if_need_be(alone: Experiment, damage: str) -> None:
    if IS_LMDB_1:
        log_first(alone.metadata, 120, lib_version=1)
    else:  # it cannot write one, and not read it either: page headers are longer, the number of the format is another
        content = data(alone.metadata).read_bytes()
        metas = [bytes(8) + content[page : page + PAGE - 8] for page in (0, PAGE)]
        data(alone.metadata).write_bytes(b"".join(metas) + content[2 * PAGE :])
    if damage:
        damage_store(alone.metadata, damage)
    result = alone.run()
    assert answers(result) == whole_in(alone.metadata)
    assert bool(result.warnings()) == bool(damage or not IS_LMDB_1)


def test_a_block_that_the_disk_cannot_read_costs_only_the_entry_that_needs_it(
    asked: Experiment, monkeypatch: Any
) -> None:
    asked.ask("q", "w", "v")
    answer, activations = logged("q", "a" * 20_000), {"data": logged("w", activations=b"b" * 200_000)}
    write_store(
        asked.metadata, [(prompt_of("q"), answer), (prompt_of("w"), activations), (prompt_of("v"), logged("v"))]
    )
    damage_store(asked.metadata, "no header")
    content, pread = data(asked.metadata).read_bytes(), os.pread
    bad = [content.index(letters * 9999) // PAGE * PAGE + PAGE for letters in (b"a", b"b")]

    def read_around(file: int, size: int, start: int) -> bytes:
        if any(block <= start < block + PAGE for block in bad):
            raise OSError(5, "Input/output error")
        return pread(file, min([size, *[block - start for block in bad if block > start]]), start)

    monkeypatch.setattr(os, "pread", read_around)
    result = asked.run()
    assert list(answers(result)) == ["w", "v"]
    assert ["Input/output error" in warning for warning in result.warnings()].count(True) == 1


@table(
    "content, words",
    {
        "nothing": (None, "cannot read .*/a.lmdb: No such file"),
        "an empty folder": ({}, "no `data.mdb`.* nothing"),
        "another folder": ({"notes": b"", "activations": b""}, "no `data.mdb`.*`activations`, `notes`"),
        "a Zarr group": ({".zgroup": b"{}"}, "Zarr"),
        "a Zarr array": ({".zarray": b"{}"}, "Zarr"),
        "a newer Zarr store": ({"zarr.json": b"{}"}, "Zarr"),
        "an empty data.mdb": ({"data.mdb": b""}, "data.mdb is empty"),
        "a Git LFS pointer": (
            {"data.mdb": b"version https://git-lfs.github.com"},
            "data.mdb is not an LMDB file.*git-lfs",
        ),
        "HTML": ({"data.mdb": b"<!DOCTYPE html>"}, "not an LMDB file.*<!DOCTYPE"),
        "a gzip file": (b"\x1f\x8b\x08\x00" + bytes(99), r"a.lmdb is not an LMDB file.*\\x1f\\"),
        "zeros": (bytes(9999), r"not an LMDB file.*\\x00"),
        "the QA file": (b'{"prompt": "q"}\n', "not an LMDB file.*hint: are .* swapped"),
        "an empty store": ([], "the store is empty"),
        "settings": ([(b"setting", b"x")], "not prompt hashes.*something else"),
        "multi-sample entries": (SAMPLES, "multi-sample"),
    },
)
def test_a_path_without_entries_is_called_by_its_name(experiment: Experiment, content: Any, words: str) -> None:
    experiment.ask("q")
    if isinstance(content, bytes):
        experiment.lmdb.write_bytes(content)
    elif isinstance(content, list):
        write_store(experiment.lmdb, content)
    elif content is not None:
        experiment.lmdb.mkdir()
        for name in content:
            (experiment.lmdb / name).write_bytes(content[name])
    result = experiment.run(code=1)
    assert re.search(words, result.error(), re.DOTALL)
    assert not re.search("damaged|recovered" if "swapped" in words else "damaged|recovered|swapped", result.err)


def test_beside_entries_multi_sample_keys_are_mentioned_and_not_counted(asked: Experiment) -> None:
    asked.ask("q", "w")
    write_store(asked.metadata, [(GOOD["prompt"], GOOD), *SAMPLES, (b"settings", b""), (b"z" * 100, b"x")])
    result = asked.run()
    assert (len(result.lines), entries(result)) == (1, {"a.lmdb_metadata": (1, 0)})
    assert ["multi-sample" in warning for warning in result.warnings()] == [True]


@pytest.fixture
def shared(alone: Experiment, capsys: Any) -> Any:
    """The pristine metadata store, in a folder that other users may write."""
    folder = Path(tempfile.mkdtemp())  # pytest's own folders are closed to others
    shutil.copytree(alone.folder, folder, dirs_exist_ok=True)
    folder.chmod(0o777)
    yield Experiment(folder, capsys)
    shutil.rmtree(folder)


def run_unprivileged(experiment: Experiment, code: int = 0) -> Result:
    """Runs the command as a user to whom permissions apply."""
    return experiment.run_as(helpers.NOBODY, code=code) if os.geteuid() == 0 else experiment.run(code=code)


@pytest.mark.parametrize("files", [["data.mdb", "lock.mdb"], ["data.mdb"]])
def test_a_read_only_store_is_read(shared: Experiment, files: list[str]) -> None:
    for file in shared.metadata.iterdir():
        file.chmod(0o444) if file.name in files else file.unlink()
    shared.metadata.chmod(0o555)
    result = run_unprivileged(shared)
    assert (answers(result), result.warnings()) == (ANSWERS, [])
    assert sorted(os.listdir(shared.metadata)) == files


def test_a_read_only_store_with_a_live_logger_gives_no_wrong_answer(shared: Experiment) -> None:
    shared.ask(*QUESTIONS * 20)
    with writer_to(shared.metadata):
        (shared.metadata / "lock.mdb").chmod(0o444)
        assert answers(run_unprivileged(shared)).items() <= ANSWERS.items()


@pytest.mark.parametrize("closed", ["a.lmdb", "a.lmdb/data.mdb"])
def test_a_store_that_may_not_be_read_is_called_so(shared: Experiment, closed: str) -> None:
    shared.metadata.rename(shared.lmdb)
    (shared.folder / closed).chmod(0)
    error = run_unprivileged(shared, code=1).error()
    (shared.folder / closed).chmod(0o700)
    assert re.search(f"{shared.lmdb}: Permission denied", error)


@table(
    "name, put, prepare",
    {
        "an empty lock file": ("a", lambda lock, other: lock.write_bytes(b""), None),
        "a lock file of other content": ("a", lambda lock, other: lock.write_bytes(b"\xde\xc0\xef\xbe" * 3000), None),
        "a lock file that is a symbolic link": ("a", Path.symlink_to, None),
        "a lock file that is a hard link": ("a", Path.hardlink_to, None),
        "a name that is not UTF-8": (os.fsdecode(b"caf\xe9"), Path.samefile, None),
        "a map larger than the address space": ("a", Path.samefile, lambda: limit(resource.RLIMIT_AS, 1 << 31)),
        "a caller that ignores SIGCHLD": ("a", Path.samefile, lambda: signal.signal(signal.SIGCHLD, signal.SIG_IGN)),
    },
)
def test_does_not_matter(experiment: Experiment, name: str, put: Any, prepare: Any) -> None:
    experiment.ask(*QUESTIONS)
    store, other = experiment.folder / f"{name}_metadata", experiment.folder / "mine"
    log_first(store, 120, map_size=1 << 36)
    other.write_text("mine")
    if put != Path.samefile:
        (store / "lock.mdb").unlink()
    put(store / "lock.mdb", other)
    result = experiment.run_process(lmdb=experiment.folder / name, preexec_fn=prepare)
    assert (answers(result), result.warnings(), other.read_text()) == (ANSWERS, [], "mine")


def limit(what: int, number: int) -> None:
    resource.setrlimit(what, (number, number))


def test_without_dev_fd_a_store_is_read(asked: Experiment, monkeypatch: Any) -> None:
    isdir, listdir = os.path.isdir, os.listdir
    monkeypatch.setattr(os.path, "isdir", lambda path: path != "/dev/fd" and isdir(path))
    monkeypatch.setattr(os, "listdir", lambda path: listdir("/missing" if path == "/dev/fd" else path))
    assert asked.run().warnings() == []


@pytest.mark.parametrize("name", ["a.lmdb", "a.lmdb_metadata"])
def test_a_store_that_the_process_has_open_is_not_opened_twice(both: Experiment, name: str) -> None:
    log_first(both.metadata, 119)
    with lmdb.open(str(both.folder / name)) as env, pytest.raises(ReconstructionError, match=f"{name}/.*open"):
        reconstruct_inference(both.qa, both.lmdb, both.output)
        env.stat()
    assert not both.output.exists()


def test_values_that_are_json_objects_are_read_alike(experiment: Experiment) -> None:
    experiment.ask("q", "w", "v")
    values = [(key_of(prompt_of("q")), GOOD), (key_of(prompt_of("w")), {"data": logged("w")})]
    write_store(
        experiment.lmdb, [*[(key, json.dumps(value).encode()) for key, value in values], (prompt_of("v"), b"{1}")]
    )
    assert answers(experiment.run()) == {"q": " An answer.", "w": " An answer."}


def test_long_values_of_activations_are_not_read_into_memory(experiment: Experiment) -> None:
    """There is memory for what the unpickler makes, `bytes` or `bytearray`, but not for a copy of the value."""
    experiment.ask("q", "w")
    entries = [logged("q", activations=bytes(60_000_000)), logged("w", activations=bytearray(60_000_000))]
    write_store(experiment.lmdb, [(e["prompt"], pickle.dumps({"data": e}, 5)) for e in entries], sync=False)
    result = experiment.run_process(preexec_fn=lambda: limit(resource.RLIMIT_DATA, 10**8))
    assert (len(result.lines), len(result.warnings())) == (2, 1)


def run_meanwhile(experiment: Experiment, act: Callable[[], object]) -> Result:
    """Runs the command with a pipe as QA file, and calls `act` when the store is open and the first line is awaited."""

    def feed() -> None:
        with pipe.open("wb") as file:
            act()
            file.write(experiment.qa.read_bytes())

    pipe = experiment.folder / "pipe"
    os.mkfifo(pipe)
    feeder = threading.Thread(target=feed, daemon=True)
    feeder.start()
    return experiment.run(qa=pipe)


@pytest.mark.filterwarnings("error")
def test_the_command_limits_its_memory_and_leaves_room_for_the_longest_value(asked: Experiment) -> None:
    limits: list[int] = []
    run_meanwhile(asked, lambda: limits.extend(resource.getrlimit(resource.RLIMIT_DATA)))
    assert 1 << 32 < limits[0] < 1 << 33


def log_more(store: Path) -> None:
    with writer_to(store):
        pass


def test_without_a_lock_what_a_logger_overwrites_meanwhile_is_still_found(alone: Experiment) -> None:
    (alone.metadata / "lock.mdb").unlink()
    assert answers(run_meanwhile(alone, lambda: log_more(alone.metadata))) == ANSWERS


def test_an_entry_that_lmdb_can_no_longer_read_is_corrupted(alone: Experiment) -> None:
    result = run_meanwhile(alone, lambda: change(alone.metadata, lambda at: (at.child, "<I", 60_000)))
    assert answers(result).items() <= ANSWERS.items()
    assert 0 < result.counts()["corrupted"] == 120 - len(result.lines)


def test_a_store_that_a_live_logger_writes_to_is_read_under_a_lock(alone: Experiment) -> None:
    with writer_to(alone.metadata):
        result = alone.run()
    assert (answers(result), result.warnings()) == (ANSWERS, [])
    with lmdb.open(str(alone.metadata)) as env:
        assert env.readers() == "(no active readers)\n"


@pytest.mark.parametrize("number", helpers.STOP_SIGNALS)
@pytest.mark.parametrize("is_checking", [True, False])
def test_a_stopped_run_leaves_no_reader_in_a_live_loggers_table(
    asked: Experiment, number: int, is_checking: bool
) -> None:
    shutil.rmtree(asked.metadata)
    keys = range(200_000 if is_checking else 3)
    write_store(asked.metadata, [(b"%064x" % key, b"x") for key in keys], subdir=is_checking)
    with lmdb.open(str(asked.metadata), subdir=is_checking, max_readers=500) as env:
        with asked.start(qa="-", stdin=subprocess.PIPE) as process:
            deadline = time.monotonic() + helpers.DEADLINE
            while ("pid" if is_checking else str(process.pid)) not in env.readers():
                assert (process.poll(), time.monotonic() < deadline) == (None, True)
                time.sleep(0.002)
            process.send_signal(number)
            asked.end(process, code=128 + number)
        assert env.readers() == "(no active readers)\n"


def test_a_lock_that_is_never_granted_is_done_without(both: Experiment, monkeypatch: Any) -> None:
    monkeypatch.setattr("reconstruct_inference.LOCK_PATIENCE", 1)
    both.ask(*QUESTIONS, "never asked")
    locks = [open(store / "lock.mdb", "r+b") for store in (both.metadata, both.lmdb)]  # noqa: SIM115
    for lock in locks:
        fcntl.lockf(lock, fcntl.LOCK_EX, 1)
    release = threading.Timer(helpers.DEADLINE, lambda: [lock.close() for lock in locks])
    release.start()
    result = both.run()
    release.cancel()
    assert (answers(result), result.warnings(), locks[0].closed) == (ANSWERS, [], False)


def test_a_process_that_cannot_be_started_ends_the_run_and_no_signal_stays_blocked(
    both: Experiment, monkeypatch: Any
) -> None:
    def fork() -> int:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", fork)
    result = both.run(code=1)
    assert "process: Resource temporarily unavailable" in result.error()
    assert (result.warnings(), signal.pthread_sigmask(signal.SIG_BLOCK, [])) == ([], set())
