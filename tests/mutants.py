"""Mutants: single small changes of a source file that a test should notice. tests.mutate tries them."""

import ast
import hashlib
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field

OPERATORS = {
    "+": ["-"], "-": ["+"], "*": ["/"], "/": ["*"], "//": ["*"], "%": ["//"], "**": ["*"], "@": ["*"],
    "&": ["|"], "|": ["&"], "^": ["&"], "<<": [">>"], ">>": ["<<"],
    "<": ["<=", ">"], "<=": ["<", ">="], ">": [">=", "<"], ">=": [">", "<="], "==": ["!="], "!=": ["=="],
    "is": ["is not"], "is not": ["is"], "in": ["not in"], "not in": ["in"], "and": ["or"], "or": ["and"],
}  # fmt: skip
# Longest first. The text between two operands holds the operator, parentheses, spaces and comments.
OPERATOR = re.compile(r"\bis\s+not\b|\bnot\s+in\b|\b(?:is|in|and|or)\b|\*\*|//|<<|>>|[<>=!]=|[-+*/%@&|^<>]")
PAIRS = (
    ("min", "max"), ("minimum", "maximum"), ("amin", "amax"), ("argmin", "argmax"), ("any", "all"), ("floor", "ceil"),
    ("zeros", "ones"), ("startswith", "endswith"), ("lstrip", "rstrip"), ("log", "log2"), ("exp", "exp2"),
)  # fmt: skip
RENAMED = dict(PAIRS) | {b: a for a, b in PAIRS}
NOT_SWAPPED = {
    "min",
    "max",
    "minimum",
    "maximum",
    "gcd",
    "isinstance",
    "cast",
}  # swapping changes nothing, or fails at once
PATH = re.compile(r"(?i)path|dir|folder|checkpoint|temporary|root|[\"']")  # here / joins paths
# People, not tests, read the arguments of these functions.
MESSAGES = {
    "print", "say", "warn", "warning", "info", "debug", "write_line", "add_argument",
    "annotate", "set_title", "set_xlabel", "set_ylabel",
}  # fmt: skip
SAME_WHEN_NEGATED = (ast.Eq, ast.NotEq, ast.Is, ast.IsNot, ast.In, ast.NotIn)
SIMPLE = (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Expr, ast.Raise, ast.Continue, ast.Break, ast.Delete)


