"""No pickle makes the command run anything, crash, or spend more than its own entry."""

from __future__ import annotations

import os
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

ARGUMENT, MKDIR, RUN = b"Vtrapped\n", b"cos\nmkdir\n", b"ctrap\nrun\n"
OBJECT = RUN + b"(" + ARGUMENT + b"tR"
HUGE = struct.pack("<Q", 1 << 60)
FIELDS = ["model", "input_length", "timestamp", "messages", "trim_position"]
each_place = pytest.mark.parametrize("place", ["metadata", "activations", "damaged store"])


def log_beside_a_good_entry(experiment: Experiment, place: str, *values: bytes) -> None:
    """Logs values for the questions `hostile 0`, `hostile 1`, …, and a good entry after them."""
    experiment.ask(*[f"hostile {n}" for n in range(len(values))], "good")
    hostile = [(prompt_of(f"hostile {n}"), value) for n, value in enumerate(values)]
    write_store(experiment.metadata, [*hostile, (prompt_of("good"), logged("good"))])
    if place == "damaged store":
        with (experiment.metadata / "data.mdb").open("r+b") as file:
            file.write(bytes(8192))


def entry_with(place: str, name: str, field: bytes) -> bytes:
    """The pickle of an entry of `hostile 0`, in which one field is given as opcodes. That of activations is long."""
    fields: dict[str, Any] = {"prompt": prompt_of("hostile 0"), "response": " fine", "model": "a-model"}
    fields |= {"activations": [b"x" * 70_000] if place == "activations" else [], name: None}
    opcodes = {name: pickle.dumps(value, 3)[2:-1] for name, value in fields.items()} | {name: field}
    return b"\x80\x03}(" + b"".join(pickle.dumps(name, 3)[2:-1] + value for name, value in opcodes.items()) + b"u."


@pytest.fixture
def trap(experiment: Experiment, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails the test if the module `trap` is imported, or `os.mkdir` called."""
    (experiment.folder / "trap.py").touch()
    monkeypatch.syspath_prepend(experiment.folder)
    monkeypatch.chdir(experiment.folder)
    yield
    assert "trap" not in sys.modules
    assert not os.path.exists("trapped")


@each_place
@table(
    "attack, is_decoded",
    {
        "GLOBAL and REDUCE": (OBJECT, True),
        "STACK_GLOBAL with a dotted name": (b"Vtrap\nVos.mkdir\n\x93" + ARGUMENT + b"\x85R", True),
        "INST": (b"(" + ARGUMENT + b"ios\nmkdir\n", True),
        "NEWOBJ_EX": (RUN + ARGUMENT + b"\x85}Vmode\nK\x07s\x92", True),
        "BUILD that sets what BUILD calls": (RUN + b")\x81}V__setstate__\n" + MKDIR + b"sb" + ARGUMENT + b"b", True),
        "APPEND to a made object": (OBJECT + ARGUMENT + b"a", True),
        "SETITEMS on a made object": (OBJECT + b"(" + ARGUMENT + ARGUMENT + b"u", True),
        "ADDITEMS on a made object": (OBJECT + b"(" + ARGUMENT + b"\x90", True),
        "REDUCE of a made object": (OBJECT + ARGUMENT + b"\x85R", True),
        "an extension code": (b"\x82\xf0" + ARGUMENT + b"\x85R", False),
        "a persistent id": (b"Pos.mkdir\n", False),
        "a list that holds itself": (b"]q\x01h\x01a", True),
    },
)
def test_a_pickle_runs_nothing(experiment: Experiment, trap: None, place: str, attack: bytes, is_decoded: bool) -> None:
    log_beside_a_good_entry(experiment, place, entry_with(place, "messages", attack), b"\x80\x03" + attack + b".")
    result = experiment.run()
    assert result.generations() == [" fine"] * is_decoded + [" An answer."]
    assert not is_decoded or (result.lines[0]["model"], result.lines[0]["messages"]) == ("a-model", None)


@each_place
@pytest.mark.parametrize("name", [*FIELDS, "other", "prompt", "response"])
def test_an_object_costs_only_its_field_or_an_entry_that_needs_it(experiment: Any, place: str, name: str) -> None:
    log_beside_a_good_entry(experiment, place, entry_with(place, name, b"(" + OBJECT + b"K\x01l"))
    result = experiment.run()
    assert result.generations() == [" fine"] * (name not in ("prompt", "response")) + [" An answer."]
    assert result.lines[0].get(name) is None or len(result.lines) == 1
    assert [f"`{name}`" in warning for warning in result.warnings() if "JSON" in warning] == [True] * (name in FIELDS)
    assert ("model: (no name)" in result.err) == (name == "model")


@each_place
def test_pickles_made_to_exhaust_cost_their_own_entries_at_most(experiment: Experiment, place: str) -> None:
    attacks = {
        "BINBYTES8 of an absurd size": b"\x8e" + HUGE,
        "LONG4 of 2 GiB": b"\x8b\xff\xff\xff\x7f1",
        "LONG_BINPUT with a huge index": b"Nr\xff\xff\xff\xff",
        "PUTs that double the memory": b"N" + b"".join(b"r" + struct.pack("<I", 1 << n) for n in (29, 30, 31)),
        "many MARKs": b"(" * 100_000,
        "many nested lists": b"]" * 100_000 + b"a" * 99_999 + b"0" * 9,
        "a long line without an end": b"S'" + b"x" * 100_000,
    }
    attacks |= {f"BYTEARRAY8 of {n}": b"\x96" + struct.pack("<Q", n) for n in range(1 << 62, (1 << 62) + 20)}
    filling = b"x" * 70_000 * (place == "activations")
    log_beside_a_good_entry(experiment, place, *[b"\x80\x03}" + attack + b"." + filling for attack in attacks.values()])
    # The limit is higher than the command's own.
    result = experiment.run_process(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (8 << 30,) * 2))
    assert result.generations() == [" An answer."]
    assert result.counts().get("corrupted", 0) == len(attacks) * (place != "damaged store")


def test_long_values_are_not_read_into_memory(experiment: Experiment) -> None:
    """There is memory for what the unpickler makes, `bytes` or `bytearray`, but not for a copy of the value."""
    experiment.ask("q", "w")
    long = [logged("q", activations=bytes(60_000_000)), logged("w", activations=bytearray(60_000_000))]
    write_store(experiment.lmdb, [(e["prompt"], pickle.dumps({"data": e}, 5)) for e in long], sync=False)
    result = experiment.run_process(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (10**8,) * 2))
    assert (len(result.lines), len(result.warnings())) == (2, 1)


@settings(max_examples=25)
@given(value=st.binary(max_size=60), changes=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=4))
def test_no_bytes_in_an_entry_stop_the_run(experiment: Experiment, value: bytes, changes: Any) -> None:
    damaged = bytearray(pickle.dumps(logged("hostile 1", messages=[b"no JSON"])))
    for position, byte in changes:
        damaged[position % len(damaged)] = byte
    for place in ("metadata", "damaged store"):
        log_beside_a_good_entry(experiment, place, value, bytes(damaged), b"{" + value)
        assert experiment.run().lines[-1]["prompt"] == "good"
