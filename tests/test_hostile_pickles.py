"""No pickle makes the command run anything, crash, or spend more than its own entry."""

from __future__ import annotations

import copyreg
import pickle
import resource
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Experiment, logged, prompt_of, read_lines, write_store
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

QUIET_EVENTS = ("import", "exec", "compile", "pickle.", "os.", "subprocess.", "shutil.", "socket.", "ctypes.", "code.")
EXPECTED_OS_EVENTS = ("os.listdir", "os.scandir", "os.mkdir", "os.rename", "os.remove", "os.putenv")

events: list[tuple[str, tuple[Any, ...]]] | None = None


def _listen(event: str, arguments: tuple[Any, ...]) -> None:
    if events is not None and event.startswith(QUIET_EVENTS) and event not in EXPECTED_OS_EVENTS:
        events.append((event, arguments))


sys.addaudithook(_listen)  # it can never be removed, so it listens only while `nothing_runs`


@pytest.fixture
def nothing_runs(experiment: Experiment) -> Iterator[None]:
    """Fails the test if anything is imported, compiled, unpickled by name or started in it."""
    global events
    experiment.ask("warm")
    write_store(experiment.metadata, [(prompt_of("warm"), logged("warm", messages=[{1}]))])
    assert experiment.run().code == 0  # imports what a run imports by itself
    (experiment.metadata / "data.mdb").unlink()
    events = []
    try:
        yield
        assert events == []
    finally:
        events = None


def text(string: str) -> bytes:
    return b"X" + struct.pack("<I", len(string.encode())) + string.encode()


TOUCH = "touch {marker}"
ARGUMENT = text(TOUCH)
SYSTEM = b"cos\nsystem\n"
NAMESPACE = b"cargparse\nNamespace\n"
POPEN = b"csubprocess\nPopen\n"

REACHING_FOR_CODE = {
    "GLOBAL and REDUCE": SYSTEM + b"(" + ARGUMENT + b"tR",
    "STACK_GLOBAL and REDUCE": b"\x80\x04" + text("os") + text("system") + b"\x93" + ARGUMENT + b"\x85R",
    "STACK_GLOBAL with a dotted name": b"\x80\x04"
    + text("pathlib")
    + text("os.system")
    + b"\x93"
    + ARGUMENT
    + b"\x85R",
    "INST": b"(" + ARGUMENT + b"ios\nsystem\n",
    "OBJ": b"(" + SYSTEM + ARGUMENT + b"o",
    "NEWOBJ": POPEN + b"(" + ARGUMENT + b"I01\nt\x81",
    "NEWOBJ_EX": b"\x80\x04" + POPEN + b"(" + ARGUMENT + b"t}" + text("shell") + b"\x88s\x92",
    "BUILD that sets what BUILD calls": b"cargparse\nNamespace\n)\x81}"
    + text("__setstate__")
    + SYSTEM
    + b"sb"
    + ARGUMENT
    + b"b",
    "BUILD on a class": b"cargparse\nNamespace\n}" + text("__init__") + SYSTEM + b"sb",
    "APPENDS to a made object": SYSTEM + b"(" + ARGUMENT + b"tR(" + ARGUMENT + b"e",
    "SETITEMS on a made object": SYSTEM + b")R(" + ARGUMENT + ARGUMENT + b"u",
    "ADDITEMS on a made object": b"\x80\x04" + SYSTEM + b")R(" + ARGUMENT + b"\x90",
    "EXT1": b"\x82\xf0" + ARGUMENT + b"\x85R",
    "EXT2": b"\x83\xf0\x00" + ARGUMENT + b"\x85R",
    "EXT4": b"\x84\xf0\x00\x00\x00" + ARGUMENT + b"\x85R",
    "PERSID": b"Pos.system\n",
    "BINPERSID": ARGUMENT + b"Q",
    "NEXT_BUFFER": b"\x80\x05\x97",
    "READONLY_BUFFER": b"\x80\x05\x97\x98",
    "builtins.eval": b"cbuiltins\neval\n(" + text("open({marker!r}, 'w')") + b"tR",
    "REDUCE of a method": b"cbuiltins\ngetattr\n(" + SYSTEM + text("__call__") + b"tR" + ARGUMENT + b"\x85R",
}


