#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["lmdb>=1.4.1", "tqdm>=4.65"]
# ///
"""Rebuild the JSONL of an inference run from its QA file and the activations logger's LMDB.

The logger keeps each request as an entry in LMDB, under the SHA-256 of its prompt. This script makes the
prompt of each QA line, looks up its hash, and writes the QA line with the generation added:

    read_qa_lines → parse_qa → PromptTemplate.make_prompt → key_of → EntryFinder.find → merge → open_output

`Join` drives that flow. Where QA lines have no entry, `explain` says which prompts the store holds instead.
"""

from __future__ import annotations

import sys

if __name__ == "__main__" and not getattr(sys.flags, "safe_path", sys.flags.isolated):
    del sys.path[0]  # the script's own folder, where a `types.py` would be imported as Python's own

import argparse
import codecs
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
from typing import Any, BinaryIO, NamedTuple, NoReturn

if __name__ == "__main__":
    if sys.version_info < (3, 10):  # noqa: UP036
        sys.exit("error: this needs Python 3.10 or later")
    if not all(map(importlib.util.find_spec, ("lmdb", "tqdm"))):
        sys.exit(f"error: this needs lmdb and tqdm: {sys.executable} -m pip install 'lmdb>=1.4.1' 'tqdm>=4.65'")

import lmdb

__version__ = "3.0.0"

# Servers log a chat message as `role: content`. Since February 2026 they leave out the role where a request
# has a single message, so the same question has one form or the other.
DEFAULT_PROMPT_TEMPLATE = "user: Answer in one sentence. Q:{prompt}\n A:"
DEFAULT_PROMPT_TEMPLATES = (DEFAULT_PROMPT_TEMPLATE, DEFAULT_PROMPT_TEMPLATE.removeprefix("user: "))

QA = dict[str, Any]  # the JSON object of a QA line
Entry = dict[str, Any]  # the fields that an entry adds to its QA line, under their names in the output

log = logging.getLogger("reconstruct_inference")


class ReconstructionError(Exception):
    """A problem that the user can solve. `hint` says how, in terms of the command line."""

    def __init__(self, text: str, hint: str = "") -> None:
        super().__init__(text)
        self.hint = hint


class NothingMatched(ReconstructionError):
    """No QA line has a usable entry. The text says why, from what is in the store."""


class UnusableStore(ReconstructionError):
    """One of the two stores cannot be read. The other one may be enough."""


class MalformedLine(Exception):
    """A QA line cannot be used. The text is the reason."""


class CorruptedEntry(Exception):
    """An entry cannot be used. The text is the reason."""


class ModelCount(types.SimpleNamespace):
    """How many lines one model answered, and when the first and the last of them were logged."""

    def __init__(self) -> None:
        self.lines = 0
        self.first: float | None = None  # seconds since 1970; None if no entry has a timestamp
        self.last: float | None = None


class Counts(types.SimpleNamespace):
    """What a run found. `qa_lines` is the sum of the four counts that follow it."""

    def __init__(self) -> None:
        self.qa_lines = 0  # lines of the QA file that are not blank
        self.matched = 0  # lines written
        self.without_entry = 0  # QA lines whose prompt is in no store
        self.malformed = 0  # QA lines that were skipped
        self.corrupted = 0  # QA lines whose entry was found but cannot be used
        self.models: dict[str, ModelCount] = {}  # the matched lines, by model name


def quoted(text: str, limit: int = 160) -> str:
    """Returns a text in quotes, on one line. The middle of a long one is left out."""
    if len(text) > limit:
        text = f"{text[: limit // 2]} … {text[-limit // 2 :]}"
    return repr(text)


def listed(names: Iterable[str], limit: int = 8) -> str:
    """Returns the first few of some names, as a list within a sentence."""
    names = [f"`{name}`" for name in names]
    return ", ".join(names[:limit] + ["…"] * (len(names) > limit))


def counted(number: int, noun: str, plural: str = "") -> str:
    """Returns a number with its noun: `1 line`, `2,000 lines`."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


@contextlib.contextmanager
def progress_bar(what: str, size: int | None, shown: bool) -> Iterator[Callable[[int], object]]:
    """Shows a bar on the terminal. Yields the function that moves it by some bytes of `size`."""
    if not shown:
        yield lambda number_of_bytes: None
        return
    from tqdm import tqdm  # only here, because the import takes longer than a small run

    with tqdm(desc=what, total=size, unit="B", unit_scale=True, leave=False) as bar:
        yield bar.update
        bar.refresh()  # to show 100 %


# --- QA lines and prompts ---------------------------------------------------------------------------
# Reads the QA file line by line, and makes of each line the prompt that the model received.

BUFFER_SIZE = 1 << 18  # bytes
JSON_WHITESPACE = " \t\r\n"
PACKED_FORMATS = {  # by how a file begins; the command unpacks it to standard output
    b"\x1f\x8b": ("gzip", "zcat"),
    b"BZh": ("bzip2", "bzcat"),
    b"\xfd7zXZ\0": ("xz", "xzcat"),
    b"\x28\xb5\x2f\xfd": ("zstd", "zstdcat"),
    b"PK\x03\x04": ("ZIP", ""),  # which may be an Excel file
}
CSV_TO_JSONL = (
    "import csv, json, sys; csv.field_size_limit(10**9); "
    "rows = csv.DictReader(open(sys.argv[1], newline='', encoding='utf-8-sig')); "
    "print(*map(json.dumps, rows), sep='\\n')"
)
MAX_DEPTH = 4  # of objects and lists in a QA line
FIELD_NAME = re.compile(r"(?!\d+$)[^{}\[!:]+")  # what can stand in a template's braces
_decode_json = json.JSONDecoder().raw_decode
_new_hash = hashlib.sha256().copy  # faster than sha256(), which looks the algorithm up in OpenSSL


def read_qa_lines(path: str, progress: bool) -> Iterator[tuple[int, bytes]]:
    """Yields number and bytes of each line that is not blank. Raises ReconstructionError if the file cannot be read."""
    try:
        with io.BufferedReader(io.FileIO(path), BUFFER_SIZE) as qa_file:
            if qa_file.isatty():
                log.info("reading QA lines from the terminal; Ctrl-D ends them")
            beginning = qa_file.peek()
            for magic, (packed_format, unpack) in PACKED_FORMATS.items():
                if beginning.startswith(magic):  # a packed line may look like JSON by chance
                    hint = f"--qa_output_path <({unpack} {shlex.quote(path)})" if unpack else ""
                    raise ReconstructionError(f"{path} is compressed ({packed_format})", hint)
            if beginning.startswith(codecs.BOM_UTF8):
                qa_file.read(len(codecs.BOM_UTF8))
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
    """Returns the JSON object of a QA line. Raises MalformedLine if it is not one in UTF-8."""
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


def not_json_lines(path: str, first_line: bytes) -> ReconstructionError:
    """Returns the error for a QA file none of whose lines is a JSON object. It names other formats if in no doubt."""
    if not first_line:
        return ReconstructionError(f"{path} is empty or has only blank lines")
    text = first_line.decode(errors="backslashreplace").strip()
    file = shlex.quote(path)
    hint = "expected JSON Lines: one JSON object per line, in UTF-8"
    if first_line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        hint = f"it is in UTF-16: --qa_output_path <(iconv -f UTF-16 -t UTF-8 {file})"
    elif re.match(r"\[$|\[\s*\{", text):
        hint = f"it is one JSON array: --qa_output_path <(jq -c '.[]' {file})"
    elif text == "{":
        hint = f"its objects are spread over several lines: --qa_output_path <(jq -c . {file})"
    elif path.lower().endswith(".csv"):
        hint = f'it is CSV: python3 -c "{CSV_TO_JSONL}" {file} > {shlex.quote(path + ".jsonl")}'
    return ReconstructionError(f"no line of {path} is a JSON object; it begins with {quoted(text, 80)}", hint)


def texts_of(value: object, name: str = "", depth: int = 0) -> Iterator[tuple[str, str]]:
    """Yields the names and the texts of a QA line's fields, numbers included, and dotted names for nested ones."""
    items: Iterable[tuple[object, object]] = ()
    if type(value) is dict:
        items = value.items()
    elif type(value) is list:
        items = enumerate(value)
    elif type(value) in (str, int, float):
        yield name, str(value)
    if depth < MAX_DEPTH:
        for step, item in items:
            yield from texts_of(item, f"{name}.{step}" if name else str(step), depth + 1)


