#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["lmdb>=3.0", "tqdm"]
# ///
"""Rebuild the JSONL of an inference run from its QA file and the activations logger's LMDB.

The logger keeps prompt, response and metadata of each request in LMDB, under the SHA-256 of
the prompt. This script formats each question of the QA file into the prompt that the model
received, looks its hash up, and writes the QA line with the generation added:

    python reconstruct_inference.py --qa_output_path QA --lmdb_path LMDB --output_path OUT

The file reads from top to bottom as the data flows: prompt, QA file, pickles, entries, stores,
output, the explanation when nothing matched, and then the function and the command that join
them.
"""

from __future__ import annotations

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `main` sees to it, Ctrl-C leaves no traceback

import argparse
import collections
import contextlib
import fcntl
import functools
import hashlib
import itertools
import json
import math
import os
import pickle
import re
import shlex
import stat
import string
import struct
import sys
import time

try:
    import lmdb
    from lmdb.verify import VerifyError, _Verifier
except ImportError as error:
    if __name__ != "__main__":
        raise
    raise SystemExit(f"reconstruct_inference.py: error: {error}: it needs lmdb 3.0 or later, and tqdm") from None

TYPE_CHECKING = False  # as in typing, whose import would be a tenth of a small run
if TYPE_CHECKING:
    import pickletools
    from collections.abc import Callable, Iterator, Sequence
    from typing import IO, Any

DEFAULT_PROMPT_TEMPLATE = "user: Answer in one sentence. Q:{prompt}\n A:"

Path = str | os.PathLike[str]
QA = dict[str, "Any"]  # the object of a QA line
Entry = dict[str, "Any"]  # what an entry adds to its QA line, under the names of the output


class ReconstructionError(Exception):
    """Something the user can mend; its text is one plain line (or an explanation) for people."""


class NothingMatched(ReconstructionError):
    """Not one QA line has a readable entry in the store; the text says why, from evidence."""


class MalformedLine(Exception):
    """A QA line that cannot be used; the text is the reason."""


class CorruptedEntry(Exception):
    """A logged entry that cannot be used; the text is the reason."""


class StoreError(ReconstructionError):
    """A store that cannot be read at all; the text is the reason, without the path."""


class Counts:
    """What a run found. `qa_entries` is the sum of the four counts that follow it."""

    qa_entries = 0  # lines of the QA file that are not blank
    matched = 0  # lines written
    without_entry = 0  # questions that no store knows
    malformed = 0  # QA lines skipped
    corrupted = 0  # QA lines whose entry was found but cannot be used
    from_metadata = 0  # of `matched`: read from the metadata store
    from_activations = 0  # of `matched`: read from the activations store
    without_timestamp = 0  # of `from_activations`: lines whose timestamp is null
    metadata_entries: int | None = None  # entries in the store, None where it was not read
    activations_entries: int | None = None

    def __repr__(self) -> str:
        return f"Counts({', '.join(f'{name}={value}' for name, value in vars(self).items())})"


def quoted(text: str, limit: int = 160) -> str:
    """`text` in quotes on one line, control characters escaped, its middle left out when long.

    Everything that comes from a file is shown through here: a terminal obeys raw escapes.
    """
    if len(text) > limit:
        text = f"{text[: limit // 2]} … {text[-limit // 2 :]}"
    return repr(text)


def shown(path: Path) -> str:
    """`path` as typed, or quoted where printing it would break the line."""
    text = os.fspath(path)
    return text if text.isprintable() else repr(text)


class Report:
    """Passes on what is to be said: the first few troubles of a kind in full, the rest counted."""

    IN_FULL = 3

    def __init__(self, say: Callable[[str], None] | None, verbose: bool) -> None:
        self.say: Callable[[str], None] = say or (lambda text: None)
        self.verbose = verbose
        self.troubles: dict[str, int] = {}

    def detail(self, text: str) -> None:
        if self.verbose:
            self.say(text)

    def trouble(self, kind: str, text: str) -> None:
        count = self.troubles[kind] = self.troubles.get(kind, 0) + 1
        if self.verbose or count <= self.IN_FULL:
            self.say(f"{kind}: {text}")

    def say_the_rest(self) -> None:
        rest = [f"{n - self.IN_FULL} × {kind}" for kind, n in self.troubles.items() if n > self.IN_FULL]
        if rest and not self.verbose:
            self.say(f"not shown without --verbose: {', '.join(rest)}")


# --- The prompt: what the model received for a question ------------------------------------


class PromptTemplate:
    """Text in which `{name}` stands for the string field `name` of a QA line.

    `{{` and `}}` are literal braces, as in `str.format`; whatever else `str.format` could do
    (positions, attributes, indexing, conversions, format specifications) is refused.

    Raises:
        ValueError: the template cannot be used; the text says what is wrong with it.
    """

    def __init__(self, template: str) -> None:
        self.head = ""
        self.parts: list[tuple[str, str]] = []  # each a field and the text that follows it
        for literal, name, spec, conversion in string.Formatter().parse(template):
            if self.parts:
                field, text = self.parts[-1]
                self.parts[-1] = field, text + literal
            else:
                self.head += literal
            if name is None:
                continue
            if name == "" or name.isdecimal():
                raise ValueError(f"{{{name}}} is a position; write the name of a QA field, as in {{prompt}}")
            if "." in name or "[" in name:
                raise ValueError(f"{{{name}}} looks inside a field; only whole fields can be used")
            if spec or conversion:
                raise ValueError(f"{{{name}}} has a conversion or format; only the plain {{{name}}} can be used")
            self.parts.append((name, ""))
        if not self.parts:
            raise ValueError("it names no QA field, as {prompt} would, so every prompt would be the same")

    def format(self, qa: QA) -> str:
        """The prompt for one QA line, each field exactly as it stands there.

        Raises:
            MalformedLine: a field that the template names is missing or no string.
        """
        prompt = self.head
        for field, text in self.parts:
            value = qa.get(field)
            if type(value) is not str:
                raise MalformedLine(f"no string in {quoted(field)}")
            prompt += value + text
        return prompt

    def has_shape_of(self, prompt: str) -> bool:
        """Whether a prompt begins and ends as those that the template makes."""
        return prompt.startswith(self.head) and prompt.endswith(self.parts[-1][1])

    def explains(self, prompt: str, qa: QA) -> bool:
        """Whether the template makes that prompt, by its hash, of a QA line."""
        with contextlib.suppress(MalformedLine):
            return self.has_shape_of(prompt) and hash_prompt(self.format(qa)) == hash_prompt(prompt)
        return False

    def fixed_length(self) -> int:
        """How many characters of a prompt come from the template itself."""
        return len(self.head) + sum(len(text) for _, text in self.parts)


def hash_prompt(prompt: str) -> str:
    """The key of a prompt's entry: the lower-case hex SHA-256 of its UTF-8.

    Lone surrogates, which UTF-8 lacks and no model can have received, get a hash all the
    same, so that such a question is simply one without an entry.
    """
    return hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()


# --- The QA file -------------------------------------------------------------------------------

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
JSON_WHITESPACE = b" \t\r\n"
MAX_LINE_BYTES = 1 << 24  # a longer line is no QA line, and shall not be held in memory
TOO_LONG = b"[a line of 16 MiB or more]"

_decode_qa = json.JSONDecoder().raw_decode


def descriptor_of(path: Path) -> int | None:
    """The number of this process's own open file that `path` names (`/dev/stdout`), or None.

    Such a path must not be opened anew: that would start at the beginning of what the shell
    redirected, and `>>` would lose what was there.
    """
    name = re.sub("^/+", "/", os.fspath(path))
    number = re.fullmatch(r"/(?:dev|proc/self|proc/thread-self)/fd/([0-9]{1,9})", name)
    return int(number[1]) if number else {"/dev/stdin": 0, "/dev/stdout": 1, "/dev/stderr": 2}.get(name)


def open_path(path: Path, mode: str) -> IO[bytes]:
    """`open` with a large buffer that also knows `/dev/stdin` and its like."""
    descriptor = descriptor_of(path)
    return open(path if descriptor is None else os.dup(descriptor), mode, buffering=1 << 18)


