"""Count the matrix instructions and all others in the inner loops of a compiled kernel.

Reads SASS as nvdisasm prints it, and amdgcn. Loops are found in the flow graph (a branch back to a block that dominates
it), so that blocks which the compiler moved elsewhere still count.
"""

import re
from typing import NamedTuple


class Instruction(NamedTuple):
    """One instruction, the labels before it, its jump target, and whether the next instruction can follow it."""

    name: str
    labels: tuple[str, ...] = ()
    target: str | None = None
    falls_through: bool = True


class Loop(NamedTuple):
    """Numbers of instructions in one pass through a loop."""

    matrix: int
    others: int


_SASS = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?P<guard>@!?\w+\s+)?(?P<name>[A-Z][\w.]*)(?P<rest>[^;]*);")
_AMD = re.compile(r"\s+(?P<name>[a-z]\w*)(?P<rest>[^;]*)")
_LABEL = re.compile(r"(?P<name>[.$\w]+):")


def sass(text: str) -> list[Instruction]:
    """Read the instructions that `nvdisasm -c` prints."""
    found, labels = [], []
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels.append(label["name"])
        elif line_found := _SASS.search(line):
            name, rest = line_found["name"], line_found["rest"]
            kind = name.split(".")[0]
            # ptxas also leaves loops by a call of a label within the function.
            target = re.search(r"`\((\.L\w+)\)", rest) if kind in ("BRA", "CALL", "JMP") else None
            # The condition of "BRA.U UP0, `(.L_x_1)" is an operand.
            is_sure = line_found["guard"] is None and "," not in rest
            falls_through = not (is_sure and kind in ("BRA", "JMP", "EXIT", "RET"))
            found.append(Instruction(name, tuple(labels), target and target[1], falls_through))
            labels = []
    return found


def bytes_spilled(text: str) -> int:
    """Count the bytes that `nvdisasm -c` stores to local memory, which the kernels use for spills only."""
    return sum(int(bits or 32) // 8 for bits in re.findall(r"\sSTL(?:\.(\d+))?\s", text))


def amdgcn(text: str) -> list[Instruction]:
    """Read the instructions of the AMD back end's assembly, up to the end of the function; data follows."""
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
    """Find the innermost loops with an instruction whose name begins with `matrix`, in the order of their heads."""
    blocks = _blocks(code)
    bodies = _loops(_edges(code, blocks))
    loops = []
    for header in sorted(bodies):
        names = [i.name for block in bodies[header] for i in code[blocks[block][0] : blocks[block][1]]]
        loops.append((bodies[header], Loop(n := sum(name.startswith(matrix) for name in names), len(names) - n)))
    loops = [(body, loop) for body, loop in loops if loop.matrix]
    return [loop for body, loop in loops if not any(other < body for other, _ in loops)]


def _blocks(code: list[Instruction]) -> list[tuple[int, int]]:
    """Find the begin and end of each basic block."""
    begins = {i for i, one in enumerate(code) if one.labels}
    begins |= {i + 1 for i, one in enumerate(code) if one.target or not one.falls_through}
    begins = sorted((begins | {0}) - {len(code)})
    return list(zip(begins, [*begins[1:], len(code)]))


def _edges(code: list[Instruction], blocks: list[tuple[int, int]]) -> list[list[int]]:
    """List the possible successors of each block."""
    places = {label: n for n, (begin, _) in enumerate(blocks) for label in code[begin].labels}
    edges = []
    for n, (_, end) in enumerate(blocks):
        last = code[end - 1]
        next_block = [n + 1] if last.falls_through and n + 1 < len(blocks) else []
        edges.append(next_block + ([places[last.target]] if last.target in places else []))
    return edges


def _loops(edges: list[list[int]]) -> dict[int, set[int]]:
    """Find the natural loops: the head of each, with all of its blocks."""
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