class PromptTemplate:
    """Text in which `{name}` stands for the text or the number in that field of a QA line.

    A dotted name leads into objects and lists: `{messages.0.content}`. Raises ValueError if the text cannot be used.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.parts: list[tuple[str, str]] = []  # a text, and the name of the field that follows it
        self.tail = ""
        try:
            for literal, name, spec, conversion in string.Formatter().parse(text):
                self.tail += literal
                if name is not None:
                    if not FIELD_NAME.fullmatch(name) or spec or conversion:
                        raise ValueError("only the name of a field can stand in braces, as in {prompt}")
                    self.parts.append((self.tail, name))
                    self.tail = ""
            if not self.parts:
                raise ValueError("it names no field; write {prompt}, in single braces, where the question goes")
        except ValueError as error:
            raise ValueError(f"{quoted(text)} cannot be used: {error}") from None

    def make_prompt(self, qa: QA) -> str:
        """Returns the prompt for a QA line, or an empty text if it lacks a field that the template names."""
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
        # A terminal would obey some characters, so they are spelled out.
        spelled = re.sub(r"[\\']|[^ -~]", lambda c: "".join(f"\\x{byte:02x}" for byte in c[0].encode()), typed)
        return f"--prompt_template=$'{spelled}'"


def key_of(prompt: str) -> bytes:
    """Returns the key under which the logger keeps a prompt: the SHA-256 of its UTF-8, in lower-case hex."""
    # UTF-8 has no lone surrogates, so no model received any. Such prompts get a key that no entry has.
    prompt_hash = _new_hash()
    prompt_hash.update(prompt.encode("utf-8", "surrogatepass"))
    return prompt_hash.hexdigest().encode()


# --- Entries ----------------------------------------------------------------------------------------
# Decodes what the logger kept of a request. A value is a pickle, and a pickle is a program: it names what
# the unpickler imports and calls. So every name gives a stand-in that does nothing.

ZERO_BLOCK = "\0" * 512  # the smallest block that a disk loses
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

    persistent_load = find_class


class ValueFile(io.RawIOBase):
    """A value as a file that is read piece by piece, so that activations never come into memory."""

    def __init__(self, read_at: Callable[[int, int], bytes], start: int, size: int) -> None:
        self._read_at = read_at  # called with a position and a number of bytes
        self._start = self._position = start
        self._end = start + size

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = self._start + offset
        return offset

    def read(self, size: int = -1) -> bytes:
        rest = self._end - self._position
        data = self._read_at(self._position, rest if size < 0 else min(size, rest))
        self._position += len(data)
        return data

    def readinto(self, buffer: Any) -> int:
        """Skips the content of a bytes object. The unpickler calls this for nothing else."""
        self._position += len(buffer)
        return len(buffer)


def read_entry(value: io.BytesIO | ValueFile) -> tuple[object, Entry]:
    """Returns the prompt that a value was logged for, None if it does not say, and its entry.

    The metadata store holds the logged fields themselves. The activations store holds `{"data": fields,
    "metadata": …}` or, from the earliest loggers, the fields themselves. Loggers other than HalluLens' may
    write JSON in the place of pickles. Raises CorruptedEntry if the value has no usable response.
    """
    try:
        is_json = value.read(1) == b"{"
        value.seek(0)
        logged = json.loads(value.read()) if is_json else InertUnpickler(value).load()
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


def time_logged(entry: Entry) -> float | None:
    """Returns when an entry was logged, in seconds since 1970, or None if it does not say."""
    timestamp: Any = entry["timestamp"]
    if type(timestamp) in (float, int) and 0 < timestamp <= MAX_TIMESTAMP:
        return float(timestamp)
    return None


def model_name(entry: Entry) -> str:
    """Returns the name of the model that answered, as messages show it."""
    model = entry["model"]
    return model if type(model) is str and model.isprintable() else "(no name)"


def newest_entry(values: Iterable[io.BytesIO | ValueFile], prompt: str) -> Entry | None:
    """Returns the newest of the entries that some versions of a prompt's value hold, None if there are none.

    Raises CorruptedEntry if there are some, but none is usable.
    """
    newest: Entry | None = None
    newest_at = 0.0
    reason: CorruptedEntry | None = None
    for value in values:
        try:
            logged_prompt, entry = read_entry(value)
        except CorruptedEntry as error:
            reason = error
            continue
        if logged_prompt is not None and logged_prompt != prompt:
            reason = CorruptedEntry("it was logged for a different prompt")
            continue
        logged_at = time_logged(entry) or 0.0
        if newest is None or logged_at > newest_at:
            newest, newest_at = entry, logged_at
    if reason and newest is None:
        raise reason
    return newest


# --- Child processes --------------------------------------------------------------------------------
# A damaged store can end the process that reads it. So a child process reads it first.

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def exit_on_stop_signals() -> None:
    """Makes the stop signals raise SystemExit, except those that the caller ignores, as nohup does."""

    def stop(number: int, frame: object) -> None:
        for each in STOP_SIGNALS:
            signal.signal(each, signal.SIG_IGN)  # a second one must not interrupt the cleaning up
        raise SystemExit(128 + number)

    for number in STOP_SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, stop)


def run_in_child(function: Callable[..., object], *arguments: object) -> Any:
    """Returns what a function returns in a child process, or None if that dies. Raises ReconstructionError."""
    reading, writing = os.pipe()
    # A signal must not reach the child before it has handlers of its own: it would do the parent's work.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # other threads do not matter to this child
            child = os.fork()
        if child == 0:
            answer_as_child(writing, mask, function, arguments)
    except OSError as error:
        os.close(reading)
        raise ReconstructionError(f"cannot start a process: {error.strerror}") from error
    finally:
        os.close(writing)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    try:
        with open(reading, "rb") as pipe:
            answer = pipe.read()
    except BaseException:
        os.kill(child, signal.SIGTERM)  # it must close its store: a reader left behind makes a live store grow
        raise
    finally:
        with contextlib.suppress(ChildProcessError):  # the caller may ignore SIGCHLD
            os.waitpid(child, 0)
    return json.loads(answer) if answer else None


def answer_as_child(writing: int, mask: Any, function: Callable[..., object], arguments: Any) -> NoReturn:
    """Writes what a function returns to a pipe, and ends this process."""
    try:
        exit_on_stop_signals()
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        sys.stderr = os.fdopen(os.dup(2), "w")  # for the progress bar
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # where lmdb writes as it aborts
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.write(writing, json.dumps(function(*arguments)).encode())
    finally:
        os._exit(0)


# --- Stores -----------------------------------------------------------------------------------------
# Finds the values of a prompt, through lmdb after a full check in a child process. Where that fails, the
# store's file is scanned for entries instead.

LOCK_PATIENCE = 5  # seconds; a lock server that is down never answers
SHORT_VALUE = 1 << 16  # bytes; a longer value holds activations
MAX_STORE_SIZE = 1 << 42  # bytes; a header that claims more is damaged
SAMPLE_SIZE = 6_000  # entries to look at when some are missing
ZARR_FILES = {".zgroup", ".zarray", ".zattrs", "zarr.json"}


def locate_stores(path: str) -> list[str]:
    """Returns the paths of the metadata store and the activations store, which need not exist.

    The logger keeps the activations store at P and appends `_metadata` to the text of P for the metadata store,
    so that this lies beside P, or inside it if P ends in a slash. P may also be the metadata store, a `data.mdb`,
    or a store that is a single file.
    """
    if os.path.basename(path) == "data.mdb" and os.path.isfile(path):
        path = os.path.dirname(path) or "."
    base = path.rstrip("/") if path.strip("./") else os.path.abspath(path)  # `.` has no name to append to
    places = [f"{base}_metadata", f"{base}/_metadata"]
    if path.endswith("/"):
        places.reverse()
    for place in places:
        if os.path.exists(place):
            return [place, base]
    if base.endswith("_metadata"):
        return [base, os.path.normpath(base.removesuffix("_metadata"))]
    return [base] if os.path.isfile(base) else [places[0], base]


def data_file(store_path: str) -> str:
    """Returns the file with the data of a store, which is a folder or that file itself."""
    return store_path if os.path.isfile(store_path) else f"{store_path}/data.mdb"


def lock_file(store_path: str) -> str:
    """Returns the file in which LMDB registers the readers of a store."""
    return f"{store_path}-lock" if os.path.isfile(store_path) else f"{store_path}/lock.mdb"


def is_same_file(one: str, other: str) -> bool:
    """Returns whether two paths, which need not exist, lead to the same file."""
    with contextlib.suppress(OSError):
        return os.path.samefile(one, other)
    return os.path.abspath(one) == os.path.abspath(other)


def require_readable(path: str) -> None:
    """Raises UnusableStore if there is no store at a path, and ReconstructionError if it is in use here."""
    file = data_file(path)
    try:
        names = [] if file == path else sorted(os.listdir(path))
        if ZARR_FILES & set(names):
            hint = "HalluLens exports it with `export_generation_jsonl` from utils/exp.py"
            raise UnusableStore(f"{path} has no `data.mdb`: it is a Zarr store, which is not supported", hint)
        if file != path and "data.mdb" not in names:
            raise UnusableStore(f"{path} has no `data.mdb`; it contains {listed(names) or 'nothing'}")
        with open(file, "rb") as opened:
            if not opened.read(1):
                raise UnusableStore(f"{file} is empty")
    except FileNotFoundError:
        raise UnusableStore(f"{path}: no such file or folder") from None
    except OSError as error:
        raise UnusableStore(f"cannot read {path}: {error.strerror}") from None
    descriptors = os.listdir("/dev/fd") if os.path.isdir("/dev/fd") else []
    if any(is_same_file(f"/dev/fd/{descriptor}", file) for descriptor in descriptors):
        raise ReconstructionError(f"{file} is open in this process already; close it there first")


def open_lmdb(path: str, lock: bool) -> lmdb.Environment:
    options = {"subdir": os.path.isdir(path), "lock": lock, "readonly": True, "create": False}
    try:
        return lmdb.open(os.fsencode(path), map_size=0, **options)  # 0 stands for the logger's own size
    except lmdb.MemoryError:  # `ulimit -v` allows less
        return lmdb.open(os.fsencode(path), map_size=os.path.getsize(data_file(path)), **options)


def ask_child(function: Callable[..., dict[str, int]], path: str, *arguments: object) -> tuple[dict[str, int], bool]:
    """Returns what a function finds in a store, nothing if that is damaged, and whether it was locked meanwhile."""
    file = lock_file(path)
    # Through a symbolic or hard link, lmdb would write to what it leads to.
    can_lock = os.path.isfile(file) and not os.path.islink(file) and os.stat(file).st_nlink == 1
    for lock in (True, False) if can_lock else (False,):  # the lock may fail; without it, a logger may disturb
        found = run_in_child(function, path, lock, *arguments)
        if found:
            return found, lock
    return {}, False


def read_claims(path: str, lock: bool) -> dict[str, int]:
    """Returns the numbers of keys and bytes that the header of a store claims. Runs in a child process."""
    signal.alarm(LOCK_PATIENCE)
    with open_lmdb(path, lock) as store:
        stat = store.stat()
        size = (store.info()["last_pgno"] + 1) * stat["psize"]
        if not stat["entries"] * 64 <= size <= MAX_STORE_SIZE:  # a key alone has 64 bytes
            raise ValueError("the header is damaged")
        return {"keys": stat["entries"], "size": size}


def check(path: str, lock: bool, progress: bool) -> dict[str, int]:
    """Reads a whole store, and returns its numbers of keys, entries and samples. Runs in a child process."""
    signal.alarm(LOCK_PATIENCE)
    with open_lmdb(path, lock) as store, store.begin() as scan, store.begin(buffers=True) as lookup:
        signal.alarm(0)
        with progress_bar(os.path.basename(path), os.path.getsize(data_file(path)), progress) as advance:
            # A function of its own, because a signal in a loop here makes Python 3.13 skip the `with`.
            return look_up_every_entry(scan, lookup, advance)


def look_up_every_entry(scan: Any, lookup: Any, advance: Callable[[int], object]) -> dict[str, int]:
    counts = {"keys": 0, "entries": 0, "samples": 0}
    claimed = scan.stat()["entries"]
    for key in itertools.islice(scan.cursor().iternext(values=False), claimed + 1):  # damaged trees can be endless
        counts["keys"] += 1
        if len(key) == 64:
            counts["entries"] += 1
            int(key, 16)  # a ValueError if it is not a hash
            value = lookup.get(key)
            value[-1]  # a TypeError if the key leads nowhere
            advance(len(value))
        elif key[64:65] == b"_":
            counts["samples"] += 1  # `<hash>_<request id>`, of a prompt that was asked several times
    if counts["keys"] != claimed:
        raise ValueError("not every key is there")
    return counts


class LmdbStore:
    """A store that is read through lmdb, after a check."""

    lost = 0

    def __init__(self, path: str, lock: bool, counts: dict[str, int], stack: contextlib.ExitStack) -> None:
        self.path, self.is_locked = path, lock
        self.key_count, self.entries = counts["keys"], counts["entries"]
        self.mtime_ns = os.stat(data_file(path)).st_mtime_ns
        self._environment = stack.enter_context(open_lmdb(path, lock))
        # Without a lock, a logger may overwrite what a transaction sees, so that each look-up has its own.
        self._snapshot = stack.enter_context(self._environment.begin(buffers=True)) if lock else None

    def keys(self) -> Iterator[bytes]:
        """Yields the keys of entries in their order."""
        with self._environment.begin() as transaction:
            yield from (key for key in transaction.cursor().iternext(values=False) if len(key) == 64)

    def values(self, key: bytes) -> Iterable[io.BytesIO | ValueFile]:
        """Returns the value of a key, if there is one. Raises CorruptedEntry if lmdb cannot read it."""
        try:
            value = (self._snapshot or self._environment.begin(buffers=True)).get(key)
        except lmdb.Error as error:
            raise CorruptedEntry(f"it cannot be read ({error})") from None
        if value is None:
            return ()
        if len(value) <= SHORT_VALUE:
            return (io.BytesIO(value),)
        return (ValueFile(lambda position, size: bytes(value[position : position + size]), 0, len(value)),)


# What is known here of LMDB's files, from mdb.c. A leaf node is the size of a value in four bytes, flags and the
# size of the key in two each, the key, and the value. A long value lies on overflow pages of its own: the number
# of the first page in eight bytes (and eight more in LMDB 1.0), two of padding, a flag in two, the number of pages
# in four, and the value.
LMDB_MAGIC = b"\xde\xc0\xef\xbe"
LEAF_NODE = re.compile(rb"(?s)(.{4})\0\0\x40\0([0-9a-f]{64})(?=[\x80{])")  # the value is a pickle or JSON
OVERFLOW_PAGE = re.compile(rb"(?s)\x04\0(.{4})(?=[\x80{])")
OVERFLOW_FLAG_OFFSETS = (10, 18)  # bytes from the beginning of the page, in LMDB 0.9 and in 1.0
PAGE_SIZES = [1 << power for power in range(9, 17)]  # bytes
SCAN_BLOCK = 1 << 16  # bytes, the largest page size and a multiple of all, so that no node crosses its end
DISK_BLOCK = 1 << 12  # bytes


class SalvagedStore:
    """A store whose file is scanned for entries, older versions included, without trust in its structure."""

    is_locked = False
    lost = 0  # entries that it once had, as far as is known

    def __init__(self, path: str, progress: bool, stack: contextlib.ExitStack) -> None:
        self.path = path
        self.read_error = ""  # what the disk said about a block that it cannot read
        self._file = os.open(data_file(path), os.O_RDONLY)
        stack.callback(os.close, self._file)
        self.size = os.fstat(self._file).st_size
        self.mtime_ns = os.fstat(self._file).st_mtime_ns
        self.beginning = self._read(0, SCAN_BLOCK)
        self._places: dict[bytes, list[tuple[int, int]]] = {}  # start and size of what may be a key's value
        self._usable_keys: set[bytes] = set()
        with progress_bar(f"scanning {os.path.basename(path)}", self.size, progress) as advance:
            for start in range(0, self.size, SCAN_BLOCK):
                self._scan(start, self._read(start, SCAN_BLOCK))
                advance(SCAN_BLOCK)
        self.entries = len(self._usable_keys)

    def keys(self) -> Iterator[bytes]:
        """Yields the keys of entries in their order."""
        return iter(sorted(self._places))

    def values(self, key: bytes) -> Iterable[io.BytesIO | ValueFile]:
        """Yields what may be versions of a key's value."""
        for start, size in self._places.get(key, ()):
            yield ValueFile(self._read, start, size)

    def _scan(self, block_start: int, block: bytes) -> None:
        for node in LEAF_NODE.finditer(block):
            self._add(block_start + node.end(), int.from_bytes(node[1], "little"), node[2])
        for page in OVERFLOW_PAGE.finditer(block):
            for offset in OVERFLOW_FLAG_OFFSETS:
                start = max(0, page.start() - offset)
                number = int.from_bytes(block[start : start + 8], "little")
                page_size = (block_start + start) / (number or 1)
                if page_size in PAGE_SIZES:
                    header_size = page.end() - start
                    pages = int.from_bytes(page[1], "little")
                    self._add(block_start + page.end(), pages * int(page_size) - header_size, None)

    def _add(self, start: int, size: int, key: bytes | None) -> None:
        """Remembers what may be a value. Without a key, the prompt in it gives the key."""
        prompt: object = None
        with contextlib.suppress(CorruptedEntry):
            prompt, _ = read_entry(ValueFile(self._read, start, size))
            if type(prompt) is str:
                key = key or key_of(prompt)
            if key:
                self._usable_keys.add(key)
        if key:
            self._places.setdefault(key, []).append((start, size))

    def _read(self, start: int, size: int) -> bytes:
        """Returns some bytes of the file, with zeros for the blocks that the disk cannot read."""
        try:
            return os.pread(self._file, size, start)
        except OSError as error:
            self.read_error = error.strerror
        if size <= DISK_BLOCK:
            return bytes(size)
        blocks = range(start, start + size, DISK_BLOCK)
        return b"".join(self._read(block, min(DISK_BLOCK, start + size - block)) for block in blocks)


