"""Prompt templates, and what is said where entries are missing or the wrong file was given."""

from __future__ import annotations

import gzip
import json
import random
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

import pytest
from helpers import SCRIPT, Experiment, logged, prompt_of, proposals, table, write_store

QUESTIONS = [
    "Who wrote the play Hamlet?",
    "What is 17 times 3? {curly} %s %(x)s {0}",
    "日本の首都はどこですか？",
    "Which of these is a fruit?\n1) stone\n2) pear",
    "A question with \"quotes\", 'quotes' and a \\ backslash",
    "Short?",
]


def paste(experiment: Experiment, options: str) -> str:
    """What the command says in bash to a user who pastes the proposed options behind it."""
    command = shlex.join([sys.executable, str(SCRIPT), *experiment.arguments()])
    return subprocess.run(["bash", "-c", f"{command} {options}"], capture_output=True, text=True, timeout=60).stderr


# Templates.


@table(
    "template, qa, prompt",
    {
        "several fields": ("{a}-{b}-{a}", {"a": "1", "b": "2"}, "1-2-1"),
        "a line break that was typed": (r"Q: {q}\nA:", {"q": "x"}, "Q: x\nA:"),
        "backslashes": (r"\\n \t {q}\\", {"q": "x"}, "\\n \\t x\\"),
        "literal braces": ("{{{q}}} {{}}", {"q": "x"}, "{x} {}"),
        "a name with a space": ("{my field}", {"my field": "x"}, "x"),
        "non-ASCII text": ("東京 {q}", {"q": "🗾"}, "東京 🗾"),
        "nothing is done to the question": ("{q}", {"q": "{q} {0} \\n %s"}, "{q} {0} \\n %s"),
    },
)
def test_a_template_makes_the_prompt(experiment: Experiment, template: str, qa: dict, prompt: str) -> None:
    experiment.ask(qa)
    experiment.log_prompts(prompt)
    assert experiment.run("--prompt_template", template).code == 0


@table(
    "template, message",
    {
        "no field": ("no field", "it names no QA field"),
        "a position": ("{0}", "plain name of a field"),
        "an attribute": ("{prompt.__class__}", "plain name of a field"),
        "a conversion": ("{prompt!r}", "plain name of a field"),
        "a format": ("{prompt:>{n}}", "plain name of a field"),
        "an open brace": ("{prompt", "expected '}'"),
    },
)
def test_a_template_that_cannot_be_used_is_wrong_usage(asked: Experiment, template: str, message: str) -> None:
    result = asked.run("--prompt_template", template)
    assert result.code == 2
    assert f"argument --prompt_template: {template!r} cannot be used: " in result.err
    assert message in result.err


def test_both_forms_of_the_default_are_tried_in_this_order_for_each_line(experiment: Experiment) -> None:
    experiment.ask("early", "late", "both")
    late = [prompt_of(question).removeprefix("user: ") for question in ("late", "both")]
    experiment.log_prompts(prompt_of("early"), prompt_of("both"), *late)
    assert [line["generation"] for line in experiment.run().lines] == ["response 0", "response 2", "response 1"]


def test_of_several_templates_the_first_that_has_an_entry_counts_for_each_line(experiment: Experiment) -> None:
    experiment.ask({"a": "1"}, {"a": "2", "b": "2"}, {"b": "3"}, {"c": "4"})
    experiment.log_prompts("A 1", "B 2", "A 2", "B 3")
    result = experiment.run("--prompt_template", "A {a}", "--prompt_template", "B {b}")
    assert [line["generation"] for line in result.lines] == ["response 0", "response 2", "response 3"]
    assert f"{experiment.qa}:4: malformed QA line, skipped: no text in `a`, `b`" in result.err


def test_a_corrupted_entry_of_one_template_does_not_hide_that_of_the_next(experiment: Experiment) -> None:
    experiment.ask("q")
    experiment.log(logged("q", None), {"prompt": prompt_of("q").removeprefix("user: "), "response": "fine"})
    assert experiment.run().lines[0]["generation"] == "fine"


# Nothing matched: proposals.


TASK = "Answer the question in a few words."