def qa_lines(qa_file: IO[bytes], path: Path, advance: Callable[[int], object] | None) -> Iterator[tuple[int, bytes]]:
    """Yields the number, from 1, and the bytes of every line that is not blank.

    A byte-order mark at the start is dropped. `advance` is told how many bytes went by.
    """
    told = done = 0
    try:
        for number, line in enumerate(iter(functools.partial(qa_file.readline, MAX_LINE_BYTES), b""), 1):
            if advance:
                done += len(line)
                if done - told > 1 << 18:  # once in a while: the bar costs more than a line
                    advance(done - told)
                    told = done
            if len(line) == MAX_LINE_BYTES:
                while line and not line.endswith(b"\n"):
                    line = qa_file.readline(MAX_LINE_BYTES)
                line = TOO_LONG
            if number == 1:
                line = line.removeprefix(BYTE_ORDER_MARK)
            if line and not line.isspace():
                yield number, line
    except OSError as error:
        raise ReconstructionError(f"cannot read {shown(path)}: {error.strerror}") from error
    if advance:
        advance(done - told)


def parse_qa(line: bytes) -> QA:
    """The object of a QA line.

    Raises:
        MalformedLine: the line is not UTF-8, not JSON or not an object.
    """
    if line is TOO_LONG:
        raise MalformedLine(f"longer than {MAX_LINE_BYTES >> 20} MiB")
    try:
        text = line.strip(JSON_WHITESPACE).decode()
        try:
            qa, end = _decode_qa(text)
        except ValueError as error:
            if isinstance(error, json.JSONDecodeError):
                raise
            # An integer beyond the digits that int() takes, which JSON allows.
            qa, end = json.JSONDecoder(parse_int=lambda digits: INERT).raw_decode(text)
    except UnicodeDecodeError as error:
        raise MalformedLine(f"not UTF-8 at byte {error.start + 1}") from None
    except json.JSONDecodeError as error:
        raise MalformedLine(f"not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise MalformedLine("nested too deeply") from None
    if end != len(text):
        raise MalformedLine(f"not JSON: extra data at column {end + 1}")
    if type(qa) is not dict:
        raise MalformedLine("not a JSON object")
    return qa


# --- Pickles: plain data out, nothing else ------------------------------------------------------
#
# A pickle is a program, and the standard unpickler imports and calls what it names. So a value
# goes to `pickle.loads` only when each of its opcodes is known to make plain data. All others
# go through an interpreter that follows the same stack machine but has nothing it could call.


class FileSlice:
    """Part of a file that can be sliced like bytes and is read only as far as it is sliced."""

    def __init__(self, file: IO[bytes], start: int, size: int) -> None:
        self.file, self.start, self.size = file, start, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, part: slice) -> bytes:
        start, stop, _ = part.indices(self.size)
        self.file.seek(self.start + start)
        return self.file.read(stop - start)


Value = bytes | memoryview | FileSlice

BINUNICODE = ord("X")  # the opcode of a text of 256 bytes or more: four bytes of length, then the text
MAX_PLAIN_BYTES = 1 << 20  # a value beyond this holds activations, or is no honest one
MAX_TEXT_BYTES = 1 << 26
MAX_OPCODES = 1_000_000  # an entry with activations has some hundred


@functools.cache
def _plain_opcodes() -> re.Pattern[bytes]:
    """Matches opcodes that make plain data, in the forms that `pickle.dumps` gives them.

    Left out on purpose, besides all that import or call: LONG_BINPUT and PUT, whose index
    makes the standard unpickler allocate as much as it says, and tuples and frozensets, which
    as keys can take exponential time to hash.
    """
    short_strings = b"|".join(b"\\x%02x.{%d}" % (size, size) for size in range(256))
    return re.compile(
        rb"(?:\x8c(?:" + short_strings + rb")"  # SHORT_BINUNICODE
        rb"[\x94}\](.sauNe\x88\x89]*"  # MEMOIZE, empty containers, MARK, STOP, SETITEM(S), ...
        rb"|[\x94}\](.sauNe\x88\x89]+"  # the same, not behind a string
        rb"|[Khq].|M..|[Jj].{4}"  # BININT1, BINGET, BINPUT, BININT2, BININT, LONG_BINGET
        rb"|[G\x95].{8}|\x80."  # BINFLOAT, FRAME, PROTO
        rb"){1,1000}",
        re.DOTALL,
    )


def is_plain_pickle(data: bytes | memoryview) -> bool:
    """Whether every opcode of a pickle makes plain data, so that `pickle.loads` is safe."""
    match_run = _plain_opcodes().match
    position, end = 0, len(data)
    while run := match_run(data, position):
        position = run.end()
        if position == end:
            return True
        if data[position] == BINUNICODE:
            position += 5 + int.from_bytes(data[position + 1 : position + 5], "little")
    return False


class Inert:
    """Stands in unpickled data for whatever is not plain data."""


INERT = Inert()


class _PickleReader:
    """Just enough of a file over a value for `pickletools` to read opcode arguments from."""

    def __init__(self, value: Value) -> None:
        self.value, self.position = value, 0

    def read(self, size: int) -> bytes:
        if size > MAX_TEXT_BYTES:
            raise CorruptedEntry("it holds a text beyond all measure")
        start = self.position
        return bytes(self.value[start : self.skip(size)])

    def skip(self, size: int) -> int:
        """Moves on by `size` bytes without reading them; returns the new position."""
        if not 0 <= size <= len(self.value) - self.position:
            raise CorruptedEntry("its pickle is cut short")
        self.position += size
        return self.position

    def readline(self) -> bytes:
        size = 64
        while (end := bytes(self.value[self.position : self.position + size]).find(b"\n")) < 0:
            if self.position + size > len(self.value):
                raise CorruptedEntry("its pickle is cut short")
            size *= 16
        return self.read(end + 1)


@functools.cache
def _opcodes() -> dict[bytes, pickletools.OpcodeInfo]:
    import pickletools  # only here: no run over a sound metadata store needs it

    return {opcode.code.encode("latin-1"): opcode for opcode in pickletools.opcodes}


_PUSHED_AS_IS = set(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING"
    " UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8".split()
)
_SIZE_BYTES_OF_BYTES = {"SHORT_BINBYTES": 1, "BINBYTES": 4, "BINBYTES8": 8, "BYTEARRAY8": 8}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY: dict[str, Callable[[], object]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MAKE_INERT_OF = {  # how many items of the stack the opcode would have used up
    "GLOBAL": 0,
    "PERSID": 0,
    "EXT1": 0,
    "EXT2": 0,
    "EXT4": 0,
    "NEXT_BUFFER": 0,
    "EMPTY_SET": 0,
    "BINPERSID": 1,
    "STACK_GLOBAL": 2,
    "REDUCE": 2,
    "NEWOBJ": 2,
    "NEWOBJ_EX": 3,
}


def interpret_pickle(value: Value) -> object:
    """Unpickles without ever importing or calling anything: what is no plain data is `INERT`.

    Sets and bytes count as no plain data, since nothing here could use them; bytes, which is
    what activations are, are skipped and not read. Opcodes and the encoding of their arguments
    come from the standard library's `pickletools`.

    Raises:
        Exception: of any kind where the pickle is broken; hostile bytes can fail in any way.
    """
    opcodes = _opcodes()
    reader = _PickleReader(value)
    memo: dict[int, object] = {}  # a dict: an index of two billion costs no more than one of two
    stack: list[Any] = []
    below: list[list[Any]] = []  # what lies below each MARK

    def pop_to_mark() -> list[Any]:
        nonlocal stack
        items, stack = stack, below.pop()
        return items

    def set_items(target: object, flat: list[Any]) -> None:
        if type(target) is dict:
            for key, item in zip(flat[::2], flat[1::2], strict=True):
                target[key if type(key) is str else INERT] = item

    for _ in range(MAX_OPCODES):
        opcode = opcodes[reader.read(1)]
        name = opcode.name
        if name in _SIZE_BYTES_OF_BYTES:
            reader.skip(int.from_bytes(reader.read(_SIZE_BYTES_OF_BYTES[name]), "little"))
            stack.append(INERT)
            continue
        argument: Any = opcode.arg.reader(reader) if opcode.arg else None  # type: ignore[arg-type]
        if name in _PUSHED_AS_IS:
            stack.append(argument)
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo[argument])
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            memo[argument] = stack[-1]
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name == "MARK":
            below.append(stack)
            stack = []
        elif name in _TUPLES:
            stack[-_TUPLES[name] :] = [tuple(stack[-_TUPLES[name] :])]
        elif name == "TUPLE":
            items = pop_to_mark()
            stack.append(tuple(items))
        elif name == "LIST":
            items = pop_to_mark()
            stack.append(items)
        elif name == "DICT":
            items = pop_to_mark()
            stack.append({})
            set_items(stack[-1], items)
        elif name == "SETITEM":
            items = [stack.pop(-2), stack.pop()]
            set_items(stack[-1], items)
        elif name == "SETITEMS":
            items = pop_to_mark()
            set_items(stack[-1], items)
        elif name in ("APPEND", "APPENDS"):
            items = [stack.pop()] if name == "APPEND" else pop_to_mark()
            if type(stack[-1]) is list:
                stack[-1].extend(items)
        elif name in _MAKE_INERT_OF:
            used = _MAKE_INERT_OF[name]
            del stack[len(stack) - used :]
            stack.append(INERT)
        elif name in ("INST", "OBJ", "FROZENSET"):
            pop_to_mark()
            stack.append(INERT)
        elif name == "ADDITEMS":
            pop_to_mark()
        elif name == "BUILD":
            stack.pop()
        elif name == "DUP":
            stack.append(stack[-1])
        elif name == "POP":
            if stack:
                stack.pop()
            else:
                pop_to_mark()
        elif name == "POP_MARK":
            pop_to_mark()
        elif name == "STOP":
            return stack.pop()
        elif name not in ("PROTO", "FRAME", "READONLY_BUFFER"):
            raise CorruptedEntry(f"its pickle has the unknown opcode {name}")
    raise CorruptedEntry("its pickle does not come to an end")


