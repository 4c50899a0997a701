"""The inside of a sandbox: a script of the standard library alone, run as a process of its own for one check.

    python -I -S inside.py <folder>

It reads the folder's ``job.json``, gives up what it must not have (limits, then a system call filter), does the job and
writes ``verdict.json`` with the job's secret. Everything that an answer brought runs after the limits are set.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import platform
import re
import resource
import signal
import sqlite3
import struct
import sys
from typing import Any

PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, MODE_FILTER = 1, 38, 22, 2
ALLOW, KILL = 0x7FFF0000, 0x80000000
LOAD, EQUAL, AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06  # of the classic Berkeley packet filter
# Audit architecture, and the numbers of: clone, fork, vfork, execve, execveat, clone3, socket, socketpair, kill, tkill,
# tgkill, pidfd_send_signal, ptrace, process_vm_writev, io_uring_setup (which opens sockets without a call).
FORBIDDEN = {
    "x86_64": (0xC000003E, (56, 57, 58, 59, 322, 435, 41, 53, 62, 200, 234, 424, 101, 311, 425)),
    "aarch64": (0xC00000B7, (220, 221, 281, 435, 198, 199, 129, 130, 131, 424, 117, 271, 425)),
}
X32 = 0x40000000  # system calls of another numbering on x86-64
TOLD = 500  # characters of an explanation


def confine(limits: dict[str, int]) -> bool:
    """Set the limits for good; whether the system call filter is on. Without it forks are limited by count alone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # whoever asked is gone: end as well
    for name, most in limits.items():
        kind = getattr(resource, name)
        _, hard = resource.getrlimit(kind)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))
    return _filtered()


def _filtered() -> bool:
    known = FORBIDDEN.get(platform.machine())
    if sys.platform != "linux" or known is None:
        return False
    architecture, calls = known
    steps = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, architecture), (RETURN, 0, 0, KILL), (LOAD, 0, 0, 0)]
    if architecture == FORBIDDEN["x86_64"][0]:
        steps += [(AT_LEAST, 0, 1, X32), (RETURN, 0, 0, KILL)]
    for number in calls:
        steps += [(EQUAL, 0, 1, number), (RETURN, 0, 0, KILL)]
    steps.append((RETURN, 0, 0, ALLOW))
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in steps))
    program = ctypes.create_string_buffer(struct.pack("@HP", len(steps), ctypes.addressof(code)))
    libc = ctypes.CDLL(None)
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        return False
    return libc.prctl(PR_SET_SECCOMP, MODE_FILTER, ctypes.c_void_p(ctypes.addressof(program)), 0, 0) == 0


def unit_tests(job: dict[str, Any]) -> tuple[float | None, str]:
    """The share of ``test_…`` functions that pass against the answer's code; without any, whether the tests run."""
    space: dict[str, Any] = {"__name__": "answer"}
    for name in ("answer", "tests"):
        try:
            exec(compile(job[name], name, "exec"), space)
        except Exception as error:
            _not_ours(error)
            return 0.0, f"{name}: {type(error).__name__}: {error}"
    tests = [name for name, value in space.items() if name.startswith("test_") and callable(value)]
    passed, why = 0, ""
    for name in tests:
        try:
            space[name]()
            passed += 1
        except Exception as error:
            _not_ours(error)
            why = why or f"{name}: {type(error).__name__}: {error}"
    if not tests:
        return 1.0, "the tests ran"
    return passed / len(tests), f"{passed} of {len(tests)} tests passed" + (f"; {why}" if why else "")


def _not_ours(error: Exception) -> None:
    """A limit that was met is no verdict on the answer."""
    if _limit(error):
        raise error


def _limit(error: BaseException) -> str | None:
    if isinstance(error, MemoryError):
        return "memory"
    if isinstance(error, SystemError):  # the interpreter itself, out of stack or memory
        return "crashed"
    number = getattr(error, "errno", None)
    return {errno.EFBIG: "too_much_output", errno.EAGAIN: "forbidden", errno.ENOMEM: "memory"}.get(number or 0)


def sql(job: dict[str, Any]) -> tuple[float | None, str]:
    """Whether the answer's query gives the rows of the reference (a query, or rows) over the same tables."""
    wanted = job["reference"]
    try:
        expected = _rows(job, wanted) if isinstance(wanted, str) else [tuple(row) for row in wanted]
    except sqlite3.Error as error:
        return None, f"the reference: {error}"
    try:
        found = _rows(job, job["answer"])
    except sqlite3.Error as error:
        return 0.0, f"the query: {error}"
    if not job["ordered"]:
        expected, found = sorted(expected, key=repr), sorted(found, key=repr)
    same = len(found) == len(expected) and all(_alike(a, b) for a, b in zip(found, expected, strict=True))
    return float(same), f"{len(found)} rows, {'as' if same else 'not as'} the reference's {len(expected)}"


def _rows(job: dict[str, Any], query: str) -> list[tuple[Any, ...]]:
    """Each query over tables of its own: one that changes them changes nothing for the other."""
    connection = sqlite3.connect(":memory:")
    connection.executescript(job["setup"])
    connection.set_authorizer(lambda action, *_: sqlite3.SQLITE_DENY if action == ATTACH else sqlite3.SQLITE_OK)
    return connection.execute(query).fetchmany(job["most_rows"] + 1)


ATTACH = 24  # SQLite's own number: another file is none of the query's business


def _alike(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    def same(x: Any, y: Any) -> bool:
        if isinstance(x, float) or isinstance(y, float):
            numbers = isinstance(x, int | float) and isinstance(y, int | float)
            return numbers and abs(x - y) <= 1e-9 * max(1.0, abs(x), abs(y))
        return bool(x == y)

    return len(a) == len(b) and all(map(same, a, b))


def pattern(job: dict[str, Any]) -> tuple[float | None, str]:
    """Whether a regular expression is found in the answer, or is the whole of it."""
    compiled = re.compile(job["pattern"], re.IGNORECASE if job["ignore_case"] else 0)
    found = compiled.fullmatch(job["answer"]) if job["whole"] else compiled.search(job["answer"])
    return float(found is not None), "it is found" if found else "it is not found"


def json_schema(job: dict[str, Any]) -> tuple[float | None, str]:
    """Whether every value is what its schema says. ``job["path"]`` is where jsonschema is installed."""
    import jsonschema
    from referencing import Registry

    for value, schema in job["pairs"]:
        maker = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
        first = jsonschema.exceptions.best_match(maker(schema, registry=Registry()).iter_errors(value))
        if first is not None:
            return 0.0, f"{first.json_path}: {first.message}"
    return 1.0, "it is what the schema says"


JOBS = {"unit_tests": unit_tests, "sql": sql, "pattern": pattern, "json_schema": json_schema}


def main(folder: str) -> int:
    path = os.path.join(folder, "job.json")
    with open(path, encoding="utf-8") as file:
        job = json.load(file)
    os.remove(path)
    secret, do = job.pop("secret"), JOBS[job.pop("do")]
    if do is json_schema:
        sys.path.append(job["path"])
        import jsonschema  # noqa: F401  # it is large: read before memory is short
    filtered = confine(job.pop("limits"))
    failure = None
    try:
        value, why = do(job)
    except BaseException as error:
        failure = _limit(error) or ("no_verdict" if isinstance(error, SystemExit) else "raised")
        value, why = None, f"{type(error).__name__}: {error}"
    said = {"secret": secret, "value": value, "why": why[:TOLD], "failure": failure, "filtered": filtered}
    with open(os.path.join(folder, "verdict.json"), "w", encoding="utf-8") as file:
        json.dump(said, file)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
