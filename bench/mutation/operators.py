# SPDX-License-Identifier: Apache-2.0
"""Small faults of Python sources, chosen by rule: one edit of one node of the syntax tree each."""

import ast
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

COMPARISONS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
ARITHMETIC = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.Mod: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Pow: ast.Mult, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr,
    ast.BitXor: ast.BitOr, ast.LShift: ast.RShift, ast.RShift: ast.LShift,
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """`old` at [begin, end) of the bytes of `path` becomes `new`; lines count from 1."""

    path: str
    statement: int  # first line of the statement
    line: int
    begin: int
    end: int
    rule: str
    old: str
    new: str

    @property
    def id(self) -> str:
        """The same for the same fault, wherever other edits move it in the file."""
        key = repr((self.path, self.rule, self.old, self.new, self.line)).encode()
        return hashlib.sha256(key).hexdigest()[:12]

    def applied(self, source: bytes) -> bytes:
        assert source[self.begin : self.end].decode() == self.old
        return source[: self.begin] + self.new.encode() + source[self.end :]


def mutants(path: str, source: str) -> list[Mutant]:
    """All mutants of a file, in the order of the file. None is of a docstring,
    an annotation, an import, a decorator, an f-string or what is raised."""
    tree = ast.parse(source)
    content = source.encode()
    starts = [0]
    for line in content.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found = {}
    for statement, node, rule, new in _edits(tree, 1):
        begin = starts[node.lineno - 1] + node.col_offset
        end = starts[node.end_lineno - 1] + node.end_col_offset
        old = content[begin:end].decode()
        mutant = Mutant(path, statement, node.lineno, begin, end, rule, old, new)
        if new != old:
            found.setdefault((begin, end, new), mutant)
    return sorted(found.values(), key=lambda m: (m.begin, m.end, m.new))


def _edits(node: ast.AST, statement: int) -> Iterator[tuple[int, ast.AST, str, str]]:
    """(first line of the statement, node, rule, what replaces its text) of all nodes that count."""
    if isinstance(node, (ast.Import, ast.ImportFrom, ast.Raise, ast.JoinedStr)):
        return
    statement = node.lineno if isinstance(node, ast.stmt) else statement
    for edit in _edits_of(node):
        yield statement, *edit
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not _is_text(child):
                yield from _edits(child, statement)


def _is_text(node: ast.AST) -> bool:
    """A docstring, or a comment in the form of one."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _edits_of(node: ast.AST) -> Iterator[tuple[ast.AST, str, str]]:
    if isinstance(node, ast.Compare):
        operator = COMPARISONS[type(node.ops[0])]()
        changed = ast.Compare(node.left, [operator, *node.ops[1:]], node.comparators)
        yield node, "comparison", f"({ast.unparse(changed)})"
    elif isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        changed = ast.BinOp(node.left, ARITHMETIC[type(node.op)](), node.right)
        yield node, "arithmetic", f"({ast.unparse(changed)})"
    elif isinstance(node, ast.BoolOp):
        other = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield node, "boolean", f"({ast.unparse(ast.BoolOp(other, node.values))})"
    elif isinstance(node, ast.UnaryOp):
        yield node, "unary", f"({ast.unparse(node.operand)})"
    elif isinstance(node, ast.Constant):
        yield from _constants(node)
    elif isinstance(node, ast.Call):
        yield from _calls(node)
    elif isinstance(node, (ast.If, ast.While, ast.IfExp)):
        yield node.test, "negation", f"(not ({ast.unparse(node.test)}))"
    if isinstance(node, (ast.Expr, ast.Assign, ast.AugAssign)) and not _is_text(node):
        yield node, "statement", "pass"


def _constants(node: ast.Constant) -> Iterator[tuple[ast.AST, str, str]]:
    if isinstance(node.value, bool):
        yield node, "constant", repr(not node.value)
    elif isinstance(node.value, (int, float)):
        yield node, "constant", repr(node.value + 1)
        yield node, "constant", f"({node.value - 1!r})"


def _calls(node: ast.Call) -> Iterator[tuple[ast.AST, str, str]]:
    for i in range(len(node.args) - 1):
        first, second = node.args[i : i + 2]
        if type(first) is type(second) and not isinstance(first, (ast.Starred, ast.Constant)):
            swapped = [*node.args[:i], second, first, *node.args[i + 2 :]]
            yield node, "arguments", ast.unparse(ast.Call(node.func, swapped, node.keywords))
    for i in range(len(node.keywords)):
        left = node.keywords[:i] + node.keywords[i + 1 :]
        yield node, "keyword", ast.unparse(ast.Call(node.func, node.args, left))