def load_pickle(value: Value) -> object:
    """The plain data in a pickle, with `INERT` in the place of everything else.

    Raises:
        CorruptedEntry: the pickle is broken.
    """
    try:
        if len(value) <= MAX_PLAIN_BYTES:
            if isinstance(value, FileSlice):
                value = value[:]
            if is_plain_pickle(value):
                return pickle.loads(value)
        return interpret_pickle(value)
    except CorruptedEntry:
        raise
    except Exception as error:
        raise CorruptedEntry(f"cannot be unpickled ({type(error).__name__})") from None


# --- Entries: what the logger kept of one request -----------------------------------------------

ADDED_IF_LOGGED = ("messages", "trim_position")

# Shared parts can make a small pickle stand for endless text. Honest sharing is a string or
# two per message; beyond this many times the value's own size, an entry is a trap.
MAX_EXPANSION = 16

_SCALARS = frozenset({str, int, float, bool, type(None)})


def read_logged(value: Value) -> dict[str, Any]:
    """The fields that the logger kept in a value, of which `response` is sure to be a string.

    The metadata store holds the fields themselves. The activations store of most loggers holds
    `{"data": fields, "metadata": …}`, that of the earliest ones the fields themselves.

    Raises:
        CorruptedEntry: the value cannot be used.
    """
    logged = load_pickle(value)
    if type(logged) is dict and "response" not in logged and "data" in logged:
        logged = logged["data"]
    if type(logged) is not dict:
        raise CorruptedEntry("it is no dict")
    if type(logged.get("response")) is not str:
        raise CorruptedEntry('no string in "response"')
    return logged


def read_entry(value: Value, prompt: str) -> Entry:
    """What the value logged for `prompt` adds to its QA line, with `INERT` for what JSON lacks.

    Raises:
        CorruptedEntry: the value cannot be used, or was logged for another prompt: damage can
            put one entry's value under another's key.
    """
    logged = read_logged(value)
    if logged.get("prompt", prompt) != prompt:
        raise CorruptedEntry('its "prompt" is another one')
    entry: Entry = {
        "generation": logged["response"],
        "model": logged.get("model"),
        "input_length": logged.get("input_length"),
        "timestamp": logged.get("timestamp"),
    }
    for name in ADDED_IF_LOGGED:
        if name in logged:
            entry[name] = logged[name]
    allowance = MAX_EXPANSION * min(len(value), MAX_PLAIN_BYTES)
    for name, field in entry.items():
        if type(field) not in _SCALARS and not _is_plain_json(field, allowance):
            entry[name] = INERT
    return entry


def _is_plain_json(field: object, allowance: int) -> bool:
    """Whether a field is plain JSON data that does not unfold beyond `allowance` characters."""
    containers: list[Any] = [field]
    for item in containers:  # and those inside, appended as they are met
        if type(item) is dict:
            try:
                allowance -= len("".join(item))
            except TypeError:  # a key is no string
                return False
            item = item.values()
        elif type(item) not in (list, tuple):
            return False
        allowance -= len(item)
        if allowance < 0:
            return False
        for part in item:
            if type(part) is str:
                allowance -= len(part)
            elif type(part) not in _SCALARS:
                containers.append(part)
    return allowance >= 0


# --- The stores: where the entries lie -----------------------------------------------------------


def locate_stores(lmdb_path: Path) -> tuple[list[str], str]:
    """The folders where the metadata store may be, the likeliest first, and the activations store's.

    The logger keeps the activations store at P and appends `_metadata` to the text of P for the
    metadata store: it lies beside P, or inside it where P ended in a slash. P may also be the
    metadata store's folder itself, or the `data.mdb` inside a store.
    """
    path = os.fspath(lmdb_path)
    if os.path.basename(path) == "data.mdb" and not os.path.isdir(path):
        path = os.path.dirname(path) or "."
    folder = path.rstrip("/") or "/"
    if os.path.basename(folder) in ("", ".", ".."):
        folder = os.path.abspath(folder)
    beside, inside = folder + "_metadata", os.path.join(folder, "_metadata")
    if folder.endswith("_metadata") and not os.path.isdir(beside) and not os.path.isdir(inside):
        return [folder], os.path.normpath(folder.removesuffix("_metadata"))
    return [inside, beside] if path.endswith("/") else [beside, inside], folder


# What is known here of LMDB's files, from mdb.c and lmdb.verify; all of it little-endian, as on
# the machines that models run on.
#
# A page begins with a header of 16 bytes in files of LMDB 0.9, 24 in those of 1.0; its last six
# are flags, and how far the offsets reach of the page's nodes, which follow the header. A node
# is the data size's low and high half, flags and key size, then key and value; where the flags
# say so, the value is the number of the page where the real one begins, after its header. In a
# branch page the first three make the number of the child page. Pages 0 and 1 are meta pages,
# written in turn: what follows their header is laid out as in META.
PAGE_HEADER_SIZES = (16, 24)
PAGE_SIZES = [1 << power for power in range(8, 17)]
LEAF_PAGE = 0x02
NODE_HEADER = struct.Struct("<4H")
LONG_VALUE = 0x01
HASH_LENGTH = 64
NODE_KEY = re.compile(re.escape(HASH_LENGTH.to_bytes(2, "little")) + rb"([0-9a-f]{64})")
META_MAGIC = 0xBEEFC0DE
META = struct.Struct("<I20xI48xH26xQQQQ")  # as `read_metas` unpacks it
MAX_DEPTH = 32
EMPTY_TREE = (1 << 64) - 1  # in the place of the root page
SCAN_BLOCK = 1 << 16  # bytes: a multiple of every page size, so that no node crosses its end


Meta = collections.namedtuple("Meta", "transaction last_page root entries database_flags page_size header_size")


def read_metas(file: IO[bytes]) -> list[Meta]:
    """What stands in the meta pages that can still be made out, the page at the start first."""
    metas = []
    for start in (0, *PAGE_SIZES):
        for header_size in PAGE_HEADER_SIZES:
            with contextlib.suppress(OSError, struct.error):
                content = FileSlice(file, start + header_size, META.size)[:]
                magic, page_size, flags, entries, root, last_page, transaction = META.unpack(content)
                # The second one is known to lie where the second page begins, and so proves itself.
                if magic == META_MAGIC and page_size in (PAGE_SIZES if start == 0 else [start]):
                    metas.append(Meta(transaction, last_page, root, entries, flags, page_size, header_size))
    return metas