@dataclass(frozen=True)
class Mutant:
    """A change of a module: bytes `start` to `end` of its source become `text`."""

    module: str  # as in "gpt/files.py"
    kind: str
    start: int
    end: int
    text: str
    lines: range  # a test that runs none of them cannot notice the change; empty: any test of the module can
    scope: str = field(repr=False)  # source of the outermost statement around the change
    offset: int = 0  # position of the change in scope

    @property
    def id(self) -> str:
        """An id of the change that does not depend on where its function is in the module."""
        words = "\0".join((self.module, self.scope, str(self.offset), self.kind, self.text))
        return hashlib.sha256(words.encode()).hexdigest()[:16]

    def apply(self, source: str) -> str:
        data = source.encode()
        return (data[: self.start] + self.text.encode() + data[self.end :]).decode()

    def difference(self, source: str) -> tuple[str, str]:
        """Return the first changed line, stripped, before and after."""
        before, after = source.split("\n"), self.apply(source).split("\n")
        at = next(i for i, (a, b) in enumerate(zip([*before, ""], [*after, "\n"])) if a != b)
        return before[at].strip(), after[at].strip()

    def is_valid(self, source: str) -> bool:
        """Whether the changed source compiles to a different program."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            try:
                changed = ast.parse(self.apply(source))
                compile(changed, self.module, "exec")
            except (SyntaxError, ValueError):
                return False
        return ast.dump(changed) != ast.dump(ast.parse(source))


def all_mutants(module: str, source: str) -> list[Mutant]:
    """List every mutant of a source file, in order; a few may not be valid."""
    finder = _Finder(source)
    found = {}
    for outer in ast.parse(source).body:
        scope = ast.get_source_segment(source, outer) or ""
        first = finder.span(outer)[0]
        for kind, (start, end), text, lines in finder.changes(outer, None, None, range(0)):
            mutant = Mutant(module, kind, start, end, text, lines, scope, start - first)
            found.setdefault((start, end, text), mutant)
    return sorted(found.values(), key=lambda mutant: (mutant.start, mutant.end, mutant.text))


Change = tuple[str, tuple[int, int], str, range]  # kind, span, new text, lines


class _Finder:
    def __init__(self, source: str):
        self.data = source.encode()
        self.starts = [0]
        for line in self.data.split(b"\n"):
            self.starts.append(self.starts[-1] + len(line) + 1)

    def span(self, node: ast.AST) -> tuple[int, int]:
        return (
            self.starts[node.lineno - 1] + node.col_offset,
            self.starts[node.end_lineno - 1] + node.end_col_offset,
        )

    def text(self, node: ast.AST) -> str:
        start, end = self.span(node)
        return self.data[start:end].decode()

    def changes(self, node, parent, function, lines: range) -> Iterator[Change]:
        """Yield the changes of a node and of its descendants, except text that only people and type checkers read."""
        if isinstance(node, (ast.Import, ast.ImportFrom, ast.JoinedStr, ast.Global, ast.Nonlocal)):
            return
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            return  # a docstring
        if isinstance(node, ast.If) and re.search(r"__name__|TYPE_CHECKING", self.text(node.test)):
            return
        if isinstance(node, ast.Assign) and "__all__" in self.text(node.targets[0]):
            return
        if isinstance(node, ast.Subscript) and _last_name(node.value) == "Literal":
            return
        if isinstance(node, ast.stmt) and function is not None:
            lines = _own_lines(node)
        yield from ((kind, span, text, lines) for kind, span, text in self.own(node, parent, function))
        if isinstance(node, ast.Raise) or (isinstance(node, ast.Call) and _is_message(node.func)):
            return
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            inside = range(node.body[0].lineno, node.end_lineno + 1)
            for default in (*node.args.defaults, *filter(None, node.args.kw_defaults)):
                yield from self.changes(default, node, None, inside)
            for statement in node.body:
                yield from self.changes(statement, node, node, inside)
            return
        for name, value in ast.iter_fields(node):
            if name not in ("annotation", "returns", "decorator_list"):
                for child in value if isinstance(value, list) else [value]:
                    if isinstance(child, ast.AST):
                        yield from self.changes(child, node, function, lines)

    def own(self, node, parent, function) -> Iterator[tuple[str, tuple[int, int], str]]:
        """Yield the changes of one node."""
        if isinstance(node, ast.BinOp) and not _is_text(node.left) and not _is_text(node.right):
            yield from self.operator("arithmetic", node.left, node.right)
        elif isinstance(node, ast.AugAssign):
            yield from self.operator("arithmetic", node.target, node.value)
        elif isinstance(node, ast.Compare):
            for left, right in zip([node.left, *node.comparators], node.comparators):
                yield from self.operator("comparison", left, right)
        elif isinstance(node, ast.BoolOp):
            yield from self.boolean(node)
        elif isinstance(node, ast.UnaryOp) and not isinstance(node.op, ast.UAdd):
            kind = "not" if isinstance(node.op, ast.Not) else "sign"
            yield kind, self.span(node), f"({self.text(node.operand)})"
        elif isinstance(node, ast.Constant):
            yield from (("constant", self.span(node), text) for text in _other_constants(node.value))
        elif isinstance(node, ast.Call):
            yield from self.call(node)
        elif isinstance(node, (ast.If, ast.While, ast.IfExp)):
            yield from self.negation(node.test)
        elif isinstance(node, ast.comprehension):
            for test in node.ifs:
                yield from self.negation(test)
        elif isinstance(node, ast.Return) and self.text(node)[7:] not in ("", "None", "True", "False"):
            yield "return", self.span(node), "return None"
        is_bare = isinstance(node, ast.Return) and node.value is None
        if (isinstance(node, SIMPLE) or is_bare) and self.can_go(node, parent, function):
            yield "dropped", self.span(node), "pass"

    def can_go(self, node, parent, function) -> bool:
        """Whether a statement can be removed without leaving a name undefined, which any test would notice."""
        if isinstance(node, ast.AnnAssign) and node.value is None:
            return False
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and any(isinstance(t, (ast.Name, ast.Tuple)) for t in targets):
            return function is not None and all(self.is_bound(t, function, node.lineno) for t in targets)
        return function is not None or isinstance(node, ast.Expr)

    def is_bound(self, target, function, line: int) -> bool:
        """Whether every name of a target already has a value before this line of the function."""
        names = {n.id for n in ast.walk(target) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        bound = {n.arg for n in ast.walk(function.args) if isinstance(n, ast.arg)}
        for n in ast.walk(function):
            if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store) and n.lineno < line:
                bound.add(n.id)
        return names <= bound

    def operator(self, kind: str, left: ast.AST, right: ast.AST):
        start, end = self.span(left)[1], self.span(right)[0]
        gap = re.sub(r"#.*", lambda match: " " * len(match[0].encode()), self.data[start:end].decode())
        match = OPERATOR.search(gap)
        if match and match[0] == "/" and PATH.search(self.text(left) + self.text(right)):
            return
        if match:
            for other in OPERATORS.get(re.sub(r"\s+", " ", match[0]), []):
                yield kind, (start + match.start(), start + match.end()), other

    def boolean(self, node: ast.BoolOp):
        for left, right in zip(node.values, node.values[1:]):
            yield from self.operator("boolean", left, right)
        word = " and " if isinstance(node.op, ast.And) else " or "
        for gone in node.values:
            rest = word.join(f"({self.text(value)})" for value in node.values if value is not gone)
            yield "boolean", self.span(node), f"({rest})"

    def negation(self, test: ast.expr):
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            return
        if isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], SAME_WHEN_NEGATED):
            return
        yield "condition", self.span(test), f"(not ({self.text(test)}))"

    def call(self, node: ast.Call):
        name = _last_name(node.func)
        if name in RENAMED:
            end = self.span(node.func)[1]
            yield "renamed", (end - len(name), end), RENAMED[name]
        if _is_message(node.func):
            return
        if not any(isinstance(arg, ast.Starred) for arg in node.args) and name not in NOT_SWAPPED:
            for a, b in zip(node.args, node.args[1:]):
                if self.text(a) != self.text(b):
                    (start, middle), (other, end) = self.span(a), self.span(b)
                    yield "swapped", (start, end), self.text(b) + self.data[middle:other].decode() + self.text(a)
        for gone in node.keywords:
            if gone.arg is not None:
                rest = [self.text(part) for part in node.args] + [self.text(k) for k in node.keywords if k is not gone]
                yield "keyword", self.span(node), f"{self.text(node.func)}({', '.join(rest)})"


def _own_lines(statement: ast.stmt) -> range:
    """Return the lines of a statement, without those of its inner statements."""
    body = [child for child in ast.iter_child_nodes(statement) if isinstance(child, (ast.stmt, ast.ExceptHandler))]
    last = body[0].lineno - 1 if body else statement.end_lineno
    return range(statement.lineno, max(statement.lineno, last) + 1)


def _other_constants(value) -> list[str]:
    if isinstance(value, bool):
        return [str(not value)]
    if isinstance(value, int):
        near = [value + 1] + [value - 1] * (value > 0) + [round(value * 1.01)] * (value >= 100)
        return [str(number) for number in near]
    if isinstance(value, float):
        return [repr(float(f"{value * 1.01:.6g}")) if value else "1.0"]
    if isinstance(value, str) and not re.search(r"\s\S|\S\s", value):
        return [repr(value + "X")]
    return []


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, (str, bytes)))


def _last_name(node: ast.AST) -> str:
    return getattr(node, "attr", getattr(node, "id", ""))


def _is_message(function: ast.AST) -> bool:
    name = _last_name(function)
    return name in MESSAGES or name.endswith(("Error", "Warning"))


def sample(mutants: list[Mutant], seed: int) -> list[Mutant]:
    """Shuffle mutants so that they spread over lines; edits elsewhere in the module do not change the order."""
    draw = lambda *words: hashlib.sha256(" ".join(map(str, words)).encode()).digest()
    lines: dict[str, list[Mutant]] = {}
    for mutant in sorted(mutants, key=lambda mutant: draw(seed, mutant.id)):
        place = f"{mutant.scope}\0{mutant.scope.encode()[: mutant.offset].count(10)}"
        lines.setdefault(place, []).append(mutant)
    order = sorted(lines, key=lambda place: draw(seed, place))
    rounds = range(max(map(len, lines.values()), default=0))
    return [lines[place][i] for i in rounds for place in order if i < len(lines[place])]
