#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["lmdb>=1.4.1", "tqdm>=4.65"]
# ///
"""Rebuild the JSONL of an inference run from its QA file and the activations logger's LMDB.

The logger keeps each request as an entry in LMDB, under the SHA-256 of its prompt. This script makes
the prompt of each QA line, looks up its hash, and writes the QA line with the generation. The flow:

    read_qa_lines → parse_qa → PromptTemplate.make_prompt → key_of → EntryFinder.find → merge → open_output
"""

from __future__ import annotations

import sys

if __name__ == "__main__" and not getattr(sys.flags, "safe_path", sys.flags.isolated):  # 3.10 lacks it
    del sys.path[0]  # the script's folder: a `types.py` there would hide Python's

import argparse
import fnmatch
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
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress

if __name__ == "__main__":
    if sys.version_info < (3, 10):  # noqa: UP036
        sys.exit("error: reconstruct_inference requires Python 3.10 or later")
    if not (importlib.util.find_spec("lmdb") and importlib.util.find_spec("tqdm")):
        sys.exit(f"error: lmdb and tqdm are missing: {sys.executable} -m pip install 'lmdb>=1.4.1' 'tqdm>=4.65'")

import lmdb

__version__ = "4.0.0"

# Servers log chat messages as `role: content`. Later ones log a single message without its role.
DEFAULT_PROMPT_TEMPLATE = "user: Answer in one sentence. Q:{prompt}\n A:"
DEFAULT_PROMPT_TEMPLATES = (DEFAULT_PROMPT_TEMPLATE, DEFAULT_PROMPT_TEMPLATE.removeprefix("user: "))

TYPE_CHECKING = False  # mypy takes it for True; `typing` is slow to import
if TYPE_CHECKING:
    from typing import Any, BinaryIO

    QA = dict[str, Any]  # the JSON object of a QA line
    Entry = dict[str, Any]  # what an entry adds to a QA line
    Loader = Callable[[], object]  # decodes a value
    Texts = dict[str, str]  # of a QA line, by field

log = logging.getLogger("reconstruct_inference")


class ReconstructionError(Exception):
    """A problem that the user can solve. `hint` says how on the command line."""

    def __init__(self, text: str, hint: str = "") -> None:
        super().__init__(f"{text}\nhint: {hint}" if hint else text)
        self.hint = hint


class UnusableStore(ReconstructionError):
    """One of the two stores cannot be read. The other one may be enough."""


class CorruptedEntry(Exception):
    """An entry cannot be used. The text is the reason."""


class Counts(types.SimpleNamespace):
    """What was found. `qa_lines` is the sum of the next four counts."""

    def __init__(self) -> None:
        self.qa_lines = 0  # lines that are not blank
        self.matched = 0  # lines written
        self.without_entry = 0  # QA lines whose prompt is in no store
        self.malformed = 0  # QA lines that are not JSON objects or lack a field
        self.corrupted = 0  # QA lines whose entry cannot be used
        self.models: Counter[str] = Counter()  # matched lines, by model


def quoted(text: str, limit: int = 160) -> str:
    """Returns a text in quotes, on one line, without the middle of a long one."""
    return repr(text if len(text) <= limit else f"{text[: limit // 2]} … {text[-(limit // 2) :]}")


def listed(names: Iterable[str], limit: int = 8) -> str:
    """Returns the first few names, as a list within a sentence."""
    names = [f"`{name}`" if name.isprintable() else ascii(name) for name in names]
    return ", ".join(names[:limit] + (["…"] if len(names) > limit else []))


def counted(number: int, noun: str, plural: str = "") -> str:
    """Returns a number with its noun: `1 line`, `2,000 lines`."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


@contextmanager
def progress_bar(what: str, size: int | None, shown: bool) -> Iterator[Callable[[int], object]]:
    """Shows a bar on the terminal. Yields a function that advances it by bytes."""
    if not shown:
        yield lambda size: None
        return
    from tqdm import tqdm  # slow to import
    from tqdm.contrib.logging import logging_redirect_tqdm

    with logging_redirect_tqdm(), tqdm(desc=what, total=size, unit="B", unit_scale=True, leave=False) as bar:
        yield bar.update
        bar.refresh()  # to show 100%


# --- QA lines and prompts ---
# Reads the QA file line by line, and makes the prompts that the model received.

BUFFER_SIZE = 1 << 18  # bytes
PACKED_FORMATS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"PK\x03\x04": "ZIP"}
CSV_TO_JSONL = "import csv, json, sys; print(*map(json.dumps, csv.DictReader("
CSV_TO_JSONL += "open(sys.argv[1], newline='', encoding='utf-8-sig'))), sep='\\n')"
MAX_ITEMS = 100  # of a list or object; longer ones are tokens or vectors
_decode_json = json.JSONDecoder().raw_decode  # faster than json.loads
FIELD_NAME = re.compile(r"(?!\d+$)[^{}\[!:]+")  # in a template's braces; {0} would be a position


def read_qa_lines(path: str, progress: bool) -> Iterator[tuple[int, bytes]]:
    """Yields the numbers and bytes of the lines that are not blank. Raises ReconstructionError."""
    try:
        # Opening /dev/stdin would read a file from its start again.
        with io.BufferedReader(io.FileIO(os.dup(0) if path == "/dev/stdin" else path), BUFFER_SIZE) as qa_file:
            if qa_file.isatty():
                log.info("reading QA lines from the terminal; Ctrl-D to finish")
            for magic, name in PACKED_FORMATS.items():
                if qa_file.peek().startswith(magic):  # a ZIP may contain JSON lines
                    hint = "" if name == "ZIP" else f"use --qa_output_path <({name} -dc {shlex.quote(path)})"
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
    """Returns the JSON object of a QA line. Raises ValueError or RecursionError if there is none."""
    text = line.decode().strip("\ufeff\t\r\n ")  # and byte order marks
    qa, end = _decode_json(text)
    if type(qa) is not dict or end < len(text):
        raise ValueError("another JSON type, or text after it")
    return qa


def not_json_lines(path: str, first_line: bytes) -> ReconstructionError:
    """Returns the error for a QA file without JSON objects. Names a format only if certain."""
    if not first_line:
        return ReconstructionError(f"{path} is empty or has only blank lines")
    text, file = first_line.decode(errors="backslashreplace").strip(), shlex.quote(path)
    hint = "expected JSON Lines: one JSON object per line, in UTF-8"
    if first_line.startswith((b"\xff\xfe", b"\xfe\xff")):
        hint = f"it is in UTF-16: use --qa_output_path <(iconv -f UTF-16 -t UTF-8 {file})"
    elif re.match(r"\[$|\[\s*\{", text):
        hint = f"it is one JSON array: use --qa_output_path <(jq -c '.[]' {file})"
    elif path.lower().endswith(".csv") and not re.search(r"[;\t\0]", text):
        hint = f'it is CSV: run python3 -c "{CSV_TO_JSONL}" {file} > {shlex.quote(path + ".jsonl")}'
    return ReconstructionError(f"no line of {path} is a JSON object; it begins with {quoted(text, 80)}", hint)


def texts_of(qa: QA) -> Iterator[tuple[str, str]]:
    """Yields the names and texts of a QA line's fields, then of nested ones. Numbers are texts."""
    fields: deque[tuple[str, Any]] = deque(qa.items())
    while fields:
        name, value = fields.popleft()
        if type(value) in (str, int, float):
            yield name, str(value)
        elif type(value) in (dict, list) and len(value) <= MAX_ITEMS:
            items = value.items() if type(value) is dict else enumerate(value)
            fields.extend((f"{name}.{step}", item) for step, item in items)


