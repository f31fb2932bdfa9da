# SPDX-License-Identifier: Apache-2.0
"""No test fails by load alone: none waits for a length of time, or compares a clock with one."""

import ast
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
WAITS = {"run", "communicate", "wait", "join", "check_output", "check_call", "call"}
CLOCKS = {"time", "monotonic", "perf_counter"}  # process_time counts the work of the process


def deadlines(source: str) -> Iterator[int]:
    """Lines that give a wait a limit, or compare what a clock on the wall says."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in WAITS:
            limits = [k.value for k in node.keywords if k.arg == "timeout"]
            limits += node.args[:1] if node.func.attr in ("wait", "join") else []
            if any(
                isinstance(it, ast.Constant) and type(it.value) in (int, float) for it in limits
            ):
                yield node.lineno
        if isinstance(node, ast.Compare):
            calls = [n.func for n in ast.walk(node) if isinstance(n, ast.Call)]
            if any(getattr(c, "attr", "") in CLOCKS for c in calls):
                yield node.lineno


def test_no_test_has_a_deadline():
    found = {
        f"{path.relative_to(TESTS)}:{line}"
        for path in TESTS.rglob("*.py")
        for line in deadlines(path.read_text(encoding="utf-8"))
    }
    assert not found


def test_the_look_for_deadlines_finds_them():
    source = """
child.communicate(timeout=600)
subprocess.run(command, timeout=120)
process.wait(20)
worker.join(5.0)
assert time.monotonic() < deadline
while time.time() - begin > 3:
    pass
", ".join(names)
results.get(timeout=1)
process.wait()
assert time.process_time() - begin < 4
"""
    assert list(deadlines(source)) == [2, 3, 4, 5, 6, 7]