@table(
    "qa, prompt",
    {
        "raw questions": ({"prompt": "Q?"}, "user: Q?"),
        "a suffix instead of a prefix": ({"prompt": "Q?"}, "Q?\nAnswer:\n\n"),
        "a system message before the user's": ({"prompt": "Q?"}, "system: You are helpful.\nuser: Q?\n A:"),
        "questions in another field": ({"prompt": ["no text"], "question": "Q?"}, prompt_of("Q?")),
        "prompts that are formatted already": ({"prompt": prompt_of("Q?")}, prompt_of("Q?")),
        "a template with non-ASCII text": ({"prompt": "Q?"}, "ユーザー: «Q?»\u2028\u00a0→"),
        "shell characters": ({"prompt": "Q?"}, """'{"q": "it's Q?"}' $HOME `ls` !! \\n \\\\"""),
        "a dash and control characters": ({"prompt": "Q?"}, "-n Q?\t\r\x1b[31m\x07"),
        "two fields and a chance": ({"task": TASK, "prompt": "Q?", "lang": "en"}, f"{TASK}\nQ?\nin a sentence"),
        "names that can stand in a template and others": ({"0": "Q?", "a.b": "Q?", "my question": "Q?"}, "user: Q?"),
        "a question said twice": ({"prompt": "Q?", "same": "Q?"}, "Q? I repeat: Q?"),
        "a text that all lines share": ({"prompt": "Q?", "task": TASK}, f"{TASK} Q? {TASK}"),
    },
)
def test_the_proposed_option_pasted_into_bash_matches_all(experiment: Experiment, qa: dict, prompt: str) -> None:
    def of(question: str) -> dict[str, Any]:
        return {name: text.replace("Q?", question) if isinstance(text, str) else text for name, text in qa.items()}

    experiment.ask(*map(of, QUESTIONS), of("Never asked?"))
    experiment.log_prompts(*[prompt.replace("Q?", question) for question in QUESTIONS], model="some-model")
    result = experiment.run()
    assert (result.code, result.lines) == (1, None)
    assert "matches 6 QA lines, `some-model` answered 'response " in result.err
    (option,) = proposals(result.err)
    assert option.isprintable()
    assert paste(experiment, option).startswith("QA lines: 7 (6 matched, 1 without an entry)\n")


def log_like_hallulens(experiment: Experiment, template: str, role: str, asked: Iterable[int] = range(30)) -> None:
    """Logs what one server sees of a study: question generator, judge of answerability, model under test."""
    lines = [
        {"title": f"Subject number {n}", "prompt": f"What is known of the subject that has the number {n}?"}
        | {"reference": f"A long reference about number {n}, with what is to be known of it.", "answer": f"fact {n}"}
        for n in range(30)
    ]
    experiment.ask(*lines)
    entries = []
    for n, line in enumerate(lines):
        generator = "Here is a text about {title}:\n{reference}\nWrite one question about it, and nothing else.\nQ:"
        judge = "Can this be answered?\nReference: {reference}\nQuestion: {prompt}\nSay the answer or `unanswerable`."
        entries.append((generator.format(**line), line["prompt"], "big-model"))
        entries.append((judge.format(**line), line["answer"], "big-model"))
        if n in asked:
            entries.append((template.format(**line), f" It is said that {n}.", "model-under-test"))
    experiment.log(*[{"prompt": role + prompt, "response": r, "model": model} for prompt, r, model in entries])


@pytest.mark.parametrize("role", ["user: ", ""], ids=["early server", "late server"])
def test_all_convincing_templates_are_shown_and_the_user_chooses(experiment: Experiment, role: str) -> None:
    log_like_hallulens(experiment, "Reply briefly: {prompt}", role, asked=range(25))
    result = experiment.run()
    assert result.code == 1
    assert re.findall(" matches (.*)", result.err) == [
        "25 QA lines, `model-under-test` answered ' It is said that 0.'",
        "30 QA lines, `big-model` answered 'What is known of the subject that has the number 0?'",
        "30 QA lines, `big-model` answered 'fact 0'",
    ]
    options = proposals(result.err)
    assert options[0] == f"--prompt_template '{role}Reply briefly: {{prompt}}'"
    assert len(options) == 3
    assert "the same server logs judges and question generators too" in result.err
    assert "QA lines: 30 (25 matched, 5 without an entry)\n" in paste(experiment, options[0])