def salvage(path: str, progress: bool, stack: contextlib.ExitStack) -> SalvagedStore:
    """Scans the file of a store that lmdb cannot read. Raises UnusableStore if it is something else."""
    store = SalvagedStore(path, progress, stack)
    if not store.entries and LMDB_MAGIC not in store.beginning:
        beginning = quoted(store.beginning[:60].decode(errors="backslashreplace"))
        hint = "are --qa_output_path and --lmdb_path swapped?" if beginning.startswith("'{") else ""
        what = f"{data_file(path)} is not an LMDB file; it begins with {beginning}"
        raise UnusableStore(f"{what}; expected a folder that contains `data.mdb`", hint)
    what = "is damaged or was written by an incompatible LMDB; scanned its raw file for entries"
    claims, _ = ask_child(read_claims, path)
    if claims:
        store.lost = max(0, claims["keys"] - store.entries)
        if store.size < claims["size"]:
            what = f"is an incomplete copy: {store.size:,} of {claims['size']:,} bytes, "
            what += f"{counted(claims['keys'], 'entry', 'entries')} when it was whole"
    log.warning("%s %s", path, what)
    if store.read_error:
        log.warning("%s: some of it cannot be read (%s)", path, store.read_error)
    log.warning("%s: %s recovered", path, counted(store.entries, "entry", "entries"))
    return store


