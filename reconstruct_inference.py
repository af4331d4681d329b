#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["lmdb>=1.4.1", "tqdm>=4.65"]
# ///
"""Rebuild the JSONL of an inference run from its QA file and the activations logger's LMDB.

The logger keeps each request as an entry in LMDB, under the SHA-256 of its prompt. This script makes
the prompt of each QA line, looks up its hash, and writes the QA line with the generation added. If QA lines
have no entry, `explain` says what the store holds. The flow:

    read_qa_lines → parse_qa → PromptTemplate.make_prompt → key_of → EntryFinder.find → merge → open_output
"""

from __future__ import annotations

import sys

if __name__ == "__main__" and not getattr(sys.flags, "safe_path", sys.flags.isolated):
    del sys.path[0]  # the script's own folder, where a `types.py` would be imported as Python's own

import argparse
import collections
import contextlib
import copyreg
import functools
import hashlib
import importlib.util
import io
import itertools
import json
import logging
import mmap
import os
import pickle
import re
import resource
import shlex
import signal
import string
import threading
import time
import types
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

if __name__ == "__main__":
    if sys.version_info < (3, 10):  # noqa: UP036
        sys.exit("error: reconstruct_inference requires Python 3.10 or later")
    if not (importlib.util.find_spec("lmdb") and importlib.util.find_spec("tqdm")):
        sys.exit(f"error: lmdb and tqdm are missing: {sys.executable} -m pip install 'lmdb>=1.4.1' 'tqdm>=4.65'")

import lmdb

__version__ = "3.0.0"

# Servers log a chat message as `role: content`. Since February 2026, they log a single one bare.
DEFAULT_PROMPT_TEMPLATE = "user: Answer in one sentence. Q:{prompt}\n A:"
DEFAULT_PROMPT_TEMPLATES = (DEFAULT_PROMPT_TEMPLATE, DEFAULT_PROMPT_TEMPLATE.removeprefix("user: "))

QA = dict[str, Any]  # the JSON object of a QA line
Entry = dict[str, Any]  # what an entry adds to its QA line

log = logging.getLogger("reconstruct_inference")


class ReconstructionError(Exception):
    """A problem that the user can solve. `hint` says how, in terms of the command line."""

    def __init__(self, text: str, hint: str = "") -> None:
        super().__init__(f"{text}\nhint: {hint}" if hint else text)
        self.hint = hint


class UnusableStore(ReconstructionError):
    """One of the two stores cannot be read. The other one may be enough."""


class CorruptedEntry(Exception):
    """An entry cannot be used. The text is the reason."""


class ModelCount(types.SimpleNamespace):
    """How many lines a model answered, and when: the first and last timestamp, in seconds."""

    def __init__(self) -> None:
        self.lines = 0
        self.first = self.last = 0.0  # since 1970; 0 if no entry has a timestamp


class Counts(types.SimpleNamespace):
    """What a run found. `qa_lines` is the sum of the four counts that follow it."""

    def __init__(self) -> None:
        self.qa_lines = 0  # lines of the QA file that are not blank
        self.matched = 0  # lines written
        self.without_entry = 0  # QA lines whose prompt is in no store
        self.malformed = 0  # QA lines that are not JSON objects or lack the template's fields
        self.corrupted = 0  # QA lines whose entry was found but cannot be used
        self.models: dict[str, ModelCount] = collections.defaultdict(ModelCount)  # of the matched lines


def quoted(text: str, limit: int = 160) -> str:
    """Returns a text in quotes, on one line. The middle of a long one is left out."""
    return repr(text if len(text) <= limit else f"{text[: limit // 2]} … {text[-limit // 2 :]}")


def listed(names: Iterable[str], limit: int = 8) -> str:
    """Returns the first few of some names, as a list within a sentence."""
    names = [f"`{name}`" if name.isprintable() else ascii(name) for name in names]
    return ", ".join(names[:limit] + ["…"] * (len(names) > limit))


def counted(number: int, noun: str, plural: str = "") -> str:
    """Returns a number with its noun: `1 line`, `2,000 lines`."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


@contextlib.contextmanager
def progress_bar(what: str, size: int | None, shown: bool) -> Iterator[Callable[[int], object]]:
    """Shows a bar on the terminal. Yields a function that advances it by a number of bytes."""
    if not shown:
        yield lambda number_of_bytes: None
        return
    from tqdm import tqdm  # only here, because the import takes longer than a small run

    with tqdm(desc=what, total=size, unit="B", unit_scale=True, leave=False) as bar:
        yield bar.update
        bar.refresh()  # to show 100 %


# --- QA lines and prompts ---
# Reads the QA file line by line, and makes the prompt that the model received.

BUFFER_SIZE = 1 << 18  # bytes
PACKED_FORMATS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"PK\x03\x04": "ZIP"}
CSV_TO_JSONL = "import csv, json, sys; csv.field_size_limit(10**9); print(*map(json.dumps, csv.DictReader("
CSV_TO_JSONL += "open(sys.argv[1], newline='', encoding='utf-8-sig'))), sep='\\n')"
MAX_DEPTH = 4  # of objects and lists in a QA line
FIELD_NAME = re.compile(r"(?!\d+$)[^{}\[!:]+")  # what can stand in a template's braces
_decode_json = json.JSONDecoder().raw_decode
_new_hash = hashlib.sha256().copy  # faster than sha256(), which looks the algorithm up in OpenSSL


def read_qa_lines(path: str, progress: bool) -> Iterator[tuple[int, bytes]]:
    """Yields the number and the bytes of each line that is not blank. Raises ReconstructionError."""
    try:
        with io.BufferedReader(io.FileIO(path), BUFFER_SIZE) as qa_file:
            if qa_file.isatty():
                log.info("reading QA lines from the terminal; Ctrl-D ends them")
            if (beginning := qa_file.peek()).startswith(b"\xef\xbb\xbf"):
                qa_file.read(3)  # a byte order mark
            for magic, name in PACKED_FORMATS.items():
                if beginning.startswith(magic):  # before its bytes are taken for lines
                    hint = "" if name == "ZIP" else f"--qa_output_path <({name} -dc {shlex.quote(path)})"
                    raise ReconstructionError(f"{path} is compressed ({name})", hint)
            size = os.fstat(qa_file.fileno()).st_size or None  # a pipe has none
            with progress_bar("QA file", size, progress) as advance:
                for number, line in enumerate(qa_file, 1):
                    advance(len(line))
                    if not line.isspace():
                        yield number, line
    except IsADirectoryError:
        raise ReconstructionError(f"{path} is a folder; expected a JSON Lines file") from None
    except OSError as error:
        raise ReconstructionError(f"cannot read {path}: {error.strerror}") from error


def parse_qa(line: bytes) -> QA:
    """Returns the JSON object of a QA line. Raises ValueError or RecursionError if it is not one."""
    text = line.decode().strip()
    qa, end = _decode_json(text)
    if type(qa) is not dict or end < len(text):
        raise ValueError("it is another value, or text follows it")
    return qa


def not_json_lines(path: str, first_line: bytes) -> ReconstructionError:
    """Returns the error for a QA file without JSON objects. It names a format only if it is certain."""
    if not first_line:
        return ReconstructionError(f"{path} is empty or has only blank lines")
    text, file = first_line.decode(errors="backslashreplace").strip(), shlex.quote(path)
    hint = "expected JSON Lines: one JSON object per line, in UTF-8"
    if first_line.startswith((b"\xff\xfe", b"\xfe\xff")):
        hint = f"it is in UTF-16: --qa_output_path <(iconv -f UTF-16 -t UTF-8 {file})"
    elif re.match(r"\[$|\[\s*\{", text):
        hint = f"it is one JSON array: --qa_output_path <(jq -c '.[]' {file})"
    elif path.lower().endswith(".csv"):
        hint = f'it is CSV: python3 -c "{CSV_TO_JSONL}" {file} > {shlex.quote(path + ".jsonl")}'
    return ReconstructionError(f"no line of {path} is a JSON object; it begins with {quoted(text, 80)}", hint)


def texts_of(value: object, name: str = "", depth: int = 0) -> Iterator[tuple[str, str]]:
    """Yields the names and texts of a QA line's fields, numbers and nested fields included."""
    if type(value) in (str, int, float):
        yield name, str(value)
    items: Any = value.items() if type(value) is dict else enumerate(value) if type(value) is list else ()
    for step, item in items if depth < MAX_DEPTH else ():
        yield from texts_of(item, f"{name}.{step}" if name else str(step), depth + 1)


