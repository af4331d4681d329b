"""Prompt templates, and what is said when not one line matched."""

from __future__ import annotations

import random
import re
import shlex
import subprocess
import sys
from collections.abc import Callable

import pytest
from conftest import SAMPLE, SCRIPT, Experiment, logged, write_store
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

QUESTIONS = [
    "Who wrote the play Hamlet?",
    "What is 17 times 3? {curly} %s %(x)s {0}",
    "日本の首都はどこですか？",
    "Which of these is a fruit?\n1) stone\n2) pear",
    "A question with \"quotes\", 'quotes' and a \\ backslash",
    "Short?",
]


def log_prompts(experiment: Experiment, prompts: list[str]) -> None:
    entries = [{"prompt": prompt, "response": f"response {n}"} for n, prompt in enumerate(prompts)]
    write_store(experiment.metadata, [(entry["prompt"], entry) for entry in entries])


def paste(experiment: Experiment, option: str) -> subprocess.CompletedProcess[str]:
    """Runs the command in bash as a user would who pastes the proposed option behind it."""
    command = shlex.join([sys.executable, str(SCRIPT), *experiment.arguments()])
    return subprocess.run(
        ["bash", "-c", f"{command} {option}"], capture_output=True, text=True, timeout=60, check=False
    )


# Templates.


@pytest.mark.parametrize(
    ("template", "qa", "prompt"),
    [
        pytest.param("{question}", {"question": " as it is "}, " as it is ", id="another field"),
        pytest.param("{a}-{b}-{a}", {"a": "1", "b": "2"}, "1-2-1", id="several fields"),
        pytest.param(r"Q: {q}\nA:", {"q": "x"}, "Q: x\nA:", id="a line break that was typed"),
        pytest.param("Q: {q}\nA:", {"q": "x"}, "Q: x\nA:", id="a real line break"),
        pytest.param(r"\\n \t {q}\\", {"q": "x"}, "\\n \\t x\\", id="backslashes"),
        pytest.param("{{{q}}} {{}}", {"q": "x"}, "{x} {}", id="literal braces"),
        pytest.param("{my field}", {"my field": "x"}, "x", id="a name with a space"),
        pytest.param("東京 {q}", {"q": "🗾"}, "東京 🗾", id="non-ASCII text"),
        pytest.param("{q}", {"q": "{q} {0} \\n %s"}, "{q} {0} \\n %s", id="nothing is done to the question"),
    ],
)
def test_a_template_makes_the_prompt(experiment: Experiment, template: str, qa: dict, prompt: str) -> None:
    experiment.ask(qa)
    log_prompts(experiment, [prompt])
    assert experiment.run("--prompt_template", template).code == 0


@pytest.mark.parametrize(
    ("template", "message"),
    [
        pytest.param("no field", "it names no QA field", id="no field"),
        pytest.param("{{prompt}}", "it names no QA field", id="only literal braces"),
        pytest.param("{}", "{} is a position", id="an automatic position"),
        pytest.param("{0}", "{0} is a position", id="a position"),
        pytest.param("{prompt.__class__}", "looks inside a field", id="an attribute"),
        pytest.param("{prompt[0]}", "looks inside a field", id="an index"),
        pytest.param("{prompt!r}", "has a conversion or format", id="a conversion"),
        pytest.param("{prompt:>{n}}", "has a conversion or format", id="a format"),
        pytest.param("{prompt", "expected '}'", id="an open brace"),
        pytest.param("prompt}", "Single '}'", id="a closing brace alone"),
    ],
)
def test_a_template_that_cannot_be_used_is_wrong_usage(experiment: Experiment, template: str, message: str) -> None:
    experiment.ask("q")
    experiment.log(logged("q"))
    result = experiment.run("--prompt_template", template)
    assert result.code == 2
    assert f"argument --prompt_template: {template!r} cannot be used: " in result.err
    assert message in result.err


def test_a_line_without_the_templates_field_is_malformed(experiment: Experiment) -> None:
    experiment.ask({"question": "q"}, "q")
    log_prompts(experiment, ["q"])
    result = experiment.run("--prompt_template", "{question}")
    assert (result.code, len(result.lines)) == (0, 1)
    assert "malformed QA line: line 2: no string in 'question'" in result.err


# Nothing matched: the proposal.


