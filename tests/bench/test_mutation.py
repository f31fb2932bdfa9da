# SPDX-License-Identifier: Apache-2.0
"""bench/mutation on a package of one file, whose mutants are known."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from mutation import run
from mutation.run import campaign, judge, mutants, read_rows, sample, summary

pytestmark = pytest.mark.any_device

SOURCE = '''"""A docstring."""


def clamp(value: int, low: int = 0) -> int:
    """At least low."""
    if value < low:
        return low
    return value


def unused():
    return 7
'''
TEST = """
from small.clamp import clamp


def test_it():
    assert clamp(-3) == 0
    assert clamp(5) == 5
"""


@pytest.fixture
def tree(tmp_path):
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "clamp.py").write_text(SOURCE)
    (tmp_path / "test_clamp.py").write_text(TEST)
    return tmp_path


@pytest.fixture
def known():
    return {"test_clamp.py": {"seconds": 1.0, "lines": {"small/clamp.py": [1, 4, 6, 7, 8, 11]}}}


def of_rule(rule, new=None):
    (found,) = [
        m for m in mutants("small/clamp.py", SOURCE) if m.rule == rule and new in (None, m.new)
    ]
    return found


def test_rules_of_a_file():
    found = [(m.line, m.rule, m.old, m.new) for m in mutants("small/clamp.py", SOURCE)]
    assert found == [
        (4, "constant", "0", "(-1)"),
        (4, "constant", "0", "1"),
        (6, "negation", "value < low", "(not (value < low))"),
        (6, "comparison", "value < low", "(value <= low)"),
        (12, "constant", "7", "(6)"),
        (12, "constant", "7", "8"),
    ]


@pytest.mark.parametrize(
    ("text", "rule", "new"),
    [
        ("a = b + c", "arithmetic", "(b - c)"),
        ("a = b and c", "boolean", "(b or c)"),
        ("a = f(b, c)", "arguments", "f(c, b)"),
        ("a = f(b, c=d)", "keyword", "f(b)"),
        ("f()", "statement", "pass"),
        ("a = not b", "unary", "(b)"),
        ("if a:\n    f()", "negation", "(not (a))"),
        ("a = f(True)", "constant", "False"),
        ("é = 'é' if ä else b", "negation", "(not (ä))"),  # offsets are bytes
    ],
)
def test_each_rule(text, rule, new):
    found = {(m.rule, m.new): m for m in mutants("a.py", text)}
    compile(found[rule, new].applied(text.encode()), "a.py", "exec")


@pytest.mark.parametrize("text", ['"""Doc + 1."""', "import a", "raise E(f'{a + 1}')", "a: b[1]"])
def test_what_is_no_place_for_a_fault(text):
    assert mutants("a.py", text) == []


def test_caught_survived_and_unreached(tree, known):
    """`value <= low` is equivalent: where the two are equal either is the result."""
    verdicts = {
        "caught": of_rule("negation"),
        "survived": of_rule("comparison"),
        "unreached": of_rule("constant", "8"),
    }
    for verdict, mutant in verdicts.items():
        row = judge(mutant, tree, known)
        assert row["verdict"] == verdict
        assert row["by"] == ("test_clamp.py" if verdict == "caught" else None)
        assert (tree / "small" / "clamp.py").read_text() == SOURCE
    assert row["diff"] == ["-    return 7", "+    return 8"]


def test_an_endless_mutant_is_timed_out(tree, known, monkeypatch):
    (tree / "test_clamp.py").write_text("while True:\n    pass\n")
    usual = run.pytest
    monkeypatch.setattr(run, "pytest", lambda place, files, limit: usual(place, files, 1.0))
    assert judge(of_rule("negation"), tree, known)["verdict"] == "timeout"


def test_a_run_goes_on_where_it_was_cut_off(tree, known, tmp_path):
    out, chosen = tmp_path / "rows.jsonl", mutants("small/clamp.py", SOURCE)
    campaign(chosen[:2], tree, known, out, 3600)
    first = out.read_text()
    out.write_text(first + '{"id": "cut o')
    campaign(chosen, tree, known, out, 0)
    assert out.read_text() == first  # no time for more
    campaign(chosen, tree, known, out, 3600)
    assert out.read_text().startswith(first)
    rows = read_rows(out)
    assert [row["id"] for row in rows] == [m.id for m in chosen]
    counts = {"caught": 3, "survived": 1, "timeout": 0, "unreached": 2}
    assert summary(rows) == {"small/clamp.py": counts}


def test_equal_seeds_draw_equal_mutants(tree):
    (tree / "small" / "more.py").write_text("".join(f"a{i} = b + {i}\n" for i in range(50)))
    first = sample(tree, ["small"], 20, 1)
    assert first == sample(tree, ["small"], 20, 1)
    assert first != sample(tree, ["small"], 20, 2)
    assert len({m.id for m in first}) == 20


def test_the_command_lists_slices_that_make_up_the_whole():
    def lines(part):
        command = [sys.executable, run.__file__, "--list", "--count", "30", "--slice", part]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    whole = lines("1/1")
    assert len(whole) == 30
    assert sorted(lines("1/2") + lines("2/2")) == sorted(whole)


def test_committed_rows_are_whole():
    for path in sorted(Path(run.ROOT, "bench/results/mutation").glob("*.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert rows
        assert len({row["id"] for row in rows}) == len(rows)
