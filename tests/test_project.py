"""What surrounds the join: the one file, its command line, progress, README and example."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from helpers import DEADLINE, SCRIPT, Experiment, bash, logged, read_lines

from reconstruct_inference import reconstruct_inference

PROJECT, TEXT = SCRIPT.parent, SCRIPT.read_text(encoding="utf-8")
EXAMPLE = f"python {PROJECT}/example_reconstruct.py"
README = (PROJECT / "README_reconstruction.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"(?ms)^```\w*\n(.*?)^```", README)
LINES = [line.strip().removeprefix("$ ") for line in README.replace("\\\n", "").splitlines()]


def test_the_file_works_alone_beside_modules_with_unlucky_names_and_says_no_word_more(asked: Experiment) -> None:
    folder = asked.folder / "activation_logging"
    (folder / "compression").mkdir(parents=True)
    shutil.copy(SCRIPT, folder)
    for name in ("types", "logging", "string", "json", "signal", "lmdb", "tqdm", "compression/__init__"):
        (folder / f"{name}.py").write_text("raise SystemExit('the wrong one')\n")
    said = bash(f"python -W error reconstruct_inference.py {shlex.join(asked.arguments())}", folder)
    assert (said.returncode, len(read_lines(asked.output))) == (0, 1)
    assert [line.split(" ")[0] for line in said.stderr.splitlines()] == ["QA", "entries:", "model:", "wrote"]


def test_missing_packages_and_an_older_python_are_one_line_with_what_to_do() -> None:
    ast.parse(TEXT, feature_version=(3, 8))  # so that an older Python gets as far as the check
    old = f"import runpy, sys; sys.version_info = (3, 9); runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    install = r".*lmdb and tqdm.*: /.*/python -m pip install 'lmdb>=1\.4\.1' 'tqdm>=4\.65'"
    for words, message in ((["-ISc", old], ".*Python 3.10 or later"), (["-IS", str(SCRIPT), "--help"], install)):
        said = bash(shlex.join(["python", *words]), PROJECT)
        assert said.returncode == 1
        assert re.fullmatch(f"error: {message}\n", said.stderr)


def test_the_scripts_own_header_for_uv_agrees_with_the_package() -> None:
    texts = [TEXT, (PROJECT / "pyproject.toml").read_text(encoding="utf-8")]
    script, package = (re.findall(r"(?m)^(?:# )?(dependencies|requires-python) = (.*)$", text) for text in texts)
    assert sorted(script) == sorted(package) != []


WATCH = """
import os, re, runpy, sys
stderr, output = os.dup(2), sys.argv[-1]
never = ("socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "pty.", "ctypes.", "shutil.",
         "pickle.find_class", "os.chmod", "os.link", "os.symlink", "import torch", "import numpy", "import pandas")
def watch(event, arguments):
    first = str(arguments[0]) if arguments else ""
    writes = event == "open" and not first.isdigit() and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    changes = (writes or event in ("os.remove", "os.rename")) and first != os.devnull
    if f"{event} {first}".startswith(never) or (changes and not re.fullmatch(output + r"\\.\\w+\\.tmp", first)):
        os.write(stderr, f"forbidden: {event}\\n".encode())