@pytest.mark.parametrize(
    ("make_qa", "make_prompt"),
    [
        pytest.param(lambda q: {"prompt": q}, lambda q: f"user: {q}", id="raw questions"),
        pytest.param(lambda q: {"prompt": q}, lambda q: q, id="nothing but the question"),
        pytest.param(lambda q: {"prompt": q}, lambda q: f"{q}\nAnswer:\n\n", id="a suffix instead of a prefix"),
        pytest.param(
            lambda q: {"prompt": q},
            lambda q: f"system: You are helpful.\nuser: Answer in one sentence. Q:{q}\n A:",
            id="a system message before the user's",
        ),
        pytest.param(
            lambda q: {"prompt": {"is": "no string"}, "question": q},
            lambda q: f"user: Answer in one sentence. Q:{q}\n A:",
            id="questions in another field",
        ),
        pytest.param(
            lambda q: {"prompt": f"user: Answer in one sentence. Q:{q}\n A:"},
            lambda q: f"user: Answer in one sentence. Q:{q}\n A:",
            id="prompts that are formatted already",
        ),
        pytest.param(
            lambda q: {"prompt": q}, lambda q: f"ユーザー: «{q}»\u2028\u00a0→", id="a template with non-ASCII text"
        ),
        pytest.param(
            lambda q: {"prompt": q},
            lambda q: f"""'{{"q": "it's {q}"}}' $HOME `ls` !! \\n \\\\""",
            id="shell characters",
        ),
        pytest.param(lambda q: {"prompt": q}, lambda q: f"-n {q}\t\r\x1b[31m\x07", id="a dash and control characters"),
        pytest.param(
            lambda q: {"context": f"A context about {q[:3]}, long and shared.", "prompt": q, "lang": "en"},
            lambda q: f"Context: A context about {q[:3]}, long and shared.\nQ: {q}\nin one sentence",
            id="two fields and a short one that is there by chance",
        ),
        pytest.param(lambda q: {"my question": q, "id": "7"}, lambda q: f"7: {q}", id="a name with a space"),
        pytest.param(lambda q: {"prompt": q, "same": q}, lambda q: f"{q} I repeat: {q}", id="a question said twice"),
    ],
)
def test_the_proposed_option_pasted_into_bash_matches_everything(
    experiment: Experiment, make_qa: Callable[[str], dict], make_prompt: Callable[[str], str]
) -> None:
    experiment.ask(*map(make_qa, QUESTIONS), make_qa("Never asked?"))
    log_prompts(experiment, [make_prompt(question) for question in QUESTIONS])
    result = experiment.run()
    assert (result.code, result.lines) == (1, None)
    assert len(result.err.splitlines()) <= 12
    assert f"Of {len(QUESTIONS)} prompts sampled from the store, {len(QUESTIONS)} follow" in result.err
    option = result.err.splitlines()[-1]
    assert option.isprintable()
    pasted = paste(experiment, option)
    assert pasted.returncode == 0, pasted.stderr
    assert re.search(rf"matched: +{len(QUESTIONS)}\n", pasted.stderr)


SHELL_TEXT = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0") | st.sampled_from("'\"\\{}$`!\n-")
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=30)
@given(head=SHELL_TEXT, tail=SHELL_TEXT)
def test_any_text_around_the_question_survives_pasting(experiment: Experiment, head: str, tail: str) -> None:
    questions = ["What is the highest mountain of Kenya?", "Who wrote the play Hamlet, and when?"]
    experiment.ask(*questions)
    (experiment.metadata / "data.mdb").unlink(missing_ok=True)
    experiment.output.unlink(missing_ok=True)
    log_prompts(experiment, [f"{head}{question}{tail}" for question in questions])
    result = experiment.run()
    if result.code == 0:
        return  # the default template, by chance
    pasted = paste(experiment, result.err.splitlines()[-1])
    assert re.search(r"matched: +2\n", pasted.stderr), (result.err, pasted.stderr)


def test_the_failing_run_shows_what_was_tried_against_what_is_there(experiment: Experiment) -> None:
    experiment.ask("Who wrote the play Hamlet?")
    log_prompts(experiment, ["user: Who wrote the play Hamlet?"])
    assert experiment.run().err.splitlines() == [
        "reconstruct_inference.py: error: nothing matched: "
        "no prompt that the template makes of 1 QA entries is in the store",
        r"  tried, first:  'user: Answer in one sentence. Q:Who wrote the play Hamlet?\n A:'",
        "  in the store:  'user: Who wrote the play Hamlet?'",
        "  Of 1 prompts sampled from the store, 1 follow another template.",
        "  Run the same command again with",
        "    --prompt_template 'user: {prompt}'",
    ]


def test_an_existing_output_stays_when_nothing_matched(experiment: Experiment) -> None:
    experiment.ask("q")
    experiment.log(logged("another"))
    experiment.output.write_text("[1]\n")
    assert experiment.run().code == 1
    assert experiment.output.read_text() == "[1]\n"
    assert {path.name for path in experiment.folder.iterdir()} == {"qa.jsonl", "a.lmdb_metadata", "out.jsonl"}


