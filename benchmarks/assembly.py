"""What is in the inner loops of a compiled kernel: its matrix instructions, and everything else.

Two kinds of assembly are read: SASS as nvdisasm prints it, and amdgcn. A loop is what the flow graph calls one (a
branch back to a block that dominates it), so that blocks which the compiler moved elsewhere still count.
"""

import re
from typing import NamedTuple


class Instruction(NamedTuple):
    """One instruction, the labels before it, the label that it may jump to, and whether the next one may follow."""

    name: str
    labels: tuple[str, ...] = ()
    target: str | None = None
    falls_through: bool = True


class Loop(NamedTuple):
    """Instructions in one pass through a loop: matrix instructions, and all others."""

    matrix: int
    others: int


_SASS = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?P<guard>@!?\w+\s+)?(?P<name>[A-Z][\w.]*)(?P<rest>[^;]*);")
_AMD = re.compile(r"\s+(?P<name>[a-z]\w*)(?P<rest>[^;]*)")
_LABEL = re.compile(r"(?P<name>[.$\w]+):")


def sass(text: str) -> list[Instruction]:
    """Instructions of `nvdisasm -c`."""
    found, labels = [], []
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels.append(label["name"])
        elif line_found := _SASS.search(line):
            name, rest = line_found["name"], line_found["rest"]
            kind = name.split(".")[0]
            # A call of a label within the function is a jump of another name, which ptxas uses to leave loops.
            target = re.search(r"`\((\.L\w+)\)", rest) if kind in ("BRA", "CALL", "JMP") else None
            # "BRA.U UP0, `(.L_x_1)" has its condition among the operands.
            is_sure = line_found["guard"] is None and "," not in rest
            falls_through = not (is_sure and kind in ("BRA", "JMP", "EXIT", "RET"))
            found.append(Instruction(name, tuple(labels), target and target[1], falls_through))
            labels = []
    return found


def bytes_spilled(text: str) -> int:
    """Bytes that the stores to local memory in `nvdisasm -c` write: the kernels keep nothing else there."""
    return sum(int(bits or 32) // 8 for bits in re.findall(r"\sSTL(?:\.(\d+))?\s", text))


def amdgcn(text: str) -> list[Instruction]:
    """Instructions of the AMD back end's assembly, which ends with the function's end; what follows is data."""
    found, labels = [], []
    for line in text.splitlines():
        if line.startswith(".Lfunc_end"):
            break
        if label := _LABEL.match(line):
            labels.append(label["name"])
        elif line_found := _AMD.match(line):
            name, rest = line_found["name"], line_found["rest"]
            target = rest.strip() if name == "s_branch" or name.startswith("s_cbranch") else None
            found.append(Instruction(name, tuple(labels), target, name not in ("s_branch", "s_endpgm")))
            labels = []
    return found


def inner_loops(code: list[Instruction], matrix: str) -> list[Loop]:
    """The innermost loops with an instruction whose name begins with `matrix`, in the order of their first one."""
    blocks = _blocks(code)
    bodies = _loops(_edges(code, blocks))
    loops = []
    for header in sorted(bodies):
        names = [i.name for block in bodies[header] for i in code[blocks[block][0] : blocks[block][1]]]
        loops.append((bodies[header], Loop(n := sum(name.startswith(matrix) for name in names), len(names) - n)))
    loops = [(body, loop) for body, loop in loops if loop.matrix]
    return [loop for body, loop in loops if not any(other < body for other, _ in loops)]


def _blocks(code: list[Instruction]) -> list[tuple[int, int]]:
    """Begin and end of each basic block."""
    begins = {i for i, one in enumerate(code) if one.labels}
    begins |= {i + 1 for i, one in enumerate(code) if one.target or not one.falls_through}
    begins = sorted((begins | {0}) - {len(code)})
    return list(zip(begins, [*begins[1:], len(code)]))


def _edges(code: list[Instruction], blocks: list[tuple[int, int]]) -> list[list[int]]:
    """For each block the blocks that may follow."""
    places = {label: n for n, (begin, _) in enumerate(blocks) for label in code[begin].labels}
    edges = []
    for n, (_, end) in enumerate(blocks):
        last = code[end - 1]
        next_block = [n + 1] if last.falls_through and n + 1 < len(blocks) else []
        edges.append(next_block + ([places[last.target]] if last.target in places else []))
    return edges


def _loops(edges: list[list[int]]) -> dict[int, set[int]]:
    """Natural loops: the block at the head of each, and all of its blocks."""
    reached, todo = {0}, [0]
    while todo:
        new = set(edges[todo.pop()]) - reached
        reached |= new
        todo += new
    before = {n: [m for m in reached if n in edges[m]] for n in reached}
    dominators = {n: set(reached) for n in reached} | {0: {0}}
    is_changing = True
    while is_changing:
        is_changing = False
        for n in sorted(reached - {0}):
            new = {n} | set.intersection(*(dominators[m] for m in before[n]))
            is_changing |= new != dominators[n]
            dominators[n] = new
    bodies: dict[int, set[int]] = {}
    for tail in reached:
        for head in set(edges[tail]) & dominators[tail]:
            body = bodies.setdefault(head, {head})
            todo = [tail]
            while todo:
                n = todo.pop()
                if n not in body:
                    body.add(n)
                    todo += before[n]
    return bodies
