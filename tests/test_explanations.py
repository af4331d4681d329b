"""What is said of QA lines without an entry: the kinds of prompts in the store, near misses, what to run."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
from collections.abc import Callable
from typing import Any

import pytest
from helpers import DEADLINE, Experiment, Result, logged, prompt_of, table, write_store
from hypothesis import given, settings
from hypothesis import strategies as st

Line = dict[str, Any]


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


def answers(who: str, asked: Any) -> list[str]:
    return [f"{who} {n}" for n in (range(asked) if isinstance(asked, int) else asked)]


def log_study(experiment: Experiment, lines: list[Line], *kinds: tuple[str, Any, Any]) -> None:
    """Logs that `who` answered "who n", asked by a template or function of n, on which lines or on how many."""
    experiment.ask(*lines)
    asked_of = [(int(said.split()[1]), who, each) for who, each, asked in kinds for said in answers(who, asked)]
    made = [(n, who, each.format(**lines[n]) if isinstance(each, str) else each(n)) for n, who, each in asked_of]
    experiment.log(*[{"prompt": prompt, "response": f"{who} {n}", "model": who} for n, who, prompt in made])


def paste(option: str) -> list[str]:
    """The words that bash makes of an option that is pasted into a command line."""
    said = subprocess.check_output(["bash", "-c", f"printf '%s\\0' {option}"], timeout=DEADLINE)
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


TASK = "Answer the question in a few words."
TEXTS = ["Who wrote the play Hamlet?", "What is 17 times 3? {curly} %s %(x)s {0}", "日本の首都はどこですか？", "Short?"]
TEXTS += ["Which of these is a fruit?\n1) stone\n2) pear", "A question with \"quotes\", 'quotes' and a \\ backslash"]


@table(
    "qa, prompt",
    {
        "questions in another field": ({"prompt": ["no text"], "my own.question": "Q?"}, prompt_of("Q?")),
        "shell characters": ({"prompt": "Q?"}, """'{"q": "it's Q?"}' $HOME `ls` !! \\n \\\\" %d{prompt}}"""),
        "a dash and control characters": ({"prompt": "Q?"}, "-n 'Q?'\\\t\r\x1b[31m\x07a «é»\u2028\u00a0→ユ"),
        "shared texts": ({"task": TASK, "prompt": "Q?", "lang": "en"}, f"{TASK} Q?\n{TASK} in a sentence"),
        "three fields": ({"a": "Say Q?", "b": 7, "c": "{c} Q?", "d": "2"}, "user: 7. {c} Q?, but Say Q?, 2 or 3"),
        "a field twice": ({"prompt": "Q?", "same": "Q?"}, "Q? I repeat: Q?"),
        "a text within another": ({"prompt": "Who said Q? and when", "said": "Q?"}, "Q?: Who said Q? and when"),
        "odd names": ({"0": "Q?", "a[b]": "Q?", "c:d": "Q?", "cafe\u0301": "Q?", "caf\u00e9": "A Q?"}, "user: Q?"),
        "options of a list": ({"prompt": "Q?", "of": ["x Q?", {"b": "y Q?"}]}, "user: Q?\n(A) x Q?\n(B) y Q?\nAnswer:"),
        "odd characters": ({"prompt": "\ue000 Q?", "x": "\ue001", "y": ["\ud800", "\ud800 Q?"]}, "user: \ue000 Q?"),
    },
)
def test_the_only_option_pasted_into_bash_gives_each_answer(experiment: Experiment, qa: Line, prompt: str) -> None:
    lines = [json.dumps(qa).replace("Q?", json.dumps(text)[1:-1]) for text in [*TEXTS, "Never asked?"]]
    experiment.qa.write_text("\n".join(lines))
    experiment.log_prompts(*[prompt.replace("Q?", text) for text in TEXTS], model="some-model")
    result = experiment.run(code=1)
    assert census(result) == "some-model 6/7"
    (option,) = result.proposals()
    assert (option.isprintable(), option.count("--prompt_template")) == (True, 1)
    again = experiment.run(*paste(option))
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
    "options": lambda n: f"user: {LINES[n]['prompt']}\n(A) big {n % 7}\n(B) small {n}\nYour answer:",
    "cut": lambda n: f"user: Read this: {LINES[n]['reference'][: 30 + n % 3]}…\n{LINES[n]['prompt']}",
    "lower": lambda n: f"user: {LINES[n]['prompt'].lower()} {'Briefly, ' * 30}",
    "name": lambda n: f"{random_name(n + 5000)}, {n}\nWhat is to be known of them?",
    "last": lambda n: f"What is known of {random_name(n)}",
    "helpful": lambda n: f"system: You are helpful.\nuser: {LINES[n]['prompt']}\n(A) {n % 7}\n(B) {n}\nAnswer:",
    "strict": lambda n: f"system: You are strict.\nuser: {LINES[n]['prompt']}\nAnswer {random_name(n)}\nRight?",
}
EXAM = [
    {**line, "answer": f"a {n}", "of": {"A": f"a {n + n % 2}", "B": f"a {n + 1 - n % 2}"}}
    for n, line in enumerate(SOME)
]
TOKENS = [{"q": {"text": line["prompt"]}, "tokens": ["What"] * 5000} for line in LINES[:9]]
JUDGES = [("generator", GENERATOR, 60), ("judge", JUDGE, 60)]
SMALL_KINDS = [("a", "A {prompt}", 9), ("b", "B {prompt}", 20), ("c", "C {title}", range(10, 20))]
TWICE = [{"inside": ["x"] * 99, **LINES[n // 2], "note": f"note {n}"} for n in range(60)]
LETTERS = [{"blank": " ", "x": "brief" if n == 0 else "facts"[n % 5], **line} for n, line in enumerate(SOME)]
WORDS = [{"prompt": text} for text in ["3+3", "3+33", "art", "tar", "star", "a", "水", "木", "水木", "👩", "👩‍🚀"]]
NUMBERS = [{"prompt": str(n), "note": "answer this in one word" if n == 17 else ""} for n in range(120)]
TOWNS = [{**line, "answer": f"town {n}", "lang": "en"} for n, line in enumerate(LINES[:9])]


@table(
    "lines, kinds, expected",
    {
        "few-shot": (SOME, [*JUDGES, ("model", FEW_SHOT, 50)], "generator 60/60, judge 60/60, model 50/60"),
        "five": (SOME, [*SMALL_KINDS, *JUDGES], "c 10/60, b 20/60, generator 60/60, judge 60/60"),
        "one of 200 asked": (LINES[:200], [("model", BRIEF, [77])], "model 1/200"),
        "short texts": (WORDS, [("model", "user: What is {prompt}? Be brief.", 11)], "model 11/11"),
        "a QA text in the template": (NUMBERS, [("model", "answer this in one word: {prompt}", 120)], "model 120/120"),
        "bare": (SOME, [("a", "{prompt}", 9), ("b", ODD["cut"], 50), ("c", ODD["name"], 9)], "a 9/60, b 50/68, c 9/68"),
        "an index first": (LINES, [("model", lambda n: f"[{n}] AND SO ON (of {n})", 120)], "model 120/120"),
        "a title first": (SOME, [("m", lambda n: f"{SOME[n]['title']}, then {random_name(-n)}", 60)], "m 60/60"),
        "two groups": (SOME, [("x", ODD["last"], 9), ("y", ODD["lower"], 7), ("z", ODD["name"], 8)], "x 9/24, z 8/24"),
        "rare": (LINES[:300], [("model", BRIEF, [0, 9]), ("odd", ODD["options"], 300)], "model 2/300, odd 300/302"),
        "a word": (LETTERS, [*JUDGES, ("model", BRIEF, [7, 12])], "model 2/60, generator 60/60, judge 60/60"),
        "notes": (TWICE, [("model", "{prompt} ({note})", range(0, 60, 2))], "model 30/60"),
        "few": (SOME, [("x", ODD["last"], 5)], "x 5/5"),
        "a trial": (SOME, [("t", "user: {prompt}\nYour answer:", 9), ("m", ODD["options"], 60)], "t 9/60, m 60/69"),
        "one beginning": (SOME, [("x", ODD["helpful"], 60), ("y", ODD["strict"], 59)], "x 60/119, y 59/119"),
        "an answer that is an option": (
            EXAM,
            [("m", "{prompt}\nA. {of[A]}\nB. {of[B]}\n", 60)],
            "m 60/60",
        ),
        "tokens": (TOKENS, [("m", "In short: {q[text]}", 9)], "m 9/9"),
        "a line of many, and its judge": (SOME, [("m", BRIEF, 1), ("j", "Is it? {prompt}", 1)], "j 1/60, m 1/60"),
        "one for all lines": (TOWNS, [("x", lambda n: "Answer in en.", 1), ("y", ODD["lower"], 9)], "y 9/10, x 1/10"),
    },
)
def test_the_kinds_are_shown_and_can_be_chosen(experiment: Experiment, lines: Any, kinds: Any, expected: str) -> None:
    log_study(experiment, lines, *kinds)
    result = experiment.run(code=1)
    assert census(result) == expected
    chosen = [kind for kind in kinds if isinstance(kind[1], str) and f"{kind[0]} " in expected]
    assert sorted(given_by_proposals(experiment, result)) == sorted(answers(who, asked) for who, _, asked in chosen)


def test_of_many_lines_those_asked_are_found(experiment: Experiment) -> None:
    asked = [("last", "Q: {prompt}", range(1080, 1200)), ("first", BRIEF, range(600))]
    log_study(experiment, LINES, ("generator", GENERATOR, 1200), ("judge", JUDGE, 1200), *asked)
    result = experiment.run(code=1)
    assert given_by_proposals(experiment, result)[:2] == [answers(who, numbers) for who, _, numbers in asked]
    found = re.fullmatch(r"last (\d+)/(\d+), first (\d+)/\2, generator \2/\2, judge \2/\2", census(result))
    assert found
    last, lines, first = map(int, found.groups())
    # The first 150 lines are looked at, and others that are spread over the rest.
    assert 225 <= lines <= 300
    assert abs(last - (lines - 150) * 4 / 35) < 5
    assert abs(first - 150 - (lines - 150) * 3 / 7) < 5


@table("asked, own", {"one": ([33], "user: "), "more": (range(20), "(Who) is [it]?\nSay *one* word: ")})
def test_a_few_lines_are_found_in_a_larger_store(experiment: Experiment, asked: Any, own: str) -> None:
    lines = [{"prompt": f"{line['prompt']}\nOr not?"} for line in LINES[:50]]
    log_study(experiment, lines, ("model", own + "{prompt}", 50))
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
    others = [f"system: {word}" for word in ("Be brief.", "Be polite.", "Be quick.", "Be exact.")]
    experiment.log_prompts(f"user: {{x}} Who? Which? {at}, which is it?", *others)
    error = experiment.run("--prompt_template={prompt}{more}", code=1).error()
    assert "'user: {{x}} {prompt} Which? {at}, which is it?'" in error


@table(
    "lines, names",
    {
        "nested": (
            [{"q": {"r": {"s": {"t": 1, "u": [2]}}}}, {"y": ["a", 0.5]}],
            "`q`, `q.r.s.t`, `q.r.s.u.0`, `y`, `y.0`, `y.1`",
        ),
        "no text": ([{"x": None}, {"y": [False, {}]}, {"tokens": ["a"] * 101}], "`x`, `y`, `tokens`"),
        "many": ([{f"field {n}": "x" for n in range(300)}], "`field 0`, .*`field 19`, …"),
    },
)
def test_without_the_templates_field_others_are_named(experiment: Experiment, lines: Any, names: str) -> None:
    experiment.ask(*lines)
    experiment.log_prompts("What?")
    error = experiment.run(code=1).error()
    assert re.match(rf"no QA line has text in `prompt`; found: {names}\. ", error)
    assert "tried" not in error


def test_of_entries_that_cannot_be_used_nothing_else_is_said(asked: Experiment) -> None:
    asked.ask("q", "w")
    asked.log(logged("q", None), logged("w", 7), logged("e"))
    assert asked.run(code=1).error() == "no usable entry for 2 of 2 QA lines\n"


@table("question, stored", {"no text": (" ", "What?"), "a letter": ("Who wrote Hamlet?", "Who wrote Hamlot?")})
def test_another_experiments_store_is_called_so_with_two_prompts(asked: Experiment, question: str, stored: str) -> None:
    asked.ask({"prompt": question, "no text": " "})
    asked.log_prompts(prompt_of(stored), model="other-model")
    result = asked.run(code=1)
    assert census(result) == "other-model 1/1"
    for words in ("another experiment", f"{prompt_of(stored)!r} resembles 1 of", f"tried: {prompt_of(question)!r}"):
        assert words in result.error()
    assert not re.search("hint|--prompt_template", result.error())


CONTEXT = "This is a long context, and it goes on. " * 40


@table(
    "question, stored",
    {
        "white space": ("Who\u00a0wroteHamlet? ", "Who wrote Hamlet?"),
        "case": ("Wer hamlet? STRASSE?", "Wer Hamlet? Straße?"),
        "composed accents": ("Cafe\u0301 au lait?", "Caf\u00e9 au lait?"),
        "no accents, and quotes": ("Who wrote “Cafe”?", 'Who wrote "Caf\u00e9"?'),
        "a long context": (f"{CONTEXT}Who?{CONTEXT}", f"{CONTEXT}Who ?{CONTEXT}"),
    },
)
@pytest.mark.parametrize("matched", [0, 3, 40])
def test_near_misses_are_shown(experiment: Experiment, question: str, stored: str, matched: int) -> None:
    usual = [f"Which is number {n}?" for n in range(matched)]
    experiment.ask("Another one that is not there?", question, *usual)
    pair = [prompt_of(text).removeprefix("user: ") for text in (question, stored)]
    experiment.log_prompts(pair[1], *map(prompt_of, usual))
    result = experiment.run(code=0 if matched else 1)
    assert census(result) == "1/1"
    assert "differs only in whitespace, case, accents or punctuation\n" in result.err
    assert (len(result.warnings()), "another experiment" in result.err) == (matched > 0, False)
    same = next(n for n in range(9999) if pair[0][n] != pair[1][n])
    for name, text in zip(["tried:  ", "stored: "], pair):
        (excerpt,) = re.findall(rf"^     {name} '(.{{1,200}})'$", result.err, re.MULTILINE)
        assert ascii(text[same - 20 : same + 4])[1:-1] in excerpt


def test_near_misses_are_not_explained_by_the_numbers_in_them(experiment: Experiment) -> None:
    experiment.ask(*[{"index": n, "prompt": f"what is the number {n * 7}?"} for n in range(50)])
    experiment.log_prompts(*[prompt_of(f"What is the number {n * 7}?") for n in range(50)])
    result = experiment.run(code=1)
    assert (census(result), result.proposals()) == ("50/50", [])
    experiment.ask(*[f"What is the number {n * 7}?" for n in range(50)])
    result = experiment.run("--prompt_template=user: Answer in one sentence.\nQ:{prompt}\nA:", code=1)
    assert given_by_proposals(experiment, result) == [answers("response", 50)]


BLANK = [{**line, "reference": line["reference"] + "\n\n" * (n % 5 == 0)} for n, line in enumerate(SOME)]
SHARED = [{**line, "shared": "The text that all questions are about."} for line in SOME]
MODEL, REST = ("model", DEFAULT, 30), ("rest", ODD["cut"], range(30, 60))


@table(
    "lines, kinds, expected",
    {
        "only some were asked": (SOME, [MODEL], ""),
        "judges that no template makes": (SOME, [MODEL, ("judge", ODD["cut"], 30)], ""),
        "judges of pairs": (SOME, [MODEL, ("judge", lambda n: str(SOME[n : n + 31 : 30]), 30)], ""),
        "another experiment": (SOME, [MODEL, ("other", ODD["name"], 60)], ""),
        "a judge where a tenth of the missing ones matched": (LINES[:110], [("m", DEFAULT, 10), ("j", JUDGE, 110)], ""),
        "a judge where fewer matched": (LINES[:109], [("m", DEFAULT, 9), ("j", JUDGE, 109)], "j 100/100"),
        "a kind that half of those matched have": (SOME, [MODEL, ("other", BRIEF, range(15, 60))], ""),
        "a kind that fewer have": (SOME, [MODEL, ("other", BRIEF, range(16, 60))], "other 30/30"),
        "no template makes the rest": (LETTERS, [MODEL, REST, ("judge", ODD["lower"], 60)], "rest 30/90"),
        "a judge of all but one": (EXAM, [("m", DEFAULT, 59), ("judge", lambda n: f"a {n + 20} {SOME[n]}", 59)], ""),
        "a generator of stripped texts": (BLANK, [MODEL, ("g", lambda n: SOME[n]["reference"] + "\n\n", 60)], ""),
        "each question twice": (TWICE, [MODEL, ("other", "user: Q: {prompt}", range(30, 60))], "other 30/30"),
    },
)
def test_after_a_match_only_the_rest_is_news(experiment: Experiment, lines: Any, kinds: Any, expected: str) -> None:
    log_study(experiment, lines, *kinds)
    result = experiment.run()
    said = [f"no usable entry for {len(lines) - kinds[0][2]} of {len(lines)} QA lines"] if expected else []
    assert (census(result), [warning.split(".")[0] for warning in result.warnings()]) == (expected, said)
    assert ("hint: " in result.err) == bool(expected)


def test_a_context_that_matched_lines_share_does_not_make_a_prompt_a_judges(experiment: Experiment) -> None:
    rest = ("rest", lambda n: f"{SHARED[n]['shared']} {ODD['options'](n)}", range(30, 60))
    log_study(experiment, SHARED, ("model", "{shared} {prompt}", 30), rest)
    assert census(experiment.run("--prompt_template={shared} {prompt}")) == "rest 30/30"


@pytest.mark.parametrize("given", [[DEFAULT, DEFAULT[6:]], ["A\n{prompt}"]])
def test_after_a_trial_run_the_real_runs_template_goes_before_those_given(experiment: Experiment, given: Any) -> None:
    log_study(experiment, LINES[:200], ("trial", given[0], 1), ("model", BRIEF, 200))
    options = [f"--prompt_template={text}".replace("\n", "\\n") for text in given]
    result = experiment.run(*options[: len(given) % 2])
    assert census(result) == "model 199/199"
    assert [warning[:31] for warning in result.warnings()] == ["no usable entry for 199 of 200 "]
    words = paste(result.proposals()[0])
    assert words == [f"--prompt_template={BRIEF}".replace("\n", "\\n"), *options]
    assert experiment.run(*words).generations() == answers("model", 200)


def test_only_prompts_of_usable_entries_are_counted_and_each_once(experiment: Experiment) -> None:
    experiment.qa.write_text('{"prompt": "Not there? \\ud800", "odd": "\\ud800"}\n')
    first, second = ([logged("", prompt=f"a prompt {n}", model=who) for n in range(30)] for who in ("first", "second"))
    useless: list[Any] = [{"prompt": "a prompt"}, b"no pickle", {"response": "x"}, {"prompt": 7, "response": "x"}]
    keys = [*(b"%064x" % n for n in range(4)), *(b"f" * 63 + b"%x" % n for n in range(4))]
    entries = [(entry["prompt"], entry) for entry in first[:20]]
    write_store(experiment.metadata, [*entries, (b"e" * 64, logged("", prompt="\ud800")), *zip(keys, useless * 2)])
    sample = (b"0" * 64 + b"_1", logged("", prompt="a sample"))
    write_store(experiment.lmdb, [*[(entry["prompt"], entry) for entry in second], sample])
    error = experiment.run(code=1).error()
    assert "30 of the 31 prompts looked at" in error
    assert "`first`, `second` answered" in error


@pytest.mark.parametrize("is_whole", [True, False])
def test_of_a_large_store_a_share_is_looked_at(experiment: Experiment, is_whole: bool) -> None:
    texts = [f"What is {n}?" for n in range(9000)]
    experiment.log(*map(logged, texts))
    write_store(experiment.lmdb, [(prompt_of(text), logged(text)) for text in texts[:7000]])
    experiment.ask(*texts[:4500], *[f"{text} " for text in texts[4500:]])
    if not is_whole:
        os.truncate(data := experiment.metadata / "data.mdb", data.stat().st_size - 4096)
    result = experiment.run()
    near, looked_at = (int(number.replace(",", "")) for number in census(result).split("/"))
    assert 2900 < looked_at < 3100  # two thirds of those without a line
    assert 130 < near < 220  # of some 280 lines


def test_lines_with_hundreds_of_fields_or_levels_do_not_matter(experiment: Experiment) -> None:
    log_study(experiment, [line | {f"field {k}": "x" * k for k in range(300)} for line in LINES[:9]], ("m", BRIEF, 9))
    with experiment.qa.open("a") as file:
        for depth in (300, 3000, 100_000):
            file.write('{"prompt": "deep", "x": ' + "[" * depth + "]" * depth + "}\n")
    result = experiment.run(code=1)
    assert census(result).startswith("m 9/1")
    assert given_by_proposals(experiment, result) == [answers("m", 9)]
