#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["lmdb>=1.4.1", "tqdm>=4.65"]
# ///
"""Rebuild the JSONL of an inference run from its QA file and the activations logger's LMDB.

The logger keeps each request as an entry in LMDB, under the SHA-256 of its prompt. This script makes the prompt of
each QA line, looks its hash up, and writes the QA line with the generation added. It reads as the data flows.
"""

from __future__ import annotations

import sys

if __name__ == "__main__" and not getattr(sys.flags, "safe_path", sys.flags.isolated):
    del sys.path[0]  # the script's own folder, where a `types.py` would be taken for Python's

import argparse
import collections
import contextlib
import copyreg
import hashlib
import importlib.util
import io
import itertools
import json
import logging
import os
import pickle
import re
import resource
import shlex
import signal
import string
import threading
import types
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

if __name__ == "__main__":
    if sys.version_info < (3, 10):  # noqa: UP036
        sys.exit(f"error: this needs Python 3.10 or later, which `uv run {sys.argv[0]}` brings along")
    if not all(map(importlib.util.find_spec, ("lmdb", "tqdm"))):
        sys.exit(f"error: this needs lmdb and tqdm: {sys.executable} -m pip install 'lmdb>=1.4.1' 'tqdm>=4.65'")

import lmdb

__version__ = "2.0.0"

# As servers log a prompt up to February 2026, and after, where a single message has no role.
DEFAULT_PROMPT_TEMPLATE = "user: Answer in one sentence. Q:{prompt}\n A:"
DEFAULT_PROMPT_TEMPLATES = (DEFAULT_PROMPT_TEMPLATE, DEFAULT_PROMPT_TEMPLATE.removeprefix("user: "))

QA = dict[str, Any]  # the object of a QA line
Entry = dict[str, Any]  # what an entry adds to its QA line, under the names of the output

log = logging.getLogger("reconstruct_inference")


class ReconstructionError(Exception):
    """Something that the user can mend, in plain words; `hint` says how in those of the command."""

    def __init__(self, text: str, hint: str = "") -> None:
        super().__init__(text)
        self.hint = hint


class NothingMatched(ReconstructionError):
    """Not one QA line has a usable entry; the text says why, from evidence."""


class MalformedLine(Exception):
    """A QA line cannot be used; the text is the reason."""


class CorruptedEntry(Exception):
    """An entry cannot be used; the text is the reason."""


class Counts(types.SimpleNamespace):
    """What a run found; `qa_lines` is the sum of the four counts that follow it."""

    def __init__(self) -> None:
        self.qa_lines = 0  # lines of the QA file that are not blank
        self.matched = 0  # lines written
        self.without_entry = 0  # QA lines that no store knows
        self.malformed = 0  # QA lines skipped
        self.corrupted = 0  # QA lines whose entry was found but cannot be used
        self.from_metadata = 0  # of `matched`: read from the metadata store
        self.from_activations = 0  # of `matched`: read from the activations store
        self.without_timestamp = 0  # of `from_activations`: lines whose timestamp is null
        self.metadata_entries: int | None = None  # in the store, None where it was not read
        self.activations_entries: int | None = None
        self.models: dict[str, int] = {}  # lines written, by the model that answered


def quoted(text: str, limit: int = 160) -> str:
    """A text in quotes on one line, control characters escaped, its middle left out when long."""
    return repr(text if len(text) <= limit else f"{text[: limit // 2]} … {text[-limit // 2 :]}")


def listed(names: Iterable[str], limit: int = 8) -> str:
    """The first few of some names, as they stand in a sentence."""
    names = [f"`{name}`" for name in names]
    return ", ".join(names[:limit] + ["…"] * (len(names) > limit))