class PromptTemplate:
    """Text in which `{name}`, or `{messages.0.content}` of nested ones, stands for a field."""

    def __init__(self, text: str) -> None:
        """Raises ValueError if the text cannot be used."""
        self.text = text
        self.parts: list[tuple[str, str]] = []  # a text, and the name of the field that follows it
        self.tail = ""
        try:
            for literal, name, spec, conversion in string.Formatter().parse(text):
                self.tail += literal
                if name is not None:
                    if not FIELD_NAME.fullmatch(name) or spec or conversion:
                        raise ValueError("braces must contain the name of a field, as in {prompt}")
                    self.parts.append((self.tail, name))
                    self.tail = ""
            if not self.parts:
                raise ValueError("it names no field; write {prompt}, in single braces")
        except ValueError as error:
            raise ValueError(f"{quoted(text)} cannot be used: {error}") from None

    def make_prompt(self, qa: QA) -> str:
        """Returns the prompt for a QA line, or an empty text if the line lacks a field."""
        try:
            prompt = ""
            for own_text, name in self.parts:
                prompt += own_text + qa[name]
            return prompt + self.tail
        except (KeyError, TypeError):  # a number, a dotted name, or nothing at all
            texts = dict(texts_of(qa))
            if not all(name in texts for _, name in self.parts):
                return ""
            return "".join(own_text + texts[name] for own_text, name in self.parts) + self.tail

    def option(self) -> str:
        """Returns the option that gives this template to the command, to be pasted into bash."""
        typed = self.text.replace("\\", "\\\\").replace("\n", "\\n")
        if typed.isprintable():
            return f"--prompt_template={shlex.quote(typed)}"
        shown = re.sub(r"[\\']|[^ -~]", lambda c: "".join(f"\\x{b:02x}" for b in c[0].encode(errors="replace")), typed)
        return f"--prompt_template=$'{shown}'"  # a terminal would obey it


def key_of(prompt: str) -> bytes:
    """Returns the key that the logger gives to a prompt: the SHA-256 of its UTF-8, in hex."""
    prompt_hash = _new_hash()
    prompt_hash.update(prompt.encode("utf-8", "surrogatepass"))  # no entry has surrogates
    return prompt_hash.hexdigest().encode()


# --- Entries ---
# Decodes what the logger kept of a request. A value is a pickle, and a pickle is a program: it names what
# the unpickler imports and calls. So every name gives a stand-in that does nothing.

ZERO_BLOCK = "\0" * 512  # a sector, the least that a disk loses
MAX_TIMESTAMP = 253_402_300_799  # seconds since 1970, the end of the year 9999


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


class ValueFile(io.RawIOBase):
    """A value as a file that is read piece by piece, so that activations never come into memory."""

    def __init__(self, read_at: Callable[[int, int], bytes], start: int, size: int) -> None:
        self._read_at = read_at  # called with a position and a number of bytes
        self._position, self._end = start, start + size

    def read(self, size: int = -1) -> bytes:
        rest = max(0, self._end - self._position)
        data = self._read_at(self._position, rest if size < 0 else min(size, rest))
        self._position += len(data)
        return data

    def readinto(self, buffer: Any) -> int:
        """Skips the content of a bytes object. The unpickler calls this for nothing else."""
        self._position += len(buffer)
        return len(buffer)


def read_entry(load: Callable[[], object]) -> tuple[object, Entry]:
    """Loads a value. Returns its prompt, or None, and its entry. Raises CorruptedEntry.

    The metadata store holds the logged fields, the activations store `{"data": fields, …}` or, early on, the fields.
    """
    try:
        logged = load()
    except Exception as error:  # hostile bytes can fail in any way
        raise CorruptedEntry(f"it cannot be decoded ({type(error).__name__})") from None
    if type(logged) is dict and "response" not in logged:
        logged = logged.get("data")
    if type(logged) is not dict or type(logged.get("response")) is not str:
        raise CorruptedEntry("it has no text in `response`")
    if ZERO_BLOCK in logged["response"]:
        raise CorruptedEntry("a part of its response was overwritten with zeros")
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


def time_logged(entry: Entry) -> float:
    """Returns when an entry was logged, in seconds since 1970, or 0 if it does not say."""
    timestamp = entry["timestamp"]
    return timestamp if type(timestamp) in (float, int) and 0 < timestamp <= MAX_TIMESTAMP else 0.0


def model_name(entry: Entry) -> str:
    """Returns the name of the model that answered, as messages show it."""
    model = entry["model"]
    return model if type(model) is str and model.isprintable() else "(no name)"


def newest_entry(values: Iterable[Callable[[], object]], prompt: str) -> Entry | None:
    """Returns a prompt's newest usable entry, if any. Raises CorruptedEntry if none is usable."""
    newest: Entry | None = None
    reason: CorruptedEntry | None = None
    for load in values:
        try:
            logged_prompt, entry = read_entry(load)
            if logged_prompt is not None and logged_prompt != prompt:
                reason = CorruptedEntry("it was logged for a different prompt")
            elif newest is None or time_logged(entry) > time_logged(newest):
                newest = entry
        except CorruptedEntry as error:
            reason = error
    if reason and newest is None:
        raise reason
    return newest


