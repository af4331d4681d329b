"""The join: QA lines come out with the generations that were logged for them."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import os
import pickle
import re
import shlex
import shutil
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePath
from typing import Any

import pytest
from helpers import SAMPLE, SCRIPT, Experiment, bash, key_of, logged, prompt_of, read_lines, table, write_store
from hypothesis import given, settings
from hypothesis import strategies as st

from reconstruct_inference import Counts, ReconstructionError, reconstruct_inference

LOGGED = ["model", "input_length", "timestamp", "messages", "trim_position"]  # beside the response
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda parts: st.lists(parts, max_size=3) | st.dictionaries(st.text(), parts, max_size=3),
    max_leaves=6,
)
QA, LINE = b'{"prompt": "q"}', b'{"prompt": "q"}\n'
NO_OBJECTS = [QA[:-1], QA + b"{}", b'{"prompt": "\xff"}', b'["q"]', bytes(99), b"\0" + QA, b"[" * 200_000]
NO_PROMPT = [b'{"question": "q"}', b'{"prompt": null}', b'{"prompt": true}', b'{"prompt": ["q"]}']
CIRCLE: list[object] = []
CIRCLE.append(CIRCLE)


def test_the_real_loggers_sample_gives_the_expected_lines_in_order(experiment: Experiment) -> None:
    result = experiment.run(qa=SAMPLE / "qa.jsonl", lmdb=SAMPLE / "activations.lmdb")
    expected = read_lines(SAMPLE / "expected.jsonl")
    assert [list(line.items()) for line in result.lines] == [list(line.items()) for line in expected]


@pytest.mark.parametrize("store", ["legacy/plain.lmdb", "legacy/wrapped.lmdb"])
def test_early_loggers_stores_give_their_entries_without_times(experiment: Experiment, store: str) -> None:
    result = experiment.run(qa=SAMPLE / "qa.jsonl", lmdb=SAMPLE / store)
    expected = [line for line in read_lines(SAMPLE / "expected.jsonl") if line["index"] in (0, 2, 3, 4, 6)]
    for name in ("index", "generation", "messages"):
        assert [line[name] for line in result.lines] == [line[name] for line in expected]
    assert [line["timestamp"] for line in result.lines] == [None] * 5
    assert "model: meta-llama/Llama-3.1-8B-Instruct (5 lines)\n" in result.err


def test_a_line_begins_with_the_very_bytes_of_its_qa_line(asked: Experiment) -> None:
    qa_line = b'{ "n" : 1e3,  "big": 1190001234567890123456, "\\u6771": [0.10, "\xe6\x9d\xb1"], "prompt" : "q" '
    asked.qa.write_bytes(qa_line + b"} \r\n")
    asked.run()
    assert asked.output.read_bytes().startswith(qa_line + b', "generation": ')


@settings(max_examples=30)
@given(
    question=st.text(st.characters(exclude_categories=["Cs"])),
    qa_fields=st.dictionaries(st.text() | st.sampled_from(["generation", *LOGGED]), JSON_VALUES, max_size=5),
    fields=st.fixed_dictionaries(
        {"response": st.text()},
        optional={**dict.fromkeys(LOGGED, JSON_VALUES), "other": st.binary() | st.sets(st.integers()) | st.tuples()},
    ),
    protocol=st.integers(0, pickle.HIGHEST_PROTOCOL),
)
def test_any_qa_line_and_any_entry_come_out_as_one_line_of_json(
    experiment: Experiment, question: str, qa_fields: dict[str, Any], fields: dict[str, Any], protocol: int
) -> None:
    experiment.ask({**qa_fields, "prompt": question})
    entry = {"prompt": prompt_of(question), **fields}
    write_store(experiment.metadata, [(prompt_of(question), pickle.dumps(entry, protocol))])
    result = experiment.run()
    present = {name: entry[name] for name in LOGGED if name in entry}
    added = {"generation": entry["response"], **dict.fromkeys(LOGGED[:3]), **present}
    expected = {**qa_fields, "prompt": question, **added}  # fields of the same name are replaced in their place
    assert [json.dumps(line) for line in result.lines] == [json.dumps(expected)]


@pytest.mark.parametrize("qa_line", [LINE, b'{"prompt": "q", "model": ["\\ud83d"], "x": "\\ud83d \\u6771"}\n'])
def test_only_what_json_must_escape_and_lone_surrogates_are_escaped(asked: Experiment, qa_line: bytes) -> None:
    asked.qa.write_bytes(qa_line)
    asked.log(logged("q", 'a\n"b"\\\x00\u2028 é\ud83d🗾'))
    assert [line["model"] for line in asked.run().lines] == ["a-model"]
    assert rb'"generation": "a\n\"b\"\\\u0000' + '\u2028 é\\ud83d🗾", "'.encode() in asked.output.read_bytes()


@pytest.mark.parametrize("value", [float("nan"), [b"bytes"], {"a": PurePath("a")}, 10**5000, CIRCLE], ids=type)
def test_what_json_cannot_represent_is_null_and_costs_nothing_else(asked: Experiment, value: Any) -> None:
    asked.log(logged("q", model=value, trim_position=value))
    result = asked.run()
    added = {"model": None, "input_length": 12, "timestamp": 1750000000.25, "trim_position": None}
    assert result.lines == [{"prompt": "q", "generation": " An answer.", **added}]
    assert result.warnings()[0].endswith(":1: not representable in JSON, written as null: `model`, `trim_position`")
    assert "model: (no name) (1 line, " in result.err


@pytest.mark.parametrize("question", ["use", "see", "era", "reuse", ": so", "user: so"])
@pytest.mark.parametrize("role", ["user: ", ""])
def test_prompt_as_sent_takes_away_one_role_and_no_letter_more(asked: Experiment, question: str, role: str) -> None:
    asked.ask({"prompt": question, "n": 1}, {"n": 2, "q": "Hi"})
    asked.log_prompts(role + question, role + "Hi")
    options = [f"--prompt_template={role}{{{name}}}" for name in ("prompt", "q")]
    in_place, added = asked.run("--prompt_as_sent", *options).lines
    sent = question if role else question.removeprefix("user: ")
    assert list(in_place.items())[:3] == [("prompt", sent), ("n", 1), ("generation", "response 0")]
    assert list(added.items())[:4] == [("n", 2), ("q", "Hi"), ("prompt", "Hi"), ("generation", "response 1")]


@table(
    "template, qa, prompt",
    {
        "text, escapes and braces": (r"\\n{{{q}}} A:\x\n", {"q": "{q} %s"}, "\\n{{q} %s} A:\\x\n"),
        "fields side by side, and twice": ("{b}{a}, {a}!", {"a": "x", "b": "y"}, "yx, x!"),
        "numbers": ("{n} {x} {q}!", {"x": 0.5, "n": 5, "q": "why"}, "5 0.5 why!"),
        "fields inside others": ("<{m.1.c}{a.b.c.d}>", {"m": [1, {"c": "x"}], "a": {"b": {"c": {"d": "y"}}}}, "<xy>"),
        "a name with a dot": ("{a.b}", {"a.b": "exact", "a": {"b": "nested"}}, "exact"),
        "any letters": ("問{the é}", {"the é": "なぜ é e\u0301 🗾"}, "問なぜ é e\u0301 🗾"),
        "white space": ("<{a}>", {"a": " "}, "< >"),
    },
)
def test_a_template_makes_the_prompt_from(experiment: Experiment, template: str, qa: Any, prompt: str) -> None:
    experiment.ask({**qa, "no text": [None, [True]]})
    experiment.log_prompts("another", prompt)
    assert experiment.run("--prompt_template", template).generations() == ["response 1"]


def test_the_usual_prompts_are_found_with_and_without_their_role(experiment: Experiment) -> None:
    experiment.ask("q", "w")
    experiment.log_prompts(prompt_of("q"), prompt_of("w").removeprefix("user: "))
    assert experiment.run().generations() == ["response 0", "response 1"]


@table("order, expected", {"one order": ("AB", ["A q", "B w"]), "the other": ("BA", ["B q", "B w"])})
def test_of_several_templates_the_first_that_has_an_entry_counts(asked: Experiment, order: str, expected: Any) -> None:
    asked.ask("q", "w", "e")
    asked.log(*[{"prompt": prompt, "response": prompt} for prompt in ("A q", "B q", "B w")])
    options = [f"--prompt_template={letter} {{prompt}}" for letter in order]
    result = asked.run("--prompt_template={prompt} {no_field}", *options)
    assert result.generations() == expected
    assert result.counts() == {"QA lines": 3, "matched": 2, "without an entry": 1}


@pytest.mark.parametrize("text", ["a", "", "Q: {{prompt}}", "{}", r"a\n{0}", "{a[0]}", "{a!r}", "{a:>5}", "{prompt"])
def test_a_template_that_cannot_be_used_is_shown_as_typed_with_the_reason(asked: Experiment, text: str) -> None:
    said = asked.run("--prompt_template={prompt}", f"--prompt_template={text}", code=2).error()
    assert said.startswith(f"argument --prompt_template: '{text}' cannot be used: ")
    assert ("single braces" in said) == (text in ("a", "", "Q: {{prompt}}"))
    assert ("the name of a field" in said) == (text in ("{}", r"a\n{0}", "{a[0]}", "{a!r}", "{a:>5}"))
    with pytest.raises(ValueError, match="cannot be used"):
        reconstruct_inference(asked.qa, asked.lmdb, asked.output, prompt_template=["{prompt}", text])


@pytest.mark.parametrize("around", [b"\xef\xbb\xbf%b\r\n", b"\n  \n\r\n%b\n\n", b"\n\xef\xbb\xbf%b", b" \t%b \t\n"])
def test_white_space_and_a_byte_order_mark_are_not_worth_a_word(asked: Experiment, around: bytes) -> None:
    asked.qa.write_bytes(around % LINE.strip())
    result = asked.run()
    assert result.counts() == {"QA lines": 1, "matched": 1}
    assert (result.generations(), result.warnings()) == ([" An answer."], [])


@pytest.mark.parametrize("line", NO_OBJECTS + NO_PROMPT, ids=repr)
def test_a_malformed_line_is_reported_by_its_number_and_skipped(asked: Experiment, line: bytes) -> None:
    asked.qa.write_bytes(LINE + b"\n \n" + line + b"\n" + LINE)
    result = asked.run()
    assert result.counts() == {"QA lines": 3, "matched": 2, "malformed": 1}
    (warning,) = result.warnings()
    reason = "not a JSON object in UTF-8 (" if line in NO_OBJECTS else "no text in `prompt`"
    assert warning.startswith(f"{asked.qa}:4: malformed QA line, skipped: {reason}")


@table(
    "value, reason",
    {
        "no pickle": (b"\x80\x04no pickle", "decoded"),
        "no response": ({"prompt": prompt_of("q")}, "`response`"),
        "a list": ([" An answer."], "`response`"),
        "a response that is no text": (logged("q", b"bytes"), "`response`"),
        "another prompt's entry": (logged("another"), "different prompt"),
        "a lost block in its response": (logged("q", "x" * 99 + "\0" * 512 + "x"), "zeros"),
    },
)
def test_a_corrupted_entry_is_reported_and_skipped(experiment: Experiment, value: object, reason: str) -> None:
    experiment.ask("good", "q")
    write_store(experiment.metadata, [(prompt_of("good"), logged("good")), (prompt_of("q"), value)])
    result = experiment.run()
    assert result.counts() == {"QA lines": 2, "matched": 1, "corrupted": 1}
    assert result.warnings()[-1].startswith(f"{experiment.qa}:2: corrupted entry, skipped: ")
    assert reason in result.warnings()[-1]


def test_an_entry_may_lack_its_prompt_and_have_some_zeros_and_a_field_called_data(asked: Experiment) -> None:
    response = "x" + "\0" * 511 + "x"
    write_store(asked.metadata, [(prompt_of("q"), {"response": response, "data": {"response": "not this"}})])
    assert asked.run().generations() == [response]


def test_three_warnings_of_a_kind_are_shown_and_with_verbose_all_and_each_hash(asked: Experiment) -> None:
    asked.ask("q", "never asked", *[{"n": n} for n in range(5)], *["bad"] * 4, *["odd"] * 4)
    asked.log(logged("q"), logged("bad", None), logged("odd", messages=b""))
    kinds = [": malformed QA line, ", ": corrupted entry, ", ": not representable in JSON, "]
    usual, verbose = asked.run().err, asked.run("--verbose").err
    assert [usual.count(kind) for kind in kinds] == [3, 3, 3]
    assert [verbose.count(kind) for kind in kinds] == [5, 4, 4]
    assert f"{asked.qa}:1: {key_of(prompt_of('q')).decode()}: matched\n" in verbose
    assert f"{asked.qa}:2: {key_of(prompt_of('never asked')).decode()}: no entry for 'user: Answer" in verbose
    assert "matched\n" not in usual


def test_nothing_that_a_terminal_obeys_is_printed(asked: Experiment) -> None:
    asked.ask({"prompt": "q", "\x1b[31mred": 1}, "never \x1b]0;title\x07asked", "w")
    asked.log(logged("q", model="\x9b2J"), logged("w", model="other\x07"))
    assert asked.run("--verbose").err.replace("\n", "").isprintable()
    assert asked.run("--prompt_template={\x1b}", code=1).err.replace("\n", "").isprintable()


@pytest.mark.parametrize("first", [b"# a,b", b'{\n"prompt":\n"w"\n}', b"[", b"<html>", bytes(512), b"\xff\xfe{\0"])
def test_a_file_in_which_one_line_is_an_object_is_never_refused(asked: Experiment, first: bytes) -> None:
    asked.qa = asked.folder / "qa.csv"
    asked.qa.write_bytes(first + b"\n" + LINE + b"]\n")
    assert asked.run().counts()["matched"] == 1


@table(
    "content, words, tool",
    {
        "gzip": (gzip.compress(LINE), "compressed (gzip)", "gzip"),
        "bzip2": (bz2.compress(LINE), "compressed (bzip2)", "bzip2"),
        "xz": (lzma.compress(LINE), "compressed (xz)", "xz"),
        "UTF-16": (LINE.decode().encode("utf-16"), "UTF-16", "iconv"),
        "UTF-16, the other way round": (b"\xfe\xff" + LINE.decode().encode("utf-16-be"), "UTF-16", "iconv"),
        "ZIP with JSON Lines in it": (b"PK\3\4 stored\n" + LINE, "compressed (ZIP)", ""),
        "a JSON array": (b"[" + LINE.strip() + b"]\n", "JSON array", "jq"),
        "a JSON array spread out": (json.dumps([{"prompt": "q"}], indent=1).encode(), "JSON array", "jq"),
        "nothing": (b"", "is empty", ""),
        "blank lines": (b"\n \t\r\n", "is empty", ""),
    },
)
def test_a_file_that_is_certainly_no_json_lines_is_named_with_any_cure(
    asked: Experiment, content: bytes, words: str, tool: str
) -> None:
    asked.qa = asked.folder / "it's qa"
    asked.qa.write_bytes(content)
    said = asked.run(code=1).error()
    assert words in said
    assert (f"<({tool} " in said, "hint: " in said) == (bool(tool), bool(tool))
    if shutil.which(tool):
        option = said[said.index("--qa_output_path") :].strip()
        bash(f"python {SCRIPT} {shlex.join(asked.arguments())} {option}", asked.folder)
        assert len(read_lines(asked.output)) == 1


def test_the_recipe_for_csv_keeps_every_cell_as_it_is(asked: Experiment) -> None:
    cells = ["q", "None", "NA", "null", "00123", "1e3", "", " x ", 'a "b", c\nd\r\ne', "東京 é"]
    asked.qa = asked.folder / "it's qa.CSV"
    asked.qa.write_text("prompt;answer\n")  # which the recipe would take for one cell
    assert "it is CSV" not in asked.run(code=1).err
    with asked.qa.open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([("prompt", "Gold answer"), *zip(cells, cells)])
    said = asked.run(code=1).error()
    bash(said[said.index("python3 ") :], asked.folder)
    asked.qa = asked.folder / "it's qa.CSV.jsonl"
    assert read_lines(asked.qa) == [{"prompt": cell, "Gold answer": cell} for cell in cells]
    assert asked.run().counts() == {"QA lines": 10, "matched": 1, "without an entry": 9}


@pytest.mark.parametrize("line", ["version https://git-lfs", "<!DOCTYPE html>", "- prompt: q", "{'p': 'q'}", '["q"]'])
def test_any_other_file_is_shown_by_how_it_begins(asked: Experiment, line: str) -> None:
    asked.qa.write_bytes(b"\n" + line.encode() + b"\xff" + b"x" * 500 + b"\nthe end")
    said = asked.run(code=1).error()
    assert f"{line}\\\\xffxx" in said
    assert "x" * 60 not in said
    assert "hint: expected JSON Lines" in said


def test_standard_input_is_read_from_where_the_shell_left_it(asked: Experiment) -> None:
    asked.ask("not this", "q", "q")
    command = shlex.join(["python", str(SCRIPT), *asked.arguments(qa="-")])
    said = bash(f"{{ read -r first; {command}; }} < qa.jsonl", asked.folder)
    assert "QA lines: 2 (2 matched)\n" in said.stderr


def test_a_tilde_is_the_home_folder(asked: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(asked.folder))
    assert asked.run(qa="~/qa.jsonl", lmdb="~/a.lmdb", output="~/out.jsonl").generations() == [" An answer."]


def test_a_qa_path_that_cannot_be_read_is_named_with_the_reason(asked: Experiment) -> None:
    for path, words in (("nope", "No such file"), (".", "is a folder"), ("/proc/self/mem", "Input/output error")):
        said = asked.run(qa=asked.folder / path, code=1).error()
        assert str(asked.folder / path) in said
        assert words in said


@table(
    "times, period",
    {
        "one minute": ([1750000000, 1750000001], ", 2025-06-16 00:06"),
        "one day": ([1750000000, 1750050000, 1750020000], ", 2025-06-16 00:06 to 14:00"),
        "two days, newest first": ([1750050000, 1749990000], ", 2025-06-15 21:20 to 2025-06-16 14:00"),
        "some without": ([None, 1750000000, "2025", True, -5, 0, 10**5000, [1]], ", 2025-06-16 00:06"),
        "no time that exists": ([-5, float("nan"), float("inf"), 253402300800, 10**400], ""),
        "the last second": ([253402300799], ", 10000-01-01 08:59"),
    },
)
def test_the_summary_says_when_a_model_answered_in_local_time(experiment: Experiment, times: Any, period: str) -> None:
    experiment.ask(*map(str, range(len(times))))
    experiment.log(*[logged(str(n), timestamp=at) for n, at in enumerate(times)])
    result = experiment.run_process(env={**os.environ, "TZ": "JST-9"})
    assert re.findall(r"model: a-model \(\d lines?(.*)\)\n", result.err) == [period]


def test_the_summary_groups_thousands_and_lists_every_model(experiment: Experiment) -> None:
    experiment.ask(*["q"] * 1999, "never asked", {"n": 1}, "bad", "other")
    experiment.log(logged("q"), logged("bad", None), logged("other", model="modèle/東 2"))
    result = experiment.run()
    assert "QA lines: 2,003 (2,000 matched, 1 without an entry, 1 malformed, 1 corrupted)\n" in result.err
    assert f"entries: 3 in {experiment.metadata}\n" in result.err
    models = re.findall(r"^model: (.*) \((.*), 2025", result.err, re.MULTILINE)
    assert models == [("a-model", "1,999 lines"), ("modèle/東 2", "1 line")]
    assert f"wrote 2,000 lines to {experiment.output}\n" in result.err


def test_the_function_returns_the_counts_and_prints_nothing(asked: Experiment, capsys: Any) -> None:
    asked.ask("q", "never asked")
    usual = prompt_of("{prompt}")
    for template in (usual, ["of no use {prompt}", usual], ("{prompt}", usual)):
        counts = reconstruct_inference(str(asked.qa), asked.lmdb, asked.output, prompt_template=template)
        found = {"qa_lines": 2, "matched": 1, "without_entry": 1, "models": counts.models}
        assert vars(counts) == {**vars(Counts()), **found}
        assert counts.models == {"a-model": 1}
    assert capsys.readouterr() == ("", "")
    asked.log_prompts(r"q\n", "q\n")  # and it takes a template as it is
    reconstruct_inference(asked.qa, asked.lmdb, asked.output, prompt_template=r"{prompt}\n", prompt_as_sent=True)
    assert read_lines(asked.output)[0]["prompt"] == r"q\n"


def test_the_function_raises_what_the_user_can_solve_with_a_hint(experiment: Experiment) -> None:
    experiment.ask("never asked")
    experiment.log_prompts("user: never asked")
    with pytest.raises(ReconstructionError, match="no usable entry for 1 of 1 QA line") as caught:
        reconstruct_inference(experiment.qa, experiment.lmdb, experiment.output)
    assert "--prompt_template='user: {prompt}'" in caught.value.hint
    assert str(caught.value).endswith(f"\nhint: {caught.value.hint}")


def test_python_users_get_log_records_of_the_usual_levels(asked: Experiment, caplog: pytest.LogCaptureFixture) -> None:
    asked.ask("q", *[{"n": 1}] * 5)
    caplog.set_level("DEBUG", "reconstruct_inference")
    reconstruct_inference(asked.qa, asked.lmdb, asked.output, prompt_template=prompt_of("{prompt}"))
    assert [record.levelname for record in caplog.records] == ["DEBUG"] + ["WARNING"] * 3 + ["DEBUG"] * 2 + ["INFO"] * 4


def test_runs_in_one_process_say_everything_once(asked: Experiment) -> None:
    code = "import sys, reconstruct_inference as r; r.main(sys.argv[1:]); r.main(sys.argv[1:])"
    said = bash(shlex.join(["python", "-c", code, *asked.arguments()]), SCRIPT.parent)
    assert said.stderr.count("QA lines: ") == 2


def test_several_threads_may_read_one_store(asked: Experiment) -> None:
    outputs = [asked.folder / f"out{number}.jsonl" for number in range(24)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda output: reconstruct_inference(asked.qa, asked.lmdb, output), outputs))
    assert [len(read_lines(output)) for output in outputs] == [1] * 24


@table("question", {"matched": "q", "without an entry": "w", "corrupted": "bad", "malformed": ["q"]})
def test_memory_does_not_grow_with_lines_that_are(experiment: Experiment, question: Any) -> None:
    experiment.log(logged("q"), logged("bad", None))
    line = json.dumps({"prompt": question, "text": "x" * 10_000}).encode() + b"\n"
    experiment.qa.write_bytes(LINE + line * 4_000)
    tracemalloc.start()
    reconstruct_inference(experiment.qa, experiment.lmdb, experiment.output)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000  # of the 40 MB that the lines have
