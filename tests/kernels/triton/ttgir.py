"""Lints of compiled kernels: what Triton 3.6 compiles to wrong numbers on Hopper, without a message.

Transposed accumulators that become operands, `tl.dot(tl.trans(acc), x)` (Triton 3.4 to 3.7; fla-org/flash-linear-attention#640).
In TTGIR it shows as a `tt.trans` of what a dot gave, still in an accumulator's layout, whose result reaches a dot's operand, in
registers or through a `local_alloc`. A transpose that is only stored is right, and so is one of what was loaded.

Operands that are overwritten while they are multiplied: a loop that runs ahead, in which a tile is both an operand and read
otherwise, gets one buffer too few for it. The copy for a later round then goes where a product that nobody has waited for reads.
"""

import re
from dataclasses import dataclass, field

NAME = re.compile(r"%[\w$.-]+(?:#\d+)?")
DOTS = ("ttng.warp_group_dot", "tt.dot", "tt.dot_scaled")
# a value ends here: what comes out was in memory, or is a sum that no layout of the summands survives
ENDS = (*DOTS, "tt.load", "tt.descriptor_load", "ttg.local_load", "tt.reduce")
MEMORY_LAYOUTS = ("#ttg.blocked", "#ttg.slice")


@dataclass
class Value:
    op: str
    line: str
    operands: list[str]


@dataclass
class Graph:
    """Values by SSA name; `sources` also holds what loops and branches carry: name -> the names it may be."""

    values: dict[str, Value] = field(default_factory=dict)
    sources: dict[str, set[str]] = field(default_factory=dict)

    def link(self, name: str, source: str) -> None:
        self.sources.setdefault(name, set()).add(source)

    def users(self) -> dict[str, set[str]]:
        out: dict[str, set[str]] = {}
        for name, sources in self.sources.items():
            for source in sources:
                out.setdefault(source, set()).add(name)
        return out


def miscompiled_transposes(ttgir: str) -> list[str]:
    """The lines that transpose an accumulator on its way to a dot."""
    graph = read(ttgir)
    layouts = dict(re.findall(r"^(#\w+) = (#[\w.]+)", ttgir, re.MULTILINE))
    dots = {name for name, v in graph.values.items() if v.op in DOTS}
    operands = {x for name in dots for x in graph.values[name].operands[:2]}
    users, found = graph.users(), []
    for name, value in graph.values.items():
        layout = re.search(r":\s*tensor<[^>]*?,\s*(#[\w.]+)", value.line)
        if value.op != "tt.trans" or layout is None or layouts.get(layout[1], layout[1]).startswith(MEMORY_LAYOUTS):
            continue
        if _reaches(name, dots, graph.sources, graph) and _reaches(name, operands, users, graph):
            found.append(value.line.strip())
    return found


def overwritten_operands(ttgir: str) -> list[str]:
    """The copies in loops that go to a buffer which a product may still read.

    Of B buffers, filled by d copies before the loop, round i fills the one of round i + d - B. When it does, products of p rounds may be
    under way: this one and those before it, or where the copy comes before the wait, those before it alone.
    """
    buffers, views, copied, found = {}, {}, {}, []  # view -> its buffers; buffers -> copies so far
    regions: list[dict] = []  # every open one; of a loop its copies, operands in use, products and waits
    for at, line in enumerate(ttgir.splitlines()):
        text = re.sub(r"\s*loc\(.*$", "", line).strip()
        name = text.partition(" = ")[0]
        if made := re.search(r"ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x\d+x\d+x.*mutable>", text):
            buffers[name] = int(made[1])
        elif view := re.search(r"= ttg\.memdesc_(?:index|trans|subslice|reinterpret) (%[\w$.-]+)", text):
            views[name] = views.get(view[1], view[1])
        loop = next((x for x in reversed(regions) if x), None)
        seen = {views[x] for x in NAME.findall(text) if views.get(x) in buffers}
        if "async_copy_global_to_local" in text or "async_tma_copy_global_to_local" in text:
            for target in seen:
                copied[target] = copied.get(target, 0) + 1
                if loop is not None:
                    loop["copies"].append((target, at, text))
        elif loop is not None and "warp_group_dot " in text and "isAsync = true" in text:
            loop["operands"] |= seen
            loop["products"] += 1
        elif loop is not None and (wait := re.search(r"warp_group_dot_wait.*pendings = (\d+)", text)):
            loop["waits"].append((int(wait[1]), at))
        if text.startswith("}") and regions:
            found += _overwriting(regions.pop(), buffers, copied)
        if text.endswith("{"):
            regions.append({"copies": [], "operands": set(), "products": 0, "waits": []} if "scf.for" in text else {})
    return found


def _overwriting(loop: dict, buffers: dict[str, int], copied: dict[str, int]) -> list[str]:
    pendings, waited = max(loop.get("waits", ()), default=(0, 0))
    rounds = -(-pendings // max(1, loop.get("products", 1)))
    found = []
    for target, at, text in loop.get("copies", ()):
        before = copied[target] - sum(other == target for other, _, _ in loop["copies"])
        if target in loop["operands"] and rounds and buffers[target] - before < rounds + (at < waited):
            found.append(text)
    return found


def _reaches(start: str, goals: set[str], neighbours: dict[str, set[str]], graph: Graph) -> bool:
    seen, todo = set(), [start]
    while todo:
        name = todo.pop()
        if name in goals:
            return True
        if name in seen or (name in graph.values and graph.values[name].op in ENDS):
            continue
        seen.add(name)
        todo += neighbours.get(name, ())
    return False


def read(ttgir: str) -> Graph:
    graph = Graph()
    regions: list[tuple[list[str], list[str]]] = []  # of every open one: the results it gives, the arguments it carries
    for line in ttgir.splitlines():
        text = re.sub(r"\s*loc\(.*$", "", line).strip()
        match = re.match(r'(%[\w$.-]+)(?::(\d+))?\s*=\s*"?([\w.]+)"?(.*)', text)
        results, carried = [], []
        if match:
            results = [f"{match[1]}#{i}" for i in range(int(match[2]))] if match[2] else [match[1]]
            carried = _define(graph, results, match[3], match[4], text)
        elif text.startswith("scf.yield") and regions:
            given, arguments = regions[-1]
            for i, x in enumerate(NAME.findall(text)):
                for name in (*given[i : i + 1], *arguments[i : i + 1]):
                    graph.link(name, x)
        if text.startswith("}") and regions:
            closed = regions.pop()
            if not match:
                results, carried = closed  # of `} else {`
        if text.endswith("{"):
            regions.append((results, carried))
    return graph


def _define(graph: Graph, results: list[str], op: str, rest: str, text: str) -> list[str]:
    """Enter one line; the arguments that it carries from round to round, if it is a loop."""
    if op == "scf.for":
        pairs = re.findall(r"(%[\w$.-]+) = (%[\w$.#-]+)", rest.partition("iter_args(")[2])
        for result, (argument, start) in zip(results, pairs, strict=True):
            graph.link(argument, start)
            graph.link(result, argument)
        return [argument for argument, _ in pairs]
    if op in ("scf.if", "scf.while"):
        return []
    operands = NAME.findall(rest)
    for i, name in enumerate(results):
        graph.values[name] = Value(op, text, operands)
        own = operands[i : i + 1] if len(results) == len(operands) else operands  # warp_group_dot_wait gives back what it takes
        for x in own:
            graph.link(name, x)
    return []