def test_the_failing_run_names_the_fields_that_there_are_and_what_would_match(experiment: Experiment) -> None:
    experiment.ask({"question": "Who wrote the play Hamlet?", "n": 1})
    experiment.log_prompts("user: Who wrote the play Hamlet?", model="m")
    assert experiment.run().err.splitlines()[1:] == [
        "error: nothing matched: no QA line has text in `prompt`; found: `question`",
        "  'user: {question}' matches 1 QA line, `m` answered 'response 0'",
        "hint: run it again with the template of your model; the same server logs judges and question generators too",
        "  --prompt_template 'user: {question}'",
    ]


def test_a_handful_of_questions_is_found_in_a_large_store(experiment: Experiment) -> None:
    numbers = random.Random(1).sample(range(3000), 3)
    experiment.log_prompts(*[f"user: Who won the chess tournament number {n} of the city?" for n in range(3000)])
    experiment.ask(*[f"Who won the chess tournament number {n} of the city?" for n in numbers])
    assert proposals(experiment.run().err) == ["--prompt_template 'user: {prompt}'"]


ANOTHER = "it seems to be of another experiment"


@table(
    "qa, prompts, said",
    {
        "other questions": ([{"prompt": "Who?"}], [prompt_of("What?")], ANOTHER),
        "blank values": ([{"prompt": " ", "x": ""}], ["user: What is this?"], ANOTHER),
        "short answers that fit by chance": (
            [{"prompt": f"Which is number {n}?", "answer": town} for n, town in enumerate(["Berlin", "Vienna"])],
            [f"Name one building in {town}." for town in ("Berlin", "Vienna", "Lima", "Oslo", "Bonn")],
            "`answer` stands in 2 of 5 prompts of the store, but no template makes them of whole fields",
        ),
    },
)
def test_of_an_unrelated_store_nothing_is_proposed_nor_made(experiment: Experiment, qa, prompts, said) -> None:
    experiment.ask(*qa)
    experiment.log_prompts(*prompts)
    before = set(experiment.folder.rglob("*"))
    result = experiment.run(output_path=experiment.folder / "new" / "out.jsonl")
    assert result.code == 1
    assert said in result.err
    assert "--prompt_template" not in result.err
    assert set(experiment.folder.rglob("*")) == before


@table(
    "question, stored, how",
    {
        "a space": ("Who wrote Hamlet, the play? ", "Who wrote Hamlet, the play?", "differ only in"),
        "case": ("Who wrote hamlet, the play?", "Who wrote Hamlet, the play?", "differ only in"),
        "quotes": ("Who wrote “Hamlet”, the play?", 'Who wrote "Hamlet", the play?', "differ only in"),
        "a composed accent": ("Who wrote Cafe\u0301 au lait?", "Who wrote Caf\u00e9 au lait?", "differ only in"),
        "a letter": ("Who wrote the play Hamlet?", "Who wrote the plai Hamlet?", ""),
        "a prefix": ("Q1: Who wrote the play Hamlet?", "Who wrote the play Hamlet?", ""),
    },
)
def test_of_prompts_that_are_nearly_the_same_both_are_shown(experiment: Experiment, question, stored, how) -> None:
    experiment.ask("Another one that is not there at all?", question)
    tried, stored = prompt_of(question).removeprefix("user: "), prompt_of(stored).removeprefix("user: ")
    experiment.log_prompts(stored, prompt_of("And this one is of no use here?"))
    err = experiment.run().err
    assert f"\n  tried:         {tried!r}\n  in the store:  {stored!r}\n" in err
    assert how in err
    assert "another experiment" not in err


def test_of_long_prompts_the_part_around_the_difference_is_shown(experiment: Experiment) -> None:
    text = "This is a long context, and it goes on. " * 30
    experiment.ask(text + "Who wrote Hamlet? " + text)
    experiment.log_prompts(prompt_of(text + "Who wrote Hamlet ? " + text))
    err = experiment.run().err
    assert max(map(len, err.splitlines())) < 250
    assert "Who wrote Hamlet? This" in err
    assert "Who wrote Hamlet ? This" in err


