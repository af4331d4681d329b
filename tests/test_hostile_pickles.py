"""No pickle makes the command run anything, crash, or spend more than its own entry."""

from __future__ import annotations

import copyreg
import pickle
import resource
import struct
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from helpers import Experiment, logged, prompt_of, table, write_store
from hypothesis import given, settings
from hypothesis import strategies as st

QUIET_EVENTS = ("import", "exec", "compile", "pickle.", "os.", "subprocess.", "shutil.", "socket.", "ctypes.", "code.")
# What a run does itself: it forks a child that rehearses the reading.
EXPECTED_OS_EVENTS = ("os.listdir", "os.scandir", "os.mkdir", "os.rename", "os.remove", "os.putenv", "os.fork")

events: list[tuple[str, tuple[Any, ...]]] | None = None


def _listen(event: str, arguments: tuple[Any, ...]) -> None:
    if events is not None and event.startswith(QUIET_EVENTS) and event not in EXPECTED_OS_EVENTS:
        events.append((event, arguments))


sys.addaudithook(_listen)  # it can never be removed, so it listens only while `nothing_runs`


@pytest.fixture
def nothing_runs(asked: Experiment) -> Iterator[None]:
    """Fails the test if anything is imported, compiled, unpickled by name or started; extension 0xF0 is `os.system`."""
    global events
    asked.log(logged("q", messages=[{1}]))
    assert asked.run().code == 0  # imports what a run imports by itself
    copyreg.add_extension("os", "system", 0xF0)
    with pytest.raises(TypeError):
        pickle.loads(b"\x82\xf0)R.")  # fills the cache into which the standard unpickler looks first
    events = []
    yield
    found, events = events, None
    with pytest.raises(TypeError):
        pickle.loads(b"\x82\xf0)R.")  # is still `os.system`, and no stand-in
    copyreg.remove_extension("os", "system", 0xF0)
    copyreg.clear_extension_cache()
    assert found == []


def log_beside_a_good_entry(experiment: Experiment, *values: bytes) -> None:
    experiment.ask(*[f"hostile {n}" for n in range(len(values))], "good")
    hostile = [(prompt_of(f"hostile {n}"), value) for n, value in enumerate(values)]
    write_store(experiment.metadata, [*hostile, (prompt_of("good"), logged("good"))])


ARGUMENT = b"Vtrue\n"
SYSTEM = b"cos\nsystem\n"
NAMESPACE = b"cargparse\nNamespace\n"
POPEN = b"csubprocess\nPopen\n"
HUGE = struct.pack("<Q", 1 << 60)


@table(
    "attack",
    {
        "GLOBAL and REDUCE": SYSTEM + b"(" + ARGUMENT + b"tR",
        "STACK_GLOBAL with a dotted name": b"\x80\x04Vshutil\nVos.system\n\x93" + ARGUMENT + b"\x85R",
        "INST": b"(" + ARGUMENT + b"ios\nsystem\n",
        "OBJ": b"(" + SYSTEM + ARGUMENT + b"o",
        "NEWOBJ": POPEN + b"(" + ARGUMENT + b"I01\nt\x81",
        "NEWOBJ_EX": b"\x80\x04" + POPEN + b"(" + ARGUMENT + b"t}Vshell\n\x88s\x92",
        "BUILD that sets what BUILD calls": NAMESPACE + b")\x81}V__setstate__\n" + SYSTEM + b"sb" + ARGUMENT + b"b",
        "BUILD on a class": NAMESPACE + b"}V__init__\n" + SYSTEM + b"sb",
        "APPENDS to a made object": SYSTEM + b"(" + ARGUMENT + b"tR(" + ARGUMENT + b"e",
        "SETITEMS on a made object": SYSTEM + b")R(" + ARGUMENT + ARGUMENT + b"u",
        "ADDITEMS on a made object": b"\x80\x04" + SYSTEM + b")R(" + ARGUMENT + b"\x90",
        "EXT1": b"\x82\xf0" + ARGUMENT + b"\x85R",
        "PERSID": b"Pos.system\n",
        "REDUCE of a method": b"cbuiltins\ngetattr\n(" + SYSTEM + b"V__call__\ntR" + ARGUMENT + b"\x85R",
    },
)
def test_a_pickle_that_reaches_for_code_runs_nothing(experiment: Experiment, nothing_runs: None, attack: bytes) -> None:
    in_a_field = b"}(Vresponse\nV fine\nVmessages\n" + attack + b"u."
    log_beside_a_good_entry(experiment, attack + b".", in_a_field)
    result = experiment.run()
    assert result.code == 0
    assert [line["generation"] for line in result.lines] == [" fine", " An answer."]
    assert result.lines[0]["messages"] is None
    assert f"{experiment.qa}:1: corrupted entry, skipped" in result.err


@table(
    "attack",
    {
        "BINBYTES8 of an absurd size": b"\x80\x04\x8e" + HUGE,
        "BINUNICODE8 of an absurd size": b"\x80\x04\x8d" + HUGE,
        "BYTEARRAY8 of an absurd size": b"\x80\x05\x96" + HUGE,
        "FRAME of an absurd size": b"\x80\x04\x95" + b"\xff" * 8,
        "LONG4 of 2 GiB": b"\x8b\xff\xff\xff\x7f1",
        "LONG_BINPUT with a huge index": b"Nr\xff\xff\xff\xff",
        "many MARKs": b"(" * 100_000,
        "many nested lists": b"]" * 100_000 + b"a" * 99_999,
        "many nested tuples": b")" + b"\x85" * 100_000,
        "many DUPs": b"N" + b"2" * 100_000,
        "an INT of many digits": b"I" + b"9" * 100_000 + b"\n",
        "a long line without an end": b"S'" + b"x" * 100_000,
    },
)
def test_a_pickle_made_to_exhaust_costs_its_own_entry_at_most(experiment: Experiment, attack: bytes) -> None:
    log_beside_a_good_entry(experiment, attack + b".")
    result = experiment.run(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (3 << 29, 3 << 29)))
    assert (result.code, [line["prompt"] for line in result.lines]) == (0, ["good"])
    assert "corrupted entry, skipped" in result.err


def test_memory_is_limited_for_the_command_by_itself(experiment: Experiment) -> None:
    """Each PUT makes the unpickler take twice as much memory, and touch it."""
    attack = b"]N" + b"".join(b"r" + struct.pack("<I", n) for n in (2**29, 2**30, 2**31)) + b"a."
    log_beside_a_good_entry(experiment, attack)
    assert [line["prompt"] for line in experiment.run(as_process=True).lines] == ["good"]


@settings(max_examples=50)
@given(value=st.binary(max_size=60), changes=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=4))
def test_no_bytes_in_an_entry_stop_the_run(experiment: Experiment, value: bytes, changes: list) -> None:
    damaged = bytearray(pickle.dumps(logged("hostile 1", messages=[b"no JSON"])))
    for position, byte in changes:
        damaged[position % len(damaged)] = byte
    log_beside_a_good_entry(experiment, value, bytes(damaged))
    result = experiment.run()
    assert (result.code, result.lines[-1]["prompt"]) == (0, "good")