def counted(number: int, one: str, many: str = "") -> str:
    """`1 line`, `2,000 lines`; of another plural than with an s, that is given."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


# --- QA lines and prompts: what was asked, and what the model received -------------------------------

BUFFER_SIZE = 1 << 18  # bytes
JSON_WHITESPACE = " \t\r\n"
FIELD_NAME = re.compile(r"(?!\d+$)[^{}.\[!:]+")  # that can stand in a template's braces
_decode_json = json.JSONDecoder().raw_decode
_new_hash = hashlib.sha256().copy  # quicker than a hash made anew, for which OpenSSL looks its algorithm up


def refuse_other_formats(head: bytes, path: str) -> None:
    """Raises a ReconstructionError where the beginning of a QA file is one of another format."""
    first, _, rest = head.lstrip().partition(b"\n")
    goes_on = rest.strip() and not rest.lstrip().startswith(b"{")  # and not as JSON Lines would
    name, other, hint = shlex.quote(path), "", ""
    if not head:
        other = "is empty"
    elif head.startswith(b"\x1f\x8b"):
        other, hint = "is compressed with gzip", f"--qa_output_path <(zcat {name})"
    elif head.startswith((b"\xff\xfe", b"\xfe\xff")) or head[:4].count(b"\0") == 2:
        other, hint = "is in UTF-16", f"--qa_output_path <(iconv -f UTF-16 -t UTF-8 {name})"
    elif b"\0" in head:
        other = "is no text file"
    elif first.startswith(b"[") or (first.startswith(b"{") and goes_on and not first.rstrip().endswith(b"}")):
        other, hint = "is one JSON document, and no JSON Lines", "write one JSON object a line"
    elif goes_on and not first.startswith(b"{") and (b"," in first or path.endswith(".csv")):
        code = "import sys, pandas; pandas.read_csv(sys.argv[1]).to_json(sys.argv[2], orient='records', lines=True)"
        other, hint = "looks like CSV, and no JSON Lines", f'python3 -c "{code}" {name} {name}.jsonl'
    if other:
        raise ReconstructionError(f"{path} {other}", hint)


def read_qa_lines(path: str, progress: bool) -> Iterator[tuple[int, bytes]]:
    """Yields number and bytes of each line that is not blank; a ReconstructionError if the file cannot be read."""
    try:
        with io.BufferedReader(io.FileIO(path), BUFFER_SIZE) as qa_file:
            if qa_file.peek().startswith(b"\xef\xbb\xbf"):
                qa_file.read(3)  # a byte order mark
            refuse_other_formats(qa_file.peek(), path)
            lines: Iterable[bytes] = qa_file
            if progress:
                from tqdm import tqdm  # only here: it takes longer to import than a small run takes

                lines = tqdm(qa_file, unit=" lines", leave=False)
            for number, line in enumerate(lines, 1):
                if not line.isspace():
                    yield number, line
    except OSError as error:
        raise ReconstructionError(f"cannot read {path}: {error.strerror}") from error


def parse_qa(line: bytes) -> QA:
    """The object of a QA line; a MalformedLine if it is not UTF-8, not JSON or not an object."""
    try:
        text = line.decode().lstrip(JSON_WHITESPACE)
        qa, end = _decode_json(text)
        if text[end:].strip(JSON_WHITESPACE):
            raise ValueError(f"extra data at column {end + 1}")
    except (ValueError, RecursionError) as error:
        raise MalformedLine(f"not JSON in UTF-8: {error}") from None
    if type(qa) is not dict:
        raise MalformedLine("not a JSON object")
    return qa


class PromptTemplate:
    """Text in which `{name}` stands for the text in that field of a QA line; a ValueError where it cannot be used."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.parts: list[tuple[str, str]] = []  # each a text and the field that follows it
        self.tail = ""
        for literal, name, spec, conversion in string.Formatter().parse(text):
            self.tail += literal
            if name is not None:
                if not FIELD_NAME.fullmatch(name) or spec or conversion:
                    raise ValueError("only the plain name of a field can stand in braces, as in {prompt}")
                self.parts.append((self.tail, name))
                self.tail = ""
        if not self.parts:
            raise ValueError("it names no QA field, as {prompt} would, so every prompt would be the same")
        self.own_length = len(self.tail) + sum(len(text) for text, _ in self.parts)  # in characters

    def make_prompt(self, qa: QA) -> str:
        """The prompt for one QA line, empty where a field that the template names is missing or holds no text."""
        try:
            prompt = ""
            for text, field in self.parts:
                prompt += text + qa[field]
            return prompt + self.tail
        except (KeyError, TypeError):
            return ""

    def option(self) -> str:
        """The command-line option; what a terminal would obey in it is spelled out in bash's $'…'."""
        typed = self.text.replace("\\", "\\\\").replace("\n", "\\n")
        word = shlex.quote(typed)
        if not typed.isprintable():
            spelled = re.sub(r"[\\']|[^ -~]", lambda c: "".join(f"\\x{byte:02x}" for byte in c[0].encode()), typed)
            word = f"$'{spelled}'"
        return f"--prompt_template {word}"


def key_of(prompt: str) -> bytes:
    """The key under which the logger keeps a prompt: the lower-case hex SHA-256 of its UTF-8."""
    # No model can have received lone surrogates, which UTF-8 lacks: they get a key that no entry has.
    prompt_hash = _new_hash()
    prompt_hash.update(prompt.encode("utf-8", "surrogatepass"))
    return prompt_hash.hexdigest().encode()


# --- Entries: what the logger kept of a request -----------------------------------------------------
# A value is a pickle, and a pickle is a program: it names what the unpickler shall import and call. So
# whatever it names is replaced by a stand-in that can be called and filled and does nothing.


class Inert:
    """Stands in unpickled data for whatever is not plain data."""

    def __init__(self, *arguments: object, **named: object) -> None:
        pass

    def ignore(self, *arguments: object) -> Inert:
        return self

    __call__ = __setitem__ = __setstate__ = append = extend = add = ignore


class InertUnpickler(pickle.Unpickler):
    """Unpickles without importing or calling anything that the pickle names."""

    def find_class(self, *names: Any) -> Any:
        return Inert

    persistent_load = find_class


class LongValue(io.RawIOBase):
    """A value as a file to unpickle from, whose bytes objects, as activations are, are skipped unread."""

    def __init__(self, read_at: Callable[[int, int], bytes], position: int = 0) -> None:
        self._read_at = read_at  # gives as many bytes from a position on as asked for, or all there are
        self._position = position

    def read(self, size: int = -1) -> bytes:
        data = self._read_at(self._position, size)
        self._position += len(data)
        return data

    def readinto(self, buffer: Any) -> int:
        """What the unpickler calls for the content of bytes objects, and for nothing else."""
        self._position += len(buffer)
        return len(buffer)


def read_entry(value: io.BytesIO | LongValue) -> tuple[object, Entry]:
    """The prompt that a value was logged for, None where it has none, and what it adds to a QA line.

    The metadata store holds the logged fields themselves, the activations store `{"data": fields, "metadata": …}`
    or, of the earliest loggers, the fields themselves. What cannot be used is a CorruptedEntry.
    """
    try:
        logged = InertUnpickler(value).load()
    except Exception as error:  # hostile bytes can fail in any way
        raise CorruptedEntry(f"cannot be unpickled ({type(error).__name__})") from None
    if type(logged) is dict and "response" not in logged:
        logged = logged.get("data")
    if type(logged) is not dict or type(logged.get("response")) is not str:
        raise CorruptedEntry("no text in `response`")
    entry = {
        "generation": logged["response"],
        "model": logged.get("model"),
        "input_length": logged.get("input_length"),
        "timestamp": logged.get("timestamp"),
    }
    for name in ("messages", "trim_position"):
        if name in logged:
            entry[name] = logged[name]
    return logged.get("prompt"), entry