def test_a_handful_of_questions_is_found_in_a_large_store(experiment: Experiment) -> None:
    numbers = random.Random(1).sample(range(3000), 3)
    log_prompts(experiment, [f"user: Who won the chess tournament number {n} of the city?" for n in range(3000)])
    experiment.ask(*[f"Who won the chess tournament number {n} of the city?" for n in numbers])
    err = experiment.run().err
    assert "Of 3000 prompts sampled from the store, 3 follow" in err
    assert "--prompt_template 'user: {prompt}'" in err


def test_one_question_is_enough_where_the_other_prompts_have_the_same_shape(experiment: Experiment) -> None:
    log_prompts(experiment, [f"user: {question}" for question in QUESTIONS])
    experiment.ask(QUESTIONS[0])
    assert "--prompt_template 'user: {prompt}'" in experiment.run().err


def test_evidence_is_found_late_in_a_long_qa_file(experiment: Experiment) -> None:
    log_prompts(experiment, [f"user: {question}" for question in QUESTIONS])
    experiment.ask(*[f"What is the number {n}?" for n in range(5000)], *QUESTIONS)
    assert "--prompt_template 'user: {prompt}'" in experiment.run().err


# Nothing matched: no proposal.


@pytest.mark.parametrize(
    ("qa", "prompts"),
    [
        pytest.param([{"prompt": "Who?"}], ["user: Answer in one sentence. Q:What?\n A:"], id="other questions"),
        pytest.param(
            [{"prompt": f"Who is number {n}?", "answer": answer} for n, answer in enumerate(["play", "the", "1889"])],
            [f"user: {question}" for question in QUESTIONS],
            id="short answers that stand in prompts by chance",
        ),
        pytest.param(
            [{"prompt": f"Who is number {n}?", "task": "Answer in one sentence."} for n in range(20)],
            [f"user: Answer in one sentence. Q:{question}\n A:" for question in QUESTIONS],
            id="an instruction that all prompts share",
        ),
        pytest.param(
            [{"prompt": f"Which is number {n}?", "answer": town} for n, town in enumerate(["Paris", "Rome"])],
            [f"Name one building in {town}." for town in ("Paris", "Rome", "Lima", "Oslo", "Bonn")],
            id="short answers that fit a few of many prompts alike",
        ),
        pytest.param([{"prompt": " ", "x": ""}], ["user: What is this?"], id="blank values"),
    ],
)
def test_an_unrelated_store_is_called_that_without_a_proposal(
    experiment: Experiment, qa: list[dict], prompts: list[str]
) -> None:
    experiment.ask(*qa)
    log_prompts(experiment, prompts)
    result = experiment.run()
    assert result.code == 1
    assert "it seems to be of another experiment" in result.err
    assert "--prompt_template" not in result.err


def test_an_empty_store_is_called_empty(experiment: Experiment) -> None:
    experiment.ask("q")
    log_prompts(experiment, [])
    assert "nothing matched: the store is empty" in experiment.run().err


@pytest.mark.parametrize("content", ["", "\n\n", "no JSON\n[1]\n{}\n", '{"n": 1}\n'])
def test_a_qa_file_without_a_usable_line_is_called_that(experiment: Experiment, content: str) -> None:
    experiment.qa.write_text(content)
    experiment.log(logged("q"))
    assert "nothing matched: the QA file has no usable line" in experiment.run().err


def test_a_store_of_corrupted_entries_only_is_called_that(experiment: Experiment) -> None:
    experiment.ask("q", "never asked")
    experiment.log(logged("q", None))
    result = experiment.run()
    assert "nothing matched: 1 QA entries were logged, but none of their entries can be used" in result.err


def test_a_run_that_matched_something_gets_no_proposal(experiment: Experiment) -> None:
    experiment.ask(*[f"Who is number {n}?" for n in range(50)], "q")
    write_store(
        experiment.metadata,
        [(f"user: {q}", {"response": "r"}) for q in QUESTIONS] + [(logged("q")["prompt"], logged("q"))],
    )
    result = experiment.run()
    assert result.code == 0
    assert "template" not in result.err


def test_the_readme_shows_a_real_exchange(experiment: Experiment) -> None:
    sample_qa = (SAMPLE / "qa.jsonl").read_bytes()
    experiment.qa.write_bytes(sample_qa.replace(b'"prompt"', b'"question"'))
    paths = {"lmdb_path": SAMPLE / "activations.lmdb"}
    failing = experiment.run(**paths)
    option = shlex.split(failing.err.splitlines()[-1])
    working = experiment.run(*option, **paths)
    readme = SCRIPT.with_name("README_reconstruction.md").read_text(encoding="utf-8")
    for line in [*failing.err.splitlines(), *working.err.splitlines()[:-1]]:
        assert f"    {line}\n" in readme