@pytest.mark.parametrize("as_a_field", [False, True], ids=["as the whole entry", "as a field of an entry"])
@pytest.mark.parametrize("attack", REACHING_FOR_CODE.values(), ids=REACHING_FOR_CODE)
def test_a_pickle_that_reaches_for_code_runs_nothing(
    experiment: Experiment, tmp_path: Path, nothing_runs: None, attack: bytes, as_a_field: bool
) -> None:
    marker = tmp_path / "it ran"
    attack = attack.replace(ARGUMENT, text(TOUCH.format(marker=marker)))
    copyreg.add_extension("os", "system", 0xF0)
    try:
        global events
        paused, events = events, None
        with pytest.raises(TypeError):
            pickle.loads(b"\x82\xf0)R.")  # fills the cache that the standard unpickler looks into first
        events = paused
        if as_a_field:
            attack = b"}(" + text("response") + text(" fine") + text("messages") + attack + b"u"
        experiment.ask("q", "good")
        write_store(experiment.metadata, [(prompt_of("q"), attack + b"."), (prompt_of("good"), logged("good"))])
        result = experiment.run()
    finally:
        copyreg.remove_extension("os", "system", 0xF0)
        copyreg.clear_extension_cache()
    assert result.code == 0
    assert not marker.exists()
    if as_a_field:
        assert [line["generation"] for line in result.lines] == [" fine", " An answer."]
        assert result.lines[0]["messages"] is None
    else:
        assert [line["generation"] for line in result.lines] == [" An answer."]
        assert "corrupted entry: line 1" in result.err


def sharing(depth: int) -> list[Any]:
    part: list[Any] = []
    for _ in range(depth):
        part = [part, part]
    return part


def nested(depth: int) -> bytes:
    return b"]" * depth + b"a" * (depth - 1)


def exponential_hash(depth: int) -> bytes:
    """A dict whose key, a tuple of shared tuples, takes 2**depth steps to hash."""
    return b"}" + b")" + b"2\x86" * depth + b"Ns"


EXHAUSTING = {
    "BINBYTES8 of an absurd size": b"\x80\x04\x8e" + b"\xff" * 7 + b"\x3f" + b"x",
    "BINUNICODE8 of an absurd size": b"\x80\x04\x8d" + b"\xff" * 7 + b"\x3f" + b"x",
    "BYTEARRAY8 of an absurd size": b"\x80\x05\x96" + b"\xff" * 7 + b"\x3f" + b"x",
    "BYTEARRAY8 of 64 GiB": b"\x80\x05\x96" + struct.pack("<Q", 1 << 36) + b"x",
    "BINUNICODE of 4 GiB": b"X\xff\xff\xff\xffx",
    "FRAME of an absurd size": b"\x80\x04\x95" + b"\xff" * 8,
    "LONG4 of 2 GiB": b"\x8b\xff\xff\xff\x7f1",
    "LONG4 of a negative size": b"\x8b\xff\xff\xff\xff1",
    "LONG_BINPUT with a huge index": b"Nr\xff\xff\xff\xff",
    "PUT with a huge index": b"Np1000000000000000000\n",
    "PUT with a large index": b"Np2000000000\n",
    "GET of what is not there": b"h\x07",
    "a million MARKs": b"(" * 1_000_000,
    "a million nested lists": nested(1_000_000),
    "half a million nested lists in a field": b"}" + text("messages") + nested(400_000) + b"s",
    "half a million nested tuples": b")" + b"\x85" * 500_000,
    "two million DUPs": b"N" + b"2" * 2_000_000,
    "two million POPs": b"0" * 2_000_000,
    "a key with an exponential hash": exponential_hash(60),
    "an exponential hash in a set": b"\x80\x04\x8f(" + b")" + b"2\x86" * 60 + b"\x90",
    "an INT of a million digits": b"I" + b"9" * 1_000_000 + b"\n",
    "a line without an end": b"S'" + b"x" * 1_000_000,
    "an unknown opcode": b"\xff",
    "no end": b"N",
}


