"""Small changes of code: operators, constants, arguments, conditions, statements left out."""

import ast
import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

PAIRS = (
    (ast.Add, ast.Sub),
    (ast.Mult, ast.Div),
    (ast.Lt, ast.LtE),
    (ast.Gt, ast.GtE),
    (ast.Eq, ast.NotEq),
    (ast.Is, ast.IsNot),
    (ast.In, ast.NotIn),
    (ast.And, ast.Or),
)
"""Operators that take each other's place."""

SWAPS = {**dict(PAIRS), **{b: a for a, b in PAIRS}}
SWAPS |= dict.fromkeys((ast.FloorDiv, ast.Mod, ast.Pow), ast.Mult)


class Mutant(NamedTuple):
    """A change of a file's text between two offsets."""

    file: str
    function: str
    line: int
    start: int
    end: int
    text: str
    old: str
    nth: int
    """Among those of the same texts in a function."""

    @property
    def name(self) -> str:
        old, new = (" ".join(text.split()) for text in (self.old, self.text))
        nth = f" [{self.nth}]" if self.nth > 1 else ""
        return f"{self.file} {self.function}: {old} -> {new}{nth}"


def changes(node: ast.AST) -> Iterator[ast.AST]:
    """Yield a node's mutants."""
    if isinstance(node, ast.BinOp | ast.BoolOp) and type(node.op) in SWAPS:
        other = copy.deepcopy(node)
        other.op = SWAPS[type(node.op)]()
        yield other
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
        other = copy.deepcopy(node)
        other.ops[0] = SWAPS[type(node.ops[0])]()
        yield other
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float):
        value = node.value
        yield ast.Constant(not value if isinstance(value, bool) else value + 1)
    elif isinstance(node, ast.Call) and len(node.args) > 1 and not in_any_order(node):
        other = copy.deepcopy(node)
        other.args[:2] = reversed(other.args[:2])
        yield other
    elif isinstance(node, ast.If | ast.IfExp):
        other = copy.deepcopy(node)
        other.test = ast.UnaryOp(ast.Not(), node.test)
        yield other
    # A statement, or a guard, is left out.
    if isinstance(node, ast.Raise | ast.AugAssign) or (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    ):
        yield ast.Pass()


def in_any_order(call: ast.Call) -> bool:
    """Whether a call gives the same if its first two arguments change places."""
    first, second, *others = call.args
    if ast.dump(first) == ast.dump(second):
        return True
    # Of a tensor's axes, only two are given.
    if isinstance(call.func, ast.Attribute):
        return call.func.attr == "transpose" and not others
    return isinstance(call.func, ast.Name) and call.func.id in ("min", "max", "gcd")


def mutants(path: Path, name: str) -> Iterator[Mutant]:
    """Yield the mutants of a file, of code in functions alone; ``name`` is the file's in them."""
    # Offsets in bytes, as ast counts columns.
    text = path.read_bytes()
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    seen = set()
    same = Counter[tuple[str, str, str]]()
    for function in functions:
        for node in inside(function.body):
            for other in changes(node):
                start = starts[node.lineno - 1] + node.col_offset
                end = starts[node.end_lineno - 1] + node.end_col_offset
                new = ast.unparse(other)
                if isinstance(node, ast.expr):
                    new = f"({new})"
                # Lines after the first keep their depth.
                new = new.replace("\n", "\n" + " " * node.col_offset)
                old = text[start:end].decode()
                if (start, end, new) not in seen:
                    seen.add((start, end, new))
                    same[function.name, old, new] += 1
                    nth = same[function.name, old, new]
                    yield Mutant(name, function.name, node.lineno, start, end, new, old, nth)


def inside(nodes: Sequence[ast.AST]) -> Iterator[Any]:
    """Walk through nodes, but not into f-strings: Python 3.11 does not know places in them.

    Nor into `strict` of a zip: it guards against a mistake of ours, which no input makes.
    """
    for node in nodes:
        if isinstance(node, ast.keyword) and node.arg == "strict":
            continue
        yield node
        if not isinstance(node, ast.JoinedStr):
            yield from inside(list(ast.iter_child_nodes(node)))