class PromptTemplate:
    """Text in which `{name}`, or `{messages.0.content}` if nested, stands for a field."""

    def __init__(self, text: str) -> None:
        """Raises ValueError if it cannot be used."""
        self.text = text
        self.parts: list[tuple[str, str]] = []  # a text, and the field that follows it
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
        """Returns the prompt for a QA line, or an empty string if it lacks a field."""
        try:
            prompt = ""
            for own_text, name in self.parts:
                prompt += own_text + qa[name]
            return prompt + self.tail
        except (KeyError, TypeError):  # a number, a nested field, or a missing one
            texts = dict(texts_of(qa))
            if not all(name in texts for _, name in self.parts):
                return ""
            return "".join(own_text + texts[name] for own_text, name in self.parts) + self.tail

    def option(self) -> str:
        """Returns this template as an option, to be pasted into bash."""
        typed = self.text.replace("\\", "\\\\").replace("\n", "\\n")
        if typed.isprintable():  # a terminal would obey control characters
            return f"--prompt_template={shlex.quote(typed)}"
        shown = re.sub(r"[\\']|[^ -~]", lambda c: "".join(f"\\x{b:02x}" for b in c[0].encode(errors="replace")), typed)
        return f"--prompt_template=$'{shown}'"


def key_of(prompt: str) -> bytes:
    """Returns the key that the logger gives a prompt: the SHA-256 of its UTF-8, in hex."""
    return hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest().encode()  # surrogates match nothing


# --- Entries ---
# Decodes what the logger kept of a request. A pickle names what the unpickler imports and calls. Here,
# every name becomes a stand-in that does nothing.

ZERO_BLOCK = "\0" * 512  # a sector, the least that a disk loses
MAX_TIMESTAMP = 253_402_300_799  # seconds since 1970, the end of the year 9999


class Inert:
    """Replaces what is not plain data."""

    def __init__(self, *arguments: object, **named: object) -> None:
        pass

    def ignore(self, *arguments: object) -> Inert:
        return self

    __call__ = __setitem__ = __setstate__ = append = extend = add = ignore


class InertUnpickler(pickle.Unpickler):
    """Unpickles without importing or calling what the pickle names."""

    def find_class(self, *names: Any) -> Any:
        return Inert


class ValueFile(io.RawIOBase):
    """A value that is read piece by piece, so that activations never come into memory."""

    def __init__(self, read_at: Callable[[int, int], bytes], start: int, size: int) -> None:
        self._read_at = read_at
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


def read_entry(load: Loader, prompt: str | None = None) -> tuple[object, Entry]:
    """Returns the prompt and the entry of a value. Raises CorruptedEntry if it is unusable or of another prompt.

    The metadata store has the logged fields, the activations store `{"data": fields, …}` or, formerly, the fields.
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
        raise CorruptedEntry("part of its response was overwritten with zeros")
    if prompt is not None and logged.get("prompt") not in (None, prompt):
        raise CorruptedEntry("it was logged for a different prompt")
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
    """Returns when an entry was logged, in seconds since 1970, or 0 if unknown."""
    timestamp = entry["timestamp"]
    return timestamp if type(timestamp) in (float, int) and 0 < timestamp <= MAX_TIMESTAMP else 0.0


def model_name(entry: Entry) -> str:
    """Returns the model's name, as messages show it."""
    model = entry["model"]
    return model if type(model) is str and model and model.isprintable() else "(no name)"


# --- Stores ---
# Finds values. A damaged store can crash the process that reads it. So a child process looks up every
# key first. If that fails, the store's file is scanned for entries.

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LOCK_PATIENCE = 5  # seconds; a dead lock server never grants one
SHORT_VALUE = 1 << 16  # bytes; a longer value is read piece by piece
MAX_STORE_SIZE = 1 << 42  # bytes; a header that claims more is damaged
SAMPLE_SIZE = 6_000  # entries to look at if some are missing


def locate_stores(path: str) -> list[str]:
    """Returns the paths of the metadata store and the activations store, or of one store.

    The logger appends `_metadata` to the text of the path. If that ends in a slash, one store is inside the other.
    """
    if os.path.basename(path) in ("data.mdb", "lock.mdb") and os.path.isfile(path):
        path = os.path.dirname(path) or "."
    base = path.rstrip("/") if path.strip("./") else os.path.abspath(path)  # `.` is not a name
    places = [f"{base}_metadata", f"{base}/_metadata", f"{os.path.realpath(base)}_metadata"]  # a link?
    metadata, activations = next(filter(os.path.exists, places), ""), base
    if not metadata and base.endswith("_metadata"):
        metadata, activations = base, os.path.normpath(base.removesuffix("_metadata"))
    if not metadata:
        return [places[0], base] if os.path.exists(f"{base}/data.mdb") else [base]  # to warn
    if not os.path.exists(activations) or is_same_file(data_file(activations), data_file(metadata)):
        return [metadata]
    return [metadata, activations]


