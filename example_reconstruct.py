#!/usr/bin/env python3
"""Makes the data that an inference run leaves behind, rebuilds its generation.jsonl, and shows what comes out."""

from __future__ import annotations

import argparse
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


def show(folder: Path) -> str:
    """Makes the data in a folder, rebuilds its generation.jsonl, and shows that; returns the command that did it."""
    qa_path, lmdb_path, output_path = folder / "qa.jsonl", folder / "run.lmdb", folder / "generation.jsonl"
    write_qa_file(qa_path)
    log_requests(lmdb_path)
    options = [f"--qa_output_path={qa_path}", f"--lmdb_path={lmdb_path}", f"--output_path={output_path}"]
    print("What the command says:\n", flush=True)
    reconstruct_inference.main(options)
    print("\nThe first line that it writes, spread out:\n")
    with output_path.open(encoding="utf-8") as file:
        print(json.dumps(json.loads(file.readline()), indent=4, ensure_ascii=False))
    return shlex.join([sys.executable, reconstruct_inference.__file__, *options])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    about_folder = "where the data stays; it must be new or empty (default: a temporary one)"
    parser.add_argument("folder", nargs="?", type=Path, metavar="FOLDER", help=about_folder)
    folder = parser.parse_args().folder
    if folder is None:
        with tempfile.TemporaryDirectory() as temporary_folder:
            show(Path(temporary_folder))
        print("\nThat was in a temporary folder. To keep one to play with:\n")
        print(shlex.join([sys.executable, __file__, "reconstruct_example"]))
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            parser.error(f"{folder} is not empty; nothing in it was touched")
        command = show(folder.absolute())
    except OSError as error:
        parser.error(f"cannot write to {folder}: {error.strerror}")
    print(f"\nThe command, to run again:\n\n{command}")


if __name__ == "__main__":
    main()
