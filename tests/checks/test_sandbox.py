"""Code that runs for ever, eats memory, forks, floods, lies or dies: a named failure, no opinion, in bounded time."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from reward.checks import CheckConfig, Checks, TurnView, run, sandbox
from reward.checks.sandbox import LimitOptions

pytestmark = pytest.mark.processes
TESTS = "def test_it():\n    assert double(4) == 8\ndef test_zero():\n    assert double(0) == 0\n"
RIGHT = "def double(x):\n    return 2 * x\n"


def check(**options: object) -> CheckConfig:
    return CheckConfig(name="code", kind="unit-tests", options={"tests": TESTS, "seconds": 20, **options})


@pytest.mark.parametrize(
    ("answer", "value", "why"),
    [
        (RIGHT, 1.0, "2 of 2 tests passed"),
        (f"Here it is:\n```python\n{RIGHT}```\nIt doubles.", 1.0, "2 of 2"),
        ("def double(x):\n    return x * x - 8 * (x > 0)\n", 1.0, "2 of 2"),
        ("def double(x):\n    return x + 1 - 1 * (x == 0)\n", 0.5, "test_it: AssertionError"),
        ("def double(x):\n    return 1 / 0\n", 0.0, "ZeroDivisionError"),
        ("def double(x)\n", 0.0, "SyntaxError"),
        ("I cannot do that.", 0.0, "SyntaxError"),
    ],
)
def test_what_ran_is_told_by_the_share_of_tests_that_passed(answer: str, value: float, why: str) -> None:
    verdict = run(check(), TurnView(answer))
    assert (verdict.value, verdict.failure) == (value, None), verdict
    assert why in verdict.why


def test_tests_without_functions_pass_as_a_whole_and_may_come_by_reference() -> None:
    config = CheckConfig(name="code", kind="unit-tests", reference="gold", options={"seconds": 20})
    for tests, value in (("assert double(1) == 2", 1.0), ("assert double(1) == 3", 0.0)):
        assert run(config, TurnView(RIGHT, references={"gold": tests})).value == value


HOSTILE = {
    "for_ever": ("while True: pass", "timeout"),
    "sleeps": ("import time; time.sleep(999)", "timeout"),
    "memory": ("x = [0]\nwhile True: x = x * 2", "memory"),
    "bytes": ("x = bytearray(1 << 40)", "memory"),
    "forks": ("import os\nwhile True: os.fork()", "forbidden"),
    "threads": ("import threading\nwhile True: threading.Thread(target=input).start()", "forbidden"),
    "starts": ("import subprocess; subprocess.run(['sleep', '60'])", "forbidden"),
    "execs": ("import os; os.execv('/bin/true', ['true'])", "forbidden"),
    "network": ("import socket; socket.create_connection(('127.0.0.1', 1))", "forbidden"),
    "signals": ("import os; os.kill(os.getppid(), 0)", "forbidden"),
    "huge_file": ("f = open('big', 'wb')\nwhile True: f.write(bytes(1 << 20))", "too_much_output"),
    "prints": ("while True: print('and on ' * 1000)", "too_much_output"),
    "errors": ("import sys\nwhile True: sys.stderr.write('and on ' * 1000); sys.stderr.flush()", "too_much_output"),
    "exits": ("import os; os._exit(0)", "no_verdict"),
    "leaves": ("raise SystemExit(0)", "no_verdict"),
    "crashes": ("import os; os._exit(3)", "crashed"),
    "segfaults": ("import ctypes; ctypes.string_at(0)", "killed"),
    "lies": ("import os\nopen('verdict.json', 'w').write('{\"value\": 1, \"why\": \"\"}'); os._exit(0)", "no_verdict"),
    "links": ("import os\nos.symlink('/etc/passwd', 'verdict.json'); os._exit(0)", "no_verdict"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_hostile_is_no_opinion_with_a_name_and_leaves_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path))
    answer, failure = HOSTILE[name]
    seconds = 2 if failure == "timeout" else 30
    checks = Checks([check(seconds=seconds, memory_mb=256, file_mb=1)])
    began = time.monotonic()
    verdict = checks.run(TurnView(answer))["code"]
    assert verdict.value is None
    assert verdict.failure == failure, verdict
    assert verdict.why
    assert checks.failures == {("code", failure): 1}
    assert time.monotonic() - began < 60
    assert list(tmp_path.iterdir()) == []
    assert children() == set()


def children() -> set[int]:
    """Processes of this one that are still there, none of them waited for."""
    tasks = Path(f"/proc/{os.getpid()}/task")
    found = (path / "children" for path in tasks.iterdir())
    return {int(pid) for path in found if path.exists() for pid in path.read_text().split()}


def test_an_endless_recursion_that_takes_all_memory_is_no_opinion() -> None:
    verdict = run(check(memory_mb=96), TurnView("def f(): return f()\nimport sys; sys.setrecursionlimit(10**8); f()"))
    assert verdict.failure in ("crashed", "killed", "memory")  # the interpreter's own end varies


def test_whether_the_filter_is_on_is_said() -> None:
    job = {"answer": "x = 1", "tests": ""}
    outcome = sandbox.run("unit_tests", job, LimitOptions(seconds=20))
    assert outcome.verdict.value == 1.0
    assert outcome.filtered is True


def test_it_sees_nothing_of_the_callers_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_OF_THE_SERVICE", "x")
    tests = "import os\nassert 'SECRET_OF_THE_SERVICE' not in os.environ\nassert os.listdir() == ['output']"
    assert run(check(tests=tests), TurnView("x = 1")).value == 1.0