sys.addaudithook(watch)
"""


@pytest.mark.parametrize("also", ["", "open(output, 'a')", "os.system('')", "import numpy"])
def test_a_run_starts_no_program_opens_no_socket_and_writes_only_its_output(asked: Experiment, also: str) -> None:
    asked.ask("q", "w", "never asked")
    asked.log(logged("q"), logged("w", None))
    code = f"{WATCH}{also}\nrunpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    said = bash(shlex.join(["python", "-B", "-c", code, *asked.arguments()]), asked.folder)
    assert ("forbidden: " in said.stderr) == bool(also)  # what is added shows that it would be noticed


def test_help_shows_an_example_the_defaults_and_the_exit_codes_under_the_name_called(tmp_path: Path) -> None:
    shutil.copy(SCRIPT, tmp_path / "rebuild.py")
    words = " ".join(bash("python rebuild.py --help", tmp_path).stdout.split())
    assert r"default: 'user: Answer in one sentence. Q:{prompt}\n A:'" in words
    assert "example: rebuild.py --qa_output_path " in words
    assert re.findall(r"\d+", words[words.index("exit codes: ") :]) == ["0", "1", "2", "129", "130", "143", "141"]
    assert re.fullmatch(r"rebuild.py \d+\.\d+\.\d+\n", bash("python rebuild.py --version", tmp_path).stdout)


def test_an_empty_missing_or_shortened_option_is_wrong_usage(asked: Experiment) -> None:
    for name in ("qa_output_path", "lmdb_path", "output_path"):
        assert f"argument --{name}: " in asked.run(f"--{name}=", code=2).err
    said = bash(f"python {SCRIPT} {shlex.join(asked.arguments())} --output=x; python {SCRIPT}", asked.folder)
    assert re.findall("error: .*(--output=x|--lmdb_path)", said.stderr) == ["--output=x", "--lmdb_path"]


def test_a_terminal_shows_progress_below_the_messages_and_keeps_only_these(asked: Experiment) -> None:
    asked.ask(*["q"] * 2_000, {"n": 1})
    terminal, its_end = os.openpty()
    bash(f"stty rows 24 columns 120 < {os.ttyname(its_end)}", asked.folder)
    with asked.start(stderr=its_end, preexec_fn=lambda: signal.alarm(DEADLINE)) as process:
        os.close(its_end)
        shown = b""
        with contextlib.suppress(OSError):  # by which Linux ends a terminal that nobody holds any more
            while chunk := os.read(terminal, 4096):
                shown += chunk
        assert process.wait(DEADLINE) == 0
    os.close(terminal)
    assert re.search(rb"(?s)a\.lmdb_metadata: .*QA file: 100%", shown)
    remains = [line.rsplit("\r", 1)[-1].strip() for line in shown.decode().replace("\r\n", "\n").split("\n")]
    asked.output.unlink()
    assert remains == asked.run().err.split("\n")  # which went to no terminal


def test_python_users_get_a_bar_if_they_ask_with_a_percentage_unless_for_a_pipe(asked: Experiment, capsys: Any) -> None:
    end, other_end = os.pipe()
    os.write(other_end, asked.qa.read_bytes())
    os.close(other_end)
    for path, shown in ((asked.qa, "QA file: 100%|"), (f"/dev/fd/{end}", "QA file: 16.0B [")):
        reconstruct_inference(path, asked.lmdb, asked.output, progress=True)
        assert shown in capsys.readouterr().err
    os.close(end)


def test_the_readmes_commands_and_options_exist_and_its_recipe_for_csv_is_the_hints(asked: Experiment) -> None:
    options = set(re.findall(r"--\w+", bash(f"python {SCRIPT} --help", PROJECT).stdout)) - {"--help", "--version"}
    used = set(re.findall(r"--\w+", " ".join(line for line in LINES if "reconstruct_inference.py " in line)))
    assert {"--qa_output_path", "--lmdb_path", "--output_path"} <= used <= options
    assert set(re.findall(r"^\| `(--\w+)", README, re.MULTILINE)) == options
    assert sum(line.startswith("python3 -m venv .venv && ") for line in LINES) == 2
    asked.qa = asked.qa.replace(asked.folder / "qa.csv")
    asked.qa.write_text("prompt\n")
    recipes = [re.findall('python3 -c "import csv.*?"', text) for text in (asked.run(code=1).err, README)]
    assert recipes[0] == recipes[1] != []


def test_the_readmes_line_of_output_is_what_comes_out(experiment: Experiment) -> None:
    (shown,) = [json.loads(block) for block in BLOCKS if '"generation": ' in block and block.endswith("}\n")]
    names = list(shown)
    start = names.index("generation")
    experiment.ask({name: shown[name] for name in names[:start]})
    experiment.log(logged(shown["prompt"], shown["generation"], **{name: shown[name] for name in names[start + 1 :]}))
    assert [list(line.items()) for line in experiment.run().lines] == [list(shown.items())]


def test_the_readmes_python_code_runs(asked: Experiment) -> None:
    (code,) = [block for block in BLOCKS if "from reconstruct_inference import" in block]
    ((qa, store, output),) = re.findall(r'reconstruct_inference\(\s*"(.*?)",\s*"(.*?)",\s*"(.*?)"', code)
    (asked.folder / store).parent.mkdir(parents=True, exist_ok=True)
    asked.metadata.rename(asked.folder / f"{store}_metadata")
    asked.qa.rename(asked.folder / qa)
    said = bash(f"python -c {shlex.quote(code)}", asked.folder, PYTHONPATH=str(PROJECT))
    assert (said.returncode, said.stderr, len(read_lines(asked.folder / output))) == (0, "", 1)


@pytest.mark.parametrize("name", ["", "new/it's one", "."])
def test_the_example_shows_what_comes_out_and_prints_a_command_that_works(tmp_path: Path, name: str) -> None:
    said = bash(f"{EXAMPLE} {shlex.quote(name) * bool(name)}", tmp_path, TMPDIR=str(tmp_path))
    assert (said.returncode, '"generation": ' in said.stdout) == (0, True)
    (output,) = (tmp_path / name).rglob("generation.jsonl")
    lines = read_lines(output)
    output.unlink()
    command = next(line for line in said.stdout.splitlines() if "--qa_output_path" in line)
    assert bash(command, PROJECT).returncode == 0
    assert read_lines(output) == lines


@pytest.mark.parametrize(("arguments", "code"), [("--help", 0), ("a.lmdb_metadata", 2), ("qa.jsonl", 2)])
def test_the_example_touches_nothing_that_is_there(asked: Experiment, arguments: str, code: int) -> None:
    before = asked.files()
    said = bash(f"{EXAMPLE} {arguments}", asked.folder, TMPDIR=str(asked.folder))
    assert (said.returncode, "error: " in said.stderr, "FOLDER" in said.stdout) == (code, code == 2, code == 0)
    assert asked.files() == before