def start_limited(experiment: Experiment) -> tuple[int, str]:
    """Runs the command with 1.5 GiB of address space, of which the store's map takes some."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (3 << 29, 3 << 29))

    with experiment.start(preexec_fn=limit) as process:
        _, err = process.communicate(timeout=120)
    assert b"Traceback" not in err
    return process.returncode, err.decode()


@pytest.mark.parametrize("attack", EXHAUSTING.values(), ids=EXHAUSTING)
def test_a_pickle_made_to_exhaust_costs_its_own_entry_at_most(experiment: Experiment, attack: bytes) -> None:
    experiment.ask("q", "good")
    write_store(experiment.metadata, [(prompt_of("q"), attack + b"."), (prompt_of("good"), logged("good"))])
    code, err = start_limited(experiment)
    assert code == 0, err
    assert read_lines(experiment.output)[-1]["prompt"] == "good"


@pytest.mark.parametrize("memoize", [b"r\xff\xff\xff\xff", b"p4000000000\n"], ids=["LONG_BINPUT", "PUT"])
def test_a_huge_memo_index_costs_nothing_at_all(experiment: Experiment, memoize: bytes) -> None:
    experiment.ask("q")
    entry = b"}(" + text("response") + memoize + text(" fine") + b"u."
    write_store(experiment.metadata, [(prompt_of("q"), b"\x80\x02" + entry)])
    code, err = start_limited(experiment)
    assert code == 0, err
    assert read_lines(experiment.output)[0]["generation"] == " fine"


def circle() -> list[Any]:
    items: list[Any] = []
    items.append(items)
    return items


@pytest.mark.parametrize(
    "messages",
    [
        pytest.param(sharing(60), id="lists that unfold to 2**60"),
        pytest.param({"a": [{"b": sharing(40)}]}, id="deep inside"),
        pytest.param(["x" * 100_000] * 50_000, id="5 GB of one shared string"),
        pytest.param([{"k" * 100_000: 1}] * 50_000, id="5 GB of one shared key"),
        pytest.param(circle(), id="a list that holds itself"),
    ],
)
def test_a_field_that_unfolds_without_end_is_null(experiment: Experiment, messages: Any) -> None:
    experiment.ask("q")
    experiment.log(logged("q", messages=messages))
    code, err = start_limited(experiment)
    assert code == 0, err
    line = read_lines(experiment.output)[0]
    assert (line["generation"], line["messages"]) == (" An answer.", None)


def test_honest_sharing_comes_out_whole(experiment: Experiment) -> None:
    system = {"role": "system", "content": "be brief " * 50}
    messages = [system, {"role": "user", "content": "q"}] * 8
    experiment.ask("q")
    experiment.log(logged("q", messages=messages))
    assert experiment.run().lines[0]["messages"] == messages


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda parts: (
        st.lists(parts, max_size=3)
        | st.tuples(parts, parts)
        | st.dictionaries(st.text(), parts, max_size=3)
        | st.sets(st.integers(), max_size=2).map(frozenset)
    ),
    max_leaves=8,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=100)
@given(response=st.text(), other=PLAIN, protocol=st.integers(0, pickle.HIGHEST_PROTOCOL))
def test_plain_data_comes_out_whatever_the_protocol_and_company(
    experiment: Experiment, response: str, other: Any, protocol: int
) -> None:
    entry = logged("q", response, logging_config=other, messages=[{"role": "user", "content": response}])
    experiment.ask("q")
    (experiment.metadata / "data.mdb").unlink(missing_ok=True)
    write_store(experiment.metadata, [(prompt_of("q"), pickle.dumps(entry, protocol))])
    line = experiment.run().lines[0]
    for name in ("model", "input_length", "timestamp", "messages"):
        assert line[name] == entry[name]
    assert line["generation"] == response


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=200)
@given(value=st.binary(max_size=60), changes=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=4))
def test_no_bytes_in_an_entry_stop_the_run(experiment: Experiment, value: bytes, changes: list) -> None:
    damaged = bytearray(pickle.dumps(logged("q", messages=[b"no JSON"])))
    for position, byte in changes:
        damaged[position % len(damaged)] = byte
    experiment.ask("q", "w", "good")
    (experiment.metadata / "data.mdb").unlink(missing_ok=True)
    values = [(prompt_of("q"), value), (prompt_of("w"), bytes(damaged)), (prompt_of("good"), logged("good"))]
    write_store(experiment.metadata, values)
    result = experiment.run()
    assert result.code == 0
    assert result.lines[-1]["prompt"] == "good"
