"""The rooms of the package and who imports whom, read from the source without importing it.

  python -m tools.import_graph           counts: rooms, levels, arrows, upward imports, cycles
  python -m tools.import_graph --write   also draws docs/figures/rooms.svg

`ROOMS` is the order that tests/test_house.py holds every module to.
"""

import argparse
import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FIGURE = ROOT / "docs/figures/rooms.svg"
ROOMS = (
    "core",
    "diffusion",
    "families",
    "networks",
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


def svg(graph: Graph) -> str:
    """The rooms by level, the lowest at the bottom; arrows that follow from others are left out."""
    level = levels(graph)
    top = max(level.values())
    rows = [[room for room in graph if level[room] == n] for n in range(top + 1)]
    wide = max(map(len, rows))
    width = 2 * (MARGIN + SIDE) + wide * WIDTH + (wide - 1) * GAP_X
    height = 2 * MARGIN + (top + 1) * HEIGHT + top * GAP_Y
    place: dict[str, tuple[float, float]] = {}
    for n, row in enumerate(rows):
        left = (width - len(row) * WIDTH - (len(row) - 1) * GAP_X) / 2
        for i, room in enumerate(row):
            place[room] = (left + i * (WIDTH + GAP_X), MARGIN + (top - n) * (HEIGHT + GAP_Y))
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">',
        "<title>The rooms of fastgen: an arrow points to what a room imports</title>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto"><path d="M0 0 8 4 0 8z" fill="#556"/></marker></defs>',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
    ]
    lines += [_arrow(place, room, below) for room, out in direct(graph).items() for below in sorted(out)]
    lines += [_box(room, *place[room]) for room in graph]
    return "\n".join([*lines, "</svg>", ""])


def _box(room: str, x: float, y: float) -> str:
    text = f'<text x="{x + WIDTH / 2:g}" text-anchor="middle"'
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{WIDTH}" height="{HEIGHT}" rx="6" fill="#eef3fa" stroke="#557"/>'
        f'{text} y="{y + 21:g}" font-size="16" font-weight="bold">{room}</text>'
        f'{text} y="{y + 40:g}" font-size="13">{PURPOSE[room]}</text>'
    )


def _arrow(place: dict[str, tuple[float, float]], room: str, below: str) -> str:
    """From a box to the one a level lower, or around the boxes between them on the left-hand side."""
    (x1, y1), (x2, y2) = place[room], place[below]
    if y2 - y1 > HEIGHT + GAP_Y:
        bend = min(x for x, _ in place.values()) - 1.5 * SIDE
        start, end = y1 + HEIGHT / 2, y2 + HEIGHT / 2
        line = f"M{x1:g} {start:g} C{bend:g} {start:g} {bend:g} {end:g} {x2 - 1:g} {end:g}"
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
