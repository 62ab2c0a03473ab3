"""Compiled kernels follow their sources."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

pytest.importorskip("numba")

from placement.search import jit

if TYPE_CHECKING:
    from pathlib import Path

CALLER = """
from kernels.jit import kernel
from kernels.called import step

@kernel
def run(value):
    return step(value) + 1

print(run(1))
"""
CALLED = """
from kernels.jit import kernel

@kernel
def step(value):
    return value + {added}
"""


def test_a_kernel_is_compiled_again_when_one_it_calls_changes(tmp_path: Path) -> None:
    folder = tmp_path / "kernels"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "caller.py").write_text(CALLER)
    shutil.copy(jit.__file__, folder)
    printed = []
    for added in (10, 10, 20):
        (folder / "called.py").write_text(CALLED.format(added=added))
        command = [sys.executable, "-m", "kernels.caller"]
        environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
        environment.pop("NUMBA_CACHE_DIR", None)
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        )
        printed.append(int(done.stdout))
    assert printed == [12, 12, 22]


def test_without_a_folder_for_its_cache_a_kernel_is_compiled_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compile_function = jit.njit

    def njit(**options: object) -> object:
        if options["cache"]:
            msg = "cannot cache function: no locator available"
            raise RuntimeError(msg)
        return compile_function(**options)

    monkeypatch.setattr(jit, "njit", njit)

    def add(value: int) -> int:
        return value + 1

    assert jit.kernel(add)(1) == 2
