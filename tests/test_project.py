"""What surrounds the function: help, packaging, README, example, and the places that the one file is copied to."""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import SAMPLE, SCRIPT, Experiment, read_lines

PROJECT = SCRIPT.parent
README = (PROJECT / "README_reconstruction.md").read_text(encoding="utf-8")


def bash(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs a line as it would be pasted, in a folder, with this Python as `python`."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    how: dict[str, Any] = {"cwd": folder, "env": {**os.environ, "PATH": path}, "timeout": 60}
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, **how)


def test_help_knows_the_name_it_was_called_by_the_defaults_and_the_exit_codes(tmp_path: Path) -> None:
    shutil.copy(SCRIPT, tmp_path / "rebuild.py")
    words = " ".join(bash("python rebuild.py --help", tmp_path).stdout.split())
    assert words.startswith("usage: rebuild.py ")
    assert r"default: 'user: Answer in one sentence. Q:{prompt}\n A:'" in words
    assert "exit codes: 0 lines were written, 1 error or nothing matched, 2 wrong usage" in words
    assert re.fullmatch(r"rebuild.py \d+\.\d+\.\d+\n", bash("python rebuild.py --version", tmp_path).stdout)


def test_modules_with_unlucky_names_beside_the_script_do_not_matter(asked: Experiment) -> None:
    folder = asked.folder / "activation_logging"
    folder.mkdir()
    script = shutil.copy(SCRIPT, folder)
    for name in ("types", "logging", "string", "json", "signal", "lmdb", "tqdm"):
        (folder / f"{name}.py").write_text("raise SystemExit('the wrong one')\n")
    result = bash(shlex.join([sys.executable, script, *asked.arguments()]), folder)
    assert result.returncode == 0, result.stderr
    assert len(read_lines(asked.output)) == 1


def test_missing_packages_are_one_line_with_the_command_that_installs_them() -> None:
    said = bash(f"python -I -S {SCRIPT} --help", PROJECT)
    assert said.returncode == 1
    assert said.stderr.startswith("error: this needs lmdb and tqdm: ")
    assert said.stderr.endswith("/python -m pip install 'lmdb>=1.4.1' 'tqdm>=4.65'\n")


@pytest.mark.parametrize("version", [(3, 8), (3, 9)])
def test_an_older_python_is_told_so_in_one_line(version: tuple[int, int]) -> None:
    ast.parse(SCRIPT.read_text(encoding="utf-8"), feature_version=version)  # so that it gets as far as the check
    run = f"import runpy, sys; sys.version_info = {version}; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    said = bash(f"python -c {shlex.quote(run)}", PROJECT)
    assert said.returncode == 1
    assert said.stderr.startswith("error: this needs Python 3.10 or later, ")
    assert said.stderr.count("\n") == 1


def test_the_scripts_own_list_of_dependencies_is_the_packages() -> None:
    texts = [path.read_text(encoding="utf-8") for path in (SCRIPT, PROJECT / "pyproject.toml")]
    script, package = (re.findall("^(?:# )?dependencies = (.*)$", text, re.MULTILINE) for text in texts)
    assert script == package != []


def test_the_readme_lists_the_options_that_help_lists() -> None:
    said = bash(f"python {SCRIPT} --help", PROJECT).stdout
    options = set(re.findall(r"--\w+", said)) - {"--help", "--version"}
    assert set(re.findall(r"^\| `(--\w+)`", README, re.MULTILINE)) == options


def test_the_exchange_in_the_readme_is_real(tmp_path: Path) -> None:
    (exchange,) = re.findall(r"^    \$ .*\n(?:    .*\n)*", README, re.MULTILINE)
    shutil.copytree(SAMPLE, tmp_path / "tests" / "sample")
    shutil.copy(SCRIPT, tmp_path)
    shown = "".join(line[4:] for line in exchange.splitlines(keepends=True))
    for command, expected in re.findall(r"^\$ (.*)\n((?:[^$].*\n)*)", shown, re.MULTILINE):
        assert bash(command, tmp_path).stderr == expected


def test_the_readmes_recipe_for_lines_without_an_entry_finds_them(asked: Experiment) -> None:
    (recipe,) = re.findall(r"to ask only these again .*: `(python3 .*)`$", README, re.MULTILINE)
    asked.ask("never asked", "q", "nor this")
    assert asked.run(output_path=asked.folder / "generation.jsonl").code == 0
    bash(recipe, asked.folder)
    assert [line["prompt"] for line in read_lines(asked.folder / "again.jsonl")] == ["never asked", "nor this"]


def run_example(*arguments: str, folder: Path) -> Any:
    return bash(shlex.join([sys.executable, str(PROJECT / "example_reconstruct.py"), *arguments]), folder)


@pytest.mark.parametrize("name", ["new/with a space", "empty"])
def test_the_example_keeps_its_data_in_a_folder_and_prints_a_command_that_works(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    result = run_example(name, folder=tmp_path)
    assert result.returncode == 0
    output = tmp_path / name / "generation.jsonl"
    assert [line["index"] for line in read_lines(output)] == [0, 1, 3]
    output.unlink()
    assert bash(result.stdout.splitlines()[-1], tmp_path / "empty").returncode == 0
    assert len(read_lines(output)) == 3


def test_the_example_without_a_folder_leaves_nothing_and_prints_how_to_keep_one(tmp_path: Path) -> None:
    result = run_example(folder=tmp_path)
    assert result.returncode == 0
    assert "QA lines: 4 (3 matched, 1 without an entry)" in result.stderr
    assert '"generation": " They come from Ailsa Craig."' in result.stdout
    assert list(tmp_path.iterdir()) == []
    assert bash(result.stdout.splitlines()[-1], tmp_path).returncode == 0
    assert len(read_lines(tmp_path / "reconstruct_example" / "generation.jsonl")) == 3


@pytest.mark.parametrize("name", ["run", "run/qa.jsonl"], ids=["a folder that is not empty", "a file"])
def test_the_example_touches_nothing_that_is_there(asked: Experiment, name: str) -> None:
    (asked.folder / "run").mkdir()
    asked.qa.rename(asked.folder / "run" / "qa.jsonl")
    before = asked.files()
    result = run_example(name, folder=asked.folder)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("example_reconstruct.py: error: ")
    assert asked.files() == before


def test_help_of_the_example_makes_no_folder(tmp_path: Path) -> None:
    assert "FOLDER" in run_example("--help", folder=tmp_path).stdout
    assert list(tmp_path.iterdir()) == []