# --- Stores ---
# Finds the values of a prompt. A damaged store can end the process that reads it through lmdb. So a child
# process looks up every key first, and if that fails, the store's file is scanned for entries.

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LOCK_PATIENCE = 5  # seconds; a lock server that is down never answers
SHORT_VALUE = 1 << 16  # bytes; a longer value is read piece by piece
MAX_STORE_SIZE = 1 << 42  # bytes; a header that claims more is damaged
SAMPLE_SIZE = 6_000  # entries to look at when some are missing
ZARR_FILES = {".zgroup", ".zarray", ".zattrs", "zarr.json"}


def exit_on_stop_signals() -> None:
    """Makes the stop signals raise SystemExit, unless the caller ignores them, as nohup does."""

    def stop(number: int, frame: object) -> None:
        for each in STOP_SIGNALS:
            signal.signal(each, signal.SIG_IGN)  # a second one must not interrupt the cleanup
        raise SystemExit(128 + number)

    for number in STOP_SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, stop)


def run_in_child(function: Callable[..., object], *arguments: object) -> Any:
    """Runs a function in a child process. Returns its JSON result, or None if it fails."""
    shared = mmap.mmap(-1, mmap.PAGESIZE)  # memory that both processes see
    # Signals wait until the child has its own handlers.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # about other threads
            child = os.fork()
    except OSError as error:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        raise ReconstructionError(f"cannot start a process: {error.strerror}") from error
    if child == 0:
        answer_and_exit(shared, mask, function, arguments)
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.waitpid(child, 0)
    except ChildProcessError:
        pass  # it has ended, and the caller ignores SIGCHLD
    except BaseException:
        with contextlib.suppress(OSError):  # if it has just ended
            os.kill(child, signal.SIGTERM)  # a reader left in a live store makes it grow
            os.waitpid(child, 0)
        raise
    return json.loads(shared[: shared.find(b"\0")] or b"null")


def answer_and_exit(shared: mmap.mmap, mask: Any, function: Callable[..., object], arguments: Any) -> None:
    try:
        exit_on_stop_signals()
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        sys.stderr = os.fdopen(os.dup(2), "w", errors="replace")  # for the progress bar
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # where lmdb writes as it aborts
        shared.write(json.dumps(function(*arguments)).encode())
    finally:
        os._exit(0)


def locate_stores(path: str) -> list[str]:
    """Returns the paths of the metadata store and the activations store, or that of a single store.

    The logger keeps the activations store at P and appends `_metadata` to the text of P for the other one, which
    lies beside P, or inside it if P ends in a slash.
    """
    if os.path.basename(path) == "data.mdb" and os.path.isfile(path):
        path = os.path.dirname(path) or "."
    base = path.rstrip("/") if path.strip("./") else os.path.abspath(path)  # `.` is not a name
    places = [f"{base}_metadata", f"{base}/_metadata"]
    if path.endswith("/"):
        places.reverse()
    if place := next(filter(os.path.exists, places), None):
        return [place] if is_same_file(data_file(place), data_file(base)) else [place, base]
    if base.endswith("_metadata"):
        return [base, os.path.normpath(base.removesuffix("_metadata"))]
    return [base] if os.path.isfile(base) else [places[0], base]


def data_file(store_path: str) -> str:  # a store is a folder or a single file
    return store_path if os.path.isfile(store_path) else f"{store_path}/data.mdb"


def lock_file(store_path: str) -> str:  # where LMDB registers its readers
    return f"{store_path}-lock" if os.path.isfile(store_path) else f"{store_path}/lock.mdb"


def is_same_file(one: str, other: str) -> bool:
    with contextlib.suppress(OSError):  # one of them does not exist
        return os.path.samefile(one, other)
    return False


def require_readable(path: str) -> None:
    """Raises UnusableStore if there is no store, ReconstructionError if this process uses it."""
    file = data_file(path)
    try:
        with open(file, "rb") as opened:
            if not opened.read(1):
                raise UnusableStore(f"{file} is empty")
    except OSError as error:
        if not os.path.isdir(path) or not isinstance(error, FileNotFoundError):
            raise UnusableStore(f"cannot read {path}: {error.strerror}") from None
        names = sorted(os.listdir(path))
        is_zarr = ZARR_FILES & set(names)
        what = "it is a Zarr store, which is not supported" if is_zarr else f"it contains {listed(names) or 'nothing'}"
        raise UnusableStore(f"{path} has no `data.mdb`; {what}") from None
    descriptors = os.listdir("/dev/fd") if os.path.isdir("/dev/fd") else []
    if any(is_same_file(f"/dev/fd/{descriptor}", file) for descriptor in descriptors):
        raise ReconstructionError(f"{file} is already open in this process; close it first")


def open_lmdb(path: str, lock: bool) -> lmdb.Environment:
    options = {"subdir": os.path.isdir(path), "lock": lock, "readonly": True, "create": False}
    try:
        return lmdb.open(os.fsencode(path), map_size=0, **options)  # 0 means the logger's own
    except lmdb.MemoryError:  # `ulimit -v` allows less
        return lmdb.open(os.fsencode(path), map_size=os.path.getsize(data_file(path)), **options)


def ask_child(function: Callable[..., dict[str, int]], path: str, *arguments: object) -> dict[str, int]:
    """Runs a check of a store in a child process. Returns its result and `lock`, or {} if it fails."""
    file = lock_file(path)
    # Through a symbolic or hard link, lmdb would write to what it leads to.
    can_lock = os.path.isfile(file) and not os.path.islink(file) and os.stat(file).st_nlink == 1
    for lock in (True, False) if can_lock else (False,):  # the lock may fail
        found = run_in_child(function, path, lock, *arguments)
        if found:
            return {**found, "lock": lock}
    return {}


def read_claims(path: str, lock: bool) -> dict[str, int]:
    """Returns how many keys and bytes the header of a store claims. Runs in a child process."""
    signal.alarm(LOCK_PATIENCE)
    with open_lmdb(path, lock) as store:
        stat = store.stat()
        size = (store.info()["last_pgno"] + 1) * stat["psize"]
    if not stat["entries"] * 64 <= size <= MAX_STORE_SIZE:  # a key alone has 64 bytes
        raise ValueError("the header is damaged")
    return {"keys": stat["entries"], "size": size}


def check(path: str, lock: bool, progress: bool) -> dict[str, int]:
    """Looks up every key, and returns the numbers of keys and entries. Runs in a child process."""
    signal.alarm(LOCK_PATIENCE)
    with open_lmdb(path, lock) as store, store.begin() as scan, store.begin(buffers=True) as lookup:
        signal.alarm(0)
        with progress_bar(os.path.basename(path), os.path.getsize(data_file(path)), progress) as advance:
            # A function of its own: a signal in a loop here makes Python 3.13 skip the `with`.
            return look_up_every_entry(scan, lookup, advance)


