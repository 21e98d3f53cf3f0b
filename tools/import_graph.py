"""The rooms of the package and who imports whom, read from the source without importing it.

  python -m tools.import_graph           counts: rooms, levels, arrows, upward imports, cycles
  python -m tools.import_graph --write   also draws docs/figures/rooms.svg

`ROOMS` is the order that tests/test_house.py holds every module to.
"""

import argparse
import ast
from collections.abc import Sequence
from itertools import permutations, product
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FIGURE = ROOT / "docs/figures/rooms.svg"
ROOMS = (
    "core",
    "diffusion",
    "families",
    "networks",
    "threed",
    "data",
    "roles",
    "sampling",
    "objectives",
    "config",
    "export",
    "evaluation",
    "training",
    "cli",
)
"""from the lowest up: a room imports those before it and itself, never one behind it"""
PURPOSE = {
    "core": "errors, files, random numbers",
    "diffusion": "schedules, losses",
    "families": "what each network does differently",
    "networks": "any denoiser as D(x_t, t, cond)",
    "threed": "cameras, splats and fields",
    "data": "images, labels, prompts",
    "roles": "teacher, student, critic",
    "sampling": "solvers, few-step sampler",
    "objectives": "one file per method",
    "config": "settings, YAML and flags",
    "export": "diffusers folders, LoRA files",
    "evaluation": "metrics, grids, report",
    "training": "the loop, checkpoints",
    "cli": "the commands",
}

Graph = dict[str, set[str]]


def name_of(path: Path) -> str:
    """Dotted name of a file of the checkout."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(p): p for p in sorted((ROOT / "fastgen").rglob("*.py"))}


def imports(path: Path) -> set[str]:
    """Dotted names of every import in a file, at any depth: the module where one is meant."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, f"{path}: imports are absolute"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in MODULES else node.module)
    return found


def room_of(module: str) -> str:
    """The room a module of the package stands in; empty for any other module, and for the hall itself."""
    room = module.split(".")[1] if module.startswith("fastgen.") else ""
    return "" if room == "__main__" else room


def upward(module: str, imported: set[str]) -> list[str]:
    """The imports of a module that go to a higher room."""
    own = ROOMS.index(room_of(module))
    return sorted(m for m in imported if room_of(m) and ROOMS.index(room_of(m)) > own)


def module_graph() -> Graph:
    """Module -> the modules of the package that it imports, lazily or not."""
    return {m: imports(p) & set(MODULES) - {m} for m, p in MODULES.items()}


def room_graph(modules: Graph) -> Graph:
    """Room -> the other rooms that its modules import."""
    rooms: Graph = {room: set() for room in ROOMS}
    for module, imported in modules.items():
        if room := room_of(module):
            rooms[room] |= {room_of(m) for m in imported} - {room, ""}
    return rooms


def cycle(graph: Graph) -> list[str]:
    """One cycle of a directed graph, its first node repeated at the end; an empty list if there is none."""
    done: set[str] = set()

    def follow(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        for child in sorted(graph.get(node, ())):
            if found := follow(child, [*path, node]):
                return found
        done.add(node)
        return []

    return next((found for node in sorted(graph) if (found := follow(node, []))), [])


def levels(graph: Graph) -> dict[str, int]:
    """The longest way down from each node of a graph without cycles; 0 imports nothing."""
    found: dict[str, int] = {}

    def level(node: str) -> int:
        if node not in found:
            found[node] = max((level(child) + 1 for child in graph[node]), default=0)
        return found[node]

    for node in graph:
        level(node)
    return found


def direct(graph: Graph) -> Graph:
    """The arrows that do not follow from others: a -> c is left out where a -> b and b reaches c."""

    def reach(node: str) -> set[str]:
        return graph[node].union(*(reach(child) for child in graph[node]))

    return {node: out - set().union(*(reach(child) for child in out)) for node, out in graph.items()}


def counts() -> dict[str, int]:
    """What is printed and tested."""
    modules = module_graph()
    rooms = room_graph(modules)
    return {
        "rooms": len(rooms),
        "levels": max(levels(rooms).values()) + 1,
        "arrows": sum(map(len, rooms.values())),
        "modules": len(modules),
        "upward imports": sum(len(upward(m, imported)) for m, imported in modules.items() if room_of(m)),
        "cycles": int(bool(cycle(modules))) + int(bool(cycle(rooms))),
    }


WIDTH, HEIGHT, GAP_X, GAP_Y, MARGIN, SIDE = 236, 50, 40, 34, 14, 90
Point = tuple[float, float]
Places = dict[str, Point]
"""upper left corner of each room's box"""


def svg(graph: Graph) -> str:
    """The rooms by level, the lowest at the bottom; arrows that follow from others are left out."""
    place, arrows = places(graph), drawn(graph)
    width = max(x for x, _ in place.values()) + WIDTH + MARGIN + SIDE
    height = max(y for _, y in place.values()) + HEIGHT + MARGIN
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
        'font-family="sans-serif">',
        "<title>The rooms of fastgen: an arrow points to what a room imports</title>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto"><path d="M0 0 8 4 0 8z" fill="#556"/></marker></defs>',
        f'<rect width="{width:g}" height="{height:g}" fill="#fff"/>',
    ]
    lines += [_arrow(place, *arrow) for arrow in arrows]
    lines += [_box(room, *place[room]) for room in graph]
    return "\n".join([*lines, "</svg>", ""])


