"""What the set-up scripts do without installing anything."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENVIRONMENT = ROOT / "scripts/lib/environment.sh"

FAKE_PYTHON = f"""#!/bin/sh
[ "$1" = -m ] || exec "{sys.executable}" "$@"
shift
echo "$@" >>pip.log
exec "${{FAKE_PIP:-true}}"
"""


def bash(code, *, cwd, **variables):
    environment = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHON")}
    return subprocess.run(
        ["bash", "-c", f'set -euo pipefail; source "{ENVIRONMENT}"; {code}'],
        cwd=cwd,
        env=environment | variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.fixture
def checkout(tmp_path):
    """A checkout with a fake virtual environment whose pip notes what it is asked for."""
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    programs = tmp_path / ".venv/bin"
    programs.mkdir(parents=True)
    (programs / "python").write_text(FAKE_PYTHON)
    (programs / "python").chmod(0o755)
    return tmp_path


def pip_calls(checkout):
    log = checkout / "pip.log"
    lines = log.read_text().splitlines() if log.exists() else []
    log.unlink(missing_ok=True)
    return [line.split("constraints.txt ")[1] for line in lines if " install " in line]


def test_torch_is_installed_first_and_the_extras_after(checkout):
    assert bash("prepare_environment test lint", cwd=checkout).returncode == 0
    assert pip_calls(checkout) == ["torch", "--editable .[lint,test]"]


def test_torch_may_have_an_index_of_its_own(checkout):
    bash("prepare_environment", cwd=checkout, EXFLOW_TORCH_INDEX="file:///wheels")
    assert pip_calls(checkout) == ["--index-url file:///wheels torch", "--editable ."]


def test_nothing_is_installed_twice_until_something_changes(checkout):
    bash("prepare_environment test", cwd=checkout)
    pip_calls(checkout)
    bash("prepare_environment test; prepare_environment", cwd=checkout)
    assert pip_calls(checkout) == []
    with (checkout / "constraints.txt").open("a") as constraints:
        constraints.write("# a change\n")
    bash("prepare_environment", cwd=checkout)
    assert pip_calls(checkout) == ["torch", "--editable .[test]"]


def test_new_extras_join_the_old_ones(checkout):
    bash("prepare_environment test; prepare_environment plot", cwd=checkout)
    assert pip_calls(checkout)[-1] == "--editable .[plot,test]"


def test_an_active_environment_is_used(checkout, tmp_path):
    active = tmp_path / "active"
    (checkout / ".venv").rename(active)
    done = bash("prepare_environment", cwd=checkout, VIRTUAL_ENV=str(active))
    assert done.returncode == 0
    assert not (checkout / ".venv").exists()
    assert (active / ".exflow-installed").exists()


def test_without_python_the_message_says_what_is_needed(tmp_path):
    done = bash("prepare_environment", cwd=tmp_path, PYTHON="/nowhere/python3")
    assert done.returncode == 1
    assert "ExFlow needs Python 3.10 or newer" in done.stderr


def test_without_venv_the_message_says_what_to_install(tmp_path):
    python = tmp_path / "python3"
    python.write_text('#!/bin/sh\n[ "$1" = -m ] && exit 1\nexit 0\n')
    python.chmod(0o755)
    done = bash("prepare_environment", cwd=tmp_path, PYTHON=str(python))
    assert done.returncode == 1
    assert "install its venv package" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_a_failing_installation_is_tried_again(checkout):
    done = bash("prepare_environment", cwd=checkout, FAKE_PIP="false")
    assert done.returncode == 1
    pip_calls(checkout)
    bash("prepare_environment", cwd=checkout)
    assert pip_calls(checkout) == ["torch", "--editable ."]


def test_what_measures_for_another_script_names_it():
    command = [sys.executable, "scripts/placement_scale.py", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "bench_placement.py: give that --scale" in done.stderr