def look_up_every_entry(scan: Any, lookup: Any, advance: Callable[[int], object]) -> dict[str, int]:
    keys = entries = 0
    claimed = scan.stat()["entries"]
    for key in itertools.islice(scan.cursor().iternext(values=False), claimed + 1):  # a damaged tree may loop
        keys += 1
        if not key or (len(key) == 64 and key.translate(None, b"0123456789abcdef")):
            raise ValueError("a key is damaged")  # what was cut off a page reads as zeros
        if len(key) == 64:
            entries += 1
            value = lookup.get(key)
            bytes(value[-1:])  # reads its last page; a TypeError if the key leads nowhere
            advance(len(value))
    if keys != claimed:
        raise ValueError("not every key is there")
    return {"keys": keys, "entries": entries}


class LmdbStore:
    """A store that is read through lmdb, after a check."""

    def __init__(self, path: str, found: dict[str, int], stack: contextlib.ExitStack) -> None:
        self.path, self.key_count, self.entries, self.lost = path, found["keys"], found["entries"], 0
        self._environment = stack.enter_context(open_lmdb(path, bool(found["lock"])))
        # Without a lock, a logger may overwrite what a transaction sees: each look-up has its own.
        self._snapshot = stack.enter_context(self._environment.begin(buffers=True)) if found["lock"] else None

    def keys(self) -> Iterator[bytes]:
        with self._environment.begin() as transaction:
            yield from (key for key in transaction.cursor().iternext(values=False) if len(key) == 64)

    def values(self, key: bytes) -> Iterable[Callable[[], object]]:
        """Returns a loader for the value of a key, if any. Raises CorruptedEntry if lmdb fails."""
        try:
            value = (self._snapshot or self._environment.begin(buffers=True)).get(key)
        except lmdb.Error as error:
            raise CorruptedEntry(f"it cannot be read ({error})") from None
        if value is None:
            return ()
        if value and value[0] == ord("{"):  # JSON, which loggers other than HalluLens' write
            return (lambda: json.loads(bytes(value)),)
        if len(value) <= SHORT_VALUE:
            return (InertUnpickler(io.BytesIO(value)).load,)
        file = ValueFile(lambda position, size: bytes(value[position : position + size]), 0, len(value))
        return (InertUnpickler(file).load,)


# How a pickled dictionary begins, in protocols 2 and 3 and, with frames, in later ones. LMDB keeps a value
# in one piece, and a pickle says where it ends.
PICKLED_DICTIONARY = re.compile(rb"(?s)\x80(?:[\x02\x03]|[\x04\x05]\x95.{8})\}")
LMDB_MAGIC = b"\xde\xc0\xef\xbe"  # in the first two pages
SCAN_BLOCK = 1 << 12  # bytes, which one bad sector costs
OVERLAP = 11  # bytes, so that no beginning is cut


class SalvagedStore:
    """A store whose file is scanned for pickled entries, whatever its structure."""

    def __init__(self, path: str, progress: bool, stack: contextlib.ExitStack) -> None:
        self.path, self.lost = path, 0  # lost entries, as far as they are known
        self.read_error = ""  # of the last block that could not be read
        self._file = os.open(data_file(path), os.O_RDONLY)
        stack.callback(os.close, self._file)
        self.size = os.fstat(self._file).st_size
        self._starts: dict[bytes, list[int]] = {}  # where the versions of a key's value begin
        with progress_bar(f"scanning {os.path.basename(path)}", self.size, progress) as advance:
            for start in range(0, self.size, SCAN_BLOCK):
                for match in PICKLED_DICTIONARY.finditer(self.read(start, SCAN_BLOCK + OVERLAP)):
                    with contextlib.suppress(CorruptedEntry):
                        prompt, _ = read_entry(self._value_at(start + match.start()))
                        if type(prompt) is str:
                            self._starts.setdefault(key_of(prompt), []).append(start + match.start())
                advance(SCAN_BLOCK)
        self.entries = self.key_count = len(self._starts)

    def keys(self) -> Iterator[bytes]:
        return iter(sorted(self._starts))

    def values(self, key: bytes) -> Iterable[Callable[[], object]]:
        """Returns loaders for the versions of a key's value."""
        return map(self._value_at, self._starts.get(key, ()))

    def _value_at(self, start: int) -> Callable[[], object]:
        return InertUnpickler(ValueFile(self.read, start, self.size - start)).load

    def read(self, start: int, size: int) -> bytes:
        """Returns some bytes of the file, zeros if the disk cannot read them."""
        try:
            return os.pread(self._file, size, start)
        except OSError as error:
            self.read_error = error.strerror or ""
            return bytes(size)


def open_store(path: str, progress: bool, stack: contextlib.ExitStack) -> LmdbStore | SalvagedStore:
    """Opens a store. Raises UnusableStore if there is none, or if it holds something else."""
    require_readable(path)
    found = ask_child(check, path, progress)
    if found:
        others = found["keys"] - found["entries"]
        if others and not found["entries"]:
            what = "this LMDB holds something else, or only multi-sample entries (`<hash>_<id>`)"
            raise UnusableStore(f"the keys in {path} are not prompt hashes: {what}")
        if others:
            log.warning("%s: multi-sample entries (`<hash>_<id>`) and other keys are not supported; skipped", path)
        return LmdbStore(path, found, stack)
    store = SalvagedStore(path, progress, stack)
    if not store.entries and LMDB_MAGIC not in store.read(0, 1 << 17):
        beginning = quoted(store.read(0, 60).decode(errors="backslashreplace"))
        hint = "are --qa_output_path and --lmdb_path swapped?" if beginning.startswith("'{") else ""
        what = f"{data_file(path)} is not an LMDB file; it begins with {beginning}"
        raise UnusableStore(f"{what}; expected a folder that contains `data.mdb`", hint)
    claims = ask_child(read_claims, path) or {"keys": 0, "size": 0}
    store.lost = max(0, claims["keys"] - store.entries)
    what = "is damaged or was written by an incompatible LMDB; scanned its raw file for entries"
    if store.size < claims["size"]:
        whole = counted(claims["keys"], "entry", "entries")
        what = f"is an incomplete copy: {store.size:,} of {claims['size']:,} bytes, {whole} when it was whole"
    log.warning("%s %s", path, what)
    if store.read_error:
        log.warning("%s cannot be read everywhere: %s", path, store.read_error)
    log.warning("%s: %s recovered", path, counted(store.entries, "entry", "entries"))
    return store


