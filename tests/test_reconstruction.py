"""The main job: QA lines come out with the generations that were logged for them."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import subprocess
from concurrent.futures import ThreadPoolExecutor

import lmdb
import pytest
from helpers import SAMPLE, Experiment, key_of, logged, prompt_of, read_lines, table, write_store
from hypothesis import given, settings
from hypothesis import strategies as st

from reconstruct_inference import Counts, NothingMatched, ReconstructionError, reconstruct_inference

LOGGED = ["model", "input_length", "timestamp", "messages", "trim_position"]  # beside the response
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda parts: st.lists(parts, max_size=3) | st.dictionaries(st.text(), parts, max_size=3),
    max_leaves=6,
)

CIRCLE: list[object] = []
CIRCLE.append(CIRCLE)


def test_the_real_loggers_data_gives_the_expected_lines_in_order(experiment: Experiment) -> None:
    result = experiment.run(qa_output_path=SAMPLE / "qa.jsonl", lmdb_path=SAMPLE / "activations.lmdb")
    expected = read_lines(SAMPLE / "expected.jsonl")
    assert result.code == 0
    assert [list(line.items()) for line in result.lines] == [list(line.items()) for line in expected]


def test_a_line_begins_with_the_very_bytes_of_its_qa_line(asked: Experiment) -> None:
    qa_line = b'{ "n" : 1e3,  "big": 1190001234567890123456, "\\u6771": [0.10, "\xe6\x9d\xb1"], "prompt" : "q" '
    asked.qa.write_bytes(qa_line + b"} \r\n")
    asked.run()
    assert asked.output.read_bytes().startswith(qa_line + b', "generation": ')


@pytest.mark.parametrize("store", ["legacy/plain.lmdb", "legacy/wrapped.lmdb"])
def test_early_loggers_stores_give_their_entries_with_null_timestamps(experiment: Experiment, store: str) -> None:
    result = experiment.run(qa_output_path=SAMPLE / "qa.jsonl", lmdb_path=SAMPLE / store)
    expected = [line for line in read_lines(SAMPLE / "expected.jsonl") if line["index"] in (0, 2, 3, 4, 6)]
    for name in ("index", "generation", "messages"):
        assert [line[name] for line in result.lines] == [line[name] for line in expected]
    assert [line["timestamp"] for line in result.lines] == [None] * 5
    assert "timestamps: null in 5 lines from the activations store" in result.err


@settings(max_examples=40)
@given(
    question=st.text(st.characters(exclude_categories=["Cs"])),
    qa_fields=st.dictionaries(st.text() | st.sampled_from(["generation", *LOGGED]), JSON_VALUES, max_size=5),
    entry=st.fixed_dictionaries(
        {"response": st.text()},
        optional={**dict.fromkeys(LOGGED, JSON_VALUES), "other": st.binary() | st.sets(st.integers()) | st.tuples()},
    ),
    escaped=st.booleans(),
    protocol=st.integers(0, pickle.HIGHEST_PROTOCOL),
)
def test_any_qa_line_and_any_entry_come_out_as_one_line_of_json(
    experiment: Experiment, question: str, qa_fields: dict, entry: dict, escaped: bool, protocol: int
) -> None:
    qa = {**qa_fields, "prompt": question}
    qa_line = json.dumps(qa, ensure_ascii=escaped).encode("utf-8", "backslashreplace")
    experiment.qa.write_bytes(qa_line + b"\n")
    value = pickle.dumps({"prompt": prompt_of(question), **entry}, protocol)
    write_store(experiment.metadata, [(prompt_of(question), value)])
    result = experiment.run()
    assert result.code == 0, result.err
    present = {name: entry[name] for name in LOGGED if name in entry}
    added = {"generation": entry["response"], **dict.fromkeys(LOGGED[:3]), **present}
    expected = json.dumps({**json.loads(qa_line), **added})
    assert [json.dumps(line) for line in result.lines] == [json.dumps(json.loads(expected))]
    if not added.keys() & qa.keys():
        assert experiment.output.read_bytes().startswith(qa_line[:-1])


def test_of_a_response_only_what_json_must_escape_and_lone_surrogates_are_escaped(asked: Experiment) -> None:
    asked.log(logged("q", 'a\n"b"\\\x00\u2028 é\ud83d🗾'))
    asked.run()
    assert rb'"generation": "a\n\"b\"\\\u0000' + '\u2028 é\\ud83d🗾", "model"'.encode() in asked.output.read_bytes()


@table(
    "value",
    {
        "NaN": float("nan"),
        "bytes": b"bytes",
        "a key that is no string": [{"content": [{1: "one"}]}],
        "an integer of 5000 digits": 10**5000,
        "a list that holds itself": CIRCLE,
    },
)
def test_an_entry_field_that_is_no_json_data_is_null_with_a_warning(asked: Experiment, value: object) -> None:
    asked.log(logged("q", messages=value))
    result = asked.run()
    assert (result.lines[0]["messages"], result.lines[0]["generation"]) == (None, " An answer.")
    assert f"warning: {asked.qa}:1: no JSON data, null instead: `messages`\n" in result.err


def test_prompt_as_sent_puts_the_sent_prompt_in_the_place_of_prompt_or_adds_it(experiment: Experiment) -> None:
    experiment.ask({"prompt": "q", "n": 1}, {"question": "w"})
    experiment.log_prompts("user: Q: q", "user: Hello, w")
    templates = ["--prompt_template", "user: Q: {prompt}", "--prompt_template", "user: Hello, {question}"]
    in_place, added = experiment.run("--prompt_as_sent", *templates).lines
    assert list(in_place.items())[:2] == [("prompt", "Q: q"), ("n", 1)]
    assert list(added.items())[:2] == [("question", "w"), ("prompt", "Hello, w")]


@table(
    "content",
    {
        "a byte-order mark, and CRLF": b'\xef\xbb\xbf{"prompt": "q"}\r\n',
        "blank lines": b'\n  \n\r\n{"prompt": "q"}\n\n',
        "a byte-order mark alone on its line, no line break at the end": b'\xef\xbb\xbf\n{"prompt": "q"}',
        "space around the object": b' \t{"prompt": "q"} \t\n',
    },
)
def test_is_fine_and_not_worth_a_word(asked: Experiment, content: bytes) -> None:
    asked.qa.write_bytes(content)
    result = asked.run()
    assert (result.code, len(result.lines)) == (0, 1)
    assert result.err.startswith("QA lines: 1 (1 matched)\n")


@table(
    "line, reason",
    {
        "cut off": (b'{"prompt": "q"', "not JSON"),
        "something behind it": (b'{"prompt": "q"} x', "not JSON"),
        "not UTF-8": (b'{"prompt": "\xff"}', "not JSON in UTF-8"),
        "an array": (b'["q"]', "not a JSON object"),
        "no prompt": (b'{"question": "q"}', "no text in `prompt`"),
        "a prompt that is no text": (b'{"prompt": ["q"]}', "no text in `prompt`"),
        "endless nesting": (b'{"prompt": "q", "x": ' + b"[" * 200_000, "not JSON"),
        "white space that is not JSON's": (b'\x0b{"prompt": "q"}', "not JSON"),
    },
)
def test_a_malformed_line_is_reported_and_skipped(asked: Experiment, line: bytes, reason: str) -> None:
    asked.qa.write_bytes(b'{"prompt": "q"}\n' + line + b'\n{"prompt": "q"}\n')
    result = asked.run()
    assert (result.code, len(result.lines)) == (0, 2)
    assert f"warning: {asked.qa}:2: malformed QA line, skipped: {reason}" in result.err
    assert "QA lines: 3 (2 matched, 1 malformed)\n" in result.err


def test_a_question_with_a_lone_surrogate_is_one_without_an_entry(asked: Experiment) -> None:
    asked.qa.write_bytes(b'{"prompt": "\\ud800"}\n{"prompt": "q"}\n')
    assert asked.run().err.startswith("QA lines: 2 (1 matched, 1 without an entry)\n")


@table(
    "value, reason",
    {
        "no pickle": (b"\x80\x04no pickle", "cannot be unpickled"),
        "no response": ({"prompt": prompt_of("q")}, "no text in `response`"),
        "no fields where they should be": ({"data": ["a list"]}, "no text in `response`"),
        "a response that is no text": (logged("q", b"bytes"), "no text in `response`"),
        "another prompt's entry": (logged("another"), "its `prompt` is another one"),
    },
)
def test_a_corrupted_entry_is_reported_and_skipped(experiment: Experiment, value: object, reason: str) -> None:
    experiment.ask("good", "q")
    write_store(experiment.metadata, [(prompt_of("good"), logged("good")), (prompt_of("q"), value)])
    result = experiment.run()
    assert (result.code, len(result.lines)) == (0, 1)
    assert f"warning: {experiment.qa}:2: corrupted entry, skipped: {reason}" in result.err
    assert "QA lines: 2 (1 matched, 1 corrupted)\n" in result.err


def test_an_entry_that_is_corrupted_in_the_metadata_store_comes_from_the_activations_store(asked: Experiment) -> None:
    asked.log(logged("q", None))
    asked.log_activations(logged("q", "from the activations"))
    result = asked.run()
    assert result.lines[0]["generation"] == "from the activations"
    assert "corrupted" not in result.err


def test_an_entry_that_the_metadata_store_lacks_comes_from_the_activations_store(asked: Experiment) -> None:
    asked.ask("q", "older")
    asked.log_activations(logged("q", "not from here"), logged("older", "from the activations"))
    result = asked.run()
    assert [line["generation"] for line in result.lines] == [" An answer.", "from the activations"]
    assert f"entries: 1 in {asked.metadata}\nentries: 2 in {asked.lmdb}\ntimestamps: null in 1 line from" in result.err


def test_the_summary_has_no_zero_rows_and_groups_thousands(experiment: Experiment) -> None:
    experiment.ask(*["q"] * 1999, "never asked", {"n": 1}, "bad", "other")
    experiment.log(logged("q"), logged("bad", None), logged("other", model="another-model"))
    result = experiment.run()
    assert result.out == ""
    assert result.err.splitlines()[-4:] == [
        "QA lines: 2,003 (2,000 matched, 1 without an entry, 1 malformed, 1 corrupted)",
        f"entries: 3 in {experiment.metadata}",
        "models: a-model 1,999, another-model 1",
        f"wrote 2,000 lines to {experiment.output}",
    ]


def test_three_warnings_of_a_kind_are_shown_then_how_many_more_and_with_verbose_all(experiment: Experiment) -> None:
    experiment.ask("q", *[{"n": n} for n in range(10)], *["bad"] * 4)
    experiment.log(logged("q"), logged("bad", None))
    usual, verbose = experiment.run().err, experiment.run("--verbose").err
    assert usual.count(": malformed QA line, skipped: ") == 3
    assert "warning: 7 more: malformed QA line, skipped\nwarning: 1 more: corrupted entry, skipped\nQA" in usual
    assert verbose.count(": malformed QA line, skipped: ") == 10
    assert "more:" not in verbose


def test_verbose_says_of_each_line_its_hash_and_what_became_of_it(asked: Experiment) -> None:
    asked.ask("q", "never asked")
    err = asked.run("--verbose").err
    assert f"{asked.qa}:1: {key_of(prompt_of('q')).decode()}: matched\n" in err
    assert f"{asked.qa}:2: {key_of(prompt_of('never asked')).decode()}: no entry for 'user: Answer" in err


def test_nothing_that_a_terminal_obeys_is_printed(asked: Experiment) -> None:
    asked.ask({"prompt": "q", "\x1b[31mred": 1}, "never \x1b]0;title\x07asked", "w")
    asked.log(logged("q", model="\x9b2J"), logged("w", model="other\x07"))
    result = asked.run("--verbose", output_path=asked.folder / "\x1b[2Jout.jsonl")
    assert result.code == 0
    assert result.err.replace("\n", "").isprintable()
    assert r"\x1b[2Jout.jsonl" in result.err


def test_progress_is_shown_on_a_terminal_only_and_leaves_nothing(asked: Experiment) -> None:
    asked.ask(*["q"] * 2_000, {"n": 1})
    terminal, its_end = os.openpty()
    subprocess.run(["stty", "rows", "24", "columns", "120"], stdin=its_end, check=True)
    process = asked.start(stderr=its_end)
    os.close(its_end)
    shown = b""
    with contextlib.suppress(OSError):  # by which Linux ends a terminal that nobody holds any more
        while chunk := os.read(terminal, 4096):
            shown += chunk
    assert process.wait(30) == 0
    assert b" lines [" in shown
    remains = [line.rsplit("\r", 1)[-1].strip() for line in shown.decode().replace("\r\n", "\n").split("\n")]
    assert remains == asked.run().err.split("\n")  # which went to no terminal


@table(
    "store, path",
    {
        "as the logger was given it": ("a.lmdb_metadata", "a.lmdb"),
        "with a slash that the logger was not given": ("a.lmdb_metadata", "a.lmdb/"),
        "with a slash as the logger was given": ("a.lmdb/_metadata", "a.lmdb/"),
        "without the slash that the logger was given": ("a.lmdb/_metadata", "a.lmdb"),
        "the metadata folder": ("a.lmdb_metadata", "a.lmdb_metadata"),
        "the metadata folder with a slash": ("a.lmdb_metadata", "a.lmdb_metadata/"),
        "the file in the metadata folder": ("a.lmdb_metadata", "a.lmdb_metadata/data.mdb"),
        "a name that itself ends in _metadata": ("x_metadata_metadata", "x_metadata"),
        "a metadata folder under another name": ("renamed", "renamed"),
    },
)
def test_the_store_is_found_by(experiment: Experiment, store: str, path: str) -> None:
    folder = experiment.folder / store
    folder.parent.mkdir(exist_ok=True)
    write_store(folder, [(prompt_of("q"), logged("q"))])
    experiment.ask("q")
    line = experiment.run(lmdb_path=f"{experiment.folder}/{path}").lines[0]
    assert (line["generation"], line["timestamp"]) == (" An answer.", 1750000000.25)


def test_a_tilde_and_a_dot_mean_what_they_do_in_a_shell(asked: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(asked.folder))
    monkeypatch.chdir(asked.metadata)
    result = asked.run(qa_output_path="~/qa.jsonl", lmdb_path="~/a.lmdb", output_path="~/out.jsonl")
    assert (result.code, len(result.lines)) == (0, 1)
    assert f"entries: 1 in {asked.metadata}\n" in asked.run(lmdb_path=".").err


@pytest.mark.parametrize("missing", ["nothing", "lock files", "activations store"])
def test_reading_changes_nothing_but_lock_files_and_makes_no_file(asked: Experiment, missing: str) -> None:
    asked.ask("q", "never asked")
    if missing != "activations store":
        asked.log_activations(logged("q"), logged("w"))
    if missing == "lock files":
        for lock in asked.folder.glob("*/lock.mdb"):
            lock.unlink()
    before = asked.files()
    assert asked.run().code == 0
    after = asked.files()
    assert after.keys() == before.keys() | {str(asked.output)}
    assert all(after[path] == before[path] for path in before if not path.endswith("lock.mdb"))


@pytest.mark.parametrize(("qa", "output"), [("-", "-"), ("/dev/stdin", "/dev/stdout")])
def test_qa_file_and_output_may_be_standard_streams_also_to_append(asked: Experiment, qa: str, output: str) -> None:
    target = asked.folder / "appended.jsonl"
    target.write_text("{}\n")
    with target.open("ab") as file:
        result = asked.run(qa_output_path=qa, output_path=output, stdin=b'{"prompt": "q"}\n', stdout=file)
    assert "wrote 1 line to /dev/stdout" in result.err
    assert [line.get("generation") for line in read_lines(target)] == [None, " An answer."]


def test_the_function_returns_the_counts_and_prints_nothing(asked: Experiment, capsys) -> None:
    asked.ask("q", "never asked")
    templates = ["of no use {prompt}", prompt_of("{prompt}")]
    counts = reconstruct_inference(asked.qa, asked.lmdb, asked.output, prompt_template=templates)
    found = {"qa_lines": 2, "matched": 1, "without_entry": 1, "from_metadata": 1, "metadata_entries": 1}
    assert vars(counts) == {**vars(Counts()), **found, "models": {"a-model": 1}}
    assert (counts.malformed, counts.activations_entries) == (0, None)
    assert capsys.readouterr() == ("", "")


def test_the_function_raises_what_went_wrong_without_a_word_of_options(experiment: Experiment) -> None:
    experiment.ask("never asked")
    paths = experiment.qa, experiment.lmdb, experiment.output
    with pytest.raises(ReconstructionError, match="no such folder"):
        reconstruct_inference(*paths)
    experiment.log_prompts("user: never asked")
    with pytest.raises(NothingMatched) as caught:
        reconstruct_inference(*paths)
    assert "--" not in str(caught.value)
    with pytest.raises(ValueError, match="it names no QA field"):
        reconstruct_inference(*paths, prompt_template="no field")


def test_python_users_get_log_records_of_the_usual_levels(asked: Experiment, caplog: pytest.LogCaptureFixture) -> None:
    asked.ask("q", *[{"n": 1}] * 5)
    caplog.set_level("DEBUG", "reconstruct_inference")
    reconstruct_inference(asked.qa, asked.lmdb, asked.output, prompt_template=prompt_of("{prompt}"))
    assert [record.levelname for record in caplog.records] == ["DEBUG"] + ["WARNING"] * 5 + ["INFO"] * 3


def test_several_threads_may_read_one_store(asked: Experiment) -> None:
    outputs = [asked.folder / f"out{number}.jsonl" for number in range(24)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda output: reconstruct_inference(asked.qa, asked.lmdb, output), outputs))
    assert [len(read_lines(output)) for output in outputs] == [1] * 24


@pytest.mark.parametrize("store", ["metadata", "lmdb"])
def test_a_store_that_this_process_has_open_is_said_to_be_and_stays_usable(asked: Experiment, store: str) -> None:
    asked.log_activations(logged("q"))
    folder = getattr(asked, store)
    with lmdb.open(str(folder)) as env:
        with pytest.raises(ReconstructionError, match=f"{folder}/data.mdb is open in this process already"):
            reconstruct_inference(asked.qa, asked.lmdb, asked.output)
        with env.begin(write=True) as transaction:
            assert transaction.put(b"still", b"usable")
    assert asked.run().code == 0