def newest_entry(versions: Iterable[io.BytesIO | LongValue], prompt: str) -> Entry | None:
    """The newest usable version of a prompt's entry, None where there is none; a CorruptedEntry if none is usable."""
    newest: Entry | None = None
    newest_at = 0.0  # seconds; the activations store does not know
    trouble: CorruptedEntry | None = None
    for value in versions:
        try:
            logged_prompt, entry = read_entry(value)
            if logged_prompt != prompt and logged_prompt is not None:
                raise CorruptedEntry("its `prompt` is another one")  # damage put it under another's key
            logged_at = entry["timestamp"] if type(entry["timestamp"]) is float else 0.0
            if newest is None or logged_at > newest_at:
                newest, newest_at = entry, logged_at
        except CorruptedEntry as error:
            trouble = error
    if trouble and newest is None:
        raise trouble
    return newest


# --- The stores: where the entries lie --------------------------------------------------------------
# lmdb maps a file and trusts it: on a damaged one it may end the process, or miss entries. So a
# child process rehearses the reading first, and where that fails, the file is searched instead.

SHORT_VALUE = 1 << 16  # bytes; a longer value holds activations
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
READ_ONLY: dict[str, Any] = {"readonly": True, "create": False, "map_size": 0}  # 0: the logger's own, it grows


def locate_stores(path: str) -> tuple[str, str]:
    """The folders of the metadata store and of the activations store, whether they exist or not.

    The logger keeps the activations store at P and appends `_metadata` to the text of P for the metadata store: it
    lies beside P, or inside it where P ended in a slash. P may also be the metadata store's folder, or a `data.mdb`.
    """
    if os.path.basename(path) == "data.mdb" and not os.path.isdir(path):
        path = os.path.dirname(path) or "."
    folder = path.rstrip("/") if path.strip("./") else os.path.abspath(path)  # `.` has no name to append to
    places = [f"{folder}_metadata", f"{folder}/_metadata"]
    if folder.endswith("_metadata") and not any(map(os.path.isdir, places)):
        return folder, os.path.normpath(folder.removesuffix("_metadata"))
    if path.endswith("/"):
        places.reverse()
    return next(filter(os.path.isdir, places), places[0]), folder


def is_same_file(one: str, other: str) -> bool:
    """Whether two paths, which need not exist, are one file, be it through links."""
    with contextlib.suppress(OSError):
        return os.path.samefile(one, other)
    return os.path.realpath(one) == os.path.realpath(other)


def look_everything_up(scan: Any, lookup: Any, expected: int) -> tuple[int, int]:
    """The numbers of entries, each found by its own key to its value's last byte, and of keys `<hash>_<request id>`."""
    entries = samples = met = 0
    for key in itertools.islice(scan.cursor().iternext(values=False), expected + 1):  # trees can go in circles
        met += 1
        if len(key) == 64:
            if key.translate(None, b"0123456789abcdef"):
                raise ValueError("no hash")
            lookup.get(key, b"")[-1]  # an IndexError where there is no value
            entries += 1
        elif key[64:65] == b"_":
            samples += 1
    if met != expected:
        raise ValueError("not all there")
    return entries, samples


def rehearse(folder: str, lock: bool, more_than: int) -> list[int]:
    """The number of keys that a store claims and, if more than asked for, what is found: as far as a child gets."""
    reading, writing = os.pipe()
    # A signal that came before the child's `try` would have it do what this process does.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # other threads do not matter to this child
        child = os.fork()
    if child == 0:
        try:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # where lmdb speaks as it dies
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            opened = lmdb.open(folder, lock=lock, **READ_ONLY)
            with opened as store, store.begin() as scan, store.begin(buffers=True) as lookup:
                expected = scan.stat()["entries"]
                os.write(writing, b"%d " % expected)
                if expected > more_than:  # by a function: a signal in a loop here makes Python 3.13 forget the `with`
                    os.write(writing, b"%d %d" % look_everything_up(scan, lookup, expected))
        finally:
            os._exit(0)
    try:
        os.close(writing)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        with open(reading) as pipe:
            return [int(number) for number in pipe.read().split()]
    except BaseException:
        # It raises in the child, which closes the store: one left open blocks pages of a live logger for ever.
        os.kill(child, signal.SIGINT)
        raise
    finally:
        os.waitpid(child, 0)


class LmdbStore:
    """A store that is read through lmdb, after a rehearsal that went well."""

    def __init__(self, folder: str, lock: bool, entries: int, stack: contextlib.ExitStack) -> None:
        self.folder, self.is_locked, self.entries = folder, lock, entries
        self.written = os.stat(f"{folder}/data.mdb").st_mtime_ns
        self._environment = stack.enter_context(lmdb.open(folder, lock=lock, **READ_ONLY))
        self.keys_in_all = self._environment.stat()["entries"]  # of whatever kind
        # Without a lock, a logger may write over what a transaction sees: each look-up has its own.
        self._snapshot = stack.enter_context(self._environment.begin(buffers=True)) if lock else None

    def keys(self) -> Iterator[bytes]:
        with self._environment.begin() as transaction:
            yield from (key for key in transaction.cursor().iternext(values=False) if len(key) == 64)

    def values(self, key: bytes) -> Iterable[io.BytesIO | LongValue]:
        value = (self._snapshot or self._environment.begin(buffers=True)).get(key)
        if value is None:
            return ()
        if len(value) <= SHORT_VALUE:
            return (io.BytesIO(value),)
        return (LongValue(lambda position, size: bytes(value[position : position + size])),)