def next_data(file: IO[bytes], position: int) -> int:
    """The first block of the file at or behind `position` that is no hole; where there is none, its end."""
    try:
        position = os.lseek(file.fileno(), position, os.SEEK_DATA)
    except OSError:  # there is no more data
        return os.fstat(file.fileno()).st_size
    return position - position % SCAN_BLOCK


def lock_is_held(path: str) -> bool:
    """Whether a process has the LMDB environment of this lock.mdb open, and so may write.

    LMDB keeps byte 0 of the file locked as long as it does. Where nobody does, the file need
    not be touched; and where it is a link, it must not, since it might lead anywhere.
    """
    if sys.platform != "linux":  # struct flock looks different elsewhere; to lock is always safe
        return os.path.exists(path)
    try:
        status = os.lstat(path)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
            return False
        with open(path, "rb") as file:
            # struct flock: type, whence, start, length, process
            question = struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, 0, 1, 0)
            answer = fcntl.fcntl(file, fcntl.F_GETLK, question)
    except OSError:
        return False
    return bool(struct.unpack("hhqqi", answer)[0] != fcntl.F_UNLCK)


class StrictVerifier(_Verifier):
    """The check of lmdb.verify, which ends at the first fault, and finds more of them.

    `lmdb.verify.verify` passes some shapes that LMDB never writes and that end the process in
    its reading code: pages without nodes, branch pages with one child, pages of bare keys. It
    does not compare the keys of a branch page with those below it, so that a flipped bit there
    hides entries. The methods overridden are those of lmdb 3.0.

    Raises:
        VerifyError: there is a fault.
    """

    def __init__(self, file: IO[bytes], size: int) -> None:
        super().__init__(file, size)  # type: ignore[no-untyped-call]
        self._separators: list[Iterator[bytes | None]] = []  # of the branch pages above

    def err(self, msg: str) -> None:
        raise VerifyError(msg)

    def _walk_page(self, ctx: dict[str, Any], pgno: int, depth: int) -> None:
        separator = next(self._separators[-1]) if self._separators else None
        if separator and not ctx["is_free"]:
            if ctx["last_key"] is not None and ctx["last_key"] >= separator:
                self.err(f"page {pgno} begins below the page before it")
            # As if there had been a key just below: the walk checks that the next one lies above.
            ctx["last_key"] = separator[:-1] + bytes([separator[-1] - 1]) + b"\xff"
        super()._walk_page(ctx, pgno, depth)  # type: ignore[no-untyped-call]

    def _walk_branch(self, ctx: dict[str, Any], pgno: int, buf: bytes, depth: int) -> None:
        count = self._numkeys(self._pg_lower(buf, 0))  # type: ignore[no-untyped-call]
        if count < 2:
            self.err(f"branch page {pgno} has less than two children")
        separators: list[bytes | None] = [None]  # the first child's goes for nothing
        for number in range(1, count):
            node = self._node_off(buf, 0, number)  # type: ignore[no-untyped-call]
            *_, key_size = NODE_HEADER.unpack_from(buf, node)
            separators.append(buf[node + NODE_HEADER.size :][:key_size])
        if b"" in separators:
            self.err(f"branch page {pgno} has an empty key")
        self._separators.append(iter(separators))
        super()._walk_branch(ctx, pgno, buf, depth)  # type: ignore[no-untyped-call]
        self._separators.pop()

    def _walk_leaf(self, ctx: dict[str, Any], pgno: int, buf: bytes) -> None:
        if ctx["is_free"]:
            super()._walk_leaf(ctx, pgno, buf)  # type: ignore[no-untyped-call]
            return
        # All of it anew, as nodes are most of the work, and unpacked at once they take half the time.
        page = f"leaf page {pgno}"
        upper, count = self._check_btree_bounds(buf, 0, self.psize, page)  # type: ignore[no-untyped-call]
        if not count:
            self.err(f"{page} is empty")
        last_key = ctx["last_key"] or b""
        for number, offset in enumerate(struct.unpack_from(f"<{count}H", buf, self.hdrsz)):
            node = self.pagebase + offset
            low, high, flags, key_size = NODE_HEADER.unpack_from(buf, node)
            key_start, size = node + NODE_HEADER.size, low | high << 16
            key = buf[key_start : key_start + key_size]
            if offset < upper or key <= last_key or key_size != HASH_LENGTH:
                self.err(f"{page} has a node out of place or order, or whose key is no hash")
            last_key = key
            value_start = key_start + key_size + (key_size & 1 if self.pagebase else 0)  # LMDB 1.0 aligns it
            if flags == LONG_VALUE:
                self._bigdata(ctx, pgno, number, buf, value_start, size, False)  # type: ignore[no-untyped-call]
            elif flags or value_start + size > self.psize:
                self.err(f"{page} has a node of another kind or over its end")
        ctx["last_key"] = last_key
        ctx["entries"] += count

    def _walk_leaf2(self, ctx: dict[str, Any], pgno: int, buf: bytes) -> None:
        self.err(f"page {pgno} has keys only")


class AlreadyOpen(ReconstructionError):
    """This process has the store open already; LMDB cannot open it a second time."""


