#!/usr/bin/env python3
"""A run from beginning to end: makes the data that an experiment leaves behind, then rebuilds its JSONL.

python example_reconstruct.py            in a temporary folder, which goes away again
python example_reconstruct.py FOLDER     in FOLDER, which stays there to play with
"""

import hashlib
import json
import pickle
import sys
import tempfile
import time
from pathlib import Path

import lmdb

from reconstruct_inference import DEFAULT_PROMPT_TEMPLATE, reconstruct_inference, summarize

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
    activations_store = lmdb.open(str(lmdb_path), map_size=1 << 24)
    metadata_store = lmdb.open(f"{lmdb_path}_metadata", map_size=1 << 24)
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
    activations_store.close()
    metadata_store.close()


def run(folder: Path) -> None:
    qa_path, lmdb_path, output_path = folder / "qa.jsonl", folder / "activations.lmdb", folder / "generation.jsonl"
    write_qa_file(qa_path)
    log_requests(lmdb_path)

    print("The command:\n")
    print("    python reconstruct_inference.py \\")
    print(f"        --qa_output_path {qa_path} \\")
    print(f"        --lmdb_path {lmdb_path} \\")
    print(f"        --output_path {output_path}")

    counts = reconstruct_inference(qa_path, lmdb_path, output_path, report=print)

    print("\nThe first line that it writes, spread out:\n")
    with output_path.open(encoding="utf-8") as file:
        print(json.dumps(json.loads(file.readline()), indent=4, ensure_ascii=False))
    print("\nIts summary:\n")
    print(summarize(counts, output_path))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        example_folder = Path(sys.argv[1])
        example_folder.mkdir(parents=True, exist_ok=True)
        run(example_folder)
    else:
        with tempfile.TemporaryDirectory() as temporary_folder:
            run(Path(temporary_folder))