# What is known here of LMDB's files, from mdb.c: a node is its value's size in four bytes, flags and key size in two
# each, key and value. Where the flags say so, the value is the number of the page where the real one lies, behind a
# header that begins with that number.
NODE_KEY = re.compile(rb"\x40\x00([0-9a-f]{64})")  # behind its size, 64
LONG_VALUE = 0x01
PAGE_HEADER_SIZES = (16, 24)  # bytes, in files of LMDB 0.9 and of 1.0
SEARCH_BLOCK = 1 << 16  # bytes: the largest page size and a multiple of all, so that no node crosses its end


class SalvagedStore:
    """A store whose file is searched for entries, also of older versions, without trust in its structure."""

    is_locked = False
    keys_in_all = -1  # nobody knows how many there were

    def __init__(self, folder: str, stack: contextlib.ExitStack) -> None:
        self.folder = folder
        self._file = os.open(f"{folder}/data.mdb", os.O_RDONLY)
        stack.callback(os.close, self._file)
        self.written = os.fstat(self._file).st_mtime_ns
        self._places: dict[bytes, list[int]] = {}  # where a key stands in the file
        for start in range(0, os.fstat(self._file).st_size, SEARCH_BLOCK):
            for match in NODE_KEY.finditer(self._read(start, SEARCH_BLOCK)):
                self._places.setdefault(match[1], []).append(start + match.start(1))
        self.entries = len(self._places)

    def keys(self) -> Iterator[bytes]:
        return iter(sorted(self._places))

    def values(self, key: bytes) -> Iterable[io.BytesIO | LongValue]:
        """What may be versions of a key's value: places in the file, none of them trusted."""
        for place in self._places.get(key, ()):
            starts = [place + 64]
            if int.from_bytes(self._read(place - 4, 2), "little") & LONG_VALUE:
                number = self._read(starts[0], 8)
                pages = [int.from_bytes(number, "little") << power for power in range(8, 17)]  # by the possible sizes
                starts = [page + size for page in pages if self._read(page, 8) == number for size in PAGE_HEADER_SIZES]
            for start in starts or [sys.maxsize]:  # the entry is there, and its value is nowhere
                yield LongValue(self._read, start)

    def _read(self, start: int, size: int) -> bytes:
        """Bytes of the file, none where the disk cannot read them, where a map would end the process."""
        try:
            return os.pread(self._file, size, start)
        except (OSError, OverflowError):
            return b""


def open_store(folder: str, more_than: int, stack: contextlib.ExitStack) -> LmdbStore | SalvagedStore | None:
    """Opens a store of more keys than a number, through lmdb where a rehearsal goes well, else by salvage.

    None where it has no more, a ReconstructionError where there is no store.
    """
    file, lock_file = f"{folder}/data.mdb", f"{folder}/lock.mdb"
    if os.path.isfile(folder):
        raise ReconstructionError(f"{folder} is a file, where a folder with a `data.mdb` is wanted")
    if not os.path.isdir(folder):
        raise ReconstructionError(f"{folder}: no such folder")
    if not os.path.lexists(file):
        raise ReconstructionError(f"{folder} has no `data.mdb`, but {listed(sorted(os.listdir(folder))) or 'nothing'}")
    if not os.access(file, os.R_OK) or not os.path.isfile(file) or not os.path.getsize(file):
        raise ReconstructionError(f"{file} is empty, or cannot be read")
    # Through a symbolic or hard link, lmdb would write to what it leads to.
    can_lock = os.path.isfile(lock_file) and not os.path.islink(lock_file) and os.stat(lock_file).st_nlink == 1
    claimed = -1
    for lock in (can_lock, False):  # the lock may fail, or without one a logger's commit fall into the rehearsal
        keys, *kinds = rehearse(folder, lock, more_than) or [-1]
        claimed = max(claimed, keys)
        if kinds:
            entries, samples = kinds
            if keys and not entries and not samples:
                raise ReconstructionError(f"the keys of {folder} are no prompt hashes: it is an LMDB of something else")
            if samples:
                log.warning("%s: %s of prompts asked several times, not read", folder, counted(samples, "sample"))
            with contextlib.suppress(lmdb.Error):
                return LmdbStore(folder, lock, entries, stack)
    if more_than >= 0 and claimed <= more_than:  # also where it is too damaged to tell
        return None
    log.warning("%s is damaged, or not for this lmdb: its file is searched for entries", folder)
    store = SalvagedStore(folder, stack)
    log.warning("%s: %s recovered", folder, counted(store.entries, "entry", "entries"))
    return store


class EntryFinder:
    """Finds entries in the metadata store, and what that lacks in the activations store.

    A ReconstructionError where no store can be read, or this process has one open already.
    """

    def __init__(self, folders: tuple[str, str], stack: contextlib.ExitStack) -> None:
        self.folders = folders
        self.stores: list[LmdbStore | SalvagedStore] = []
        self._stack = stack
        self._spare_folder = ""  # of an activations store that can only help with corrupted entries
        files = [f"{folder}/data.mdb" for folder in self.folders]
        for file in files:
            if any(is_same_file(f"/dev/fd/{number}", file) for number in os.listdir("/dev/fd")):
                raise ReconstructionError(f"{file} is open in this process already; close it there first")
        troubles: dict[str, str] = {}
        for folder in self.folders:
            if self.stores and not os.path.exists(files[1]):
                break
            # The activations store can be huge and far away: it is for what the metadata store lacks.
            more_than = self.stores[0].keys_in_all if self.stores else -1
            try:
                store = open_store(folder, more_than, stack)
                self.stores += [store] if store else []
                self._spare_folder = "" if store else folder
            except (ReconstructionError, OSError) as error:
                troubles[folder] = str(error)
        if not self.stores:
            there = [trouble for folder, trouble in troubles.items() if os.path.exists(folder)]
            raise ReconstructionError("; ".join(there or troubles.values()))
        for trouble in troubles.values():
            log.warning("%s", trouble)

    def find(self, qa: QA, templates: list[PromptTemplate]) -> tuple[str, Entry | None, str]:
        """The first prompt made of a QA line that has a usable entry, the entry, and its store's folder.

        Else the first prompt, empty where no template makes one, and None; a CorruptedEntry if none is usable.
        """
        tried = ""
        trouble: CorruptedEntry | None = None
        for template in templates:
            prompt = template.make_prompt(qa)
            if not prompt:
                continue
            tried = tried or prompt
            key = key_of(prompt)
            for store in self.stores:
                try:
                    entry = newest_entry(store.values(key), prompt)
                    if entry:
                        return prompt, entry, store.folder
                except CorruptedEntry as error:
                    trouble = error
                    if self._spare_folder:
                        folder, self._spare_folder = self._spare_folder, ""
                        with contextlib.suppress(ReconstructionError, OSError):
                            self.stores += filter(None, [open_store(folder, -1, self._stack)])  # the loop's next
        if trouble:
            raise trouble
        return tried, None, ""

    def sample_prompts(self) -> Iterator[str]:
        """Yields prompts of some usable entries, in the order of their hashes: it is a random sample."""
        for store in self.stores:
            for key in itertools.islice(store.keys(), 6_000):
                with contextlib.suppress(CorruptedEntry):
                    yield from (prompt for prompt, _ in map(read_entry, store.values(key)) if type(prompt) is str)