class Store:
    """One LMDB store, read in one of three ways.

    Through lmdb where the store proves sound: lmdb maps the file and trusts it, so on a damaged
    one it may end the process by a signal. By salvage where it does not: the file is searched for
    entries, and nothing in it is trusted. And where a logger writes to it and it cannot be locked,
    by following the tree in the file, each time under the meta page that stands at the moment.

    Raises:
        StoreError: there is no store, or nothing in it can be read.
        AlreadyOpen: this process has it open.
    """

    CHECKS = 3  # of a store that changes meanwhile
    VERSIONS = 100  # of an entry that salvage looks at
    READS = 100  # of an entry, where a logger may write over what is being read

    def __init__(self, folder: str, report: Report) -> None:
        self.path = os.path.join(folder, "data.mdb")
        self._folder = folder
        self._report = report
        self._env: lmdb.Environment | None = None
        self._txn: lmdb.Transaction[memoryview] | None = None
        self._locked = False
        self._live = False
        self._next_look = 0.0  # for a writer
        self._nodes: dict[bytes, list[int]] = {}  # where the nodes of a hash lie in the file
        self._page_sizes: Sequence[int] = PAGE_SIZES  # as far as is known
        try:
            # Looked at before it is opened, since opening a pipe would wait for ever.
            if not stat.S_ISREG(os.stat(self.path).st_mode):
                raise StoreError("its data.mdb is no regular file")
            self._file: IO[bytes] = open(self.path, "rb", buffering=0)
        except (FileNotFoundError, NotADirectoryError):
            raise StoreError("no data.mdb in it" if os.path.isdir(folder) else "no such folder") from None
        except OSError as error:
            raise StoreError(f"cannot be read ({error.strerror})") from None
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._close_lmdb()
        self._file.close()

    @property
    def entries(self) -> int:
        """How many entries the store holds; of a salvaged one, how many hashes were found."""
        if self._txn:
            return self._txn.stat()["entries"]
        if self._live:
            return max((meta.entries for meta in read_metas(self._file)), default=0)
        return len(self._nodes)

    def load(self, prompt_hash: str, prompt: str) -> Entry | None:
        """The entry logged for `prompt`, or None where the store has none under its hash.

        Raises:
            CorruptedEntry: there is one, but it cannot be used.
        """
        if self._txn and not self._locked and time.monotonic() > self._next_look:
            self._look_for_a_writer()
        if self._live:
            return self._load_live(prompt_hash, prompt)
        if not self._txn:
            return self._load_newest(prompt_hash, prompt)
        try:
            value = self._txn.get(prompt_hash.encode())
        except lmdb.Error as error:
            self._salvage(error.reason)
            return self.load(prompt_hash, prompt)
        return None if value is None else read_entry(value, prompt)

    def load_older(self, prompt_hash: str, prompt: str) -> Entry | None:
        """A copy of the entry that is still intact on a page which LMDB has given back, or None."""
        if not self._nodes:
            self._scan()
        with contextlib.suppress(CorruptedEntry):
            return self._load_newest(prompt_hash, prompt)
        return None

    def sample_prompts(self) -> Iterator[str]:
        """Yields the prompts of the entries: a random sample, as far as one goes, since hashes order them."""
        if self._txn and self._locked:
            values: Iterator[Value] = self._txn.cursor().iternext(keys=False)
        else:  # the map is used only as `load` does
            values = (value for _, node in self._walk_nodes() for value in self._values_at(node))
        seen = set()  # as old versions turn up, too
        for value in values:
            with contextlib.suppress(CorruptedEntry):
                prompt = read_logged(value).get("prompt")
                if type(prompt) is str and prompt not in seen:
                    seen.add(prompt)
                    yield prompt

    # Through lmdb.

    def _open(self) -> None:
        """Opens the store and checks it, and turns to another way of reading where that fails."""
        changing = False
        try:
            self._open_env(lock=False)  # finds out first whether it is open in this process
            if lock_is_held(os.path.join(self._folder, "lock.mdb")):
                changing = True
                self._close_lmdb()
                self._open_env(lock=True)
                self._locked = True
            for _ in range(self.CHECKS):
                before = self._last_transaction()
                damage = self._find_damage()
                changing = self._last_transaction() != before
                if not damage or not changing:
                    break  # else a commit fell into the check, which may have seen half of it
        except lmdb.Error as error:
            if "already open in this process" in str(error):
                raise AlreadyOpen(f"{shown(self._folder)} is open in this process already; close it first") from None
            damage = error.reason
        if not damage:
            how = "with" if self._locked else "without"
            self._report.detail(f"{shown(self.path)}: sound, read through lmdb {how} a reader lock")
        elif changing:
            self._read_live()
        else:
            self._salvage(damage)

    def _open_env(self, lock: bool) -> None:
        self._env = lmdb.open(self._folder, readonly=True, create=False, lock=lock)
        # Before any check: with the lock, a live logger now recycles none of the pages.
        self._txn = self._env.begin(buffers=True)

    def _last_transaction(self) -> int:
        return self._env.info()["last_txnid"] if self._env else 0

    def _find_damage(self) -> str | None:
        """What is wrong with the file, None where nothing is."""
        size = os.fstat(self._file.fileno()).st_size
        metas = sorted(read_metas(self._file))
        if len(metas) != 2:
            return "a meta page is damaged"
        older, newer = metas
        pages, all_pages = size // newer.page_size, newer.last_page + 1
        if pages < all_pages:
            return f"it is cut short: {pages} of its {all_pages} pages are there"
        # Each commit writes the meta page of the one before last, and pages are never given back.
        in_a_row = newer.transaction - older.transaction == 1 or pages == 2  # which is a new store
        if not in_a_row or older.last_page > newer.last_page:
            return "its meta pages are not those of two commits in a row"
        if newer.database_flags:
            return "its main database is of another kind"
        try:
            StrictVerifier(self._file, size).verify()  # type: ignore[no-untyped-call]
        except Exception as error:  # what else a file made to mislead it may bring about
            return str(error) or type(error).__name__
        return None

    def _look_for_a_writer(self) -> None:
        """Stops trusting the map when a logger has begun to write, since we hold no reader lock.

        LMDB writes over a page in the second commit after the one that freed it, at the earliest.
        To look takes as long as reading an entry, so it is done a thousand times a second at most.
        """
        self._next_look = time.monotonic() + 0.001
        if self._txn and self._last_transaction() > self._txn.id() + 1:
            self._read_live()

    def _close_lmdb(self) -> None:
        if self._txn:
            self._txn.abort()
        if self._env:
            self._env.close()
        self._txn = self._env = None

    # Without a lock, while a logger writes.

    def _read_live(self) -> None:
        """From now on follows the tree in the file itself, since lmdb would trust pages as they change."""
        self._close_lmdb()
        self._live = True
        self._report.say(
            f"{shown(self.path)}: a logger has it open, and it cannot be locked or checked: reading slowly"
        )

    def _load_live(self, prompt_hash: str, prompt: str) -> Entry | None:
        for _ in range(self.READS):
            meta = max(read_metas(self._file), default=None)
            entry = trouble = None
            try:
                if meta and meta.root != EMPTY_TREE:
                    node = self._find_node(meta, prompt_hash.encode())
                    entry = None if node is None else self._read_newest([node], prompt)
            except CorruptedEntry as error:
                trouble = error
            # As long as this meta page is not written over, none of the pages below it is.
            if meta in read_metas(self._file):
                if trouble:
                    raise trouble
                return entry
        raise CorruptedEntry("a logger writes faster than it can be read")

    def _find_node(self, meta: Meta, key: bytes) -> int | None:
        """Follows the tree to the node of `key`; returns the node's offset in the file."""
        page: int = meta.root
        header_size: int = meta.header_size
        page_size: int = meta.page_size
        self._page_sizes = [page_size]
        self._size = os.fstat(self._file.fileno()).st_size
        base = 0 if header_size == PAGE_HEADER_SIZES[0] else header_size  # what offsets count from
        try:
            for _ in range(MAX_DEPTH):
                start = page * page_size
                content = FileSlice(self._file, start, page_size)[:]
                flags, end = struct.unpack_from("<HH", content, header_size - 6)
                for position in range(header_size, base + end, 2):
                    node = base + int.from_bytes(content[position : position + 2], "little")
                    low, middle, high, key_size = NODE_HEADER.unpack_from(content, node)
                    node_key = content[node + NODE_HEADER.size :][:key_size]
                    if flags == LEAF_PAGE and node_key == key:
                        return start + node
                    if flags != LEAF_PAGE and (position == header_size or node_key <= key):
                        page = low | middle << 16 | high << 32
                if flags == LEAF_PAGE:
                    return None
        except (struct.error, OSError, OverflowError) as error:
            raise CorruptedEntry(f"the tree above it is damaged: {error}") from None
        raise CorruptedEntry("the tree above it is too deep")

    # By salvage.

    def _salvage(self, damage: str) -> None:
        """Finds the entries in the file without following its tree."""
        self._close_lmdb()
        self._scan()
        if not self._nodes:
            raise StoreError(f"{damage}; nothing in it looks like an entry")
        self._report.say(f"{shown(self.path)}: {damage}; {len(self._nodes)} entries found by salvage")

    def _scan(self) -> None:
        for prompt_hash, node in self._walk_nodes():
            self._nodes.setdefault(prompt_hash, []).append(node)

    def _walk_nodes(self) -> Iterator[tuple[bytes, int]]:
        """Yields prompt hash and offset of each node in the file whose key is a prompt hash.

        Which pages are in use, and as what, is not asked: old versions of an entry turn up as
        well, and `_read_newest` chooses.
        """
        self._page_sizes = [meta.page_size for meta in read_metas(self._file)[-1:]] or PAGE_SIZES
        self._size = os.fstat(self._file.fileno()).st_size
        start = 0
        while start < self._size:
            with contextlib.suppress(OSError):  # a sector that the disk cannot read costs its own block
                for key in NODE_KEY.finditer(FileSlice(self._file, start, SCAN_BLOCK)[:]):
                    node = key.start() + 2 - NODE_HEADER.size  # the pattern begins with the key's size
                    if node >= 0:
                        yield bytes.fromhex(key[1].decode()), start + node
            start = next_data(self._file, start + SCAN_BLOCK)

    def _load_newest(self, prompt_hash: str, prompt: str) -> Entry | None:
        nodes = self._nodes.get(bytes.fromhex(prompt_hash))
        return self._read_newest(nodes, prompt) if nodes else None

    def _read_newest(self, nodes: list[int], prompt: str) -> Entry:
        """Of the entries at nodes of one hash, the sound one that was logged last."""
        newest: Entry | None = None
        trouble = CorruptedEntry("its value is not in the file")
        seen = set()  # many nodes may name one value, in a file made to keep us busy
        for node in nodes[: self.VERSIONS]:
            for value in self._values_at(node):
                place = value.start, value.size
                if place in seen:
                    continue
                seen.add(place)
                try:
                    entry = read_entry(value, prompt)
                except CorruptedEntry as error:
                    trouble = error
                else:
                    newest = entry if newest is None else max(newest, entry, key=_logged_at)
        if newest is None:
            raise trouble
        return newest

    def _values_at(self, offset: int) -> list[FileSlice]:
        """What may be the value of the node at `offset`: a few places, none trusted."""
        try:
            node = FileSlice(self._file, offset, NODE_HEADER.size + HASH_LENGTH + 8)[:]
            low, high, flags, _ = NODE_HEADER.unpack_from(node)
        except (OSError, struct.error):
            return []
        size = low | high << 16
        if flags & LONG_VALUE:
            page = int.from_bytes(node[-8:], "little")
            starts = [page * page_size + header for page_size in self._page_sizes for header in PAGE_HEADER_SIZES]
        else:
            starts = [offset + NODE_HEADER.size + HASH_LENGTH]
        return [FileSlice(self._file, start, size) for start in starts if start + size <= self._size]