def test_prompts_with_qa_texts_that_no_template_makes_are_no_other_experiment(experiment: Experiment) -> None:
    experiment.ask(*[{"prompt": f"Which is number {n} of these?", "choices": [f"a{n}", f"b{n}"]} for n in range(9)])
    experiment.log_prompts(*[f"user: Which is number {n} of these?\nChoices: a{n}, b{n}" for n in range(9)])
    err = experiment.run().err
    assert "`prompt` stands in 9 of 9 prompts of the store, but no template makes them of whole fields" in err
    assert "another experiment" not in err
    assert "  in the store:  'user: Which is number " in err
    assert proposals(err) == []


# Some lines match, and others do not.


def test_lines_without_an_entry_are_explained_where_the_store_has_entries_left(experiment: Experiment) -> None:
    questions = [f"What is the answer to question number {n}?" for n in range(50)]
    experiment.ask(*questions[:3], *[f"{question} " for question in questions[3:]])
    experiment.log(*map(logged, questions))
    result = experiment.run()
    assert (result.code, len(result.lines)) == (0, 3)
    assert "warning: 47 QA lines have no entry, though at least 47 entries of the store match no line\n" in result.err
    assert "  tried:         'user: Answer in one sentence. Q:What is the answer to question number " in result.err


def test_the_proposal_for_the_rest_of_a_run_repeats_the_templates_given_and_matches_all(experiment: Experiment) -> None:
    questions = [f"What is the answer to question number {n}?" for n in range(20)]
    experiment.ask(*questions)
    experiment.log_prompts(*[f"A {q}" for q in questions[:5]], *[f"B {q}" for q in questions[5:]])
    result = experiment.run("--prompt_template", "A {prompt}")
    assert "15 QA lines have no entry, though at least 15 entries of the store match no line" in result.err
    assert proposals(result.err) == ["--prompt_template 'A {prompt}' --prompt_template 'B {prompt}'"]
    assert paste(experiment, proposals(result.err)[0]).startswith("QA lines: 20 (20 matched)\n")


def test_in_a_sampled_run_whose_entries_are_all_used_nothing_is_explained(experiment: Experiment) -> None:
    experiment.ask(*QUESTIONS)
    experiment.log(*map(logged, QUESTIONS[:2]))
    assert "though" not in experiment.run().err


def test_judges_and_generators_of_a_sampled_run_are_no_news(experiment: Experiment) -> None:
    log_like_hallulens(experiment, "Answer in one sentence. Q:{prompt}\n A:", "user: ", asked=range(10))
    result = experiment.run()
    assert result.code == 0
    assert "\n20 QA lines have no entry, though at least 60 entries" in "\n" + result.err
    assert "warning" not in result.err
    assert proposals(result.err) == []


# The wrong file, or the wrong path.

LINE = '{"prompt": "q"}\n'
CSV = 'prompt,answer\nq,"an answer, with a comma"\n'
SPREAD = json.dumps([{"prompt": "q", "n": 1}], indent=1)
DOCUMENT = "{e.qa} is one JSON document, and no JSON Lines\nhint: write one JSON object a line\n"
NO_FIELD = "nothing matched: no QA line has text in `prompt`; found: none\n"
IS_A_FILE = " is a file, where a folder with a `data.mdb` is wanted\n"
NO_ENTRY = "{e.metadata}: 0 entries recovered\nerror: nothing matched: the store is empty\n"