class EntryFinder:
    """Finds entries in the metadata store, and in the activations store what the first lacks."""

    def __init__(self, paths: list[str], progress: bool, stack: contextlib.ExitStack) -> None:
        self.stores: list[LmdbStore | SalvagedStore] = []
        self._unopened = list(paths)
        self._progress, self._stack = progress, stack
        self.sample_bound = b"g"  # keys below it are the sample; at first, every key
        self.used_keys: set[bytes] = set()  # of the sample, those that belong to a QA line
        while not self.stores:
            self._open_next_store()

    def _open_next_store(self) -> bool:
        """Opens the next store. Returns whether it could. Raises UnusableStore if all fail."""
        if not self._unopened:
            return False
        try:
            store = open_store(self._unopened.pop(0), self._progress, self._stack)
        except UnusableStore as error:
            if not self.stores and not self._unopened:
                raise
            log.warning("%s", error)
            return False
        self.stores.append(store)
        if store.entries > SAMPLE_SIZE:  # hashes are random, so a range of them is fair
            self.sample_bound = min(self.sample_bound, b"%016x" % ((SAMPLE_SIZE << 64) // store.entries))
        return True

    @functools.cached_property
    def _activations_may_have_more(self) -> bool:
        """Whether the activations store may have entries that the metadata store lacks."""
        if not self._unopened or not os.path.exists(data_file(self._unopened[0])):
            return False
        claims = ask_child(read_claims, self._unopened[0])
        return not claims or claims["keys"] > self.stores[0].key_count

    def find(self, qa: QA, templates: Sequence[PromptTemplate]) -> tuple[str, Entry | None]:
        """Returns the first prompt with an entry, and that, or the first prompt and None. Raises CorruptedEntry."""
        first_prompt = ""
        reason: CorruptedEntry | None = None
        for template in templates:
            prompt = template.make_prompt(qa)
            if not prompt:
                continue
            first_prompt = first_prompt or prompt
            key = key_of(prompt)
            for store in self.stores:
                try:
                    entry = newest_entry(store.values(key), prompt)
                except CorruptedEntry as error:
                    if self._open_next_store():
                        return self.find(qa, templates)
                    entry, reason = None, error
                if key < self.sample_bound and (entry or reason):
                    self.used_keys.add(key)
                if entry:
                    return prompt, entry
        if reason:
            raise reason
        if first_prompt and self._activations_may_have_more and self._open_next_store():
            return self.find(qa, templates)
        return first_prompt, None

    def unused_prompts(self, max_characters: int) -> dict[str, Entry]:
        """Returns a sample of the prompts that belong to no QA line, with their entries."""
        prompts: dict[str, Entry] = {}
        for store in self.stores:
            for key in itertools.takewhile(lambda key: key < self.sample_bound, store.keys()):
                if key in self.used_keys:
                    continue
                with contextlib.suppress(CorruptedEntry):
                    prompt, entry = read_entry(next(iter(store.values(key)), dict))
                    if type(prompt) is str:
                        prompts.setdefault(prompt, entry)
                        max_characters -= len(prompt)
                if max_characters < 0:
                    return prompts
        return prompts


# --- Join and output ---
# Writes each QA line with its entry, and keeps what explains missing entries.

LINE_WARNINGS = 3  # of each kind; the summary has the counts
MATCHED_SAMPLE_SIZE = 100  # QA lines
UNMATCHED_SAMPLE_SIZE = 300  # QA lines; half are the first ones
_encode_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False, check_circular=False).encode


def encode(fields: Entry) -> str | None:
    """Returns the JSON text of some fields, or None if JSON cannot represent them."""
    try:
        return _encode_json(fields)
    except (TypeError, ValueError, RecursionError, MemoryError):  # RecursionError: it contains itself
        return None


def merge(line: bytes, qa: QA, entry: Entry) -> tuple[bytes, list[str]]:
    """Returns the output line, and the names of its fields that are null because JSON cannot represent them."""
    unusable: list[str] = []
    text = encode(entry)
    if text is None:
        unusable = [name for name, value in entry.items() if encode({name: value}) is None]
        entry = entry | dict.fromkeys(unusable)
        text = _encode_json(entry)
    # The QA line's own text stays as it is. Lone surrogates, which UTF-8 lacks, become JSON's escapes.
    if qa.keys().isdisjoint(entry):
        return b"%b, %b\n" % (line[: line.rindex(b"}")], text[1:].encode("utf-8", "backslashreplace")), unusable
    return json.dumps(qa | entry, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n", unusable


class Join:
    """Joins QA lines with their entries, counts, and keeps samples of the lines."""

    def __init__(self, qa_path: str, finder: EntryFinder, templates: list[PromptTemplate], as_sent: bool) -> None:
        self._qa_path, self.finder, self.templates, self._as_sent = qa_path, finder, templates, as_sent
        self.field_names = dict.fromkeys(name for template in templates for _, name in template.parts)
        self.counts = Counts()
        self.first_line = b""
        self.matched_sample: list[QA] = []  # the first ones
        self.unmatched_count = 0  # QA lines without an entry, or without the fields
        self.unmatched_sample: list[QA] = []
        self._sample_step = 1  # after the first ones, every n-th is kept
        self._warned: collections.Counter[str] = collections.Counter()

    def merge_lines(self, progress: bool) -> Iterator[bytes]:
        """Yields the output line of each QA line that has an entry."""
        counts, is_debugging = self.counts, log.isEnabledFor(logging.DEBUG)
        for number, line in read_qa_lines(self._qa_path, progress):
            counts.qa_lines += 1
            self.first_line = self.first_line or line
            try:
                qa = parse_qa(line)
            except (ValueError, RecursionError) as error:
                counts.malformed += 1
                self._warn(number, "malformed QA line, skipped", f"not a JSON object in UTF-8 ({error})")
                continue
            try:
                prompt, entry = self.finder.find(qa, self.templates)
            except CorruptedEntry as error:
                counts.corrupted += 1
                self._warn(number, "corrupted entry, skipped", error)
                continue
            if not prompt:
                counts.malformed += 1
                self._warn(number, "malformed QA line, skipped", f"no text in {listed(self.field_names)}")
            elif not entry:
                counts.without_entry += 1
            if prompt and is_debugging:
                outcome = "matched" if entry else f"no entry for {quoted(prompt)}"
                log.debug("%s:%d: %s: %s", self._qa_path, number, key_of(prompt).decode(), outcome)
            if not entry:
                self._keep_unmatched(qa)
                continue
            if self._as_sent:
                entry = {"prompt": prompt.removeprefix("user: "), **entry}
            merged, unusable = merge(line, qa, entry)
            if unusable:
                self._warn(number, "not representable in JSON, written as null", listed(unusable))
            if counts.matched < MATCHED_SAMPLE_SIZE:
                self.matched_sample.append(qa)
            counts.matched += 1
            self._count_model(entry)
            yield merged

    def _count_model(self, entry: Entry) -> None:
        model, logged_at = self.counts.models[model_name(entry)], time_logged(entry)
        model.lines += 1
        if 0 < logged_at < model.first or not model.first:
            model.first = logged_at
        if logged_at > model.last:
            model.last = logged_at

    def _keep_unmatched(self, qa: QA) -> None:
        """Keeps the first lines, because many runs ask only these, and as many of the others."""
        half = UNMATCHED_SAMPLE_SIZE // 2
        if self.unmatched_count < half or self.unmatched_count % self._sample_step == 0:
            self.unmatched_sample.append(qa)
        if len(self.unmatched_sample) > UNMATCHED_SAMPLE_SIZE:
            del self.unmatched_sample[half::2]
            self._sample_step *= 2
        self.unmatched_count += 1

    def _warn(self, number: int, problem: str, reason: object) -> None:
        """Warns about the first QA lines with a problem. Logs the others at debug level."""
        self._warned[problem] += 1
        level = logging.WARNING if self._warned[problem] <= LINE_WARNINGS else logging.DEBUG
        log.log(level, "%s:%d: %s: %s", self._qa_path, number, problem, reason)


@contextlib.contextmanager
def open_output(path: str) -> Iterator[BinaryIO]:
    """Opens a stream, or a temporary file that replaces the output once it is complete."""
    try:
        if path == "/dev/stdout" or (os.path.exists(path) and not os.path.isfile(path)):
            # Opening /dev/stdout would truncate what the shell opened with `>>`.
            with open(os.dup(1) if path == "/dev/stdout" else path, "wb", buffering=BUFFER_SIZE) as file:
                yield file
            return
        target = os.path.realpath(path)  # so that a symbolic link stays one
        with contextlib.suppress(FileExistsError):  # `open` gives the better error
            os.makedirs(os.path.dirname(target), exist_ok=True)
        temporary = f"{target}.{os.urandom(4).hex()}.tmp"
        try:
            with open(temporary, "xb", buffering=BUFFER_SIZE) as file:
                yield file
            os.replace(temporary, target)
        finally:
            with contextlib.suppress(OSError):  # it is there only if something went wrong
                os.unlink(temporary)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise ReconstructionError(f"cannot write {path}: {error.strerror}") from error


# --- Missing entries ---
# Takes a census of the prompts in the store. Servers also log what made questions or judged answers,
# so the user has to choose: a template that matches may be a judge's.

SEARCH_BUDGET = 3_000_000_000  # characters to compare, about two seconds
MAX_TEXTS = 40  # per QA line to look for
MAX_CANDIDATES = 100  # templates to try
TELLING_SIZE = 16  # bytes; a shorter text may be in a prompt by chance
BEGINNING, END = 12, 8  # characters in which prompts of a group are alike
SHOWN_KINDS, SHOWN_GROUPS = 4, 2  # kinds with a template, groups without
PRIVATE_USE = 0xE000  # code points that few texts have
DIFFERENCES: dict[str, Callable[[str], str]] = {  # by the function that removes them
    "white space": lambda text: "".join(text.split()),
    "case": str.casefold,
    "the Unicode form of accents": lambda text: unicodedata.normalize("NFC", text),
    "white space, case, accents or punctuation": lambda text: "",
}
Texts = dict[str, str]  # of a QA line, by the names of the fields


class Kind(NamedTuple):
    """The prompts that a template makes of some QA lines, as far as they are in the store."""

    template: PromptTemplate
    match_count: int  # QA lines
    entries: dict[str, Entry]  # by prompt


def find_kind(template: PromptTemplate, qa_lines: Iterable[QA], finder: EntryFinder) -> Kind:
    matches: list[tuple[str, Entry]] = []
    for qa in qa_lines:
        with contextlib.suppress(CorruptedEntry):
            prompt, entry = finder.find(qa, [template])
            matches += [(prompt, entry)] if entry else []
    return Kind(template, len(matches), dict(matches))


def find_texts(prompts: Iterable[str], texts_of_lines: list[Texts]) -> dict[str, Texts]:
    """Returns the prompts that contain texts of QA lines, each with those of its best line."""
    lines_with: dict[str, list[int]] = {}
    for position, texts in enumerate(texts_of_lines):
        for text in filter(str.strip, dict.fromkeys(texts.values())):
            lines_with.setdefault(text, []).append(position)
    found = {prompt: [text for text in lines_with if text in prompt] for prompt in prompts}
    prompts_with = collections.Counter(itertools.chain.from_iterable(found.values()))
    best_texts: dict[str, Texts] = {}
    for prompt, texts_in_prompt in found.items():
        scores: collections.Counter[int] = collections.Counter()
        for text in texts_in_prompt:  # one that is in many prompts tells little
            scores.update(dict.fromkeys(lines_with[text], 1000 * len(text) // prompts_with[text]))
        for position, _ in scores.most_common(1):
            texts = texts_of_lines[position]
            best_texts[prompt] = {name: text for name, text in texts.items() if text.strip() and text in prompt}
    return best_texts


def template_of(prompt: str, texts: Texts) -> str:
    """Returns a prompt in which the names of fields stand for their texts."""
    # The longest goes first, because a shorter one may stand in it, or anywhere by chance.
    fields = sorted(texts.items(), key=lambda field: -len(field[1]))
    for mark, (_, text) in enumerate(fields, PRIVATE_USE):
        prompt = prompt.replace(text, chr(mark))  # a name might contain a text
    names = {mark: f"{{{name}}}" for mark, (name, _) in enumerate(fields, PRIVATE_USE)}
    return prompt.translate(names | {ord("{"): "{{", ord("}"): "}}"})


def candidate_templates(best_texts: dict[str, Texts]) -> list[PromptTemplate]:
    """Returns templates that would make some of the prompts, those first that would make most."""
    candidates: collections.Counter[str] = collections.Counter()
    for prompt, texts in best_texts.items():
        fields = [field for field in texts.items() if FIELD_NAME.fullmatch(field[0])]
        fields = sorted(fields, key=lambda field: -len(field[1]))
        sets = [[field] for field in fields] + [fields[:count] for count in range(2, len(fields) + 1)]
        candidates.update({template_of(prompt, dict(chosen)): 1 for chosen in sets})
    ranked = sorted(candidates, key=lambda text: (-candidates[text], len(text), text))
    return [PromptTemplate(text) for text in ranked[:MAX_CANDIDATES]]


def proved_kinds(templates: Iterable[PromptTemplate], join: Join, least: int) -> list[Kind]:
    """Returns the kinds with at least `least` prompts in the store, best first."""
    kinds = [find_kind(template, join.unmatched_sample, join.finder) for template in templates]
    kinds.sort(key=lambda kind: (-kind.match_count, len(kind.template.parts), len(kind.template.text)))
    proved: list[Kind] = []
    for kind in kinds:
        is_new = not any(kind.entries.keys() <= better.entries.keys() for better in proved)
        if is_new and len(kind.entries) >= least:
            proved.append(kind)
    return proved


def is_of_kind(prompt: str, kind: Kind, join: Join) -> bool:
    """Returns whether a kind explains a prompt, even one of a QA line outside the sample."""
    first, *others = [own_text for own_text, _ in kind.template.parts]
    own_length = len(first + "".join(others) + kind.template.tail)
    fits, rest = prompt.startswith(first), prompt[len(first) :]
    for own_text in others:
        fits = fits and own_text in rest
        rest = rest[rest.find(own_text) + len(own_text) :]
    fits = fits and rest.endswith(kind.template.tail)
    # A few characters fit other kinds, too. But without all lines, there is no better sign.
    may_fit = own_length >= TELLING_SIZE or join.unmatched_count > len(join.unmatched_sample)
    return prompt in kind.entries or (may_fit and fits)


def group_alike(texts_in: dict[str, Texts]) -> list[list[str]]:
    """Groups prompts that begin or end alike, whatever their QA texts. The largest is first."""
    shapes = {prompt: re.sub(r"\d+", "0", template_of(prompt, texts)) for prompt, texts in texts_in.items()}
    beginnings = collections.Counter(shape[:BEGINNING] for shape in shapes.values())
    ends = collections.Counter(shape[-END:] for shape in shapes.values())
    groups: dict[str, list[str]] = {}
    for prompt, shape in shapes.items():
        begins_alike = beginnings[shape[:BEGINNING]] >= min(len(shapes) / 2, ends[shape[-END:]])
        groups.setdefault(shape[:BEGINNING] if begins_alike else shape[-END:], []).append(prompt)
    return sorted(groups.values(), key=len, reverse=True)


def letters_of(text: str) -> str:
    return "".join(filter(str.isalnum, unicodedata.normalize("NFKD", text).casefold()))


def unexplained(best_texts: dict[str, Texts], kinds: list[Kind], join: Join) -> dict[str, Texts]:
    """Returns the prompts that no kind explains, each with its texts that are not there by chance."""
    names, rest = join.field_names, {}
    matched_texts = {text for qa in join.matched_sample for name, text in texts_of(qa) if name in names}
    for prompt, texts in best_texts.items():
        texts = {n: t for n, t in texts.items() if n in names or len(t.encode(errors="replace")) >= TELLING_SIZE}
        # After a match, only prompts with unmatched questions count. Those with matched ones are a judge's.
        if matched_texts and (not texts.keys() & names or any(text in prompt for text in matched_texts)):
            continue
        if not any(is_of_kind(prompt, kind, join) for kind in kinds):
            rest[prompt] = texts
    return rest


def explain(join: Join) -> ReconstructionError:
    """Returns an error that says why QA lines have no entry, with a hint if anything can be done."""
    sample, matched, bare = join.unmatched_sample, join.matched_sample, ReconstructionError(headline(join))
    if not sample or not join.finder.unused_prompts(0):  # every prompt has a line
        return bare
    by_depth = (sorted(texts_of(qa), key=lambda field: field[0].count(".")) for qa in sample)
    texts_of_lines = [dict(texts[:MAX_TEXTS]) for texts in by_depth]
    prompts = join.finder.unused_prompts(SEARCH_BUDGET // (1 + sum(map(len, texts_of_lines))))
    best_texts = find_texts(prompts, texts_of_lines)
    kinds = proved_kinds(candidate_templates(best_texts), join, min(2, len(prompts), join.unmatched_count))
    made = (template.make_prompt(qa) for qa in sample for template in join.templates)
    tried = {letters_of(prompt): prompt for prompt in made if prompt}
    near_misses = {prompt: tried[letters] for prompt in prompts if (letters := letters_of(prompt)) in tried}
    rest = unexplained({p: best_texts.get(p, {}) for p in prompts if p not in near_misses}, kinds, join)
    if join.unmatched_count <= 10 * join.counts.matched:  # what also fits the matched lines is a judge's
        kinds = [k for k in kinds if 2 * find_kind(k.template, matched, join.finder).match_count < len(matched)]
    kinds = sorted(kinds[:SHOWN_KINDS], key=lambda kind: len(kind.template.text))

    details = []
    for kind in kinds:
        what = f"matches {kind.match_count:,} of the {len(sample):,} QA lines looked at"
        details.append(f"{quoted(kind.template.text, 80)} {what}{answers(list(kind.entries.values()))}")
    of_prompts = f"of the {len(prompts):,} prompts looked at"
    if near_misses:
        details.append(f"{len(near_misses):,} {of_prompts} {describe_difference(*next(iter(near_misses.items())))}")
    for group in group_alike(rest)[:SHOWN_GROUPS]:
        what = f"look like {quoted(template_of(group[0], rest[group[0]]), 80)}, which no template makes"
        details.append(f"{len(group):,} {of_prompts} {what}{answers([prompts[prompt] for prompt in group])}")
    if not details:
        return bare
    lines = [f"{bare}. These kinds of prompts are in the store:"]
    lines += [f"  {number}. {detail}" for number, detail in enumerate(details, 1)]
    if kinds or near_misses or any(rest.values()):
        return ReconstructionError("\n".join(lines), hint_for(kinds, join))
    lines += [f"  tried: {quoted(prompt)}" for prompt in list(tried.values())[:1]]
    end = "  They contain none of the longer texts of the QA file. The store may be another experiment's."
    return ReconstructionError("\n".join([*lines, end]))


def headline(join: Join) -> str:
    """Returns how many QA lines have no entry, or why none has one."""
    counts = join.counts
    if counts.matched:
        return f"{join.unmatched_count:,} of {counted(counts.qa_lines, 'QA line')} have no entry"
    if not any(store.entries for store in join.finder.stores):
        return "nothing matched: the store is empty"
    if not join.unmatched_count:
        return f"nothing matched: no usable entry for {counted(counts.corrupted, 'QA line')}"
    if not counts.without_entry and not counts.corrupted:
        names = dict.fromkeys(name for qa in join.unmatched_sample for name, _ in texts_of(qa))
        return f"no QA line has text in {listed(join.field_names)}; found: {listed(names, 20) or 'no fields'}"
    return f"none of {counted(counts.qa_lines, 'QA line')} has a usable entry"


def answers(entries: Sequence[Entry]) -> str:
    return f"\n     {listed(sorted(set(map(model_name, entries))), 2)} answered {quoted(entries[0]['generation'], 60)}"


def describe_difference(stored: str, tried: str) -> str:
    cause = next(cause for cause, equal in DIFFERENCES.items() if equal(tried) == equal(stored))
    common = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(tried, stored))))
    excerpts = [ascii(text[max(0, common - 60) : common + 100]) for text in (tried, stored)]
    pair = f"\n     tried:   {excerpts[0]}\n     stored:  {excerpts[1]}"
    return f"are almost like a prompt tried; the first differs only in {cause}:{pair}"


def hint_for(kinds: list[Kind], join: Join) -> str:
    if not kinds:
        return "use the QA file of this run, or add a field with the whole prompt for --prompt_template"
    # A proposed template comes before the given ones, so that a trial run with these does not win.
    given = join.templates if join.counts.matched else []
    options = [" ".join(each.option() for each in [kind.template, *given]) for kind in kinds]
    text = "pick the kind that the model under test was asked with (servers also log question generators and judges), "
    return "\n  ".join([text + "and run again with its option:", *options])


# --- The run and the command ---

MAX_MEMORY = 5 << 30  # bytes, without the mapped store; an LMDB value has less than 4 GiB
_one_run = threading.Lock()  # at a time, because lmdb opens a store only once in a process


def reconstruct_inference(
    qa_output_path: str | os.PathLike[str],
    lmdb_path: str | os.PathLike[str],
    output_path: str | os.PathLike[str],
    *,
    prompt_template: str | Sequence[str] = DEFAULT_PROMPT_TEMPLATES,
    prompt_as_sent: bool = False,
    progress: bool = False,
) -> Counts:
    """Joins a QA file with the logger's LMDB, writes the merged JSONL, and returns what it found.

    The path `-` is standard input or output; for `lmdb_path` see `locate_stores`. Of several templates, the first
    with an entry is used. `prompt_as_sent` writes the prompt as sent, without `user: `, into `prompt`. Messages
    go to the logger `reconstruct_inference`. Raises ValueError if a template cannot be used, BrokenPipeError if the
    output is a pipe that nobody reads, and ReconstructionError if no line can be written.
    """
    texts = [prompt_template] if isinstance(prompt_template, str) else prompt_template
    templates = [PromptTemplate(text) for text in texts]
    qa_path = "/dev/stdin" if qa_output_path == "-" else os.fspath(qa_output_path)
    output = "/dev/stdout" if output_path == "-" else os.fspath(output_path)
    stores = locate_stores(os.fspath(lmdb_path))
    if os.path.isdir(output) or not os.path.basename(output):
        raise ReconstructionError(f"cannot write {output}: it is a folder")
    for each in [qa_path, *map(data_file, stores), *map(lock_file, stores)]:
        if os.path.isfile(each) and is_same_file(output, each):
            raise ReconstructionError(f"refusing to overwrite the input {each}")
    while (descriptor := os.open(os.devnull, os.O_RDONLY)) <= 2:
        pass  # a standard stream is closed, and a store would be opened in its place
    os.close(descriptor)
    with _one_run, contextlib.ExitStack() as stack:
        copyreg.clear_extension_cache()  # the unpickler takes from it without asking
        stack.callback(copyreg.clear_extension_cache)
        stack.callback(setattr, sys, "excepthook", sys.excepthook)
        sys.excepthook = lambda *error: None  # CPython calls it for a bytearray of absurd size
        finder = EntryFinder(stores, progress, stack)
        join = Join(qa_path, finder, templates, prompt_as_sent)
        merged = join.merge_lines(progress)
        first = next(merged, None)
        if first is None:  # before an output is made
            has_objects = join.unmatched_count or join.counts.corrupted
            raise explain(join) if has_objects else not_json_lines(qa_path, join.first_line)
        replaced = " (replaced the old file)" if output != "/dev/stdout" and os.path.isfile(output) else ""
        with open_output(output) as file:
            file.write(first)
            file.writelines(merged)
            explanation = explain(join)  # a stop keeps the old file
        if explanation.hint:
            log.warning("%s", explanation)
    summarize(join)
    log.info("wrote %s to %s%s", counted(join.counts.matched, "line"), output, replaced)
    return join.counts


def summarize(join: Join) -> None:
    """Logs the counts of QA lines, entries and models."""
    counts = join.counts
    kinds = {"matched": counts.matched, "without an entry": counts.without_entry}
    kinds |= {"malformed": counts.malformed, "corrupted": counts.corrupted}
    parts = ", ".join(f"{number:,} {kind}" for kind, number in kinds.items() if number)
    log.info("QA lines: %s (%s)", f"{counts.qa_lines:,}", parts)
    for store in join.finder.stores:
        lost = f" ({store.lost:,} of {store.entries + store.lost:,} lost)" if store.lost else ""
        log.info("entries: %s in %s%s", f"{store.entries:,}", store.path, lost)
    for name, model in counts.models.items():
        period = ""
        if model.first:
            first, last = (time.strftime("%Y-%m-%d %H:%M", time.localtime(at)) for at in (model.first, model.last))
            period = f", {first}" if first == last else f", {first} to {last.removeprefix(first[:11])}"
        log.info("model: %s (%s%s)", name, counted(model.lines, "line"), period)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    parser = argparse.ArgumentParser(
        description="Rebuild the generation.jsonl of an inference run from the activations logger's LMDB.",
        epilog="example:\n  %(prog)s --qa_output_path qa.jsonl \\\n"
        "      --lmdb_path lmdb_data/activations.lmdb --output_path generation.jsonl\n\n"
        "exit codes: 0 = lines written, 1 = error or no match, 2 = wrong usage,\n"
        "            129, 130, 143 = stopped by a signal, 141 = output closed",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    how = "how prompts were made: {name} is a field, \\n a line break; may be repeated: each QA line uses the first "
    how += f"template that has an entry (default: {DEFAULT_PROMPT_TEMPLATE!r}, with and without `user: `)"
    path: dict[str, Any] = {"required": True, "type": os.path.expanduser, "metavar": "PATH"}
    add = parser.add_argument
    add("--qa_output_path", **path, help="JSON Lines file with the questions; `-` is standard input")
    add("--lmdb_path", **path, help="path passed to the activations logger; `PATH_metadata` is found automatically")
    add("--output_path", **path, help="generation.jsonl to write; `-` is standard output")
    add("--prompt_template", action="append", metavar="TEMPLATE", help=how)
    add("--prompt_as_sent", action="store_true", help="put the prompt as sent into `prompt`, as HalluLens does")
    add("--verbose", action="store_true", help="log the hash and outcome of QA lines, and all warnings")
    add("--version", action="version", version=f"%(prog)s {__version__}")
    options = vars(parser.parse_args(argv))
    for name, value in options.items():
        if value == "":
            parser.error(f"argument --{name}: the value is empty (an unset shell variable?)")
    templates = options["prompt_template"] or []
    unescaped = [re.sub(r"\\([n\\])", lambda c: "\n" if c[1] == "n" else "\\", text) for text in templates]
    options["prompt_template"] = unescaped or DEFAULT_PROMPT_TEMPLATES
    for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR):
        logging.addLevelName(level, {logging.WARNING: "warning: ", logging.ERROR: "error: "}.get(level, ""))
    level = logging.DEBUG if options.pop("verbose") else logging.INFO
    logging.basicConfig(level=level, format="%(levelname)s%(message)s", force=True)
    exit_on_stop_signals()
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (MAX_MEMORY if soft < 0 else min(soft, MAX_MEMORY), hard))
    progress = sys.stderr is not None and sys.stderr.isatty()
    with contextlib.ExitStack() as stack:
        if progress:
            from tqdm.contrib.logging import logging_redirect_tqdm

            stack.enter_context(logging_redirect_tqdm())  # above the bar
        try:
            reconstruct_inference(**options, progress=progress)
        except SystemExit:
            log.error("stopped" if options["output_path"] == "-" else f"stopped; {options['output_path']} is unchanged")
            raise
        except BrokenPipeError:
            return 128 + signal.SIGPIPE
        except ValueError as error:
            parser.error(f"argument --prompt_template: {error}")
        except (ReconstructionError, OSError, MemoryError, RecursionError, lmdb.Error) as error:
            log.error("%s", str(error) or "out of memory")
            return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