# --- The join and the output: each QA line with its generation --------------------------------------

LINE_WARNING = "%s:%d: %s: %s"  # where, what became of it, and why
_encode_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False, check_circular=False).encode  # circles recurse


def encode(fields: dict[str, Any]) -> str | None:
    """The JSON text of fields, None where they are not all JSON data."""
    try:
        refuse_other_keys(fields.get("messages"))  # no other field is logged with any
        return _encode_json(fields)
    except (TypeError, ValueError, RecursionError, MemoryError):
        return None


def refuse_other_keys(value: Any) -> None:
    """Raises a TypeError for a key that is no text, of which json would make some."""
    if type(value) is dict:
        for key, item in value.items():
            if type(key) is not str:
                raise TypeError
            if type(item) is not str:
                refuse_other_keys(item)
    elif type(value) is list:
        for item in value:
            refuse_other_keys(item)


def merge(line: bytes, qa: QA, added: Entry) -> tuple[bytes, list[str]]:
    """The output line: the QA line's own text and the added fields; and names of these that are no JSON data, so null.

    Only where both have a field of the same name is all of it encoded anew, the added value in that name's place.
    """
    unusable: list[str] = []
    text = encode(added)
    if text is None:
        unusable = [name for name, value in added.items() if encode({name: value}) is None]
        added = added | dict.fromkeys(unusable)
        text = encode(added) or ""
    # What UTF-8 cannot hold, lone surrogates, backslashreplace spells as JSON does.
    if qa.keys().isdisjoint(added):
        return b"%b, %b\n" % (line[: line.rindex(b"}")], text[1:].encode("utf-8", "backslashreplace")), unusable
    return json.dumps(qa | added, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n", unusable


class Join:
    """Joins QA lines with their entries, counts, and keeps some lines to explain missing entries by."""

    def __init__(self, entries: EntryFinder, templates: list[PromptTemplate], prompt_as_sent: bool) -> None:
        self.entries, self.templates, self.prompt_as_sent = entries, templates, prompt_as_sent
        self.fields = dict.fromkeys(field for template in templates for _, field in template.parts)
        self.counts = Counts()
        self.matched: list[QA] = []  # the first hundred
        self.unmatched: collections.deque[QA] = collections.deque(maxlen=500)

    def merge_lines(self, qa_lines: Iterable[tuple[int, bytes]], path: str) -> Iterator[bytes]:
        counts, is_debugging = self.counts, log.isEnabledFor(logging.DEBUG)
        for number, line in qa_lines:
            counts.qa_lines += 1
            qa: QA = {}
            try:
                qa = parse_qa(line)
                prompt, entry, folder = self.entries.find(qa, self.templates)
                if not prompt:
                    raise MalformedLine(f"no text in {listed(self.fields)}")
            except CorruptedEntry as reason:
                counts.corrupted += 1
                log.warning(LINE_WARNING, path, number, "corrupted entry, skipped", reason)
                continue
            except MalformedLine as reason:
                counts.malformed += 1
                log.warning(LINE_WARNING, path, number, "malformed QA line, skipped", reason)
                self.unmatched.extend(filter(None, [qa]))
                continue
            if is_debugging:
                outcome = "matched" if entry else f"no entry for {quoted(prompt)}"
                log.debug("%s:%d: %s: %s", path, number, key_of(prompt).decode(), outcome)
            if not entry:
                counts.without_entry += 1
                self.unmatched.append(qa)
                continue
            if self.prompt_as_sent:
                entry = {"prompt": prompt.removeprefix("user: "), **entry}
            merged, unusable = merge(line, qa, entry)
            if unusable:
                log.warning(LINE_WARNING, path, number, "no JSON data, null instead", listed(unusable))
            if counts.matched < 100:
                self.matched.append(qa)
            counts.matched += 1
            model = str(entry["model"])
            counts.models[model] = counts.models.get(model, 0) + 1
            if folder != self.entries.folders[0]:
                counts.from_activations += 1
                counts.without_timestamp += entry["timestamp"] is None
            yield merged


def refuse_output(path: str, inputs: Iterable[str]) -> None:
    """Raises a ReconstructionError where an output is a folder, or one of the inputs under any name or link."""
    if os.path.isdir(path) or not os.path.basename(path):
        raise ReconstructionError(f"cannot write {path}: it is a folder")
    for each in inputs:
        if is_same_file(path, each) and (os.path.isfile(each) or not os.path.exists(each)):  # and no terminal
            raise ReconstructionError(f"the output {path} is an input, {each}: nothing was touched")


def write_output(path: str, lines: Iterable[bytes]) -> None:
    """Writes a pipe or device, or a file that appears once it is whole; a ReconstructionError where it cannot."""
    try:
        if path == "/dev/stdout" or (os.path.exists(path) and not os.path.isfile(path)):
            # To open standard output anew would lose what was there before a `>>`.
            with open(os.dup(1) if path == "/dev/stdout" else path, "wb", buffering=BUFFER_SIZE) as file:
                file.writelines(lines)
            return
        target = os.path.realpath(path)  # of a symbolic link, what it points to is replaced
        os.makedirs(os.path.dirname(target), exist_ok=True)
        temporary = f"{target}.{os.urandom(4).hex()}.tmp"
        try:
            with open(temporary, "xb", buffering=BUFFER_SIZE) as file:
                file.writelines(lines)
            os.replace(temporary, target)
        finally:
            with contextlib.suppress(OSError):  # it is there only where something went wrong
                os.unlink(temporary)
    except OSError as error:
        raise ReconstructionError(f"cannot write {path}: {error.strerror}") from error


# --- Missing entries: why, and what would match -----------------------------------------------------
# A server logs whatever goes through it, also what made the questions or judged them: the user chooses.


class Proposal:
    """A template, and the entries that are found for the prompts that it makes of QA lines."""

    def __init__(self, text: str, qa_lines: Iterable[QA], entries: EntryFinder) -> None:
        self.template = PromptTemplate(text)
        self.qa_lines = 0  # that match
        self.found: dict[str, Entry] = {}  # by prompt
        for qa in qa_lines:
            with contextlib.suppress(CorruptedEntry):
                prompt, entry, _ = entries.find(qa, [self.template])
                if entry:
                    self.qa_lines += 1
                    self.found[prompt] = entry

    def __str__(self) -> str:
        text, qa_lines = quoted(self.template.text, 80), counted(self.qa_lines, "QA line")
        models = listed(sorted({str(entry["model"]) for entry in self.found.values()}), 2)
        answer = quoted(next(iter(self.found.values()))["generation"], 60)
        return f"  {text} matches {qa_lines}, {models} answered {answer}"


def candidate_templates(prompt: str, qa: QA) -> set[str]:
    """Templates that would make a prompt of a QA line: of one field, and of those with the longest texts together."""
    longest_first = sorted(qa, key=lambda field: -len(qa[field]))
    fields = [field for field in longest_first if qa[field] in prompt and FIELD_NAME.fullmatch(field)]
    marks = dict(zip(fields, map(chr, range(0xE000, 0xE008))))  # of Unicode's private use: no text has them
    marked, together = set(), prompt
    for field, mark in marks.items():
        together = together.replace(qa[field], mark)
        marked |= {prompt.replace(qa[field], mark), together}
    names = str.maketrans({"{": "{{", "}": "}}"} | {mark: f"{{{field}}}" for field, mark in marks.items()})
    return {text.translate(names) for text in marked}


def letters_of(text: str) -> str:
    """What is left of a text without white space, case, accents and punctuation."""
    return "".join(filter(str.isalnum, unicodedata.normalize("NFKD", text).casefold()))


def pieces_of(letters: str) -> set[str]:
    """Whatever six letters stand side by side."""
    return {letters[start : start + 6] for start in range(len(letters) - 5)}


class Comparison:
    """Compares QA lines that have no entry with a sample of the store's prompts."""

    def __init__(self, join: Join) -> None:
        self.join = join
        self.qa_lines = [{k: v for k, v in qa.items() if type(v) is str and v.strip()} for qa in join.unmatched]
        self.stored = list(dict.fromkeys(join.entries.sample_prompts()))
        self.close: list[tuple[str, str, QA]] = []  # prompt, field and QA line of a text that mostly stands in it
        texts = {letters_of(text)[-40:]: (field, qa) for qa in self.qa_lines for field, text in qa.items()}
        holders: dict[str, list[str]] = {}  # of a piece, so that a prompt is searched for all texts at once
        for text in texts:
            for piece in pieces_of(text):
                holders.setdefault(piece, []).append(text)
        rare = {piece: holding for piece, holding in holders.items() if len(holding) <= 20}
        for prompt in self.stored:
            pieces = pieces_of(letters_of(prompt))
            shared = collections.Counter(text for piece in pieces & rare.keys() for text in rare[piece])
            close = [text for text, _ in shared.most_common(4) if 2 * len(pieces_of(text) & pieces) > len(text) - 5]
            self.close += [(prompt, *texts[text]) for text in close]

    def proposals(self) -> list[Proposal]:
        """Up to three templates that match QA lines without an entry, that with the least text of its own first."""
        entries, matched = self.join.entries, self.join.matched
        inside = [(prompt, qa) for prompt, field, qa in self.close if qa[field] in prompt]
        made = collections.Counter(text for prompt, qa in inside[:600] for text in candidate_templates(prompt, qa))
        tried = [Proposal(text, self.qa_lines, entries) for text, _ in made.most_common(60)]
        proposals: list[Proposal] = []
        for proposal in sorted(tried, key=lambda proposal: (-len(proposal.found), len(proposal.template.parts))):
            template, prompts = proposal.template, proposal.found.keys()
            by_chance = sum(len(prompt) - template.own_length for prompt in prompts) < 16  # characters
            is_explained = any(prompts <= better.found.keys() for better in proposals)
            if by_chance or is_explained or (len(prompts) == 1 and len(self.qa_lines) > 1):
                continue
            # One that most of the matched lines match too is a judge's or a question generator's.
            if not matched or 2 * Proposal(template.text, matched, entries).qa_lines < len(matched):
                proposals.append(proposal)
        return sorted(proposals, key=lambda proposal: proposal.template.own_length)[:3]

    def closest(self) -> list[str]:
        """A prompt tried and the one in the store most like it; where other lines match, only if nearly the same."""
        pairs = [(prompt, qa) for prompt, _, qa in self.close] or list(zip(self.stored, self.join.unmatched))
        tried = [(one, other) for other, qa in pairs for each in self.join.templates if (one := each.make_prompt(qa))]
        twins = [(one, other) for one, other in tried if letters_of(one) == letters_of(other)]
        if not tried or (self.join.matched and not twins):
            return []

        def likeness(pair: tuple[str, str]) -> float:
            ours, theirs = (pieces_of(letters_of(text)) for text in pair)
            return len(ours & theirs) / (len(ours | theirs) or 1)

        one, other = max((twins or tried)[:4000], key=likeness)
        differ = next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), 0)
        start = max(0, differ - 60) if max(len(one), len(other)) > 160 else 0  # of long ones the part around it
        lines = [f"  tried:         {quoted(one[start:])}", f"  in the store:  {quoted(other[start:])}"]
        fields = collections.Counter(field for _, field in {(p, f) for p, f, qa in self.close if qa[f] in p})
        looked_at = f"{counted(len(self.stored), 'prompt')} of the store"
        if twins:
            lines.append("They differ only in white space, case, accents or punctuation.")
        elif fields:
            field, number = fields.most_common(1)[0]
            lines.append(f"`{field}` stands in {number:,} of {looked_at}, but no template makes them of whole fields.")
        elif not self.close:
            lines.append(f"No text of the QA file stands in {looked_at}: it seems to be of another experiment.")
        return lines