@table(
    "break_it, message",
    {
        "gzip": (lambda e: e.qa.write_bytes(gzip.compress(LINE.encode())), "{e.qa} is compressed with gzip\n"),
        "UTF-16": (lambda e: e.qa.write_bytes(LINE.encode("utf-16")), "{e.qa} is in UTF-16\n"),
        "CSV": (lambda e: e.qa.write_text(CSV), "{e.qa} looks like CSV, and no JSON Lines\nhint: python3 -c"),
        "an array on one line": (lambda e: e.qa.write_text('[{"prompt": "q"}]\n'), DOCUMENT),
        "an array on many lines": (lambda e: e.qa.write_text(SPREAD), DOCUMENT),
        "an object spread over lines": (lambda e: e.qa.write_text(SPREAD[2:-2]), DOCUMENT),
        "swapped files": (lambda e: {"qa_output_path": e.metadata / "data.mdb"}, "data.mdb is no text file\n"),
        "an empty QA file": (lambda e: e.qa.write_bytes(b""), "{e.qa} is empty\n"),
        "words": (lambda e: e.qa.write_text("no JSON\nnor this\n"), NO_FIELD),
        "no QA file": (lambda e: e.qa.unlink(), "cannot read {e.qa}: No such file or directory\n"),
        "swapped paths": (lambda e: {"qa_output_path": e.metadata, "lmdb_path": e.qa}, "{e.qa}" + IS_A_FILE),
        "a store that is one file": (
            lambda e: {"lmdb_path": (e.metadata / "data.mdb").rename(e.folder / "one.mdb")},
            "{e.folder}/one.mdb" + IS_A_FILE,
        ),
        "the parent": (lambda e: {"lmdb_path": e.folder}, "has no `data.mdb`, but `a.lmdb_metadata`, `qa.jsonl`\n"),
        "no store": (lambda e: {"lmdb_path": e.folder / "no"}, "{e.folder}/no_metadata: no such folder; "),
        "an empty data.mdb": (lambda e: (e.metadata / "data.mdb").write_bytes(b""), "data.mdb is empty, or cannot be"),
        "no LMDB file": (lambda e: (e.metadata / "data.mdb").write_bytes(b"text" * 9999), NO_ENTRY),
        "something else": (
            lambda e: write_store(e.metadata, [(b"an image", b"x")]),
            "the keys of {e.metadata} are no prompt hashes",
        ),
        "an empty store": (lambda e: e.log(), "nothing matched: the store is empty\n"),
        "only corrupted entries": (
            lambda e: e.log(logged("q", None)),
            "nothing matched: 1 entry found, but none usable\n",
        ),
    },
)
def test_what_cannot_work_is_called_by_its_name(asked: Experiment, break_it: Any, message: str) -> None:
    change = break_it(asked)
    before = asked.files().keys()
    result = asked.run(**(change if isinstance(change, dict) else {}))
    assert result.code == 1
    assert message.format(e=asked) in result.err
    assert result.err.count("error: ") == 1
    assert asked.files().keys() == before


@table("content", {"gzip": gzip.compress(LINE.encode()), "UTF-16": LINE.encode("utf-16")})
def test_the_option_in_the_hint_reads_the_qa_file(asked: Experiment, content: bytes) -> None:
    asked.qa.write_bytes(content)
    hint = asked.run().err.splitlines()[1].removeprefix("hint: ")
    assert paste(asked, hint).startswith("QA lines: 1 (1 matched)\n")


def test_the_line_that_converts_csv_makes_a_qa_file(asked: Experiment) -> None:
    pytest.importorskip("pandas")
    asked.qa.write_text(CSV)
    hint = asked.run().err.splitlines()[1].removeprefix("hint: ").replace("python3", shlex.quote(sys.executable), 1)
    subprocess.run(["bash", "-c", hint], check=True, timeout=60)
    result = asked.run(qa_output_path=f"{asked.qa}.jsonl")
    assert result.lines[0]["answer"] == "an answer, with a comma"


@pytest.mark.parametrize("content", [f'{{"prompt": "q"\n{LINE}', f"a, b\n{LINE}", f"{LINE}no JSON, but a comma\n"])
def test_one_bad_line_is_no_other_format(asked: Experiment, content: str) -> None:
    asked.qa.write_text(content)
    assert "QA lines: 2 (1 matched, 1 malformed)\n" in asked.run().err


@pytest.mark.parametrize("name", ["qa_output_path", "lmdb_path", "output_path"])
def test_an_empty_path_is_wrong_usage_of_the_option_that_is_named(asked: Experiment, name: str) -> None:
    result = asked.run(**{name: ""})
    assert result.code == 2
    assert f"argument --{name}: it is empty, as a variable that is not set" in result.err


@pytest.mark.parametrize("options", [["--unknown"], ["--qa", "x"], ["--prompt_template"]])
def test_wrong_usage_ends_with_exit_code_2(asked: Experiment, options: list[str]) -> None:
    assert asked.run(*options).code == 2