def _logged_at(entry: Entry) -> float:
    timestamp = entry["timestamp"]
    honest = isinstance(timestamp, int | float) and abs(timestamp) < 1e18  # not NaN, nor beyond a float
    return float(timestamp) if honest else -math.inf


class Stores:
    """The metadata store, and behind it the activations store, opened when first needed.

    Raises:
        ReconstructionError: neither can be read; the text names both and what is wrong with each.
    """

    def __init__(self, lmdb_path: Path, report: Report) -> None:
        self._report = report
        folders, self._activations_folder = locate_stores(lmdb_path)
        folder = next((f for f in folders if os.path.exists(os.path.join(f, "data.mdb"))), folders[0])
        self.metadata: Store | None = None
        self._activations: Store | None = None
        self._activations_wanted = not is_same_file(
            os.path.join(folder, "data.mdb"), os.path.join(self._activations_folder, "data.mdb")
        )
        try:
            self.metadata = Store(folder, report)
        except StoreError as reason:
            try:
                self._activations = Store(self._activations_folder, report)
            except StoreError as other_reason:
                raise ReconstructionError(
                    f"no store can be read: {shown(folder)}: {reason}; "
                    f"{shown(self._activations_folder)}: {other_reason}"
                ) from None
            report.say(f"no metadata store {shown(folder)}: {reason}; reading the activations store instead")

    @property
    def activations(self) -> Store | None:
        """The activations store, None where there is none that can be read."""
        if self._activations_wanted and not self._activations:
            self._activations_wanted = False
            try:
                self._activations = Store(self._activations_folder, self._report)
            except StoreError as reason:
                is_there = os.path.lexists(os.path.join(self._activations_folder, "data.mdb"))
                say = self._report.say if is_there else self._report.detail
                say(f"no activations store {shown(self._activations_folder)}: {reason}")
        return self._activations

    def find(self, prompt_hash: str, prompt: str) -> tuple[Entry, Store] | None:
        """The entry logged for `prompt` and the store that has it, None where neither has.

        Raises:
            CorruptedEntry: there is one, but no store has it in a state that can be used.
        """
        trouble: CorruptedEntry | None = None
        try:
            if self.metadata and (entry := self.metadata.load(prompt_hash, prompt)):
                return entry, self.metadata
        except CorruptedEntry as error:
            trouble = error
        try:
            if self.activations and (entry := self.activations.load(prompt_hash, prompt)):
                return entry, self.activations
        except CorruptedEntry as error:
            trouble = trouble or error
        if trouble and self.metadata and (entry := self.metadata.load_older(prompt_hash, prompt)):
            return entry, self.metadata
        if trouble:
            raise trouble
        return None

    def count_entries(self, counts: Counts) -> None:
        """Fills in how many entries each store holds that was opened."""
        if self.metadata:
            counts.metadata_entries = self.metadata.entries
        if self._activations:
            counts.activations_entries = self._activations.entries

    def sample_prompts(self) -> Iterator[str]:
        """Yields the prompts of the first store that has any."""
        for store in (self.metadata, self.activations):
            if store:
                found = False
                for prompt in store.sample_prompts():
                    found = True
                    yield prompt
                if found:
                    return

    def close(self) -> None:
        for store in (self.metadata, self._activations):
            if store:
                store.close()


# --- The output: each QA line with its generation ------------------------------------------------


# Circles are ruled out by `_is_plain_json`.
_encoder = json.JSONEncoder(ensure_ascii=False, allow_nan=False, check_circular=False)


def _make_encode() -> Callable[[object], str]:
    """`_encoder.encode`, without making json's C encoder anew on each call, which saves a fifth of its time."""
    make_encoder = getattr(json.encoder, "c_make_encoder", None)
    if make_encoder is None:
        return _encoder.encode
    basestring = json.encoder.encode_basestring
    encode = make_encoder(None, _encoder.default, basestring, None, ": ", ", ", False, False, False)
    return lambda value: "".join(encode(value, 0))


_encode = _make_encode()


def merge(line: bytes, qa: QA, entry: Entry) -> tuple[bytes, list[str]]:
    """The output line, and the names of added fields that had to be null for being no JSON data.

    It is the QA object's own text with the entry's fields added at its end. Only where the QA
    object has a field of the same name is it encoded anew, the added value in that name's place.

    Raises:
        MalformedLine: it must be encoded anew, and Python cannot.
    """
    unusable: list[str] = []
    try:
        added = _encode(entry)
    except (TypeError, ValueError, RecursionError):
        unusable = [name for name, value in entry.items() if not _can_be_encoded(value)]
        entry = {**entry, **dict.fromkeys(unusable)}
        added = _encode(entry)
    if entry.keys().isdisjoint(qa):
        return line[: line.rindex(b"}")] + b", " + to_utf8(added[1:]) + b"\n", unusable
    try:
        merged = json.dumps({**qa, **entry}, ensure_ascii=False)
    except (TypeError, RecursionError) as error:
        raise MalformedLine(f"cannot be encoded anew: {error}") from None
    return to_utf8(merged) + b"\n", unusable


def _can_be_encoded(value: object) -> bool:
    try:
        _encode(value)
    except (TypeError, ValueError, RecursionError):  # INERT; NaN, endless digits; deep nesting
        return False
    return True


def to_utf8(json_text: str) -> bytes:
    """UTF-8, except for what it cannot hold, lone surrogates: backslashreplace spells them as JSON does."""
    return json_text.encode("utf-8", "backslashreplace")


def is_same_file(one: Path, other: Path) -> bool:
    """Whether two paths, which need not exist, are one file, be it through links."""
    with contextlib.suppress(OSError):
        if os.path.samefile(one, other):
            return True
    return os.path.realpath(one) == os.path.realpath(other)


def refuse_to_overwrite_inputs(output_path: Path, inputs: Sequence[Path]) -> None:
    """Does nothing, unless the output is one of the inputs under whatever name or link.

    Raises:
        ReconstructionError: it is.
    """
    for path in inputs:
        is_no_file = os.path.exists(path) and not os.path.isfile(path)  # a terminal may be both ends
        if is_same_file(output_path, path) and not is_no_file:
            raise ReconstructionError(
                f"the output {shown(output_path)} is an input, {shown(path)}: nothing was touched"
            )