def data_file(store_path: str) -> str:  # a store is a folder or a single file
    return store_path if os.path.isfile(store_path) else f"{store_path}/data.mdb"


def lock_file(store_path: str) -> str:  # where LMDB registers its readers
    return f"{store_path}-lock" if os.path.isfile(store_path) else f"{store_path}/lock.mdb"


def is_same_file(one: str, other: str) -> bool:
    with suppress(OSError):  # one of them does not exist
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
        if not (os.path.isdir(path) and isinstance(error, FileNotFoundError)):
            raise UnusableStore(f"cannot read {path}: {error.strerror}") from None
        names = sorted(os.listdir(path))
        what = f"it contains {listed(names) or 'nothing'}"
        if any(name.startswith((".z", "zarr.json")) for name in names):
            what = "it is a Zarr store, which is not supported"
        raise UnusableStore(f"{path} has no `data.mdb`; {what}") from None
    open_files = os.listdir("/dev/fd") if os.path.isdir("/dev/fd") else []
    if any(is_same_file(f"/dev/fd/{number}", file) for number in open_files):
        raise ReconstructionError(f"{file} is already open in this process; close it first")


def open_lmdb(path: str, lock: bool) -> lmdb.Environment:
    options = {"subdir": os.path.isdir(path), "lock": lock, "readonly": True, "create": False}
    try:
        return lmdb.open(os.fsencode(path), map_size=0, **options)  # 0: the logger's own
    except lmdb.MemoryError:  # `ulimit -v` allows less
        return lmdb.open(os.fsencode(path), map_size=os.path.getsize(data_file(path)), **options)


def exit_on_stop_signals() -> None:
    """Makes stop signals raise SystemExit, except those that the caller ignores."""

    def stop(signal_number: int, frame: object) -> None:
        for each in STOP_SIGNALS:
            signal.signal(each, lambda *_: None)  # a second one must not stop the cleanup
        raise SystemExit(128 + signal_number)

    for number in STOP_SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, stop)


def run_in_child(function: Callable[..., object], *arguments: object) -> Any:
    """Runs a function in a child process. Returns its result, or None if it fails."""
    shared = mmap.mmap(-1, mmap.PAGESIZE)  # memory of both processes
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
        pass  # the caller ignores SIGCHLD, so it is gone
    except BaseException:
        with suppress(OSError):  # it may have ended
            os.kill(child, signal.SIGTERM)  # LMDB reuses no pages while a reader is left
            os.waitpid(child, 0)
        raise
    return json.loads(shared[: shared.find(b"\0")] or b"null")


def answer_and_exit(shared: mmap.mmap, mask: Any, function: Callable[..., object], arguments: Any) -> None:
    """Does the child's part of `run_in_child`. Never returns."""
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


def ask_child(function: Callable[..., dict[str, int]], path: str, *arguments: object) -> dict[str, int]:
    """Checks a store in a child process. Returns the result with `lock`, or {} if it fails."""
    file = lock_file(path)
    can_lock = os.path.isfile(file) and not os.path.islink(file)  # lmdb would write to its target
    for lock in (True, False) if can_lock else (False,):  # unlocked if that fails
        result = run_in_child(function, path, lock, *arguments)
        if result:
            return {**result, "lock": lock}
    return {}


def read_claims(path: str, lock: bool) -> dict[str, int]:
    """Returns how many keys and bytes a store's header claims. Runs in a child process."""
    signal.alarm(LOCK_PATIENCE)
    with open_lmdb(path, lock) as store:
        stat = store.stat()
        size = (store.info()["last_pgno"] + 1) * stat["psize"]
    if not stat["entries"] * 64 <= size <= MAX_STORE_SIZE:  # a key has 64 bytes
        raise ValueError("the header is damaged")
    return {"keys": stat["entries"], "size": size}


def check(path: str, lock: bool, progress: bool) -> dict[str, int]:
    """Looks up every key. Returns the numbers of keys and entries. Runs in a child process."""
    signal.alarm(LOCK_PATIENCE)
    with open_lmdb(path, lock) as store, store.begin() as scan, store.begin(buffers=True) as lookup:
        signal.alarm(0)
        with progress_bar(os.path.basename(path), os.path.getsize(data_file(path)), progress) as advance:
            # Not inline: a signal in a loop here can make Python 3.13 skip the end of `with`.
            return look_up_every_entry(scan, lookup, advance)


def look_up_every_entry(scan: Any, lookup: Any, advance: Callable[[int], object]) -> dict[str, int]:
    keys = entries = 0
    claimed = scan.stat()["entries"]
    for key in itertools.islice(scan.cursor().iternext(values=False), claimed + 1):  # a damaged tree may loop
        keys += 1
        if not key or (len(key) == 64 and key.translate(None, b"0123456789abcdef")):
            raise ValueError("a key is damaged")  # zeros if its page was cut off
        if len(key) == 64:
            entries += 1
            value = lookup.get(key)
            bytes(value[-1:])  # reads the last page; a TypeError if there is no value
            advance(len(value))
    if keys != claimed:
        raise ValueError("a key is missing")
    return {"keys": keys, "entries": entries}


