#!/usr/bin/env python3
"""Makes the data that an inference run leaves behind, rebuilds its generation.jsonl, and shows each step."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import pickle
import shlex
import sys
import tempfile
import time
from pathlib import Path

import lmdb

import reconstruct_inference
from reconstruct_inference import DEFAULT_PROMPT_TEMPLATE

PATHS = ["--qa_output_path", "--lmdb_path", "--output_path"]

QUESTIONS = [
    {"index": 0, "title": "Curling", "prompt": "From which island do curling stones come?", "answer": "Ailsa Craig"},
    {"index": 1, "title": "東京", "prompt": "日本の首都はどこですか？", "answer": "東京"},
    {"index": 2, "title": "Never asked", "prompt": "Which question was filtered out?", "answer": "this one"},
    {"index": 3, "title": "Eiffel Tower", "prompt": "When was the Eiffel Tower completed?", "answer": "1889"},
]
RESPONSES = {0: " They come from Ailsa Craig.", 1: " 東京です。", 3: " It was completed in 1889.\n"}


def write_qa_file(path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        for question in QUESTIONS:
            file.write(json.dumps(question, ensure_ascii=False) + "\n")


def log_requests(lmdb_path: Path) -> None:
    """Writes both stores as the activations logger does while the model answers."""
    with (
        lmdb.open(str(lmdb_path), map_size=1 << 24) as activations_store,
        lmdb.open(f"{lmdb_path}_metadata", map_size=1 << 24) as metadata_store,
    ):
        for question in QUESTIONS:
            if question["index"] not in RESPONSES:
                continue  # most runs ask only some of the questions
            prompt = DEFAULT_PROMPT_TEMPLATE.format(**question)
            fields = {
                "prompt": prompt,
                "response": RESPONSES[question["index"]],
                "input_length": len(prompt.split()),
                "model": "an-example-model",
                "messages": [{"role": "user", "content": prompt.removeprefix("user: ")}],
                "trim_position": None,
            }
            key = hashlib.sha256(prompt.encode()).hexdigest().encode()
            activations = {"all_layers_activations": [b"hidden states"] * 4}
            with activations_store.begin(write=True) as transaction:
                transaction.put(key, pickle.dumps({"data": fields | activations, "metadata": {"compression": "none"}}))
            with metadata_store.begin(write=True) as transaction:
                transaction.put(key, pickle.dumps(fields | {"timestamp": time.time(), "has_activations": True}))


def command(*paths: object) -> list[str]:
    """Returns the command that rebuilds a generation.jsonl, for three paths."""
    options = [word for name, path in zip(PATHS, paths) for word in (name, str(path))]
    return [sys.executable, reconstruct_inference.__file__, *options]


def show(folder: Path) -> None:
    """Makes the data in a folder, rebuilds its generation.jsonl, and shows each step."""
    qa_path, lmdb_path, output_path = folder / "qa.jsonl", folder / "run.lmdb", folder / "generation.jsonl"
    write_qa_file(qa_path)
    log_requests(lmdb_path)
    print(f"1. A QA file with {len(QUESTIONS)} questions. Its first line:\n")
    print(qa_path.read_text(encoding="utf-8").splitlines()[0])
    print(
        f"\n2. The logger's LMDB, {lmdb_path}, has {len(RESPONSES)} entries. One question was never asked, on purpose."
    )
    print("\n3. The command:\n")
    print(shlex.join(command(qa_path, lmdb_path, output_path)))
    print("\n4. Its messages:\n", flush=True)
    with contextlib.redirect_stderr(sys.stdout):
        reconstruct_inference.main(command(qa_path, lmdb_path, output_path)[2:])
    rebuilt = [json.loads(line) for line in output_path.read_text(encoding="utf-8").splitlines()]
    print("\n5. The first line that it wrote, indented:\n")
    print(json.dumps(rebuilt[0], indent=4, ensure_ascii=False))
    right = sum(line["generation"] == RESPONSES[line["index"]] for line in rebuilt)
    print(f"\n{right} of {len(RESPONSES)} generations match what was logged. All files are in {folder}.")
    print("\nFor your own data, replace the names in capital letters with your paths:\n")
    own = command("YOUR_QA.jsonl", "YOUR_LMDB", "generation.jsonl")
    print(f"cd YOUR_FOLDER && {shlex.join(own)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    about_folder = "folder for the files, new or empty (default: a new temporary one)"
    parser.add_argument("folder", nargs="?", type=Path, metavar="FOLDER", help=about_folder)
    folder = parser.parse_args().folder
    try:
        if folder is None:
            folder = Path(tempfile.mkdtemp(prefix="reconstruct_example_"))
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            parser.error(f"{folder} is not empty; nothing in it was changed")
        show(folder.absolute())
    except OSError as error:
        parser.error(f"cannot write to {folder}: {error.strerror}")


if __name__ == "__main__":
    main()