def drawn(graph: Graph) -> list[tuple[str, str]]:
    """The arrows of the picture."""
    return [(room, below) for room, out in direct(graph).items() for below in sorted(out)]


def places(graph: Graph) -> Places:
    """Where the boxes stand: a row for each level, ordered to keep arrows short and off boxes."""
    level, arrows = levels(graph), drawn(graph)
    rows = [[room for room in graph if level[room] == n] for n in range(max(level.values()) + 1)]
    orders = product(*(permutations(row) for row in rows))
    return min(map(_in_rows, orders), key=lambda one: _cost(one, arrows))


def _in_rows(rows: Sequence[Sequence[str]]) -> Places:
    """Boxes in rows from the lowest up, each row in the middle."""
    wide = max(map(len, rows))
    place: Places = {}
    for n, row in enumerate(rows):
        left = MARGIN + SIDE + (wide - len(row)) * (WIDTH + GAP_X) / 2
        for i, room in enumerate(row):
            place[room] = (left + i * (WIDTH + GAP_X), MARGIN + (len(rows) - 1 - n) * (HEIGHT + GAP_Y))
    return place


def _cost(place: Places, arrows: list[tuple[str, str]]) -> tuple[int, float]:
    """Boxes that arrows run behind, and how far arrows lean."""
    hits = sum(len(behind(place, *arrow)) for arrow in arrows)
    return hits, sum(abs(place[room][0] - place[below][0]) for room, below in arrows)


def _around(place: Places, room: str, below: str, right: bool) -> tuple[Point, ...]:
    """The four points of a curve from box to box, around those between them on one side."""
    (x1, y1), (x2, y2) = place[room], place[below]
    y1, y2 = y1 + 0.7 * HEIGHT, y2 + 0.3 * HEIGHT
    xs = [x for x, _ in place.values()]
    bend = max(xs) + WIDTH + 1.5 * SIDE if right else min(xs) - 1.5 * SIDE
    x1, x2 = (x1 + WIDTH, x2 + WIDTH + 1) if right else (x1, x2 - 1)
    return (x1, y1), (bend, y1), (bend, y2), (x2, y2)


def _hit(place: Places, curve: tuple[Point, ...], ends: tuple[str, str]) -> set[str]:
    """The boxes that a cubic curve runs through, its ends apart."""
    found = set()
    for step in range(1, 100):
        s = step / 100
        weights = ((1 - s) ** 3, 3 * s * (1 - s) ** 2, 3 * s**2 * (1 - s), s**3)
        x, y = (sum(w * p[axis] for w, p in zip(weights, curve)) for axis in (0, 1))
        found |= {r for r, (x0, y0) in place.items() if x0 <= x <= x0 + WIDTH and y0 <= y <= y0 + HEIGHT}
    return found - set(ends)


def behind(place: Places, room: str, below: str) -> set[str]:
    """The boxes that the arrow between two rooms runs behind, on its better side."""
    if not _far(place, room, below):
        return set()
    return min((_hit(place, _around(place, room, below, r), (room, below)) for r in (False, True)), key=len)


def _far(place: Places, room: str, below: str) -> bool:
    """Whether there is a level between two rooms."""
    return place[below][1] - place[room][1] > HEIGHT + GAP_Y


def _box(room: str, x: float, y: float) -> str:
    text = f'<text x="{x + WIDTH / 2:g}" text-anchor="middle"'
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{WIDTH}" height="{HEIGHT}" rx="6" fill="#eef3fa" stroke="#557"/>'
        f'{text} y="{y + 21:g}" font-size="16" font-weight="bold">{room}</text>'
        f'{text} y="{y + 40:g}" font-size="13">{PURPOSE[room]}</text>'
    )


def _arrow(place: Places, room: str, below: str) -> str:
    """From a box to the one a level lower, or around the boxes between them."""
    (x1, y1), (x2, y2) = place[room], place[below]
    if _far(place, room, below):
        curves = [_around(place, room, below, right) for right in (False, True)]
        a, b, c, d = min(curves, key=lambda one: len(_hit(place, one, (room, below))))
        line = f"M{a[0]:g} {a[1]:g} C{b[0]:g} {b[1]:g} {c[0]:g} {c[1]:g} {d[0]:g} {d[1]:g}"
    else:
        lean = max(-0.35, min(0.35, (x2 - x1) / (4 * WIDTH))) * WIDTH
        line = f"M{x1 + WIDTH / 2 + lean:g} {y1 + HEIGHT:g} L{x2 + WIDTH / 2 - lean:g} {y2 - 1:g}"
    return f'<path d="{line}" fill="none" stroke="#556" stroke-width="1.4" marker-end="url(#tip)"/>'


def main() -> None:
    flags = argparse.ArgumentParser("python -m tools.import_graph", description=__doc__.splitlines()[0])
    flags.add_argument("--write", action="store_true", help=f"draw {FIGURE.relative_to(ROOT)}")
    if flags.parse_args().write:
        FIGURE.parent.mkdir(parents=True, exist_ok=True)
        FIGURE.write_text(svg(room_graph(module_graph())))
    for name, count in counts().items():
        print(f"{name}: {count}")


if __name__ == "__main__":
    main()
