"""The installed commands: help at once, mistakes in one line."""

import subprocess
import sys
from pathlib import Path

import pytest

import exflow.cli
import placement.cli
from exflow import __version__
from placement.errors import UserError

EXFLOW = str(Path(sys.executable).with_name("exflow"))
PROGRAMS = {
    "exflow": [EXFLOW],
    "python -m exflow": [sys.executable, "-m", "exflow"],
    "python -m placement": [sys.executable, "-m", "placement"],
}
HEAVY = {"numpy", "scipy", "networkx", "numba", "torch", "transformers", "tokenizers", "rich"}


def call(*command):
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_lists_the_commands(program):
    done = call(*PROGRAMS[program], "--help")
    assert done.returncode == 0
    commands = placement.cli.COMMANDS if "placement" in program else exflow.cli.COMMANDS
    assert [name for name in commands if f"  {name} " not in done.stdout] == []


@pytest.mark.parametrize("module", ["exflow.cli", "placement.cli"])
def test_help_imports_nothing_heavy(module):
    code = (
        f"import atexit, sys\nfrom {module} import main\n"
        f"atexit.register(lambda: print({HEAVY} & set(sys.modules), file=sys.stderr))\n"
        "sys.argv[1:] = ['--help']\nmain()"
    )
    done = call(sys.executable, "-c", code)
    assert (done.returncode, done.stderr) == (0, "set()\n")


@pytest.mark.parametrize("command", exflow.cli.COMMANDS)
def test_every_command_has_help(command, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["exflow", command, "--help"])
    with pytest.raises(SystemExit) as caught:
        exflow.cli.main()
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith(f"Usage: exflow {command} ")


def test_version():
    assert call(EXFLOW, "--version").stdout == f"exflow {__version__}\n"


@pytest.mark.parametrize(
    "arguments", [["no-such-command"], ["affinity"], ["place", "--nodes", "x"]]
)
def test_wrong_usage_ends_with_code_2_and_the_usage(arguments):
    done = call(EXFLOW, *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("Usage: exflow")


def test_a_users_mistake_is_one_line_and_code_2(tmp_path):
    done = call(EXFLOW, "affinity", str(tmp_path / "missing.safetensors"))
    assert done.returncode == 2
    assert "missing.safetensors" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("plan.json is for 8 ranks"), "error: plan.json is for 8 ranks\n"),
        (
            UserError("no tokenizer: one of\n (1) a file\n"),
            "error: no tokenizer: one of (1) a file\n",
        ),
        (FileNotFoundError(2, "No such file", "a.json"), "error: a.json: No such file\n"),
    ],
)
def test_errors_of_a_command_become_one_line(error, line, capsys, monkeypatch):
    def fail():
        raise error

    app = placement.cli.make_app("An app.")
    app.command("fail")(fail)
    monkeypatch.setattr(sys, "argv", ["app", "fail"])
    with pytest.raises(SystemExit) as caught:
        placement.cli.run(app, "app")
    assert caught.value.code == 2
    assert capsys.readouterr().err == line


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "pile-moe-top1", "--prompts", "p.jsonl", "-o", "o.jsonl"],
        ["bench", "pile-moe-top1", "--prompts", "p.jsonl"],
        ["links", "-o", "links.json"],
        ["profile", "pile-moe-top1", "corpus", "-o", "trace.safetensors"],
        ["convert-deepspeed", "checkpoint", "-o", "converted"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_without_torch_a_command_says_what_to_install(arguments, tmp_path):
    code = (
        "import sys\nsys.modules['torch'] = None\nfrom exflow.cli import main\n"
        f"sys.argv[1:] = {arguments}\nmain()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    line = "error: this needs the package torch, which is not installed; `pip install torch`\n"
    assert (done.returncode, done.stderr) == (2, line)
    assert not list(tmp_path.iterdir())


def test_a_bug_keeps_its_traceback(monkeypatch):
    def fail():
        raise KeyError

    app = placement.cli.make_app("An app.")
    app.command("fail")(fail)
    monkeypatch.setattr(sys, "argv", ["app", "fail"])
    with pytest.raises(KeyError):
        placement.cli.run(app, "app")