def explain(join: Join) -> tuple[list[str], str]:
    """Why QA lines have no entry, in some lines of text, and a hint; nothing where all is well."""
    counts, matched = join.counts, join.matched
    unused = max(store.entries for store in join.entries.stores) - counts.matched - counts.corrupted
    if matched and not (counts.without_entry and unused > 0):  # all entries of a sampled run are used
        return [], ""
    known = f"nothing matched: no prompt made of {counted(counts.qa_lines, 'QA line')} is in the store"
    if matched:
        known = f"{counted(counts.without_entry, 'QA line has', 'QA lines have')} no entry, though at least "
        known += counted(unused, "entry of the store matches no line", "entries of the store match no line")
    elif counts.corrupted:
        known = f"nothing matched: {counted(counts.corrupted, 'entry', 'entries')} found, but none usable"
    elif not unused:
        known = "nothing matched: the store is empty"
    elif not counts.without_entry:
        there = dict.fromkeys(field for qa in join.unmatched for field, text in qa.items() if type(text) is str)
        known = f"nothing matched: no QA line has text in {listed(join.fields)}; found: {listed(there, 20) or 'none'}"
    comparison = Comparison(join)
    proposals = comparison.proposals()
    if not proposals:
        return [known, *comparison.closest()], ""
    hint = "run it again with the template of your model; the same server logs judges and question generators too"
    given = join.templates if matched else []
    options = [" ".join(each.option() for each in [*given, proposal.template]) for proposal in proposals]
    return [known, *map(str, proposals)], "\n  ".join([hint, *options])


