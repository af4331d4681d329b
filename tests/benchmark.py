#!/usr/bin/env python3
"""Measures the command against a minimal loop over the same data, and prints a Markdown table.

    python tests/benchmark.py 5000 50000 500000

Each size is a number of QA lines of about 1.8 kB, each with an entry. The command and the loop
run in turn, each as a process of its own, `--rounds` times; the table gives medians, and the most memory.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from helpers import SCRIPT, logged, write_store
from tqdm import tqdm

MINIMAL_LOOP = """
import hashlib, json, pickle, sys
import lmdb
qa_path, store, output_path = sys.argv[1:]
names = "model", "input_length", "timestamp", "messages", "trim_position"
encode = json.JSONEncoder(ensure_ascii=False).encode
transaction = lmdb.open(store, readonly=True, lock=False).begin(buffers=True)
with open(qa_path, "rb") as qa_file, open(output_path, "wb", buffering=1 << 18) as output:
    for line in qa_file:
        prompt = "user: Answer in one sentence. Q:" + json.loads(line.decode())["prompt"] + "\\n A:"
        value = transaction.get(hashlib.sha256(prompt.encode()).hexdigest().encode())
        if value is not None:
            entry = pickle.loads(value)
            added = {"generation": entry["response"], **{name: entry[name] for name in names}}
            output.write(line[:-2] + b", " + encode(added)[1:].encode() + b"\\n")
"""


class Run(NamedTuple):
    seconds: float
    cpu_seconds: float
    private_kb: int  # at its highest; the store, which is mapped, does not count


def make_data(folder: Path, lines: int, bar: tqdm[Any]) -> None:
    """Writes a QA file of so many lines, and a metadata store in which each has an entry."""
    rng = random.Random(lines)
    words = ["the", "of", "and", "to", "in", "is", "that", "for", "it", "as", "was", "with", "be", "by", "on", "not"]
    references = [" ".join(rng.choices(words, k=420)) for _ in range(100)]
    questions = [f"What is the {rng.choice(words)} {rng.choice(words)} of number {n}?" for n in range(lines)]

    def qa_objects() -> Iterator[dict[str, Any]]:
        for number, question in enumerate(questions):
            bar.update()
            yield {
                "index": number,
                "title": f"Title {number}",
                "pageid": rng.randrange(10**8),
                "categories": rng.choices(words, k=4),
                "reference": rng.choice(references),
                "prompt": question,
                "answer": f"Answer {number}",
            }

    def entries() -> Iterator[tuple[str, dict[str, Any]]]:
        for question in questions:
            bar.update()
            entry = logged(question, " ".join(rng.choices(words, k=45)), trim_position=None)
            entry["messages"] = [{"role": "user", "content": entry["prompt"].removeprefix("user: ")}]
            yield entry["prompt"], entry

    write_store(folder / "a.lmdb_metadata", entries(), map_size=1 << 36)
    with (folder / "qa.jsonl").open("w", encoding="utf-8") as qa_file:
        qa_file.writelines(json.dumps(qa) + "\n" for qa in qa_objects())


def measure(command: list[str]) -> Run:
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command], stderr=subprocess.DEVNULL)
    private_kb = 0
    while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        private_kb = max([private_kb, *(int(row.split()[1]) for row in status.splitlines() if "RssAnon" in row)])
        time.sleep(0.02)
    seconds = time.perf_counter() - start
    _, status_code, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status_code)
    if process.returncode:
        raise SystemExit(f"exit code {process.returncode}: {' '.join(command)}")
    return Run(seconds, usage.ru_utime + usage.ru_stime, private_kb)


def benchmark(lines: int, rounds: int) -> str:
    """The table's row for a size."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with tqdm(total=2 * lines, desc=f"making {lines:,} lines", leave=False) as bar:
            make_data(folder, lines, bar)
        qa_path, lmdb_path, output_path = folder / "qa.jsonl", folder / "a.lmdb", folder / "out.jsonl"
        paths = [f"--qa_output_path={qa_path}", f"--lmdb_path={lmdb_path}", f"--output_path={output_path}"]
        loops, runs = [], []
        for _ in tqdm(range(rounds), desc=f"measuring {lines:,} lines", leave=False):
            loops.append(measure(["-c", MINIMAL_LOOP, str(qa_path), f"{lmdb_path}_metadata", str(output_path)]))
            runs.append(measure([str(SCRIPT), *paths]))
    seconds = statistics.median(run.seconds for run in runs)
    cpu = statistics.median(run.cpu_seconds / loop.cpu_seconds for run, loop in zip(runs, loops))
    private = max(run.private_kb for run in runs) / 1000
    return f"| {lines:,} | {seconds:.2f} | {cpu:.2f} | {private:.0f} MB |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", type=int, nargs="+", help="numbers of QA lines")
    parser.add_argument("--rounds", type=int, default=5, help="how often each is measured (default: 5)")
    arguments = parser.parse_args()
    table = [
        f"Python {platform.python_version()}, {platform.system()}, {os.cpu_count()} cores, {arguments.rounds} rounds",
        "",
        "| QA lines | seconds | CPU, relative to the minimal loop | private memory |",
        "| ---: | ---: | ---: | ---: |",
    ]
    table += [benchmark(lines, arguments.rounds) for lines in arguments.lines]
    print("\n".join(table))


if __name__ == "__main__":
    main()