class LmdbStore:
    """A store that is read through lmdb, after a check."""

    def __init__(self, path: str, checked: dict[str, int], stack: ExitStack) -> None:
        self.path, self.lost = path, 0
        self.key_count, self.entries = checked["keys"], checked["entries"]
        self._env = stack.enter_context(open_lmdb(path, bool(checked["lock"])))
        # Without a lock, a logger may overwrite what a transaction sees, so each look-up begins one.
        self._snapshot = stack.enter_context(self._env.begin(buffers=True)) if checked["lock"] else None

    def keys(self) -> Iterator[bytes]:
        with self._env.begin() as transaction:
            yield from (key for key in transaction.cursor().iternext(values=False) if len(key) == 64)

    def loader(self, key: bytes) -> Loader | None:
        """Returns what loads the value of a key, if any. Raises CorruptedEntry if lmdb fails."""
        try:
            value = (self._snapshot or self._env.begin(buffers=True)).get(key)
        except lmdb.Error as error:
            raise CorruptedEntry(f"it cannot be read ({error})") from None
        if value is None:
            return None
        if value and value[0] == ord("{"):  # JSON, as other loggers write
            return lambda: json.loads(bytes(value))
        if len(value) <= SHORT_VALUE:
            return InertUnpickler(io.BytesIO(value)).load
        file = ValueFile(lambda position, size: bytes(value[position : position + size]), 0, len(value))
        return InertUnpickler(file).load


# How a pickled dictionary begins, in protocols 2 and 3 and, with frames, in later ones. LMDB keeps a value
# in one piece, and a pickle says where it ends.
PICKLED_DICTIONARY = re.compile(rb"(?s)\x80(?:[\x02\x03]|[\x04\x05]\x95.{8})\}")
LMDB_MAGIC = b"\xde\xc0\xef\xbe"  # in the first two pages, of up to 64 kB
SCAN_BLOCK = 1 << 12  # bytes to read at once, which a bad sector costs
OVERLAP = 11  # bytes; a beginning has at most 12


class SalvagedStore:
    """A store whose file is scanned for pickled entries."""

    def __init__(self, path: str, progress: bool, stack: ExitStack) -> None:
        self.path, self.lost = path, 0  # as far as known
        self.read_error = ""  # of the last unreadable block
        self._file = os.open(data_file(path), os.O_RDONLY)
        stack.callback(os.close, self._file)
        self.size = os.fstat(self._file).st_size
        self._newest: dict[bytes, tuple[float, int]] = {}  # time and start of each key's newest value
        with progress_bar(f"scanning {os.path.basename(path)}", self.size, progress) as advance:
            for start in range(0, self.size, SCAN_BLOCK):
                for match in PICKLED_DICTIONARY.finditer(self.read(start, SCAN_BLOCK + OVERLAP)):
                    with suppress(CorruptedEntry):
                        self._add(start + match.start())
                advance(SCAN_BLOCK)
        self.entries = len(self._newest)
        self.key_count = 0  # unknown; the other may have more

    def keys(self) -> Iterator[bytes]:
        return iter(sorted(self._newest))

    def loader(self, key: bytes) -> Loader | None:
        return self._value_at(self._newest[key][1]) if key in self._newest else None

    def _add(self, start: int) -> None:
        prompt, entry = read_entry(self._value_at(start))
        if type(prompt) is str:
            version = (time_logged(entry), start)
            self._newest[key_of(prompt)] = max(version, self._newest.get(key_of(prompt), version))

    def _value_at(self, start: int) -> Loader:
        return InertUnpickler(ValueFile(self.read, start, self.size - start)).load

    def read(self, start: int, size: int) -> bytes:
        """Returns bytes of the file, or zeros if the disk cannot read them."""
        try:
            return os.pread(self._file, size, start)
        except OSError as error:
            self.read_error = error.strerror or ""
            return bytes(size)


def open_store(path: str, progress: bool, stack: ExitStack) -> LmdbStore | SalvagedStore:
    """Opens a store. Raises UnusableStore if there is none or it holds something else."""
    require_readable(path)
    checked = ask_child(check, path, progress)
    if checked:
        others = checked["keys"] - checked["entries"]
        if others and not checked["entries"]:
            what = "this LMDB holds something else, or only multi-sample entries (`<hash>_<id>`)"
            raise UnusableStore(f"the keys in {path} are not prompt hashes: {what}")
        if others:
            log.warning("%s: multi-sample entries (`<hash>_<id>`) are not supported; skipped", path)
        return LmdbStore(path, checked, stack)
    store = SalvagedStore(path, progress, stack)
    if not store.entries and LMDB_MAGIC not in store.read(0, 1 << 17):
        beginning = quoted(store.read(0, 60).decode(errors="backslashreplace"))
        hint = "are --qa_output_path and --lmdb_path swapped?" if store.read(0, 1) == b"{" else ""
        what = f"is not an LMDB file; it begins with {beginning}; expected a folder that contains `data.mdb`"
        raise UnusableStore(f"{data_file(path)} {what}", hint)
    claims = ask_child(read_claims, path) or {"keys": 0, "size": 0}
    store.lost = max(0, claims["keys"] - store.entries)
    what = "is damaged or was written by an incompatible LMDB; scanned its raw file for entries"
    if store.size < claims["size"]:
        whole = counted(claims["keys"], "entry", "entries")
        what = f"is an incomplete copy: {store.size:,} of {claims['size']:,} bytes; the original has {whole}"
    log.warning("%s %s", path, what)
    if store.read_error:
        log.warning("part of %s cannot be read: %s", path, store.read_error)
    log.warning("%s: %s recovered", path, counted(store.entries, "entry", "entries"))
    return store