# --- The run and the command ------------------------------------------------------------------------

MAX_MEMORY = 5 << 30  # bytes, for which a mapped store does not count; LMDB's values are under 4 GiB
_one_run = threading.Lock()  # at a time, since lmdb opens a store only once in a process


def reconstruct_inference(
    qa_output_path: str | os.PathLike[str],
    lmdb_path: str | os.PathLike[str],
    output_path: str | os.PathLike[str],
    *,
    prompt_template: str | Sequence[str] = DEFAULT_PROMPT_TEMPLATES,
    prompt_as_sent: bool = False,
    progress: bool = False,
) -> Counts:
    """Joins a QA file with the logger's LMDB and writes the merged JSONL; returns what it found.

    A path `-` is standard input or output, `lmdb_path` as for `locate_stores`. Of several prompt templates, for each QA
    line the first that has an entry counts. `prompt_as_sent` puts the prompt that matched, without a leading `user: `,
    into `prompt`. `progress` shows a tqdm bar. What there is to say goes to the logger `reconstruct_inference`.

    Raises:
        ValueError: a template cannot be used.
        NothingMatched: no line was written; an existing output is untouched.
        ReconstructionError: something else that the user can mend; an existing output is untouched.
    """
    texts = [prompt_template] if isinstance(prompt_template, str) else prompt_template
    templates = [PromptTemplate(text) for text in texts]
    qa_path = "/dev/stdin" if qa_output_path == "-" else os.fspath(qa_output_path)
    output = "/dev/stdout" if output_path == "-" else os.fspath(output_path)
    folders = locate_stores(os.fspath(lmdb_path))
    refuse_output(output, [qa_path, *(f"{folder}/{name}" for folder in folders for name in ("data.mdb", "lock.mdb"))])
    with _one_run, contextlib.ExitStack() as stack:
        entries = EntryFinder(folders, stack)
        # The unpickler takes what a pickle names by a number from this cache, without asking.
        copyreg.clear_extension_cache()
        stack.callback(copyreg.clear_extension_cache)  # where it has put stand-ins
        join = Join(entries, templates, prompt_as_sent)
        merged = join.merge_lines(read_qa_lines(qa_path, progress), qa_path)
        first = next(merged, None)
        if first is not None:  # else nothing shall be made at all
            write_output(output, itertools.chain([first], merged))
        reasons, hint = explain(join)
        if first is None:
            raise NothingMatched("\n".join(reasons), hint)
        if reasons:
            log.log(logging.WARNING if reasons[1:] else logging.INFO, "\n".join(reasons), extra={"hint": hint})
        for store in entries.stores:
            if not store.is_locked and os.stat(f"{store.folder}/data.mdb").st_mtime_ns != store.written:
                log.warning("%s changed while it was read: run this again when the logger is done", store.folder)
    counts, entries_in = join.counts, {store.folder: store.entries for store in entries.stores}
    counts.from_metadata = counts.matched - counts.from_activations
    counts.metadata_entries, counts.activations_entries = map(entries_in.get, entries.folders)
    kinds = {"matched": counts.matched, "without an entry": counts.without_entry}
    kinds |= {"malformed": counts.malformed, "corrupted": counts.corrupted}
    log.info("QA lines: %s (%s)", f"{counts.qa_lines:,}", ", ".join(f"{n:,} {kind}" for kind, n in kinds.items() if n))
    for folder, number in entries_in.items():
        log.info("entries: %s in %s", f"{number:,}", folder)
    if counts.without_timestamp:
        log.info("timestamps: null in %s from the activations store", counted(counts.without_timestamp, "line"))
    if len(counts.models) > 1:
        log.info("models: %s", ", ".join(f"{model} {number:,}" for model, number in counts.models.items()))
    log.info("wrote %s to %s", counted(counts.matched, "line"), output)
    return counts


