"""The main job: QA lines come out with the generations that were logged for them."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import shutil
import struct
import subprocess
import sys
import termios
import threading
from pathlib import Path

import pandas
import pytest
from conftest import SAMPLE, SCRIPT, Experiment, logged, prompt_of, read_lines, write_store
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import reconstruct_inference
from reconstruct_inference import NothingMatched, ReconstructionError

SAMPLE_PATHS = {"qa_output_path": SAMPLE / "qa.jsonl", "lmdb_path": SAMPLE / "activations.lmdb"}


# The sample, which the real logger wrote.


def test_the_real_loggers_data_gives_the_expected_lines_in_order(experiment: Experiment) -> None:
    result = experiment.run(**SAMPLE_PATHS)
    expected = read_lines(SAMPLE / "expected.jsonl")
    assert result.code == 0
    assert [list(line.items()) for line in result.lines] == [list(line.items()) for line in expected]


def test_every_line_begins_with_the_bytes_of_its_qa_line_unless_names_clash(experiment: Experiment) -> None:
    experiment.run(**SAMPLE_PATHS)
    qa_lines = (SAMPLE / "qa.jsonl").read_bytes().split(b"\n")
    never_asked, clashing = 7, 8
    del qa_lines[never_asked]
    output_lines = experiment.output.read_bytes().removesuffix(b"\n").split(b"\n")
    for number, (qa_line, output_line) in enumerate(zip(qa_lines, output_lines, strict=True)):
        assert output_line.startswith(qa_line.rstrip()[:-1]) == (number != clashing - 1)


def test_pandas_reads_the_output_as_hallulens_does(experiment: Experiment) -> None:
    qa_lines = (SAMPLE / "qa.jsonl").read_bytes().splitlines(keepends=True)
    del qa_lines[1]  # its integer of 22 digits, which pandas can read nowhere
    experiment.qa.write_bytes(b"".join(qa_lines))
    experiment.run(lmdb_path=SAMPLE / "activations.lmdb")
    frame = pandas.read_json(experiment.output, lines=True)
    assert len(frame) == 10
    assert frame["generation"][1] == " A maior cidade é São Paulo. 🏙️"
    assert {"prompt", "generation", "answer"} <= set(frame.columns)


@pytest.mark.parametrize("store", ["legacy/plain.lmdb", "legacy/wrapped.lmdb"])
def test_early_loggers_stores_give_their_entries_with_null_timestamps(experiment: Experiment, store: str) -> None:
    result = experiment.run(qa_output_path=SAMPLE / "qa.jsonl", lmdb_path=SAMPLE / store)
    expected = {line["index"]: line for line in read_lines(SAMPLE / "expected.jsonl")}
    assert [line["index"] for line in result.lines] == [0, 2, 3, 4, 6]
    for line in result.lines:
        assert line["timestamp"] is None
        assert line["generation"] == expected[line["index"]]["generation"]
        assert line["messages"] == expected[line["index"]]["messages"]
    assert "no timestamp in 5 entries" in result.err


# What goes in comes out.

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda parts: st.lists(parts, max_size=3) | st.dictionaries(st.text(), parts, max_size=3),
    max_leaves=6,
)
ENTRIES = st.fixed_dictionaries(
    {"response": st.text()},
    optional={
        "model": JSON_VALUES,
        "input_length": st.integers(),
        "timestamp": st.floats(allow_nan=False, allow_infinity=False),
        "messages": JSON_VALUES,
        "trim_position": st.none() | st.integers(),
    },
)
NAMES = st.text() | st.sampled_from(["generation", "model", "input_length", "timestamp", "messages", "trim_position"])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150)
@given(
    question=st.text(st.characters(exclude_categories=["Cs"])),
    qa_fields=st.dictionaries(NAMES, JSON_VALUES, max_size=5),
    entry=ENTRIES,
    escaped=st.booleans(),
)
def test_any_qa_line_and_any_entry_come_out_as_one_line_of_json(
    experiment: Experiment, question: str, qa_fields: dict, entry: dict, escaped: bool
) -> None:
    qa = {**qa_fields, "prompt": question}
    qa_line = json.dumps(qa, ensure_ascii=escaped).encode("utf-8", "backslashreplace")
    experiment.qa.write_bytes(qa_line + b"\n")
    shutil.rmtree(experiment.metadata, ignore_errors=True)
    experiment.log({"prompt": prompt_of(question), **entry})
    result = experiment.run()
    assert result.code == 0, result.err
    added = {"generation": entry["response"]}
    added |= {name: entry.get(name) for name in ("model", "input_length", "timestamp")}
    added |= {name: entry[name] for name in ("messages", "trim_position") if name in entry}
    expected = json.dumps({**json.loads(qa_line), **added})
    assert [json.dumps(line) for line in result.lines] == [json.dumps(json.loads(expected))]
    if not added.keys() & qa.keys():
        assert experiment.output.read_bytes().startswith(qa_line[:-1])


@pytest.mark.parametrize(
    ("response", "written"),
    [
        pytest.param("東京 🗾", '"東京 🗾"', id="UTF-8 stays unescaped"),
        pytest.param('a\n"b"\\\x00', r'"a\n\"b\"\\\u0000"', id="what JSON must escape is escaped"),
        pytest.param("a\u2028b\x85c", '"a\u2028b\x85c"', id="line separators of Unicode end no line"),
        pytest.param("é\ud83dé", r'"é\ud83dé"', id="a lone surrogate is escaped, and nothing else"),
        pytest.param("", '""', id="an empty response"),
    ],
)
def test_a_response_is_written_as(experiment: Experiment, response: str, written: str) -> None:
    experiment.ask("q")
    experiment.log(logged("q", response))
    result = experiment.run()
    assert f'"generation": {written}, "model"'.encode() in experiment.output.read_bytes()
    assert result.lines[0]["generation"] == response


def test_a_huge_integer_in_a_qa_line_is_kept(experiment: Experiment) -> None:
    digits = "7" * 5000
    experiment.qa.write_text(f'{{"prompt": "q", "n": {digits}}}\n')
    experiment.log(logged("q"))
    with experiment.start() as process:
        assert process.wait(30) == 0
    assert f'"n": {digits}, "generation"' in experiment.output.read_text()


def test_a_qa_line_without_a_logged_field_keeps_its_own_of_that_name(experiment: Experiment) -> None:
    experiment.ask({"prompt": "q", "messages": "mine", "trim_position": "mine too"})
    experiment.log(logged("q"))
    line = experiment.run().lines[0]
    assert (line["messages"], line["trim_position"]) == ("mine", "mine too")


@pytest.mark.parametrize("field", ["model", "input_length", "timestamp"])
def test_a_field_that_the_entry_lacks_is_null(experiment: Experiment, field: str) -> None:
    entry = logged("q")
    del entry[field]
    experiment.ask("q")
    experiment.log(entry)
    assert experiment.run().lines[0][field] is None


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(float("nan"), id="NaN"),
        pytest.param(float("inf"), id="infinity"),
        pytest.param(b"bytes", id="bytes"),
        pytest.param({1: "one"}, id="a key that is no string"),
        pytest.param({("a", "b"): 1}, id="a key that is a tuple"),
        pytest.param([{"role": "user"}, {1, 2}], id="a set inside"),
        pytest.param(10**5000, id="an integer of 5000 digits"),
        pytest.param(Path("p"), id="an object"),
    ],
)
def test_an_entry_field_that_is_no_json_data_is_null_with_a_warning(experiment: Experiment, value: object) -> None:
    experiment.ask("q")
    experiment.log(logged("q", messages=value))
    result = experiment.run()
    assert result.lines[0]["messages"] is None
    assert result.lines[0]["generation"] == " An answer."
    assert "line 1: null instead: messages" in result.err


# QA files as they are.


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b'\xef\xbb\xbf{"prompt": "q"}\n', id="a byte-order mark"),
        pytest.param(b'{"prompt": "q"}\r\n', id="CRLF"),
        pytest.param(b'\n  \n\r\n{"prompt": "q"}\n\n', id="blank lines"),
        pytest.param(b'\xef\xbb\xbf\n{"prompt": "q"}', id="a byte-order mark alone on its line"),
        pytest.param(b'{"prompt": "q"}', id="no line break at the end"),
        pytest.param(b' \t{"prompt": "q"} \t\n', id="space around the object"),
    ],
)
def test_is_fine_and_not_worth_a_word(experiment: Experiment, content: bytes) -> None:
    experiment.qa.write_bytes(content)
    experiment.log(logged("q"))
    result = experiment.run()
    assert (result.code, len(result.lines)) == (0, 1)
    assert result.err.startswith("QA entries read:                          1\n")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        pytest.param(b'{"prompt": "q"', "not JSON", id="cut off"),
        pytest.param(b'{"prompt": "q"} x', "not JSON", id="something behind it"),
        pytest.param(b'{"prompt": "\xff"}', "not UTF-8 at byte 13", id="not UTF-8"),
        pytest.param(b'{"prompt": "q"}'.decode().encode("utf-16"), "not UTF-8", id="UTF-16"),
        pytest.param(b'["q"]', "not a JSON object", id="an array"),
        pytest.param(b'{"question": "q"}', "no string in 'prompt'", id="no prompt"),
        pytest.param(b'{"prompt": ["q"]}', "no string in 'prompt'", id="a prompt that is no string"),
        pytest.param(b'{"prompt": "q", "x": ' + b"[" * 200_000, "nested too deeply", id="endless nesting"),
        pytest.param(b'\x0b{"prompt": "q"}', "not JSON", id="white space that is not JSON's"),
    ],
)
def test_a_malformed_line_is_reported_and_skipped(experiment: Experiment, line: bytes, reason: str) -> None:
    experiment.qa.write_bytes(b'{"prompt": "q"}\n' + line.replace(b"\n", b"") + b'\n{"prompt": "q"}\n')
    experiment.log(logged("q"))
    result = experiment.run()
    assert (result.code, len(result.lines)) == (0, 2)
    assert f"malformed QA line: line 2: {reason}" in result.err
    assert counts_in(result.err)["malformed, skipped"] == 1


def test_a_line_without_an_end_is_skipped_without_being_held_in_memory(experiment: Experiment) -> None:
    with experiment.qa.open("wb") as file:
        file.truncate(1 << 29)
        file.seek(0, os.SEEK_END)
        file.write(b'\n{"prompt": "q"}\n')
    experiment.log(logged("q"))

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (1 << 29, 1 << 29))

    with experiment.start(preexec_fn=limit) as process:
        _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert b"malformed QA line: line 1: longer than 16 MiB" in err


def test_a_question_with_a_lone_surrogate_is_one_without_an_entry(experiment: Experiment) -> None:
    experiment.qa.write_bytes(b'{"prompt": "\\ud800"}\n{"prompt": "q"}\n')
    experiment.log(logged("q"))
    result = experiment.run()
    assert result.code == 0
    assert counts_in(result.err)["without an entry"] == 1


def test_the_first_troubles_are_shown_and_all_of_them_with_verbose(experiment: Experiment) -> None:
    experiment.ask("q", *[{"n": n} for n in range(10)])
    experiment.log(logged("q"))
    usual, verbose = experiment.run().err, experiment.run("--verbose").err
    assert usual.count("malformed QA line: line") == 3
    assert "7 × malformed QA line" in usual
    assert verbose.count("malformed QA line: line") == 10


# Entries that cannot be used.


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        pytest.param(b"\x80\x04no pickle", "cannot be unpickled", id="no pickle"),
        pytest.param(b"", "its pickle is cut short", id="nothing"),
        pytest.param(["a list"], "it is no dict", id="no dict"),
        pytest.param({"prompt": prompt_of("q")}, 'no string in "response"', id="no response"),
        pytest.param(logged("q", b"bytes"), 'no string in "response"', id="a response that is no string"),
        pytest.param(logged("another"), 'its "prompt" is another one', id="another prompt's entry"),
        pytest.param(logged("q", prompt=None), 'its "prompt" is another one', id="a prompt that is no string"),
    ],
)
def test_a_corrupted_entry_is_reported_and_skipped(experiment: Experiment, value: object, reason: str) -> None:
    experiment.ask("good", "q")
    write_store(experiment.metadata, [(prompt_of("good"), logged("good")), (prompt_of("q"), value)])
    result = experiment.run()
    assert (result.code, len(result.lines)) == (0, 1)
    assert "corrupted entry: line 2: " in result.err
    assert reason in result.err
    assert counts_in(result.err)["entry corrupted, skipped"] == 1


# The summary.


def counts_in(err: str) -> dict[str, int]:
    """The numbers of the summary, under the labels as they are printed, repeated ones left out."""
    counts: dict[str, int] = {}
    for line in err.splitlines():
        label, _, number = line.strip().rpartition(":")
        if number.strip().isdecimal():
            counts.setdefault(label, int(number))
    return counts


def test_the_numbers_of_the_summary_add_up(experiment: Experiment) -> None:
    experiment.ask("a", "b", "c", "never asked", "a", {"n": 1})
    experiment.log(logged("a"), logged("b", None), logged("unrelated"))
    experiment.log_activations(logged("c"))
    result = experiment.run()
    assert result.err.splitlines()[-10:] == [
        "QA entries read:                             6",
        "  matched:                                   3",
        "  without an entry:                          1",
        "  malformed, skipped:                        1",
        "  entry corrupted, skipped:                  1",
        "activation entries in the metadata store:    3",
        "  matched from there:                        2",
        "activation entries in the activations store: 1",
        "  matched from there:                        1",
        f"output: {experiment.output}",
    ]


def test_verbose_says_of_each_line_its_hash_and_whether_it_matched(experiment: Experiment) -> None:
    experiment.ask("q", "never asked")
    experiment.log(logged("q"))
    err = experiment.run("--verbose").err
    assert f"line 1: {reconstruct_inference.hash_prompt(prompt_of('q'))}: matched" in err
    assert f"line 2: {reconstruct_inference.hash_prompt(prompt_of('never asked'))}: no entry: 'user: Answer" in err
    assert "data.mdb: sound, read through lmdb without a reader lock" in err


# Paths.


@pytest.mark.parametrize(
    ("store", "path"),
    [
        pytest.param("a.lmdb_metadata", "a.lmdb", id="as the logger was given it"),
        pytest.param("a.lmdb_metadata", "a.lmdb/", id="with a slash that the logger was not given"),
        pytest.param("a.lmdb/_metadata", "a.lmdb/", id="with a slash as the logger was given"),
        pytest.param("a.lmdb/_metadata", "a.lmdb", id="without the slash that the logger was given"),
        pytest.param("a.lmdb_metadata", "a.lmdb_metadata", id="the metadata folder"),
        pytest.param("a.lmdb_metadata", "a.lmdb_metadata/", id="the metadata folder with a slash"),
        pytest.param("a.lmdb_metadata", "a.lmdb_metadata/data.mdb", id="the file in the metadata folder"),
        pytest.param("a.lmdb/_metadata", "a.lmdb/_metadata", id="the metadata folder inside"),
        pytest.param("x_metadata_metadata", "x_metadata", id="a name that itself ends in _metadata"),
        pytest.param("renamed", "renamed", id="a metadata folder under another name"),
    ],
)
def test_the_store_is_found_by(experiment: Experiment, store: str, path: str) -> None:
    folder = experiment.folder / store
    folder.parent.mkdir(exist_ok=True)
    write_store(folder, [(prompt_of("q"), logged("q"))])
    experiment.ask("q")
    line = experiment.run(lmdb_path=f"{experiment.folder}/{path}").lines[0]
    assert (line["generation"], line["timestamp"]) == (" An answer.", 1750000000.25)


def test_the_store_is_found_from_inside_its_folder(experiment: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment.ask("q")
    experiment.log(logged("q"))
    monkeypatch.chdir(experiment.metadata)
    assert experiment.run(lmdb_path=".").code == 0


def test_reading_leaves_nothing_behind_in_the_stores(experiment: Experiment, files_before) -> None:
    experiment.ask("q", "never asked")
    experiment.log(logged("q"))
    experiment.log_activations(logged("q"))
    before = files_before()
    assert experiment.run().code == 0
    after = files_before()
    assert after.pop("out.jsonl")
    assert after == before


def test_a_missing_activations_store_is_not_made_and_not_mentioned(experiment: Experiment) -> None:
    experiment.ask("q", "never asked")
    experiment.log(logged("q"))
    assert experiment.run().err.startswith("QA entries read")
    assert not experiment.lmdb.exists()


def test_missing_parent_folders_of_the_output_are_made(experiment: Experiment) -> None:
    experiment.ask("q")
    experiment.log(logged("q"))
    output = experiment.folder / "new" / "folders" / "out.jsonl"
    assert experiment.run(output_path=output).code == 0
    assert len(read_lines(output)) == 1


def test_qa_file_and_output_may_be_pipes(experiment: Experiment) -> None:
    experiment.log(logged("q"))
    process = experiment.start(
        changes={"qa_output_path": "/dev/stdin", "output_path": "/dev/stdout"}, stdin=subprocess.PIPE
    )
    out, err = process.communicate(b'{"prompt": "q"}\n', timeout=30)
    assert process.returncode == 0, err
    assert json.loads(out)["generation"] == " An answer."
    assert b"output: /dev/stdout" in err


def test_named_pipes_work_on_both_ends(experiment: Experiment) -> None:
    experiment.log(logged("q"))
    qa, output = experiment.folder / "qa.pipe", experiment.folder / "out.pipe"
    os.mkfifo(qa)
    os.mkfifo(output)
    received: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: qa.write_bytes(b'{"prompt": "q"}\n')),
        threading.Thread(target=lambda: received.append(output.read_bytes())),
    ]
    for thread in threads:
        thread.start()
    assert experiment.run(qa_output_path=qa, output_path=output).code == 0
    for thread in threads:
        thread.join()
    assert json.loads(received[0])["generation"] == " An answer."
    assert output.is_fifo()


def test_what_the_shell_appends_to_keeps_what_it_had(experiment: Experiment) -> None:
    experiment.ask("q")
    experiment.log(logged("q"))
    target = experiment.folder / "appended.jsonl"
    target.write_text("{}\n")
    with target.open("ab") as file:
        assert experiment.start(changes={"output_path": "/dev/stdout"}, stdout=file).wait(30) == 0
    assert len(read_lines(target)) == 2


# Errors and exit codes.


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        pytest.param(lambda e: e.qa.unlink(), "cannot read {e.qa}: No such file", id="no QA file"),
        pytest.param(lambda e: (e.qa.unlink(), e.qa.mkdir()), "cannot read {e.qa}: Is a dir", id="a folder as QA file"),
        pytest.param(
            lambda e: shutil.rmtree(e.metadata),
            "no store can be read: {e.metadata}: no such folder; {e.lmdb}: no such folder",
            id="no store",
        ),
        pytest.param(
            lambda e: (e.metadata / "data.mdb").unlink(), "{e.metadata}: no data.mdb in it; {e.lmdb}", id="no data.mdb"
        ),
        pytest.param(
            lambda e: (e.metadata / "data.mdb").write_bytes(b"text" * 9999),
            "{e.metadata}: MDB_INVALID: File is not an LMDB file; nothing in it looks like an entry; {e.lmdb}",
            id="no LMDB file",
        ),
        pytest.param(
            lambda e: ((e.metadata / "data.mdb").unlink(), os.mkfifo(e.metadata / "data.mdb")),
            "{e.metadata}: its data.mdb is no regular file",
            id="a pipe as data.mdb",
        ),
        pytest.param(lambda e: e.output.mkdir(), "cannot write {e.output}: it is a folder", id="a folder as output"),
        pytest.param(lambda e: e.qa.write_bytes(b""), "nothing matched", id="an empty QA file"),
    ],
)
def test_ends_in_one_plain_line_and_exit_code_1(experiment: Experiment, break_it, message: str) -> None:
    experiment.ask("q")
    experiment.log(logged("q"))
    break_it(experiment)
    result = experiment.run()
    assert result.code == 1
    assert len(result.err.splitlines()) == 1
    assert result.err.startswith("reconstruct_inference.py: error: ")
    assert message.format(e=experiment) in result.err


@pytest.mark.parametrize("argv", [[], ["--qa_output_path", "x"], ["--unknown"], ["--qa", "x"]])
def test_wrong_usage_ends_with_exit_code_2(run_main, argv: list[str]) -> None:
    assert run_main(argv).code == 2


def test_a_missing_package_is_one_plain_line(experiment: Experiment) -> None:
    command = [sys.executable, "-I", "-S", str(SCRIPT), "--help"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert result.returncode == 1
    assert result.stderr.splitlines() == [
        "reconstruct_inference.py: error: No module named 'lmdb': it needs lmdb 3.0 or later, and tqdm"
    ]


def test_a_progress_bar_over_the_qa_files_bytes_is_shown_on_a_terminal_only(experiment: Experiment) -> None:
    experiment.ask(*["q"] * 2000)
    experiment.log(logged("q"))
    terminal, its_end = os.openpty()
    fcntl.ioctl(its_end, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    process = experiment.start(stderr=its_end)
    os.close(its_end)
    shown = b""
    try:
        while chunk := os.read(terminal, 4096):
            shown += chunk
    except OSError:  # Linux ends a terminal that nobody holds any more by an error
        pass
    assert process.wait(30) == 0
    assert b"100%|" in shown
    assert b"32.0k/32.0k" in shown
    assert b"%|" not in experiment.start().communicate(timeout=30)[1]


# From Python.


def test_the_function_returns_the_counts_and_says_nothing(experiment: Experiment, capsys) -> None:
    experiment.ask("q", "never asked")
    experiment.log(logged("q"))
    counts = reconstruct_inference.reconstruct_inference(experiment.qa, experiment.lmdb, experiment.output)
    assert vars(counts) == {
        "qa_entries": 2,
        "matched": 1,
        "without_entry": 1,
        "from_metadata": 1,
        "metadata_entries": 1,
    }
    assert counts.malformed == 0
    assert capsys.readouterr() == ("", "")


def test_the_function_raises_what_went_wrong(experiment: Experiment) -> None:
    experiment.ask("never asked")
    with pytest.raises(ReconstructionError, match="no store can be read"):
        reconstruct_inference.reconstruct_inference(experiment.qa, experiment.lmdb, experiment.output)
    experiment.log(logged("q"))
    with pytest.raises(NothingMatched):
        reconstruct_inference.reconstruct_inference(experiment.qa, experiment.lmdb, experiment.output)


def test_the_example_runs_and_leaves_its_data_where_it_is_told_to(tmp_path: Path) -> None:
    example = SCRIPT.with_name("example_reconstruct.py")
    for arguments in ([], [str(tmp_path / "data")]):
        command = [sys.executable, str(example), *arguments]
        result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        assert '"generation": " They come from Ailsa Craig."' in result.stdout
        assert "matched:                                   3" in result.stdout
    assert len(read_lines(tmp_path / "data" / "generation.jsonl")) == 3