def open_store(path: str, progress: bool, stack: contextlib.ExitStack) -> LmdbStore | SalvagedStore:
    """Opens a store. Raises UnusableStore if there is none, or if it holds something else."""
    require_readable(path)
    counts, lock = ask_child(check, path, progress)
    if counts:
        if counts["samples"] and not counts["entries"]:
            raise UnusableStore(f"{path} holds only multi-sample entries (`<hash>_<id>`), which are not supported")
        if counts["keys"] and not counts["entries"]:
            raise UnusableStore(f"the keys in {path} are not prompt hashes: this LMDB holds something else")
        if counts["samples"]:
            log.warning("%s: multi-sample entries (`<hash>_<id>`) are not supported; skipped", path)
        with contextlib.suppress(lmdb.Error):
            return LmdbStore(path, lock, counts, stack)
    return salvage(path, progress, stack)


class EntryFinder:
    """Finds entries in the metadata store, and in the activations store what the first lacks.

    Raises UnusableStore if no store can be read.
    """

    def __init__(self, paths: list[str], progress: bool, stack: contextlib.ExitStack) -> None:
        self.stores: list[LmdbStore | SalvagedStore] = []
        self._progress, self._stack = progress, stack
        # Of the keys below a bound, which are a sample, those that belong to a QA line.
        self.sample_bound = b"g"  # behind every hex digit
        self.used_keys: set[bytes] = set()
        self._unopened = list(paths)
        problems: list[UnusableStore] = []
        while self._unopened and not self.stores:
            try:
                self._open_next_store()
            except UnusableStore as error:
                problems.append(error)
        if not self.stores:
            raise UnusableStore("; ".join(map(str, reversed(problems))), problems[-1].hint)
        for problem in problems:
            log.warning("%s", problem)

    def _open_next_store(self) -> None:
        store = open_store(self._unopened.pop(0), self._progress, self._stack)
        self.stores.append(store)
        if store.entries > SAMPLE_SIZE:  # hashes are random, so a share of the numbers is a share of the keys
            self.sample_bound = min(self.sample_bound, b"%016x" % ((SAMPLE_SIZE << 64) // store.entries))

    def find(self, qa: QA, templates: Iterable[PromptTemplate]) -> tuple[str, Entry | None]:
        """Returns the first prompt made of a QA line that has an entry, and the entry.

        If none has one, returns the first prompt, empty if no template makes one, and None. Raises CorruptedEntry
        if there are entries, but none is usable.
        """
        first_prompt = ""
        reason: CorruptedEntry | None = None
        for template in templates:
            prompt = template.make_prompt(qa)
            if not prompt:
                continue
            first_prompt = first_prompt or prompt
            key = key_of(prompt)
            for store in self.stores:
                entry = None
                try:
                    entry = newest_entry(store.values(key), prompt)
                except CorruptedEntry as error:
                    if self._open_activations_store():
                        return self.find(qa, templates)
                    reason = error
                if key < self.sample_bound and (entry or reason):
                    self.used_keys.add(key)
                if entry:
                    return prompt, entry
        if reason:
            raise reason
        if first_prompt and self._activations_may_have_more and self._open_activations_store():
            return self.find(qa, templates)
        return first_prompt, None

    @functools.cached_property
    def _activations_may_have_more(self) -> bool:
        """Whether an activations store may have entries that the metadata store lacks."""
        if not self._unopened or not os.path.exists(data_file(self._unopened[0])):
            return False
        claims, _ = ask_child(read_claims, self._unopened[0])
        first = self.stores[0]
        return not claims or isinstance(first, SalvagedStore) or claims["keys"] > first.key_count

    def _open_activations_store(self) -> bool:
        """Opens the activations store if that has not been tried. Returns whether it gives more to read."""
        if not self._unopened:
            return False
        try:
            self._open_next_store()
        except UnusableStore as error:
            log.warning("%s", error)
            return False
        return True

    def unused_prompts(self, max_characters: int) -> tuple[dict[str, Entry], bool]:
        """Returns a sample of the prompts that belong to no QA line, their entries, and whether these are all."""
        prompts: dict[str, Entry] = {}
        for store in self.stores:
            for key in itertools.takewhile(lambda key: key < self.sample_bound, store.keys()):
                if key in self.used_keys:
                    continue
                with contextlib.suppress(CorruptedEntry):
                    for value in itertools.islice(store.values(key), 1):
                        prompt, entry = read_entry(value)
                        if type(prompt) is str and prompt not in prompts:
                            prompts[prompt] = entry
                            max_characters -= len(prompt)
                if max_characters < 0:
                    return prompts, False
        return prompts, self.sample_bound == b"g"


# --- Join and output --------------------------------------------------------------------------------
# Writes each QA line with the entry of its prompt, and keeps what explains missing entries.

LINE_WARNINGS = 3  # of each kind; the summary has the counts
MATCHED_SAMPLE_SIZE = 100  # QA lines
UNMATCHED_SAMPLE_SIZE = 300  # QA lines, of which a half are the first ones
_encode_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False, check_circular=False).encode  # circles recurse


def encode(fields: Entry) -> str | None:
    """Returns the JSON text of some fields, or None if JSON cannot represent them."""
    try:
        return _encode_json(fields)
    except (TypeError, ValueError, RecursionError, MemoryError):
        return None


def merge(line: bytes, qa: QA, entry: Entry) -> tuple[bytes, list[str]]:
    """Returns the output line, and the names of the fields that JSON cannot represent, which are null in it.

    The text of the QA line stays as it is, unless it has a field of the same name as the entry. Then all of it is
    encoded anew, with the entry's value in the place of the QA line's.
    """
    unusable: list[str] = []
    text = encode(entry)
    if text is None:
        unusable = [name for name, value in entry.items() if encode({name: value}) is None]
        entry = entry | dict.fromkeys(unusable)
        text = _encode_json(entry)
    # What UTF-8 lacks, lone surrogates, becomes the escapes that JSON has for them, too.
    if qa.keys().isdisjoint(entry):
        return b"%b, %b\n" % (line[: line.rindex(b"}")], text[1:].encode("utf-8", "backslashreplace")), unusable
    return json.dumps(qa | entry, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n", unusable


class Join:
    """Joins QA lines with their entries, counts, and keeps samples of the lines."""

    def __init__(self, finder: EntryFinder, templates: list[PromptTemplate], prompt_as_sent: bool) -> None:
        self.finder, self.templates, self.prompt_as_sent = finder, templates, prompt_as_sent
        self.field_names = dict.fromkeys(name for template in templates for _, name in template.parts)
        self.counts = Counts()
        self.object_count = 0  # QA lines that are JSON objects
        self.first_line = b""
        self.matched_sample: list[QA] = []  # the first ones
        self.unmatched_count = 0  # JSON objects without an entry, or without the fields that the templates name
        self.unmatched_sample: list[QA] = []
        self._sample_step = 1  # every which one of them is kept, after the first ones
        self._warned: collections.Counter[str] = collections.Counter()

    @property
    def many_matched(self) -> bool:
        """Whether the templates are right for many lines, and not just for those of a trial run."""
        return 0 < self.counts.matched >= self.unmatched_count / 10

    def merge_lines(self, qa_path: str, progress: bool) -> Iterator[bytes]:
        """Yields the output line of each QA line that has an entry."""
        counts = self.counts
        is_debugging = log.isEnabledFor(logging.DEBUG)
        for number, line in read_qa_lines(qa_path, progress):
            place = f"{qa_path}:{number}"
            counts.qa_lines += 1
            self.first_line = self.first_line or line
            try:
                qa = parse_qa(line)
                self.object_count += 1
                prompt, entry = self.finder.find(qa, self.templates)
                if not prompt:
                    self._keep_unmatched(qa)
                    raise MalformedLine(f"no text in {listed(self.field_names)}")
            except MalformedLine as reason:
                counts.malformed += 1
                self._warn(place, "malformed QA line, skipped", reason)
                continue
            except CorruptedEntry as reason:
                counts.corrupted += 1
                self._warn(place, "corrupted entry, skipped", reason)
                continue
            if is_debugging:
                outcome = "matched" if entry else f"no entry for {quoted(prompt)}"
                log.debug("%s: %s: %s", place, key_of(prompt).decode(), outcome)
            if not entry:
                counts.without_entry += 1
                self._keep_unmatched(qa)
                continue
            if self.prompt_as_sent:
                entry = {"prompt": prompt.removeprefix("user: "), **entry}
            merged, unusable = merge(line, qa, entry)
            if unusable:
                self._warn(place, "not representable in JSON, written as null", listed(unusable))
            if counts.matched < MATCHED_SAMPLE_SIZE:
                self.matched_sample.append(qa)
            counts.matched += 1
            self._count_model(entry)
            yield merged

    def _count_model(self, entry: Entry) -> None:
        name, logged_at = model_name(entry), time_logged(entry)
        if name not in self.counts.models:
            self.counts.models[name] = ModelCount()
        model = self.counts.models[name]
        model.lines += 1
        if logged_at:
            model.first = min(logged_at, model.first or logged_at)
            model.last = max(logged_at, model.last or logged_at)

    def _keep_unmatched(self, qa: QA) -> None:
        """Keeps the first lines, since many runs ask only these, and as many spread evenly over the rest."""
        half = UNMATCHED_SAMPLE_SIZE // 2
        if self.unmatched_count < half or self.unmatched_count % self._sample_step == 0:
            self.unmatched_sample.append(qa)
        if len(self.unmatched_sample) > UNMATCHED_SAMPLE_SIZE:
            del self.unmatched_sample[half::2]
            self._sample_step *= 2
        self.unmatched_count += 1

    def _warn(self, place: str, problem: str, reason: object) -> None:
        """Warns about a QA line. Of many with the same problem, the later ones are for those who debug."""
        self._warned[problem] += 1
        level = logging.WARNING if self._warned[problem] <= LINE_WARNINGS else logging.DEBUG
        log.log(level, "%s: %s: %s", place, problem, reason)


def refuse_output(path: str, inputs: Iterable[str]) -> None:
    """Raises ReconstructionError if the output is a folder, or one of the inputs under any name or link."""
    if os.path.isdir(path) or not os.path.basename(path):
        raise ReconstructionError(f"cannot write {path}: it is a folder")
    for each in inputs:
        if is_same_file(path, each) and (os.path.isfile(each) or not os.path.exists(each)):  # not a terminal
            raise ReconstructionError(f"refusing to overwrite the input {each}")


@contextlib.contextmanager
def open_output(path: str) -> Iterator[BinaryIO]:
    """Opens the output: a pipe or a device, or a file that takes the place of an old one when it is whole.

    Raises ReconstructionError if it cannot be written, and BrokenPipeError if nobody reads it.
    """
    try:
        if path == "/dev/stdout" or (os.path.exists(path) and not os.path.isfile(path)):
            # Opening standard output anew would lose what was there before a `>>`.
            with open(os.dup(1) if path == "/dev/stdout" else path, "wb", buffering=BUFFER_SIZE) as file:
                yield file
            return
        target = os.path.realpath(path)  # so that a symbolic link stays one
        with contextlib.suppress(FileExistsError):  # a file where a folder is needed: `open` says so better
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


# --- Missing entries --------------------------------------------------------------------------------
# Takes a census of the prompts in the store. Servers also log what made the questions or judged the answers, so
# the user has to choose: a template that matches may be a judge's.

SEARCH_BUDGET = 3_000_000_000  # characters to compare, about two seconds
MAX_TEXTS = 20  # to look for, of each QA line
MAX_TEMPLATE_FIELDS = 8
MAX_CANDIDATES = 100  # templates to try
TELLING_SIZE = 16  # bytes; a shorter text may be in a prompt by chance
ALIKE_LENGTH = 12  # characters at the beginning or the end of prompts of one group
SHOWN_KINDS = 4
SHOWN_GROUPS = 2
PRIVATE_USE = 0xE000  # the first of the code points that no text has
DIFFERENCES: dict[str, Callable[[str], str]] = {  # and what makes texts equal that differ in nothing else
    "white space": lambda text: "".join(text.split()),
    "case": str.casefold,
    "the Unicode form of accents": lambda text: unicodedata.normalize("NFC", text),
}
Texts = dict[str, str]  # of a QA line, by the names of the fields


class Kind(NamedTuple):
    """The prompts that one template makes."""

    template: PromptTemplate
    match_count: int  # QA lines, of those looked at
    entries: dict[str, Entry]  # by prompt


def find_kind(template: PromptTemplate, qa_lines: Iterable[QA], finder: EntryFinder) -> Kind:
    """Looks up the prompts that a template makes of some QA lines."""
    entries: dict[str, Entry] = {}
    match_count = 0
    for qa in qa_lines:
        with contextlib.suppress(CorruptedEntry):
            prompt, entry = finder.find(qa, [template])
            if entry:
                entries[prompt] = entry
                match_count += 1
    return Kind(template, match_count, entries)


def find_texts(prompts: Iterable[str], texts_of_lines: list[Texts]) -> dict[str, Texts]:
    """Returns the prompts that contain texts of QA lines, each with those of the line that it fits best."""
    lines_with: dict[str, list[int]] = {}
    for position, texts in enumerate(texts_of_lines):
        for text in dict.fromkeys(texts.values()):
            if text.strip():
                lines_with.setdefault(text, []).append(position)
    found = {prompt: [text for text in lines_with if text in prompt] for prompt in prompts}
    prompts_with = collections.Counter(itertools.chain.from_iterable(found.values()))
    best_texts: dict[str, Texts] = {}
    for prompt, texts_in_prompt in found.items():
        scores: dict[int, float] = {}
        for text in texts_in_prompt:
            for position in lines_with[text]:  # what is in many prompts tells little
                scores[position] = scores.get(position, 0) + len(text) / prompts_with[text]
        if scores:
            texts = texts_of_lines[max(scores, key=scores.__getitem__)]
            best_texts[prompt] = {name: text for name, text in texts.items() if text in prompt}
    return best_texts


def template_of(prompt: str, texts: Texts) -> str:
    """Returns a prompt in which the names of fields stand for their texts."""
    # The longest goes first, because a shorter one may stand in it, or anywhere by chance.
    fields = sorted(texts.items(), key=lambda field: -len(field[1]))
    for mark, (_, text) in enumerate(fields, PRIVATE_USE):
        prompt = prompt.replace(text, chr(mark))  # not yet the name, in which another text may stand
    names = {mark: f"{{{name}}}" for mark, (name, _) in enumerate(fields, PRIVATE_USE)}
    return prompt.translate(names | {ord("{"): "{{", ord("}"): "}}"})


def candidate_templates(best_texts: dict[str, Texts]) -> list[str]:
    """Returns templates that would make some of the prompts, those first that would make most."""
    candidates: collections.Counter[str] = collections.Counter()
    for prompt, texts in best_texts.items():
        fields = [field for field in texts.items() if FIELD_NAME.fullmatch(field[0])]
        fields = sorted(fields, key=lambda field: -len(field[1]))[:MAX_TEMPLATE_FIELDS]
        sets = [[field] for field in fields] + [fields[:count] for count in range(2, len(fields) + 1)]
        candidates.update({template_of(prompt, dict(chosen)): 1 for chosen in sets})
    return sorted(candidates, key=lambda text: (-candidates[text], len(text), text))[:MAX_CANDIDATES]


def proved_kinds(candidates: Iterable[str], join: Join, one_is_enough: bool) -> list[Kind]:
    """Returns the kinds whose prompts are in the store, those first that match most QA lines."""
    kinds = [find_kind(PromptTemplate(text), join.unmatched_sample, join.finder) for text in candidates]
    kinds.sort(key=lambda kind: (-kind.match_count, len(kind.template.parts), len(kind.template.text)))
    proved: list[Kind] = []
    for kind in kinds:
        is_chance = len(kind.entries) < (1 if one_is_enough else 2)
        if not is_chance and not any(kind.entries.keys() <= better.entries.keys() for better in proved):
            proved.append(kind)
    return proved


def letters_of(text: str) -> str:
    """Returns what is left of a text without white space, case, accents and punctuation."""
    return "".join(filter(str.isalnum, unicodedata.normalize("NFKD", text).casefold()))


def near_misses(prompts: Iterable[str], join: Join) -> dict[str, str]:
    """Returns the prompts of the store that are almost the prompt of a QA line, each with that one."""
    tried: dict[str, tuple[str, list[str]]] = {}
    for qa in join.unmatched_sample:
        questions = [text for name, text in texts_of(qa) if name in join.field_names]
        for template in join.templates:
            prompt = template.make_prompt(qa)
            tried[letters_of(prompt)] = prompt, questions
    misses = {}
    for prompt in prompts:
        twin, questions = tried.get(letters_of(prompt), ("", []))
        if twin and not all(text in prompt for text in questions):  # else another template would make it
            misses[prompt] = twin
    return misses


def unexplained(
    prompts: Iterable[str], best_texts: dict[str, Texts], kinds: list[Kind], join: Join
) -> dict[str, Texts]:
    """Returns the prompts that no kind and no near miss explains, with the texts in them that tell something."""
    asked = {text for qa in join.matched_sample for name, text in texts_of(qa) if name in join.field_names}
    rest: dict[str, Texts] = {}
    for prompt in prompts:
        texts = best_texts.get(prompt, {})
        questions = {name: text for name, text in texts.items() if name in join.field_names}
        long_texts = {name: text for name, text in texts.items() if len(text.encode()) >= TELLING_SIZE}
        if join.many_matched and (not questions or any(text in prompt for text in asked)):
            continue  # a judge's, most likely
        if join.counts.matched and not questions | long_texts:
            continue
        if not any(is_of_kind(prompt, kind, join) for kind in kinds):
            rest[prompt] = questions | long_texts
    return rest


def is_of_kind(prompt: str, kind: Kind, join: Join) -> bool:
    """Returns whether a kind explains a prompt, if only as that of a QA line that is not looked at."""
    own_texts = [own_text for own_text, _ in kind.template.parts] + [kind.template.tail]
    is_telling = sum(map(len, own_texts)) >= TELLING_SIZE or join.unmatched_count > len(join.unmatched_sample)
    fits = is_telling and re.fullmatch(".*".join(map(re.escape, own_texts)), prompt, re.DOTALL)
    return bool(fits) or prompt in kind.entries


def group_alike(rest: dict[str, Texts]) -> list[list[str]]:
    """Groups prompts that begin or end alike, apart from texts of QA lines and numbers. The largest is first."""
    shapes = {prompt: re.sub(r"\d+", "0", template_of(prompt, texts)) for prompt, texts in rest.items()}
    beginnings = collections.Counter(shape[:ALIKE_LENGTH] for shape in shapes.values())
    groups: dict[str, list[str]] = {}
    for prompt, shape in shapes.items():
        key = shape[:ALIKE_LENGTH]
        if beginnings[key] < max(2, len(shapes) / 10):  # what varies comes first
            key = shape[-ALIKE_LENGTH:]
        groups.setdefault(key, []).append(prompt)
    return sorted(groups.values(), key=len, reverse=True)


def explain(join: Join) -> NothingMatched:
    """Returns why QA lines have no entry, and which prompts the store holds instead. Without a hint, all may be well."""
    nothing_to_do = NothingMatched(headline(join))
    if not join.unmatched_count:
        return nothing_to_do
    texts_of_lines = [dict(itertools.islice(texts_of(qa), MAX_TEXTS)) for qa in join.unmatched_sample]
    text_count = sum(map(len, texts_of_lines))
    prompts, are_all = join.finder.unused_prompts(SEARCH_BUDGET // max(1, text_count))
    if not prompts:  # a run that asked only some of the questions
        return nothing_to_do
    best_texts = find_texts(prompts, texts_of_lines)
    kinds = proved_kinds(candidate_templates(best_texts), join, 1 in (len(prompts), join.unmatched_count))
    misses = near_misses(prompts, join)
    rest = unexplained((prompt for prompt in prompts if prompt not in misses), best_texts, kinds, join)
    if join.many_matched:  # what most matched lines match as well is a judge's
        half = len(join.matched_sample) / 2
        kinds = [kind for kind in kinds if find_kind(kind.template, join.matched_sample, join.finder)[1] < half]
    kinds = sorted(kinds[:SHOWN_KINDS], key=lambda kind: len(kind.template.text))

    looked_at = "" if are_all else f" of the {len(prompts):,} looked at"
    details = [describe_kind(kind, join) for kind in kinds]
    if misses:
        number = counted(len(misses), f"prompt{looked_at} differs", f"prompts{looked_at} differ")
        details.append(f"{number} {describe_difference(*next(iter(misses.items())))}")
    for group in group_alike(rest)[:SHOWN_GROUPS]:
        example = quoted(template_of(group[0], rest[group[0]]), 80)
        number = counted(len(group), "prompt") + looked_at
        details.append(f"{number} like {example}, which no template makes")
        details[-1] += describe_answers([prompts[prompt] for prompt in group])
    if not details:
        return nothing_to_do
    lines = [f"{headline(join)}. These kinds of prompts are in the store:"]
    lines += [f"  {number}. {detail}" for number, detail in enumerate(details, 1)]
    if not kinds and not misses and not any(rest.values()):
        tried = join.templates[0].make_prompt(join.unmatched_sample[0])
        lines += [f"  tried: {quoted(tried)}"] if tried else []
        lines += ["  The store looks like another experiment's: its prompts contain no longer text of the QA file."]
        return NothingMatched("\n".join(lines))
    return NothingMatched("\n".join(lines), hint_for(kinds, bool(misses), join))


def headline(join: Join) -> str:
    """Returns how many QA lines have no entry, or why none has one."""
    counts = join.counts
    if counts.matched:
        return f"{join.unmatched_count:,} of {counted(counts.qa_lines, 'QA line')} have no entry"
    if not any(store.entries for store in join.finder.stores):
        return "nothing matched: the store is empty"
    if not join.unmatched_count:
        return f"nothing matched: {counted(counts.corrupted, 'entry', 'entries')} found, but none is usable"
    if not counts.without_entry:
        names = dict.fromkeys(name for qa in join.unmatched_sample for name, _ in texts_of(qa))
        return f"no QA line has text in {listed(join.field_names)}; found: {listed(names, 20) or 'no fields'}"
    return f"none of {counted(counts.qa_lines, 'QA line')} matches an entry"


def describe_kind(kind: Kind, join: Join) -> str:
    lines = counted(kind.match_count, "QA line")
    looked_at = len(join.unmatched_sample)
    if looked_at < join.unmatched_count:
        lines = f"{kind.match_count:,} of the {looked_at:,} QA lines looked at"
    return f"{quoted(kind.template.text, 80)} matches {lines}{describe_answers(kind.entries.values())}"


def describe_answers(entries: Iterable[Entry]) -> str:
    """Returns which models answered, and one of the answers, on a line of their own."""
    entries = list(entries)
    return f"\n     {listed(sorted(set(map(model_name, entries))), 2)} answered {quoted(entries[0]['generation'], 60)}"


def describe_difference(stored: str, tried: str) -> str:
    """Returns what differs in two prompts, and both around that place, in ASCII so that it can be seen."""
    pairs = enumerate(zip(tried, stored))
    place = next((position for position, (one, other) in pairs if one != other), min(len(tried), len(stored)))
    start = max(0, place - 60)
    causes = [cause for cause, make_equal in DIFFERENCES.items() if make_equal(tried) == make_equal(stored)]
    cause = causes[0] if causes else "white space, case, accents or punctuation"
    excerpts = [ascii(text[start : place + 100]) for text in (tried, stored)]
    return f"from a prompt tried only in {cause}:\n     tried:   {excerpts[0]}\n     stored:  {excerpts[1]}"


def hint_for(kinds: list[Kind], has_near_misses: bool, join: Join) -> str:
    """Returns what the user can do, in terms of the command line."""
    if kinds:
        # The proposed template comes before the given ones, so that a trial run with these does not win.
        given = join.templates if join.counts.matched else []
        options = [" ".join(each.option() for each in [kind.template, *given]) for kind in kinds]
        text = "pick the kind that the model under test was asked with (servers also log question generators and "
        return "\n  ".join([text + "judges), and run again with its option:", *options])
    if has_near_misses:
        return "use the QA file as it was when the questions were asked"
    return "add the whole prompt to each QA line as a field, and name that in --prompt_template"


# --- The run and the command ------------------------------------------------------------------------

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

    The path `-` is standard input or output; for `lmdb_path` see `locate_stores`. Of several prompt templates, the
    first that has an entry counts, for each QA line anew. `prompt_as_sent` writes the prompt that matched, without
    a leading `user: `, into `prompt`. `progress` shows a bar. Messages go to the logger `reconstruct_inference`.

    Raises:
        ValueError: a template cannot be used.
        NothingMatched: no line was written. An existing output is unchanged.
        ReconstructionError: another problem that the user can solve. An existing output is unchanged.
        BrokenPipeError: nobody reads the pipe that is the output.
    """
    texts = [prompt_template] if isinstance(prompt_template, str) else prompt_template
    templates = [PromptTemplate(text) for text in texts]
    qa_path = "/dev/stdin" if qa_output_path == "-" else os.fspath(qa_output_path)
    output = "/dev/stdout" if output_path == "-" else os.fspath(output_path)
    stores = locate_stores(os.fspath(lmdb_path))
    refuse_output(output, [qa_path, *map(data_file, stores), *map(lock_file, stores)])
    while (descriptor := os.open(os.devnull, os.O_RDONLY)) <= 2:
        pass  # a standard stream is closed, and a store would be opened in its place
    os.close(descriptor)
    with _one_run, contextlib.ExitStack() as stack:
        # The unpickler takes what a pickle names by a number from this cache, without asking.
        copyreg.clear_extension_cache()
        stack.callback(copyreg.clear_extension_cache)  # which then has stand-ins in it
        finder = EntryFinder(stores, progress, stack)
        join = Join(finder, templates, prompt_as_sent)
        merged = join.merge_lines(qa_path, progress)
        first = next(merged, None)
        if first is None:  # before an output is made
            raise explain(join) if join.object_count else not_json_lines(qa_path, join.first_line)
        replaced = " (replaced the old file)" if os.path.isfile(output) else ""
        with open_output(output) as file:
            file.write(first)
            file.writelines(merged)
            explanation = explain(join)  # before the output is replaced, because it can take seconds
        if explanation.hint:
            log.warning("%s", explanation, extra={"hint": explanation.hint})
        for store in finder.stores:
            if not store.is_locked and os.stat(data_file(store.path)).st_mtime_ns != store.mtime_ns:
                log.warning("%s changed while it was read: run this again when the logger is done", store.path)
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
        number, lost = f"{store.entries:,}", ""
        if store.lost:
            number, lost = f"{store.entries:,} of {store.entries + store.lost:,}", f" ({store.lost:,} lost)"
        log.info("entries: %s in %s%s", number, store.path, lost)
    for name, model in counts.models.items():
        period = ""
        if model.first and model.last:
            first, last = (time.strftime("%Y-%m-%d %H:%M", time.localtime(at)) for at in (model.first, model.last))
            period = f", {first}" if first == last else f", {first} to {last.removeprefix(first[:11])}"
        log.info("model: %s (%s%s)", name, counted(model.lines, "line"), period)


class MessageFormatter(logging.Formatter):
    """Formats messages as command-line tools do, with a prefix, and with the hint on a line of its own."""

    def format(self, record: logging.LogRecord) -> str:
        text = {logging.WARNING: "warning: ", logging.ERROR: "error: "}.get(record.levelno, "") + record.getMessage()
        hint = getattr(record, "hint", "")
        text += f"\nhint: {hint}" if hint else ""
        # What a terminal would obey is spelled out.
        return re.sub(r"[^\n -~\xa0-\U0010ffff]", lambda character: repr(character[0])[1:-1], text)


def template_argument(typed: str) -> str:
    """Returns the template that was typed, where `\\n` stands for a line break and `\\\\` for a backslash."""
    template = re.sub(r"\\([n\\])", lambda escape: "\n" if escape[1] == "n" else "\\", typed)
    try:
        PromptTemplate(template)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return template


def path_argument(typed: str) -> str:
    """Returns the path that was typed, also with a `~`, which shells leave alone in `--option=~/…`."""
    if not typed:
        raise argparse.ArgumentTypeError("is empty (an unset shell variable?)")
    return os.path.expanduser(typed)


EPILOG = """example:
  %(prog)s --qa_output_path qa.jsonl \\
      --lmdb_path lmdb_data/activations.lmdb --output_path generation.jsonl

exit codes: 0 lines were written, 1 error or nothing matched, 2 wrong usage,
            129, 130 or 143 stopped by a signal, 141 the output was closed"""
HELP = {
    "--qa_output_path": "JSON Lines file with the questions; `-` is standard input",
    "--lmdb_path": "path that was passed to the activations logger; `PATH_metadata` is found automatically",
    "--output_path": "generation.jsonl to write; `-` is standard output",
    "--prompt_template": "how a prompt was made from a QA line: {name} is one of its fields, \\n a line break; if given "
    "several times, the first that has an entry counts; leave it out if you are not sure "
    f"(default: {DEFAULT_PROMPT_TEMPLATE!r}, with and without `user: `)",
    "--prompt_as_sent": "write the prompt as it was sent into `prompt`, as HalluLens does, not the raw question",
    "--verbose": "log each QA line's hash and outcome, and all warnings",
}


def parse_arguments(argv: Sequence[str] | None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description="Rebuild the generation.jsonl of an inference run from the activations logger's LMDB.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for name in ("--qa_output_path", "--lmdb_path", "--output_path"):
        parser.add_argument(name, required=True, type=path_argument, metavar="PATH", help=HELP[name])
    name = "--prompt_template"
    parser.add_argument(name, action="append", type=template_argument, metavar="TEMPLATE", help=HELP[name])
    for name in ("--prompt_as_sent", "--verbose"):
        parser.add_argument(name, action="store_true", help=HELP[name])
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    return vars(parser.parse_args(argv))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    options = parse_arguments(argv)
    options["prompt_template"] = options["prompt_template"] or DEFAULT_PROMPT_TEMPLATES
    handler = logging.StreamHandler()
    handler.setFormatter(MessageFormatter())
    log.handlers[:] = [handler]
    log.setLevel(logging.DEBUG if options.pop("verbose") else logging.INFO)
    exit_on_stop_signals()
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (MAX_MEMORY if soft < 0 else min(soft, MAX_MEMORY), hard))
    progress = sys.stderr is not None and sys.stderr.isatty()
    with contextlib.ExitStack() as stack:
        if progress:
            from tqdm.contrib.logging import logging_redirect_tqdm

            stack.enter_context(logging_redirect_tqdm([log]))  # above the bar
        try:
            reconstruct_inference(**options, progress=progress)
        except SystemExit:
            log.error("stopped; %s is unchanged", options["output_path"])
            raise
        except BrokenPipeError:
            return 128 + signal.SIGPIPE
        except (ReconstructionError, OSError, MemoryError) as error:
            log.error("%s", str(error) or "out of memory", extra={"hint": getattr(error, "hint", "")})
            return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