@contextlib.contextmanager
def open_output(path: Path) -> Iterator[IO[bytes]]:
    """The file to write the output to; it appears at `path` when the block ends without an error.

    Until then, and after an error, an output that was there stays as it was. Pipes and devices
    are written straight.

    Raises:
        ReconstructionError: it cannot be written.
    """
    try:
        if os.path.isdir(path) or not os.path.basename(path):
            raise IsADirectoryError(None, "it is a folder")
        straight = descriptor_of(path) is not None
        with contextlib.suppress(FileNotFoundError):
            straight = straight or not stat.S_ISREG(os.stat(path).st_mode)
        if straight:
            with open_path(path, "wb") as file:
                yield file
            return
        target = os.path.realpath(path)  # of a symbolic link, what it points to is replaced
        folder = os.path.dirname(target)
        os.makedirs(folder, exist_ok=True)
        temporary = os.path.join(folder, f".reconstruct-{os.urandom(8).hex()}.tmp")
        try:
            with open_path(temporary, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError as error:
        raise ReconstructionError(f"cannot write {shown(path)}: {error.strerror}") from error
    _flush_folder(folder)


def _flush_folder(folder: str) -> None:
    """Has the disk keep the folder's new entry; not every file system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# --- Nothing matched: why, and what would match --------------------------------------------------


class Evidence:
    """What is kept of both sides while no line has matched, to explain it at the end.

    The store's side is a sample of its prompts, so few that a text can be looked for in all of
    them at once. The QA side is, for each of them, the lines that share the longest texts with it.
    """

    PENDING_LINES = 1000  # kept before the store is sampled: most runs match sooner
    PENDING_BYTES = 1 << 20
    CHARACTERS = 1 << 16  # of the sample, where the QA file is longer than that
    SEARCHES = 1 << 30  # characters of a shorter one's values times those of the sample
    PROMPTS = 20_000  # in any sample
    LINES = 3  # kept for each prompt
    FIELDS = 8  # of a line, that may stand in a template
    SOURCES = 200  # prompts that templates are made of
    TEMPLATES = 50  # that are tried on all prompts
    SUBSTANTIAL = 16  # characters: a shorter text may stand in a prompt by chance

    def __init__(self, stores: Stores) -> None:
        self._stores = stores
        self._pending: list[QA] = []
        self._pending_bytes = 0
        self._seen: set[int] = set()
        self.first_prompt: str | None = None
        self.prompts: list[str] = []
        self._all_prompts = ""
        self._lines: list[list[tuple[int, QA]]] = []  # for each prompt: the length shared, the line

    def add(self, qa: QA, size: int, prompt: str | None) -> None:
        """Takes a QA line of `size` bytes that has no entry, and its prompt where it makes one."""
        if self.first_prompt is None:
            self.first_prompt = prompt
        self._pending.append({name: value for name, value in qa.items() if type(value) is str and value.strip()})
        self._pending_bytes += size
        if len(self._pending) >= self.PENDING_LINES or self._pending_bytes >= self.PENDING_BYTES:
            self._search(self.CHARACTERS)

    def finish(self) -> None:
        """Takes in what is pending; a short QA file is worth a large sample, to meet it at all."""
        values = sum(map(len, self._pending))
        self._search(max(self.CHARACTERS, min(self.SEARCHES // (values + 1), 4 << 20)))

    def _search(self, characters: int) -> None:
        if not self.prompts:
            for prompt in itertools.islice(self._stores.sample_prompts(), self.PROMPTS):
                characters -= len(prompt)
                if characters < 0 and self.prompts:
                    break
                self.prompts.append(prompt)
            self._all_prompts = "\0".join(self.prompts)
            self._lines = [[] for _ in self.prompts]
        for qa in self._pending:
            for value in qa.values():
                if hash(value) in self._seen or value not in self._all_prompts:
                    continue
                if len(self._seen) < 100_000:  # a text that many lines share is looked for once
                    self._seen.add(hash(value))
                for prompt, lines in zip(self.prompts, self._lines):
                    if value in prompt and (len(lines) < self.LINES or len(value) > lines[-1][0]):
                        lines.append((len(value), qa))
                        lines.sort(key=lambda line: -line[0])
                        del lines[self.LINES :]
        self._pending, self._pending_bytes = [], 0

    def find_template(self) -> tuple[str, int] | None:
        """The template that explains most of the sampled prompts, and how many it explains.

        Explained is a prompt whose hash is that of a QA line formatted by the template. None
        where no template explains any, or only what chance would.
        """
        met = [(prompt, [qa for _, qa in lines]) for prompt, lines in zip(self.prompts, self._lines) if lines]
        made: collections.Counter[str] = collections.Counter()  # the right one is made of most prompts
        longest: dict[str, int] = {}  # the longest field value that each came from
        for prompt, qas in met[: self.SOURCES]:
            for text, length in dict(candidate for qa in qas for candidate in candidate_templates(prompt, qa)).items():
                made[text] += 1
                longest[text] = max(length, longest.get(text, 0))
        best: tuple[int, int, int] = 0, 0, 0
        found = None
        for text in sorted(made, key=lambda text: (made[text], longest[text]), reverse=True)[: self.TEMPLATES]:
            template, length = PromptTemplate(text), longest[text]
            explained = sum(any(template.explains(prompt, qa) for qa in qas) for prompt, qas in met)
            rank = explained, length, -len(template.parts)
            if rank > best and self._is_convincing(template, length, explained):
                best, found = rank, (text, explained)
        return found

    def _is_convincing(self, template: PromptTemplate, length: int, explained: int) -> bool:
        """Whether chance would hardly explain so many prompts by a field value of that length."""
        alike = sum(map(template.has_shape_of, self.prompts))
        if length < self.SUBSTANTIAL:
            return 2 * explained >= alike and (explained > 1 or length >= template.fixed_length())
        return explained > 1 or 2 * alike >= len(self.prompts)


def candidate_templates(prompt: str, qa: QA) -> Iterator[tuple[str, int]]:
    """Templates that would make `prompt` of a QA line, each with the longest field value in it.

    One field at a time, in all places where its value stands or in the last one only, then the
    longest values together.
    """
    contained = sorted(
        ((name, value) for name, value in qa.items() if value in prompt and _can_be_named(name)),
        key=lambda field: -len(field[1]),
    )[: Evidence.FIELDS]
    for name, value in contained:
        yield _template_of(_split_out([prompt], name, value)), len(value)
        before, _, after = prompt.rpartition(value)
        yield _template_of([before, (name,), after]), len(value)
    pieces: list[str | tuple[str]] = [prompt]
    for name, value in contained:
        pieces = _split_out(pieces, name, value)
        yield _template_of(pieces), len(contained[0][1])


def _can_be_named(field: str) -> bool:
    try:
        return PromptTemplate(f"{{{field}}}").parts == [(field, "")]
    except ValueError:
        return False


def _split_out(pieces: Sequence[str | tuple[str]], name: str, value: str) -> list[str | tuple[str]]:
    """`pieces`, in which a field is a 1-tuple, with each `value` in the text made the field `name`."""
    split: list[str | tuple[str]] = []
    for piece in pieces:
        if isinstance(piece, str):
            for text in piece.split(value):
                split += [text, (name,)]
            split.pop()
        else:
            split.append(piece)
    return split


def _template_of(pieces: Sequence[str | tuple[str]]) -> str:
    return "".join(
        piece.replace("{", "{{").replace("}", "}}") if isinstance(piece, str) else f"{{{piece[0]}}}" for piece in pieces
    )


def template_option(template: str) -> str:
    """The command-line option for a template, quoted for bash.

    Where it holds what a terminal would obey, as $'...' in which that is spelled out.
    """
    typed = template.replace("\\", "\\\\").replace("\n", "\\n")
    word = shlex.quote(typed) if typed.isprintable() else f"$'{''.join(map(_spelled_for_bash, typed))}'"
    return f"--prompt_template{'=' if typed.startswith('-') else ' '}{word}"


def _spelled_for_bash(character: str) -> str:
    if character in "\\'":
        return "\\" + character
    if character.isprintable():
        return character
    return "".join(f"\\x{byte:02x}" for byte in character.encode("utf-8", "surrogatepass"))


def explain_no_match(counts: Counts, evidence: Evidence) -> str:
    """Why nothing matched, in a few lines, with the template that would match where one is found."""
    if counts.corrupted:
        return f"nothing matched: {counts.corrupted} QA entries were logged, but none of their entries can be used"
    evidence.finish()
    if not evidence.prompts:
        entries = (counts.metadata_entries or 0) + (counts.activations_entries or 0)
        return f"nothing matched: {'no entry in the store can be used' if entries else 'the store is empty'}"
    found = evidence.find_template()
    if not found and not evidence.first_prompt:
        return "nothing matched: the QA file has no usable line"
    lines = [f"nothing matched: no prompt that the template makes of {counts.qa_entries} QA entries is in the store"]
    if evidence.first_prompt:
        lines.append(f"  tried, first:  {quoted(evidence.first_prompt)}")
    else:
        lines.append("  tried:         nothing, since no QA line has the fields that the template names")
    lines.append(f"  in the store:  {quoted(min(evidence.prompts, key=hash_prompt))}")
    if found:
        template, explained = found
        lines.append(
            f"  Of {len(evidence.prompts)} prompts sampled from the store, {explained} follow another template."
        )
        lines.append("  Run the same command again with")
        lines.append(f"    {template_option(template)}")
    else:
        lines.append(
            f"  No QA text makes any of the {len(evidence.prompts)} prompts sampled from the store:"
            " it seems to be of another experiment."
        )
    return "\n".join(lines)


# --- The run -------------------------------------------------------------------------------------


def reconstruct_inference(
    qa_output_path: Path,
    lmdb_path: Path,
    output_path: Path,
    *,
    prompt_template: str = DEFAULT_PROMPT_TEMPLATE,
    verbose: bool = False,
    progress: bool = False,
    report: Callable[[str], None] | None = None,
) -> Counts:
    """Joins a QA file with the logger's LMDB and writes the merged JSONL.

    Args:
        qa_output_path: the QA JSONL, or a pipe that carries it.
        lmdb_path: the path that the logger was given; see `locate_stores`.
        output_path: where the merged JSONL goes; see `open_output`.
        prompt_template: how a prompt is made of a QA line; see `PromptTemplate`.
        verbose: report each QA line and all troubles, not only the first few.
        progress: show a tqdm bar on standard error.
        report: called with each line of text there is to say; without it, nothing is said.

    Returns:
        What was read, matched and skipped.

    Raises:
        ValueError: the template cannot be used.
        NothingMatched: no line was written; an existing output is untouched.
        ReconstructionError: the paths cannot be used as they are.
    """
    template = PromptTemplate(prompt_template)
    folders, activations_folder = locate_stores(lmdb_path)
    store_files = [os.path.join(f, name) for f in (*folders, activations_folder) for name in ("data.mdb", "lock.mdb")]
    refuse_to_overwrite_inputs(output_path, [qa_output_path, *store_files])
    counts = Counts()
    reporter = Report(report, verbose)
    with contextlib.ExitStack() as stack:
        try:
            qa_file = stack.enter_context(open_path(qa_output_path, "rb"))
        except OSError as error:
            raise ReconstructionError(f"cannot read {shown(qa_output_path)}: {error.strerror}") from error
        stores = stack.enter_context(contextlib.closing(Stores(lmdb_path, reporter)))
        output = stack.enter_context(open_output(output_path))
        advance = _show_progress(qa_file, stack) if progress else None
        evidence: Evidence | None = Evidence(stores)
        for number, line in qa_lines(qa_file, qa_output_path, advance):
            counts.qa_entries += 1
            qa = prompt = None
            try:
                qa = parse_qa(line)
                prompt = template.format(qa)
                prompt_hash = hash_prompt(prompt)
                found = stores.find(prompt_hash, prompt)
                if found:
                    entry, store = found
                    merged, unusable = merge(line, qa, entry)
            except MalformedLine as reason:
                counts.malformed += 1
                reporter.trouble("malformed QA line", f"line {number}: {reason}")
            except CorruptedEntry as reason:
                counts.corrupted += 1
                reporter.trouble("corrupted entry", f"line {number}: {prompt_hash}: {reason}")
            else:
                if found:
                    output.write(merged)
                    counts.matched += 1
                    if store is stores.metadata:
                        counts.from_metadata += 1
                    else:
                        counts.from_activations += 1
                        counts.without_timestamp += entry["timestamp"] is None
                    if unusable:
                        reporter.trouble("no JSON data", f"line {number}: null instead: {', '.join(unusable)}")
                    if verbose:
                        reporter.say(f"line {number}: {prompt_hash}: matched")
                    evidence = None
                    continue
                counts.without_entry += 1
                if verbose:
                    reporter.say(f"line {number}: {prompt_hash}: no entry: {quoted(prompt)}")
            if evidence and qa:
                evidence.add(qa, len(line), prompt)
        reporter.say_the_rest()
        stores.count_entries(counts)
        if evidence:
            raise NothingMatched(explain_no_match(counts, evidence))
    if counts.without_timestamp:
        reporter.say(f"no timestamp in {counts.without_timestamp} entries of the activations store: null instead")
    return counts


def _show_progress(qa_file: IO[bytes], stack: contextlib.ExitStack) -> Callable[[int], object]:
    from tqdm import tqdm  # only here: it takes longer to import than a small run takes

    status = os.fstat(qa_file.fileno())
    total = status.st_size if stat.S_ISREG(status.st_mode) else None
    bar = stack.enter_context(tqdm(total=total, unit="B", unit_scale=True, file=sys.stderr))
    update: Callable[[int], object] = bar.update
    return update


# --- The command ---------------------------------------------------------------------------------


class Stopped(BaseException):
    """SIGINT or SIGTERM came; the argument is its number."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code, which the README explains."""
    parser = argparse.ArgumentParser(
        prog="reconstruct_inference.py",
        description="Rebuild an inference JSONL from the QA file and the activations logger's LMDB.",
        allow_abbrev=False,
    )
    parser.add_argument("--qa_output_path", required=True, metavar="QA", help="the QA file: JSONL, one question a line")
    parser.add_argument("--lmdb_path", required=True, metavar="LMDB", help="the path that the logger was given")
    parser.add_argument("--output_path", required=True, metavar="OUT", help="the merged JSONL to write")
    parser.add_argument(
        "--prompt_template",
        type=_template_argument,
        default=DEFAULT_PROMPT_TEMPLATE,
        metavar="TEMPLATE",
        help="how the prompt is made: {name} is that field of the QA line, \\n a line break, \\\\ a backslash"
        " (default: 'user: Answer in one sentence. Q:{prompt}\\n A:')",
    )
    parser.add_argument(
        "--verbose", action="store_true", help="say of each QA line whether it matched, and all troubles"
    )
    arguments = parser.parse_args(argv)
    try:
        with _signals_raise():
            counts = reconstruct_inference(
                **vars(arguments), progress=sys.stderr is not None and sys.stderr.isatty(), report=_say
            )
    except Stopped as stop:
        return 128 + int(stop.args[0])
    except (ReconstructionError, ImportError, MemoryError) as error:
        _say(f"{parser.prog}: error: {str(error) or 'out of memory'}")
        return 1
    _say(summarize(counts, arguments.output_path))
    return 0


def _template_argument(typed: str) -> str:
    """The template that was typed, where `\\n` means a line break and `\\\\` a backslash."""
    template = re.sub(r"\\([n\\])", lambda escape: "\n" if escape[1] == "n" else "\\", typed)
    try:
        PromptTemplate(template)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{quoted(typed)} cannot be used: {error}") from None
    return template


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
    """Has Ctrl-C and SIGTERM end the block by an exception, so that it cleans up behind itself."""

    def stop(number: int, frame: object) -> None:
        for each in before:
            signal.signal(each, signal.SIG_IGN)  # a second one must not break the cleaning up
        raise Stopped(number)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number in before:
            signal.signal(number, stop)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _say(text: str) -> None:
    """Prints to standard error, above the progress bar where there is one."""
    with contextlib.suppress(OSError):  # whoever read it is gone, and the work goes on
        if "tqdm" in sys.modules:
            sys.modules["tqdm"].tqdm.write(text, file=sys.stderr)
        elif sys.stderr:  # None where it was closed, and print would turn to standard output
            print(text, file=sys.stderr)


def summarize(counts: Counts, output_path: Path) -> str:
    """The run in a few lines for people; the four counts below the first add up to it."""
    rows = [
        ("QA entries read", counts.qa_entries),
        ("  matched", counts.matched),
        ("  without an entry", counts.without_entry),
        ("  malformed, skipped", counts.malformed),
        ("  entry corrupted, skipped", counts.corrupted),
    ]
    if counts.metadata_entries is not None:
        rows.append(("activation entries in the metadata store", counts.metadata_entries))
        rows.append(("  matched from there", counts.from_metadata))
    if counts.activations_entries is not None:
        rows.append(("activation entries in the activations store", counts.activations_entries))
        rows.append(("  matched from there", counts.from_activations))
    width = max(len(label) for label, _ in rows) + 1
    digits = max(len(str(number)) for _, number in rows)
    lines = [f"{label + ':':{width}} {number:{digits}}" for label, number in rows]
    return "\n".join([*lines, f"output: {shown(output_path)}"])


if __name__ == "__main__":
    raise SystemExit(main())
