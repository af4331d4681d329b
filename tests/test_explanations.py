"""What is said of QA lines without an entry: the kinds of prompts in the store, near misses, what to run."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import subprocess
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from helpers import DEADLINE, Experiment, Result, logged, prompt_of, table, write_store
from hypothesis import given, settings
from hypothesis import strategies as st

Line = dict[str, Any]
Kind = tuple[str, Any, Any]  # who is asked, by a template or function of n, on which lines or on how many


def random_name(n: int) -> str:
    return hashlib.sha256(b"%d" % n).hexdigest()[:20]


def make_line(n: int) -> Line:
    line = {"title": f"{random_name(n)}, {n}", "prompt": f"What is known of number {n}?", "answer": f"fact {n}."}
    return {**line, "reference": f"{n} is the number of a subject, and there is much to be known of {n}."}


LINES = [make_line(n) for n in range(1200)]
SOME = LINES[:60]
DEFAULT = prompt_of("{prompt}")
BRIEF = "user: {prompt}\nAnswer briefly."
GENERATOR = "user: Here is a text about {title}:\n{reference}\nWrite one question about it, and nothing else.\nQ:"
JUDGE = "user: Can this be answered?\nReference: {reference}\nQuestion: {prompt}\nSay the answer, or `unanswerable`."
SHOTS = "\n\n".join(f"Question: {line['prompt']}\nAnswer: {line['answer']}" for line in LINES[:5])
FEW_SHOT = f"user: Answer as in these examples.\n\n{SHOTS}\n\nQuestion: {{prompt}}\nAnswer:"


def numbers_of(asked: Any) -> Sequence[int]:
    return range(asked) if isinstance(asked, int) else asked


def answers(who: str, asked: Any) -> list[str]:
    return [f"{who} {n}" for n in numbers_of(asked)]


def log_study(experiment: Experiment, lines: list[Line], *kinds: Kind) -> None:
    """Writes the QA file, and logs what servers see of a study: `who` answers "who n" on line n."""
    experiment.ask(*lines)
    asked_of = [(n, who, template) for who, template, asked in kinds for n in numbers_of(asked)]
    made = [(n, who, each.format(**lines[n]) if isinstance(each, str) else each(n)) for n, who, each in asked_of]
    experiment.log(*[{"prompt": prompt, "response": f"{who} {n}", "model": who} for n, who, prompt in made])


def paste(option: str) -> list[str]:
    """The words that bash makes of an option that is pasted into a command line."""
    command = ["bash", "-c", f"printf '%s\\0' {option}"]
    said = subprocess.run(command, capture_output=True, check=True, timeout=DEADLINE).stdout
    return [os.fsdecode(word) for word in said.split(b"\0")[:-1]]


def given_by_proposals(experiment: Experiment, result: Result) -> list[list[str]]:
    """The generations that come out if each of the proposals is pasted into bash."""
    return [experiment.run(*paste(each)).generations() for each in result.proposals()]


def census(result: Result) -> str:
    """The kinds of prompts that are shown, in short: "model 2/9" for 2 of the 9 looked at that model answered."""
    form = r"^  \d\. (?:.* )?([\d,]+) of the ([\d,]+) (?:QA lines|prompts) looked at.*(?:\n     `(.+)` answered '.+')?$"
    kinds = [f"{who} {part}/{whole}".strip() for part, whole, who in re.findall(form, result.err, re.MULTILINE)]
    assert [len(line) < 250 for line in result.err.splitlines() if re.match(r"  \d\. ", line)] == [True] * len(kinds)
    return ", ".join(kinds)


def assert_silent(result: Result) -> None:
    """Nothing is said of missing entries beside the summary."""
    assert (result.warnings(), census(result), "hint" in result.err) == ([], "", False)


# Nothing matched: the kinds of prompts that there are, and the options that are proposed.

TASK = "Answer the question in a few words."
TEXTS = ["Who wrote the play Hamlet?", "What is 17 times 3? {curly} %s %(x)s {0}", "日本の首都はどこですか？", "Short?"]
TEXTS += ["Which of these is a fruit?\n1) stone\n2) pear", "A question with \"quotes\", 'quotes' and a \\ backslash"]


@table(
    "qa, prompt",
    {
        "nothing but the question": ({"prompt": "Q?"}, "Q?"),
        "questions in another field": ({"prompt": ["no text"], "the.question": "Q?"}, prompt_of("Q?")),
        "a template with non-ASCII text": ({"prompt": "Q?"}, "ユーザー: «Q?»\u2028\u00a0→"),
        "shell characters": ({"prompt": "Q?"}, """'{"q": "it's Q?"}' $HOME `ls` !! \\n \\\\" %d{prompt}}"""),
        "a dash and control characters": ({"prompt": "Q?"}, "-n 'Q?'\\\t\r\x1b[31m\x07a «é»"),
        "two fields and a chance": ({"task": TASK, "prompt": "Q?", "lang": "en"}, f"{TASK}\nQ?\nin a sentence"),
        "three fields": ({"a": "Say Q?", "b": 7, "c": "{c} Q?", "d": "2"}, "user: 7. {c} Q?, but Say Q?, 2 or 3"),
        "a field twice": ({"prompt": "Q?", "same": "Q?"}, "Q? I repeat: Q?"),
        "a text within another": ({"prompt": "Who said Q? and when", "said": "Q?"}, "Q?: Who said Q? and when"),
        "a text that all lines share": ({"prompt": "Q?", "task": TASK}, f"{TASK} Q? {TASK}"),
        "names that differ only by accents": ({"caf\u00e9": "A Q?", "cafe\u0301": "The Q?"}, "user: The Q?"),
        "names that no template can have": ({"0": "Q?", "a[b]": "Q?", "c:d": "Q?", "my own": "Q?"}, "user: Q?"),
        "options of a list": ({"prompt": "Q?", "of": ["x Q?", "y Q?"]}, "user: Q?\n(A) x Q?\n(B) y Q?\nAnswer:"),
        "a message": ({"messages": [{"role": "user", "content": "Q?"}]}, "user: Q?"),
        "texts that UTF-8 lacks": ({"prompt": "Q?", "odd": "\ud800", "odder": ["\ud800 Q?"]}, "user: Q?"),
        "characters for private use in a question": ({"prompt": "\ue000 Q?", "x": "\ue001"}, "user: \ue000 Q?"),
    },
)
def test_the_only_option_pasted_into_bash_gives_each_answer(experiment: Experiment, qa: Line, prompt: str) -> None:
    lines = [json.dumps(qa).replace("Q?", json.dumps(text)[1:-1]) for text in [*TEXTS, "Never asked?"]]
    experiment.qa.write_text("\n".join(lines))
    experiment.log_prompts(*[prompt.replace("Q?", text) for text in TEXTS], model="some-model")
    result = experiment.run(code=1)
    assert census(result) == "some-model 6/7"
    (option,) = result.proposals()
    assert option.isprintable()
    (word,) = paste(option)
    again = experiment.run(word)
    assert again.generations() == [f"response {n}" for n in range(6)]
    assert again.counts() == {"QA lines": 7, "matched": 6, "without an entry": 1}


# A command line has no NUL, and no text has characters for private use.
OWN_TEXT = st.text(st.characters(blacklist_categories=("Cs", "Co"), blacklist_characters="\0"))


@settings(max_examples=20)
@given(before=OWN_TEXT, after=OWN_TEXT)
def test_any_template_can_be_pasted(experiment: Experiment, before: str, after: str) -> None:
    log_study(experiment, LINES[:9], ("model", lambda n: before + LINES[n]["prompt"] + after, 9))
    assert given_by_proposals(experiment, experiment.run(code=1)) == [answers("model", 9)]


# Prompts that no template makes.
ODD: dict[str, Callable[[int], str]] = {
    "options": lambda n: f"user: {LINES[n]['prompt']}\n(A) big {n % 7}\n(B) small {n}\nAnswer:",
    "cut": lambda n: f"user: Read this: {LINES[n]['reference'][: 30 + n % 3]}…\n{LINES[n]['prompt']}",
    "lower": lambda n: f"user: {LINES[n]['prompt'].lower()} {'Briefly, ' * 30}",
    "name": lambda n: f"{random_name(n + 5000)}, {n}\nWhat is to be known of them?",
    "last": lambda n: f"What is known of {random_name(n)}",
    "book": lambda n: f"In one book, {random_name(n + 5000)} Answer:",
    "page": lambda n: f"On one page, {random_name(n + 5000)} Answer:",
}
JUDGES = [("generator", GENERATOR, 60), ("judge", JUDGE, 60)]
LATE_JUDGE, LATE_MODEL = ("judge", JUDGE[6:], 60), ("model", BRIEF[6:], 50)
SMALL_KINDS = [("a", "A {prompt}", 9), ("b", "B {prompt}", 20), ("c", "C {title}", range(10, 20))]
DOUBLE = "user: {title} -and now- {prompt} -and now- {answer}"
ONCE = ("once", lambda n: f"user: {SOME[n]['prompt'].lower()} -and now- {n}", 50)
ALIKE = [("m", DOUBLE, 60), ("front", lambda n: random_name(n + 5000) + DOUBLE.format(**SOME[n]), 40), ONCE]
TWICE = [{**LINES[n // 2], "note": f"note {n}"} for n in range(60)]
LETTERS = [{"blank": " ", "x": "brief" if n == 0 else "facts"[n % 5], **line} for n, line in enumerate(SOME)]
WORDS = [{"prompt": text} for text in ["3+3", "3+33", "art", "tar", "star", "a", "水", "木", "水木", "👩", "👩‍🚀"]]
NUMBERS = [{"prompt": str(n), "note": "answer this in one word" if n == 17 else ""} for n in range(120)]
TOWNS = [{**line, "answer": f"town {n}", "lang": "en"} for n, line in enumerate(LINES[:9])]
NESTED = [{"q": {"stem": line["prompt"]}, "of": ["yes", 1900 + n]} for n, line in enumerate(SOME)]


@table(
    "lines, kinds, expected",
    {
        "an early server": (SOME, [*JUDGES, ("model", BRIEF, 50)], "model 50/60, generator 60/60, judge 60/60"),
        "a late server": (SOME, [LATE_JUDGE, LATE_MODEL], "model 50/60, judge 60/60"),
        "few-shot": (SOME, [*JUDGES, ("model", FEW_SHOT, 50)], "generator 60/60, judge 60/60, model 50/60"),
        "five": (SOME, [*SMALL_KINDS, *JUDGES], "c 10/60, b 20/60, generator 60/60, judge 60/60"),
        "one of 200 asked": (LINES[:200], [("model", BRIEF, [77])], "model 1/200"),
        "300 lines": (LINES[:300], [("model", BRIEF, range(100, 300))], "model 200/300"),
        "nested": (NESTED, [("model", "user: Q: {q[stem]} ({of[1]})", 60)], "model 60/60"),
        "short texts": (WORDS, [("model", "user: What is {prompt}? Be brief.", 11)], "model 11/11"),
        "a QA text in the template": (NUMBERS, [("model", "answer this in one word: {prompt}", 120)], "model 120/120"),
        "no other text": (SOME, [("a", "{prompt}", 60), ("b", ODD["options"], 50)], "a 60/60, b 50/110"),
        "options": (SOME, [LATE_JUDGE, ("model", ODD["options"], 50)], "judge 60/60, model 50/110"),
        "context cut": (SOME, [LATE_JUDGE, ("model", ODD["cut"], 50)], "judge 60/60, model 50/110"),
        "lower case": (SOME, [LATE_JUDGE, ("model", ODD["lower"], 50)], "judge 60/60, model 50/110"),
        "an index first": (LINES, [("model", lambda n: f"[{n}] AND SO ON (of {n})", 120)], "model 120/120"),
        "a name first": (LINES, [("model", ODD["name"], 60)], "model 60/60"),
        "a name last": (LINES, [("model", ODD["last"], 60)], "model 60/60"),
        "a title first": (SOME, [("m", lambda n: f"{SOME[n]['title']}, then {random_name(-n)}", 60)], "m 60/60"),
        "two groups": (SOME, [("x", ODD["last"], 9), ("y", ODD["lower"], 7), ("z", ODD["name"], 8)], "x 9/24, z 8/24"),
        "rare": (LINES[:300], [("model", BRIEF, [0, 9]), ("odd", ODD["options"], 300)], "model 2/300, odd 300/302"),
        "letters": (LETTERS, [("model", "user: Give facts of {title}: {prompt}", 50)], "model 50/60"),
        "a word": (LETTERS, [*JUDGES, ("model", BRIEF, [7, 12])], "model 2/60, generator 60/60, judge 60/60"),
        "notes": (TWICE, [("model", "{prompt} ({note})", range(0, 60, 2))], "model 30/60"),
        "the same end": (SOME, [("x", ODD["book"], 12), ("y", ODD["page"], 10)], "x 12/22, y 10/22"),
        "much alike": (SOME, ALIKE, "m 60/60, once 50/150, front 40/150"),
        "a prompt by chance": (TOWNS, [("x", lambda n: "Is it town 0?", 1), ("y", ODD["lower"], 9)], "y 9/10, x 1/10"),
        "one for all lines": (TOWNS, [("x", lambda n: "Answer in en.", 1), ("y", ODD["lower"], 9)], "y 9/10, x 1/10"),
    },
)
def test_the_kinds_are_shown_and_can_be_chosen(experiment: Experiment, lines: Any, kinds: Any, expected: str) -> None:
    log_study(experiment, lines, *kinds)
    result = experiment.run(code=1)
    assert census(result) == expected
    chosen = [kind for kind in kinds if isinstance(kind[1], str) and f"{kind[0]} " in expected]
    assert sorted(given_by_proposals(experiment, result)) == sorted(answers(who, asked) for who, _, asked in chosen)


def test_the_template_with_the_fewest_fields_is_proposed(experiment: Experiment) -> None:
    lines = [{"task": TASK, "same": line["prompt"] if n < 5 else "x", **line} for n, line in enumerate(LINES[:9])]
    log_study(experiment, lines, ("model", "{task} {prompt}", 9))
    assert experiment.run(code=1).proposals() == [f"--prompt_template='{TASK} {{prompt}}'"]


@table(
    "template, asked, share", {"first": (BRIEF, range(600), 3 / 7), "last": ("Q: {prompt}", range(1080, 1200), 4 / 35)}
)
def test_of_many_lines_those_asked_are_found(experiment: Experiment, template: str, asked: Any, share: float) -> None:
    log_study(experiment, LINES, ("generator", GENERATOR, 1200), ("judge", JUDGE, 1200), ("model", template, asked))
    result = experiment.run(code=1)
    assert given_by_proposals(experiment, result).count(answers("model", asked)) == 1
    found = re.fullmatch(r"model (\d+)/(\d+), generator \2/\2, judge \2/\2", census(result))
    assert found
    matched, lines = map(int, found.groups())
    # The first 150 lines are looked at, and others that are spread over the rest.
    assert 225 <= lines <= 300
    assert abs(matched - 150 * (asked[0] == 0) - share * (lines - 150)) < 5


@table(
    "asked, stored, own",
    {
        "one": ([33], 50, "user: "),
        "a handful": ([7, 900, 2900], 3000, "user: "),
        "more with regular expressions": (range(20), 50, "(Who) is [it]?\nSay *one* word: "),
    },
)
def test_a_few_lines_are_found_in_a_larger_store(experiment: Experiment, asked: Any, stored: int, own: str) -> None:
    lines = [{"prompt": f"{make_line(n)['prompt']}\nOr not?"} for n in range(stored)]
    log_study(experiment, lines, ("model", own + "{prompt}", stored))
    experiment.ask(*[lines[n] for n in asked])
    result = experiment.run(code=1)
    # Where a template has little text of its own, the other prompts are shown too.
    assert census(result).split(", ")[: 1 + (len(own) > 16)] == [f"model {len(asked)}/{len(asked)}"]
    assert given_by_proposals(experiment, result) == [answers("model", asked)]


def test_a_kind_is_proposed_though_some_entries_are_corrupted_or_have_no_model(experiment: Experiment) -> None:
    experiment.ask(*LINES[:8])
    made = zip(LINES, ["zeta", None, 7, "a\x1b[31m", "beta"] + ["gone"] * 3, [f"a {n}" for n in range(5)] + [None] * 3)
    experiment.log(*[logged("", text, prompt=BRIEF.format(**line), model=model) for line, model, text in made])
    result = experiment.run(code=1)
    assert "matches 5 of the 8 QA lines looked at\n     `(no name)`, `beta`, … answered 'a 0'\n" in result.error()
    again = experiment.run(*paste(result.proposals()[0]))
    assert again.counts() == {"QA lines": 8, "matched": 5, "corrupted": 3}


def test_several_runs_say_the_same_whatever_the_order_of_sets(experiment: Experiment) -> None:
    lines = [{**line, "copy": line["prompt"], "k": f"note {n % 2}"} for n, line in enumerate(TWICE)]
    loud = ("loud", lambda n: f"{lines[n]['k']}: {lines[n]['prompt'].upper()}", 40)
    models = [(name, "1 {prompt}", range(n, 60, 3)) for n, name in enumerate(["left", "right", "middle"])]
    log_study(experiment, lines, *models, ("b", "2 {copy}", 60), ("cut", ODD["cut"], 60), loud)
    seeds = [{**os.environ, "PYTHONHASHSEED": seed} for seed in "123"]
    assert len({experiment.run_process(code=1, env=seed).err for seed in seeds}) == 1


def test_qa_texts_in_prompts_are_marked_by_field_unless_they_are_there_by_chance(experiment: Experiment) -> None:
    at = "日本の首都 {1} Who?"
    line = {"messages": [{"role": "user", "content": "Which?"}], "prompt": "Who?", "at": at, "more": " "}
    experiment.ask(line, "Why?")
    experiment.log_prompts(f"user: {{x}} Who? Which? {at}, which is it?", "system: Be brief.")
    error = experiment.run("--prompt_template={prompt}{more}", code=1).error()
    assert "'user: {{x}} {prompt} Which? {at}, which is it?'" in error


@table(
    "lines, names",
    {
        "nested": ([{"q": {"r": {"s": {"t": 1, "u": [2]}}}}, {"y": ["a", 0.5]}], "`q.r.s.t`, `y.0`, `y.1`"),
        "none": ([{"x": None}, {"y": [False, {}]}], "no fields"),
        "many": ([{f"field {n}": "x" for n in range(300)}], "`field 0`, .*`field 19`, …"),
    },
)
def test_without_the_templates_field_others_are_named(experiment: Experiment, lines: Any, names: str) -> None:
    experiment.ask(*lines)
    experiment.log_prompts("What?")
    error = experiment.run(code=1).error()
    assert re.match(rf"no QA line has text in `prompt`; found: {names}\. ", error)
    assert "tried" not in error


@table(
    "entries, said",
    {
        "no entry": ({}, "the store is empty"),
        "corrupted": ({"q": logged("q", None), "w": logged("w", 7), "e": logged("e")}, "2 entries found, .* none .*"),
        "another's entry": ({"q": logged("other")}, "none of 2 QA lines has a usable entry"),
    },
)
def test_of_entries_that_cannot_be_used_nothing_else_is_said(asked: Experiment, entries: Any, said: str) -> None:
    asked.ask("q", "w")
    write_store(asked.metadata, [(prompt_of(question), entry) for question, entry in entries.items()])
    assert re.fullmatch(f".*{said}\n", asked.run(code=1).error())


@table("question, stored", {"no text": (" ", "What?"), "a letter": ("Who wrote Hamlet?", "Who wrote Hamlot?")})
def test_another_experiments_store_is_called_so_with_two_prompts(asked: Experiment, question: str, stored: str) -> None:
    asked.ask({"prompt": question, "no text": " "})
    asked.log_prompts(prompt_of(stored), model="other-model")
    result = asked.run(code=1)
    assert census(result) == "other-model 1/1"
    assert "another experiment" in result.error()
    assert f"look like {prompt_of(stored)!r}" in result.error()
    assert f"tried: {prompt_of(question)!r}" in result.error()
    assert not re.search("hint|--prompt_template", result.error())


# Near misses.

SPACE, CASE, ACCENTS, ANY = "only in white space:", "only in case:", "only in the Unicode form of", "or punctuation:"
CONTEXT = "This is a long context, and it goes on. " * 40


@table(
    "question, stored, cause",
    {
        "a space at the end": ("Who wrote Hamlet? ", "Who wrote Hamlet?", SPACE),
        "a hard space": ("Who wrote\u00a0Hamlet?", "Who wrote Hamlet?", SPACE),
        "a space too few": ("Who wroteHamlet?", "Who wrote Hamlet?", SPACE),
        "case": ("Wer hamlet? STRASSE?", "Wer Hamlet? Straße?", CASE),
        "composed accents": ("Who wrote Cafe\u0301 au lait?", "Who wrote Caf\u00e9 au lait?", ACCENTS),
        "no accents": ("Who wrote Cafe au lait?", "Who wrote Caf\u00e9 au lait?", ANY),
        "quotes": ("Who wrote “Hamlet”?", 'Who wrote "Hamlet"?', ANY),
        "a long context": (f"{CONTEXT}Who?{CONTEXT}", f"{CONTEXT}Who ?{CONTEXT}", SPACE),
        "a long context of one": (f"who?{'!' * 4000}", "Who?", ANY),
        "a long context of the other": ("who?", f"Who?{'!' * 4000}", ANY),
    },
)
@pytest.mark.parametrize("matched", [0, 3, 40])
def test_near_misses_are_shown(experiment: Experiment, question: str, stored: str, cause: str, matched: int) -> None:
    """A pair is shown in ASCII, with the cause and the number."""
    usual = [f"Which is number {n}?" for n in range(matched)]
    experiment.ask("Another one that is not there?", question, f"{question} Or else", *usual)
    pairs = [(prompt_of(question + end)[6:], prompt_of(stored + end)[6:]) for end in ("", " Or else")]
    experiment.log_prompts(*[prompt for _, prompt in pairs], *map(prompt_of, usual))
    result = experiment.run(code=0 if matched else 1)
    assert census(result) == "2/2"
    assert cause in result.err
    assert (len(result.warnings()), "another experiment" in result.err) == (matched > 0, False)
    excerpts = re.findall(r"^     (?:tried:  |stored: ) '(.{1,200})'$", result.err, re.MULTILINE)
    same = [next(n for n in range(9999) if one[n] != other[n]) for one, other in pairs]
    telling = [[ascii(text[max(0, n - 20) : n + 4])[1:-1] for text in pair] for pair, n in zip(pairs, same)]
    assert any(one in excerpts[0] and other in excerpts[1] for one, other in telling)


# Some lines match, and others do not.

MODEL, REST = ("model", DEFAULT, 30), ("rest", ODD["cut"], range(30, 60))


@table(
    "lines, kinds, expected",
    {
        "only some were asked": (SOME, [MODEL], ""),
        "judges of all": (SOME, [MODEL, *JUDGES], ""),
        "judges of those asked": (SOME, [MODEL, ("judge", JUDGE, 30)], ""),
        "judges that no template makes": (SOME, [MODEL, ("judge", ODD["cut"], 30)], ""),
        "judges of pairs": (SOME, [MODEL, ("judge", lambda n: str(SOME[n : n + 31 : 30]), 30)], ""),
        "another experiment": (SOME, [MODEL, ("other", ODD["name"], 60)], ""),
        "a judge where a tenth of the missing ones matched": (LINES[:110], [("m", DEFAULT, 10), ("j", JUDGE, 110)], ""),
        "a judge where fewer matched": (LINES[:109], [("m", DEFAULT, 9), ("j", JUDGE, 109)], "j 100/100"),
        "a kind that half of those matched have": (SOME, [MODEL, ("other", BRIEF, range(15, 60))], ""),
        "a kind that fewer have": (SOME, [MODEL, ("other", BRIEF, range(16, 60))], "other 30/30"),
        "no template makes the rest": (LETTERS, [MODEL, REST, ("judge", ODD["lower"], 60)], "rest 30/90"),
        "each question twice": (TWICE, [MODEL, ("other", "user: Q: {prompt}", range(30, 60))], "other 30/30"),
    },
)
def test_after_a_match_only_the_rest_is_news(experiment: Experiment, lines: Any, kinds: Any, expected: str) -> None:
    log_study(experiment, lines, *kinds)
    result = experiment.run()
    if not expected:
        return assert_silent(result)
    assert (census(result), len(result.warnings())) == (expected, 1)
    missing = len(lines) - len(numbers_of(kinds[0][2]))
    assert result.warnings()[0].startswith(f"{missing} of {len(lines)} QA lines have no entry")
    assert "\nhint: " in result.err


@pytest.mark.parametrize("given", [[DEFAULT, DEFAULT[6:]], ["A\n{prompt}"]])
def test_after_a_trial_run_the_real_runs_template_goes_before_those_given(experiment: Experiment, given: Any) -> None:
    log_study(experiment, LINES[:200], ("trial", given[0], 1), ("model", BRIEF, 200))
    options = [f"--prompt_template={text}".replace("\n", "\\n") for text in given]
    result = experiment.run(*options[: len(given) % 2])
    assert census(result) == "model 199/199"
    assert [warning[:10] for warning in result.warnings()] == ["199 of 200"]
    words = paste(result.proposals()[0])
    assert words == [f"--prompt_template={BRIEF}".replace("\n", "\\n"), *options]
    assert experiment.run(*words).generations() == answers("model", 200)


def test_the_explanation_comes_before_the_output_is_replaced(experiment: Experiment, monkeypatch: Any) -> None:
    """So that a user who stops it has the old output."""
    seen = []

    def look(record: logging.LogRecord) -> bool:
        seen.append(("multi-sample" in record.getMessage(), experiment.output.read_text()))
        return True

    experiment.ask(*LINES[:9])
    prompts = [DEFAULT.format(**LINES[0]), *(BRIEF.format(**line) for line in LINES[1:9])]
    experiment.log(*[logged("", " An answer." if n < 8 else None, prompt=prompt) for n, prompt in enumerate(prompts)])
    # The template that is tried then leads to a corrupted entry, and so to the other store, of which a warning tells.
    write_store(experiment.lmdb, [(b"0" * 64 + b"_1", {}), (prompts[8], logged("", prompt=prompts[8]))])
    experiment.output.write_text("old")
    monkeypatch.setattr(logging.getLogger("reconstruct_inference"), "filters", [look])
    experiment.run()
    assert (True, "old") in seen


def test_only_prompts_of_usable_entries_are_counted_and_each_once(experiment: Experiment) -> None:
    experiment.qa.write_text('{"prompt": "Not there?", "odd": "\\ud800"}\n')
    first, second = ([logged("", prompt=f"a prompt {n}", model=who) for n in range(30)] for who in ("first", "second"))
    useless: list[Any] = [{"prompt": "a prompt"}, b"no pickle", {"response": "x"}, {"prompt": 7, "response": "x"}]
    keys = [*(b"%064x" % n for n in range(4)), *(b"f" * 63 + b"%x" % n for n in range(4))]
    entries = [(entry["prompt"], entry) for entry in first[:20]]
    write_store(experiment.metadata, [*entries, (b"e" * 64, logged("", prompt="\ud800")), *zip(keys, useless * 2)])
    write_store(experiment.lmdb, [(entry["prompt"], entry) for entry in second])
    error = experiment.run(code=1).error()
    assert "30 of the 31 prompts looked at" in error
    assert "`first`, `second` answered" in error


@pytest.mark.parametrize("is_whole", [True, False])
def test_of_a_large_store_a_share_is_looked_at(experiment: Experiment, is_whole: bool) -> None:
    texts = [f"What is {n}?" for n in range(9000)]
    experiment.log(*map(logged, texts))
    experiment.ask(*texts[:4500], *[f"{text} " for text in texts[4500:]])
    if not is_whole:
        os.truncate(data := experiment.metadata / "data.mdb", data.stat().st_size - 4096)
    result = experiment.run()
    near, looked_at = (int(number.replace(",", "")) for number in census(result).split("/"))
    assert 2900 < looked_at < 3100  # two thirds of those without a line
    assert 130 < near < 220  # of some 280 lines


def test_prompts_that_belong_to_lines_are_no_near_misses_in_large_stores(experiment: Experiment) -> None:
    texts = [f"What is {n}?" for n in range(9000)]
    entries = [(entry["prompt"], entry) for entry in map(logged, texts)]
    write_store(experiment.metadata, [*entries[:-1], (entries[-1][0], logged(texts[-1], None))])
    write_store(experiment.lmdb, entries[-7000:])
    experiment.ask(*[f"{text}?" for text in texts[:300]], *texts)
    result = experiment.run()
    assert result.counts() == {"QA lines": 9300, "matched": 9000, "without an entry": 300}
    assert_silent(result)


def test_of_very_long_prompts_fewer_are_looked_at(experiment: Experiment) -> None:
    experiment.ask(*[{"prompt": f"{n}?"} | {f"field {k}": f"text {k}" for k in range(40)} for n in range(300)])
    experiment.log_prompts(*[f"{n}!" + "x" * 20_000 for n in range(40)])
    assert "25 of the 25 prompts looked at" in experiment.run(code=1).error()


def test_lines_with_hundreds_of_fields_or_levels_do_not_matter(experiment: Experiment) -> None:
    log_study(experiment, [line | {f"field {k}": "x" * k for k in range(300)} for line in LINES[:9]], ("m", BRIEF, 9))
    with experiment.qa.open("a") as file:
        for depth in (300, 3000, 100_000):
            file.write('{"prompt": "deep", "x": ' + "[" * depth + "]" * depth + "}\n")
    result = experiment.run(code=1)
    assert census(result).startswith("m 9/1")
    assert given_by_proposals(experiment, result) == [answers("m", 9)]
