"""Command lines of tests: what a test adds replaces what its base sets, as a flag may be given only once."""


def last_of_each(argv: list) -> list[str]:
    """The command line with the last value of each flag; --prompt and --image may stand several times."""
    found: dict[str, list[str]] = {}
    name = ""
    for i, word in enumerate(map(str, argv)):
        if word.startswith("--"):
            name = word.partition("=")[0]
            name = f"{name} {i}" if name in ("--prompt", "--image") else name
            found[name] = [word]
        else:
            found.setdefault(name, []).append(word)
    return [word for words in found.values() for word in words]