class TerminalHandler(logging.Handler):
    """Shows records as one meets them in a terminal; of warnings of a kind about lines the first three, or all."""

    def __init__(self, shows_all: bool) -> None:
        super().__init__()
        self._limit = sys.maxsize if shows_all else 3
        self._seen: collections.Counter[str] = collections.Counter()  # warnings of each kind

    def emit(self, record: logging.LogRecord) -> None:
        kind = str(record.args[2]) if record.msg == LINE_WARNING and isinstance(record.args, tuple) else ""
        if not kind:
            for each, number in self._seen.items():
                if number > self._limit:
                    self._show(f"warning: {number - self._limit:,} more: {each}")
            self._seen.clear()
        self._seen[kind] += bool(kind)
        if self._seen[kind] <= self._limit:
            prefix, hint = {logging.WARNING: "warning: ", logging.ERROR: "error: "}, getattr(record, "hint", "")
            self._show(prefix.get(record.levelno, "") + record.getMessage() + (f"\nhint: {hint}" if hint else ""))

    def _show(self, text: str) -> None:
        text = re.sub(r"[^\n -~\xa0-\U0010ffff]", lambda c: repr(c[0])[1:-1], text)  # what a terminal would obey
        with contextlib.suppress(OSError):  # whoever read it is gone, and the work goes on
            if "tqdm" in sys.modules:
                sys.modules["tqdm"].tqdm.write(text, file=sys.stderr)  # above the bar
            elif sys.stderr:
                print(text, file=sys.stderr)


def template_argument(typed: str) -> str:
    """The template that was typed, where `\\n` means a line break and `\\\\` a backslash."""
    template = re.sub(r"\\([n\\])", lambda escape: "\n" if escape[1] == "n" else "\\", typed)
    try:
        PromptTemplate(template)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{quoted(typed)} cannot be used: {error}") from None
    return template


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        description="Rebuild a lost generation.jsonl from what the server logged to LMDB, without asking again.",
        epilog="exit codes: 0 lines were written, 1 error or nothing matched, 2 wrong usage, 130 and 143 stopped",
        allow_abbrev=False,
    )
    how = "how a prompt was made: {name} is a field of the QA line, \\n a line break; of several, the first that has "
    how += f"an entry counts; not sure? leave it out (default: {DEFAULT_PROMPT_TEMPLATE!r}, with `user: ` or without)"
    path: dict[str, Any] = {"required": True, "type": os.path.expanduser, "metavar": "PATH"}
    add = parser.add_argument
    add("--qa_output_path", **path, help="the JSONL of the questions that were asked; `-` is standard input")
    add("--lmdb_path", **path, help="what the server's logger was given; its `PATH_metadata` is found from there")
    add("--output_path", **path, help="the generation.jsonl to write; `-` is standard output")
    add("--prompt_template", action="append", type=template_argument, metavar="TEMPLATE", help=how)
    add("--prompt_as_sent", action="store_true", help="put what was sent into `prompt`, as HalluLens itself writes it")
    add("--verbose", action="store_true", help="say what became of each QA line, and show all warnings")
    add("--version", action="version", version=f"%(prog)s {__version__}")
    options = vars(parser.parse_args(argv))
    options["prompt_template"] = options["prompt_template"] or DEFAULT_PROMPT_TEMPLATES
    for name, value in options.items():
        if value == "":
            parser.error(f"argument --{name}: it is empty, as a variable that is not set")

    def stop(number: int, frame: object) -> None:
        for each in STOP_SIGNALS:
            signal.signal(each, signal.SIG_IGN)  # a second one must not break the cleaning up
        raise SystemExit(128 + number)

    with contextlib.ExitStack() as stack:
        handler = TerminalHandler(options["verbose"])
        stack.callback(log.removeHandler, handler)
        stack.callback(log.setLevel, log.level)
        log.addHandler(handler)
        log.setLevel(logging.DEBUG if options.pop("verbose") else logging.INFO)
        for number in STOP_SIGNALS:
            stack.callback(signal.signal, number, signal.signal(number, stop))
        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        stack.callback(resource.setrlimit, resource.RLIMIT_DATA, (soft, hard))
        resource.setrlimit(resource.RLIMIT_DATA, (MAX_MEMORY if soft < 0 else min(soft, MAX_MEMORY), hard))
        try:
            reconstruct_inference(**options, progress=sys.stderr is not None and sys.stderr.isatty())
        except (ReconstructionError, OSError, MemoryError) as error:
            log.error("%s", str(error) or "out of memory", extra={"hint": getattr(error, "hint", "")})
            return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
