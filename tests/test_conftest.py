"""In CI a skipped test fails, whether it skips itself or its whole file does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = """
import pytest

def test_that_skips_itself():
    pytest.skip("no")

@pytest.mark.skip
def test_that_is_marked():
    pass

@pytest.mark.xfail
def test_that_is_known_to_fail():
    assert False
"""
FILE = "import pytest\npytest.importorskip('no_such_module')\ndef test_it():\n    pass\n"


@pytest.mark.parametrize(
    ("ci", "code", "summary"),
    [("true", 1, "1 failed, 1 xfailed, 2 errors in "), ("", 0, "3 skipped, 1 xfailed in ")],
)
def test_a_skip_fails_in_ci_only(tmp_path: Path, ci: str, code: int, summary: str):
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "test_file.py").write_text(FILE)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--continue-on-collection-errors", str(tmp_path)],
        cwd=tmp_path,
        env={**os.environ, "CI": ci},
        capture_output=True,
        text=True,
    )
    assert summary in done.stdout
    assert done.returncode == code