class EntryFinder:
    """Finds entries in the metadata store or, if missing, in the activations store."""

    def __init__(self, paths: list[str], progress: bool, stack: ExitStack) -> None:
        self.stores: list[LmdbStore | SalvagedStore] = []
        self._unopened = list(paths)
        self._progress, self._stack = progress, stack
        self.sample_bound = b"g"  # keys below it are the sample; all hex is below g
        self.used_keys: set[bytes] = set()  # of the sample, those of QA lines
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
        if store.entries > SAMPLE_SIZE:  # hashes are random, so a range is fair
            self.sample_bound = min(self.sample_bound, b"%016x" % ((SAMPLE_SIZE << 64) // store.entries))
        return True

    @functools.cached_property
    def _other_has_more(self) -> bool:
        if not self._unopened:
            return False
        claims = ask_child(read_claims, self._unopened[0])
        return not claims or claims["keys"] > self.stores[0].key_count

    def find(self, qa: QA, templates: Sequence[PromptTemplate]) -> tuple[str, Entry | None]:
        """Returns the first prompt with an entry, or the first and None. Raises CorruptedEntry."""
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
                    load = store.loader(key)
                    _, entry = read_entry(load, prompt) if load else (None, None)
                except CorruptedEntry as error:
                    if self._open_next_store():  # it may have a usable one
                        return self.find(qa, templates)
                    entry, reason = None, error
                if key < self.sample_bound and (entry or reason):
                    self.used_keys.add(key)
                if entry:
                    return prompt, entry
        if reason:
            raise reason
        if first_prompt and self._other_has_more and self._open_next_store():
            return self.find(qa, templates)
        return first_prompt, None

    def unused_prompts(self, max_characters: int) -> dict[str, Entry]:
        """Returns a sample of the prompts that matched no QA line, with their entries."""
        prompts: dict[str, Entry] = {}
        for store in self.stores:
            sampled = itertools.takewhile(lambda key: key < self.sample_bound, store.keys())
            for key in itertools.filterfalse(self.used_keys.__contains__, sampled):
                with suppress(CorruptedEntry):
                    prompt, entry = read_entry(store.loader(key) or dict)
                    if type(prompt) is str:
                        prompts.setdefault(prompt, entry)
                        max_characters -= len(prompt)
                if max_characters < 0:
                    return prompts
        return prompts


# --- Join and output ---
# Writes each QA line with its entry, and keeps samples for the census.

LINE_WARNINGS = 3  # of each kind; the summary has the counts
MATCHED_SAMPLE_SIZE, UNMATCHED_SAMPLE_SIZE = 100, 300  # QA lines; the first 150 and a spread of later ones
_encode_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False, check_circular=False).encode


def encode(fields: Entry) -> str | None:
    """Returns the JSON text of some fields, or None if JSON cannot represent them."""
    try:
        return _encode_json(fields)
    except (TypeError, ValueError, RecursionError, MemoryError):
        return None


def merge(line: bytes, qa: QA, entry: Entry) -> tuple[bytes, list[str]]:
    """Returns the output line, and the fields that JSON cannot represent, which are null."""
    unusable: list[str] = []
    text = encode(entry)
    if text is None:
        unusable = [name for name, value in entry.items() if encode({name: value}) is None]
        entry = entry | dict.fromkeys(unusable)
        text = _encode_json(entry)
    # The QA line, never {} here, stays as it is. Lone surrogates become JSON escapes.
    if qa.keys().isdisjoint(entry):
        kept = line[line.index(b"{") : line.rindex(b"}")]
        return b"%b, %b\n" % (kept, text[1:].encode("utf-8", "backslashreplace")), unusable
    return json.dumps(qa | entry, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n", unusable


class Join:
    """Joins QA lines with entries, counts them, and keeps samples."""

    def __init__(self, qa_path: str, finder: EntryFinder, templates: list[PromptTemplate], as_sent: bool) -> None:
        self._qa_path, self.finder, self.templates, self._as_sent = qa_path, finder, templates, as_sent
        self.field_names = dict.fromkeys(name for template in templates for _, name in template.parts)
        self.counts = Counts()
        self.periods: dict[str, tuple[float, float]] = {}  # by model: first and last time, since 1970
        self.first_line = b""
        self.matched_sample: list[QA] = []  # the first ones
        self.unmatched_count = 0  # QA lines without an entry or the fields
        self.unmatched_sample: list[QA] = []
        self._sample_step = 1  # of later ones, every n-th is kept
        self._warned: Counter[str] = Counter()

    def merge_lines(self, progress: bool) -> Iterator[bytes]:
        """Yields the output line of each QA line that has an entry."""
        counts, debugging = self.counts, log.isEnabledFor(logging.DEBUG)
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
            if prompt and debugging:
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
        name, logged_at = model_name(entry), time_logged(entry)
        self.counts.models[name] += 1
        if logged_at:
            first, last = self.periods.get(name, (logged_at, logged_at))
            self.periods[name] = min(first, logged_at), max(last, logged_at)

    def _keep_unmatched(self, qa: QA) -> None:
        """Keeps the first lines, often all that was asked, and as many others."""
        half = UNMATCHED_SAMPLE_SIZE // 2
        if self.unmatched_count < half or self.unmatched_count % self._sample_step == 0:
            self.unmatched_sample.append(qa)
        if len(self.unmatched_sample) > UNMATCHED_SAMPLE_SIZE:
            del self.unmatched_sample[half::2]
            self._sample_step *= 2
        self.unmatched_count += 1

    def _warn(self, number: int, problem: str, reason: object) -> None:
        """Warns about the first QA lines with a problem."""
        self._warned[problem] += 1
        level = logging.WARNING if self._warned[problem] <= LINE_WARNINGS else logging.DEBUG
        log.log(level, "%s:%d: %s: %s", self._qa_path, number, problem, reason)


@contextmanager
def open_output(path: str) -> Iterator[BinaryIO]:
    """Opens a stream, or a temporary file that replaces the output at the end."""
    try:
        if path == "/dev/stdout" or (os.path.exists(path) and not os.path.isfile(path)):
            # Opening /dev/stdout would truncate what the shell opened with `>>`.
            with open(os.dup(1) if path == "/dev/stdout" else path, "wb", buffering=BUFFER_SIZE) as file:
                yield file
            return
        target = os.path.realpath(path)  # so that a symbolic link stays one
        with suppress(FileExistsError):  # `open` gives the better error
            os.makedirs(os.path.dirname(target), exist_ok=True)
        temporary = f"{target}.{os.urandom(4).hex()}.tmp"
        try:
            with open(temporary, "xb", buffering=BUFFER_SIZE) as file:
                yield file
            os.replace(temporary, target)
        finally:
            with suppress(OSError):  # it is gone if all went well
                os.unlink(temporary)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise ReconstructionError(f"cannot write {path}: {error.strerror}") from error


# --- Missing entries ---
# Takes a census of the prompts in the store. A template that matches may be a judge's, so the user chooses.

SEARCH_BUDGET = 3_000_000_000  # characters to compare, about two seconds
MAX_TEXTS, MAX_CANDIDATES = 40, 100  # texts per QA line to look for, templates to try
TELLING_SIZE = 16  # bytes; a shorter text may be in a prompt by chance
BEGINNING, END = 12, 4  # characters in which a group is alike
SHOWN_KINDS, SHOWN_GROUPS = 4, 2  # kinds with a template, groups without
PRIVATE_USE = 0xE000  # code points that few texts have


class Kind(types.SimpleNamespace):
    """The prompts in the store that a template makes from some QA lines."""

    template: PromptTemplate
    match_count: int  # QA lines
    entries: dict[str, Entry]  # by prompt


def find_kind(template: PromptTemplate, qa_lines: Iterable[QA], finder: EntryFinder) -> Kind:
    matches: list[tuple[str, Entry]] = []
    for qa in qa_lines:
        with suppress(CorruptedEntry):
            prompt, entry = finder.find(qa, [template])
            if entry:
                matches.append((prompt, entry))
    return Kind(template=template, match_count=len(matches), entries=dict(matches))


def find_texts(prompts: Iterable[str], texts_of_lines: list[Texts]) -> dict[str, Texts]:
    """Returns the prompts that contain texts of QA lines, each with those of its best line."""
    lines_with: dict[str, list[int]] = {}
    for position, texts in enumerate(texts_of_lines):
        for text in filter(str.strip, dict.fromkeys(texts.values())):
            lines_with.setdefault(text, []).append(position)
    found = {prompt: [text for text in lines_with if text in prompt] for prompt in prompts}
    prompts_with = Counter(itertools.chain.from_iterable(found.values()))
    best_texts: dict[str, Texts] = {}
    for prompt, in_prompt in found.items():
        scores: Counter[int] = Counter()
        for text in in_prompt:  # one that is in many prompts tells little
            scores.update(dict.fromkeys(lines_with[text], 1000 * len(text) // prompts_with[text]))
        if scores:
            texts = texts_of_lines[max(scores, key=scores.__getitem__)]
            best_texts[prompt] = {name: text for name, text in texts.items() if text in in_prompt}
    return best_texts


def template_of(prompt: str, texts: Texts) -> str:
    """Returns a prompt in which the names of fields stand for their texts."""
    # The longest goes first: a shorter one may be in it, or anywhere by chance.
    fields = sorted(texts.items(), key=lambda field: -len(field[1]))
    for mark, (_, text) in enumerate(fields, PRIVATE_USE):
        prompt = prompt.replace(text, chr(mark))  # a name might contain a text
    names = {mark: f"{{{name}}}" for mark, (name, _) in enumerate(fields, PRIVATE_USE)}
    return prompt.translate(names | {ord("{"): "{{", ord("}"): "}}"})


def candidate_templates(best_texts: dict[str, Texts]) -> list[PromptTemplate]:
    """Returns templates that may have made the prompts, the most frequent first."""
    candidates: Counter[str] = Counter()
    for prompt, texts in best_texts.items():
        fields = [field for field in reversed(texts.items()) if FIELD_NAME.fullmatch(field[0])]
        fields.sort(key=lambda field: -len(field[1]))  # reversed: of equals, the nested one first
        sets = [[field] for field in fields] + [fields[:count] for count in range(2, len(fields) + 1)]
        candidates.update({template_of(prompt, dict(chosen)) for chosen in sets})
    ranked = sorted(candidates, key=lambda text: (-candidates[text], len(text), text))
    return [PromptTemplate(text) for text in ranked[:MAX_CANDIDATES]]


def proved_kinds(templates: list[PromptTemplate], least: int, near_misses: dict[str, str], join: Join) -> list[Kind]:
    """Returns the kinds with at least `least` prompts in the store, best first."""
    kinds = [find_kind(template, join.unmatched_sample, join.finder) for template in templates]
    kinds.sort(key=lambda kind: (-kind.match_count, len(kind.template.parts), len(kind.template.text)))
    proved: list[Kind] = []
    for kind in kinds:
        prompts = kind.entries.keys()
        is_new = not any(prompts <= better.entries.keys() for better in proved)
        # One that makes only near misses, and not all, fits by chance.
        if is_new and len(prompts) >= least and not prompts < near_misses.keys():
            proved.append(kind)
    return proved


def is_long(text: str) -> bool:
    return len(text.encode(errors="replace")) >= TELLING_SIZE


def telling_texts(texts: Texts, join: Join) -> Texts:
    """Returns the texts that were asked for or are too long to be there by chance."""
    return {name: text for name, text in texts.items() if name in join.field_names or is_long(text)}


def is_of_kind(prompt: str, texts: Texts, kind: Kind, join: Join) -> bool:
    """Returns whether a kind explains a prompt, even one of a QA line outside the sample."""
    is_made = prompt in kind.entries
    if is_made or kind.template.make_prompt({name: text for name, text in texts.items() if is_long(text)}):
        return is_made  # its fields are known
    own_texts = [own_text for own_text, _ in kind.template.parts] + [kind.template.tail]
    # A short template fits other kinds, too. It counts only if the sample lacks QA lines.
    may_fit = is_long("".join(own_texts)) or join.unmatched_count > len(join.unmatched_sample)
    pattern = "*".join(re.sub(r"[*?[]", r"[\g<0>]", own_text) for own_text in own_texts)
    return may_fit and fnmatch.fnmatchcase(prompt, pattern)


def group_alike(texts_in: dict[str, Texts]) -> list[list[str]]:
    """Groups prompts that begin and end alike. The largest group is first."""
    shapes = {prompt: re.sub(r"\d+", "0", template_of(prompt, texts)) for prompt, texts in texts_in.items()}
    beginnings = Counter(shape[:BEGINNING] for shape in shapes.values())
    ends = Counter(shape[-END:] for shape in shapes.values())
    groups: dict[tuple[str, str], list[str]] = {}
    least = max(2, len(shapes) / 8)
    for prompt, shape in shapes.items():
        beginning = shape[:BEGINNING] if beginnings[shape[:BEGINNING]] >= least else ""
        end = shape[-END:] if ends[shape[-END:]] >= least else ""
        groups.setdefault((beginning, end), []).append(prompt)
    return sorted(groups.values(), key=len, reverse=True)


def unexplained(texts_in: dict[str, Texts], kinds: list[Kind], join: Join) -> dict[str, Texts]:
    """Returns the prompts that no kind explains, with their texts."""
    names, others = join.field_names, {}
    matched = [[text for name, text in texts_of(qa) if name in names] for qa in join.matched_sample]
    for prompt, texts in texts_in.items():
        # Once lines matched, a prompt on a matched one is a judge's; others need an unmatched one.
        is_a_judges = any(all(text in prompt for text in qa_texts) for qa_texts in matched)
        if matched and (is_a_judges or not texts.keys() & names):
            continue
        if not any(is_of_kind(prompt, texts, kind, join) for kind in kinds):
            others[prompt] = texts
    return others


def find_near_misses(prompts: Iterable[str], tried: list[str]) -> dict[str, str]:
    """Returns prompts that have the letters of one that was tried, with that one."""
    normal = {prompt: unicodedata.normalize("NFKD", prompt).casefold() for prompt in [*prompts, *tried]}
    letters = {prompt: re.sub(r"[^\w+<=>]|_", "", text) for prompt, text in normal.items()}
    by_letters = {letters[prompt]: prompt for prompt in tried}
    return {p: by_letters[letters[p]] for p in prompts if letters[p] in by_letters}


def is_judges(kind: Kind, join: Join) -> bool:
    """Returns whether a kind fits matched lines at least half as often, if enough matched."""
    if join.unmatched_count > 10 * join.counts.matched:
        return False
    in_matched = find_kind(kind.template, join.matched_sample, join.finder).match_count
    return 2 * in_matched * len(join.unmatched_sample) >= kind.match_count * len(join.matched_sample)


def explain(join: Join) -> ReconstructionError:
    """Returns why QA lines have no entry, with a hint if the user can do something."""
    plain = ReconstructionError(headline(join))
    sample = join.unmatched_sample
    if not sample or not join.finder.unused_prompts(0):  # nothing is left
        return plain
    texts_of_lines = [dict(itertools.islice(texts_of(qa), MAX_TEXTS)) for qa in sample]
    prompts = join.finder.unused_prompts(SEARCH_BUDGET // (1 + sum(map(len, texts_of_lines))))
    best_texts = find_texts(prompts, texts_of_lines)
    telling = {prompt: telling_texts(texts, join) for prompt, texts in best_texts.items()}
    tried = [prompt for qa in sample for template in join.templates if (prompt := template.make_prompt(qa))]
    near_misses = find_near_misses(prompts, tried)
    has_few = len(prompts) <= SHOWN_KINDS or join.unmatched_count == 1  # then one match counts
    templates = candidate_templates(telling if has_few else best_texts)
    kinds = proved_kinds(templates, 1 if has_few else 2, near_misses, join)
    others = unexplained({p: telling.get(p, {}) for p in prompts if p not in near_misses}, kinds, join)
    kinds = [kind for kind in kinds if not is_judges(kind, join)][:SHOWN_KINDS]
    kinds.sort(key=lambda kind: len(kind.template.text))

    details = []
    for kind in kinds:
        what = f"matches {kind.match_count:,} of the {len(sample):,} QA lines looked at"
        details.append(f"{quoted(kind.template.text, 80)} {what}{answers(list(kind.entries.values()))}")
    of_prompts = f"of the {len(prompts):,} prompts looked at"
    if near_misses:
        what = "almost matched: the first differs only in whitespace, case, accents or punctuation"
        details.append(f"{len(near_misses):,} {of_prompts} {what}{difference(*next(iter(near_misses.items())))}")
    for group in group_alike(others)[:SHOWN_GROUPS]:
        what = f"resembles {len(group):,} {of_prompts}; no template was found"
        shape = quoted(template_of(group[0], others[group[0]]), 80)
        details.append(f"{shape} {what}{answers([prompts[prompt] for prompt in group])}")
    if not details:
        return plain
    text = f"{plain}. These kinds of prompts are in the store:"
    text += "".join(f"\n  {number}. {detail}" for number, detail in enumerate(details, 1))
    if kinds or near_misses or any(others.values()):
        return ReconstructionError(text, hint_for(kinds, len(details), join))
    text += "".join(f"\n  tried: {quoted(prompt)}" for prompt in tried[:1])
    text += "\n  They contain none of the longer texts of the QA lines looked at."
    return ReconstructionError(f"{text} The store may be from another experiment.")


def headline(join: Join) -> str:
    """Returns how many QA lines have no entry, or why none has one."""
    counts = join.counts
    if not any(store.entries for store in join.finder.stores):
        return "nothing matched: no entries found in the store"
    if counts.malformed == counts.qa_lines:
        names = dict.fromkeys(name for qa in join.unmatched_sample for name in [*qa, *dict(texts_of(qa))])
        return f"no QA line has text in {listed(join.field_names)}; found: {listed(names, 20)}"
    return f"no usable entry for {join.unmatched_count + counts.corrupted:,} of {counted(counts.qa_lines, 'QA line')}"


def answers(entries: Sequence[Entry]) -> str:
    """Returns a line with the models and an answer."""
    models = listed(sorted(set(map(model_name, entries))), 2)
    return f"\n     {models} answered {quoted(entries[0]['generation'], 60)}"


def difference(stored: str, tried: str) -> str:
    """Returns two prompts in ASCII, from just before they differ."""
    common = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(tried, stored))))
    start, end = max(0, common - 60), common + 100
    return f"\n     tried:   {tried[start:end]!a}\n     stored:  {stored[start:end]!a}"


def hint_for(kinds: list[Kind], shown: int, join: Join) -> str:
    """Returns what to do, with the options of the kinds."""
    advice = "use the inference run's QA file, or add a field with the whole prompt for --prompt_template"
    if not kinds:
        return advice
    text = "pick the kind that was sent to the model under test (servers also log question generators and judges), "
    text += "and run again with its option in place of yours:"
    for kind in kinds:
        # The proposed template comes first, so that a trial run does not win.
        given = join.templates if join.counts.matched else []
        text += "\n  " + " ".join(template.option() for template in [kind.template, *given])
    return text if shown == len(kinds) else f"{text}\n  if that kind has no option: {advice}"


# --- The run and the command ---

MAX_MEMORY = 5 << 30  # bytes, without the mapped store; a value is under 4 GiB
_one_run = threading.Lock()  # because lmdb opens a store only once in a process


def reconstruct_inference(
    qa_output_path: str | os.PathLike[str],
    lmdb_path: str | os.PathLike[str],
    output_path: str | os.PathLike[str],
    *,
    prompt_template: str | Sequence[str] = DEFAULT_PROMPT_TEMPLATES,
    prompt_as_sent: bool = False,
    progress: bool = False,
) -> Counts:
    """Joins a QA file with the logger's LMDB, writes the JSONL, and returns what it found.

    The path `-` is standard input or output; for `lmdb_path` see `locate_stores`. Of several templates, the first
    that matches is used. `prompt_as_sent` writes the prompt as sent, without `user: `, into `prompt`. Messages
    go to the logger `reconstruct_inference`. Raises ValueError if a template cannot be used, BrokenPipeError if
    the output pipe is closed, and ReconstructionError if no line can be written.
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
        pass  # a standard stream was closed; a store would take its place
    os.close(descriptor)
    with _one_run, ExitStack() as stack:
        stack.callback(setattr, sys, "excepthook", sys.excepthook)
        sys.excepthook = lambda *error: None  # or a bytearray of absurd size prints an error
        finder = EntryFinder(stores, progress, stack)
        join = Join(qa_path, finder, templates, prompt_as_sent)
        output_lines = join.merge_lines(progress)
        first = next(output_lines, None)
        if first is None:  # before an output is made
            has_objects = join.unmatched_count or join.counts.corrupted
            raise explain(join) if has_objects else not_json_lines(qa_path, join.first_line)
        replaced = " (replaced the old file)" if output != "/dev/stdout" and os.path.isfile(output) else ""
        with open_output(output) as file:
            file.write(first)
            file.writelines(output_lines)
            explanation = explain(join)  # a stop still keeps the old file
        if explanation.hint:
            log.warning("%s", explanation)
    summarize(join)
    log.info("wrote %s to %s%s", counted(join.counts.matched, "line"), output, replaced)
    return join.counts


def summarize(join: Join) -> None:
    """Logs the counts of QA lines, entries and models."""
    counts = join.counts
    outcomes = {"matched": counts.matched, "without an entry": counts.without_entry}
    outcomes |= {"malformed": counts.malformed, "corrupted": counts.corrupted}
    parts = ", ".join(f"{number:,} {outcome}" for outcome, number in outcomes.items() if number)
    log.info("QA lines: %s (%s)", f"{counts.qa_lines:,}", parts)
    for store in join.finder.stores:
        lost = f" ({store.lost:,} of {store.entries + store.lost:,} lost)" if store.lost else ""
        log.info("entries: %s in %s%s", f"{store.entries:,}", store.path, lost)
    for name, lines in counts.models.items():
        period = ""
        if name in join.periods:
            first, last = (time.strftime("%Y-%m-%d %H:%M", time.localtime(at)) for at in join.periods[name])
            period = f", {first}" if first == last else f", {first} to {last.removeprefix(first[:11])}"
        log.info("model: %s (%s%s)", name, counted(lines, "line"), period)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    parser = argparse.ArgumentParser(
        description="Rebuild the generation.jsonl of an inference run from the activations logger's LMDB.",
        epilog="example:\n  %(prog)s --qa_output_path qa.jsonl \\\n"
        "      --lmdb_path lmdb_data/activations.lmdb --output_path generation.jsonl\n\n"
        "exit codes: 0 = lines written, 1 = error or no match, 2 = wrong usage,\n"
        "            129, 130, 143 = a signal, 141 = output closed",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )

    def unescaped(typed: str) -> str:
        return re.sub(r"\\([n\\])", lambda c: "\n" if c[1] == "n" else "\\", typed)

    how = "how prompts were made: {name} is a field, \\n is a line break; may be repeated: each QA line uses "
    how += f"the first template that matches (default: {DEFAULT_PROMPT_TEMPLATE!r}, with and without `user: `)"
    path: dict[str, Any] = {"required": True, "type": os.path.expanduser, "metavar": "PATH"}
    add = parser.add_argument
    add("--qa_output_path", **path, help="the QA file, in JSON Lines; `-` is standard input")
    add("--lmdb_path", **path, help="path passed to the activations logger; `PATH_metadata` is found automatically")
    add("--output_path", **path, help="generation.jsonl to write; `-` is standard output")
    add("--prompt_template", action="append", type=unescaped, metavar="TEMPLATE", help=how)
    add("--prompt_as_sent", action="store_true", help="put the prompt as sent into `prompt`, as HalluLens does")
    add("--verbose", action="store_true", help="log each prompt hash and its outcome, and all warnings")
    add("--version", action="version", version=f"%(prog)s {__version__}")
    options = vars(parser.parse_args(argv))
    for name, value in options.items():
        if value == "":
            parser.error(f"argument --{name}: the value is empty (an unset shell variable?)")
    options["prompt_template"] = options["prompt_template"] or DEFAULT_PROMPT_TEMPLATES
    prefixes = {logging.DEBUG: "", logging.INFO: "", logging.WARNING: "warning: ", logging.ERROR: "error: "}
    for level, prefix in prefixes.items():
        logging.addLevelName(level, prefix)
    level = logging.DEBUG if options.pop("verbose") else logging.INFO
    logging.basicConfig(level=level, format="%(levelname)s%(message)s", force=True)
    exit_on_stop_signals()
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if soft < 0:  # no limit
        resource.setrlimit(resource.RLIMIT_DATA, (MAX_MEMORY, hard))
    progress = sys.stderr is not None and sys.stderr.isatty()
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
