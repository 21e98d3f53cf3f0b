"""Votes of a blind page, read with its key: win rates with intervals.

A vote counts 1 for the set it prefers, 1/2 for each where they are about the same, 0 for the other. Votes of
several people on one pair of images are not independent, so the unit is the pair: its score is the mean over
its voters, the win rate the mean over pairs, and the interval is that of a mean of one score per pair
(`estimate.mean_interval`: bootstrap-t, Wilson's where all scores are 0 or 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastgen.core.errors import UserError
from fastgen.core.reading import read_json
from fastgen.evaluation.human_view import KEY_FORMAT
from fastgen.evaluation.metrics.estimate import mean_of, share_of
from fastgen.export.markdown import table

CHOICES = ("left", "right", "tie")
KEY, FILES = "--key", "votes"
AGAIN = "save it again from the blind page"
MOST_BYTES = 2**27


class Vote(NamedTuple):
    """One person's word on pair `pair` of the page: left, right or tie."""

    voter: str
    pair: int
    choice: str


@dataclass
class Key:
    """What a blind page does not say: the names on both sides of every pair."""

    page: str
    sets: list[str]
    pairs: list[dict[str, Any]]


def read_key(path: Path) -> Key:
    """key.json of `fastgen-eval view`; UserError where it is not one."""
    found = read_json(path, KEY, "give the key.json that was written with the page", MOST_BYTES)
    page, sets, pairs = (found.get(k) for k in ("page", "sets", "pairs"))
    whole = isinstance(page, str) and isinstance(sets, list) and isinstance(pairs, list) and bool(pairs)
    if found.get("format") != KEY_FORMAT or not whole or not all(_is_pair(p, sets) for p in pairs or []):
        raise UserError(KEY, f"{path} is no key of a blind page", "give the key.json written with the page")
    return Key(str(page), sets or [], pairs or [])


def _is_pair(pair: Any, sets: list | None) -> bool:
    sides = [pair.get(k) for k in ("left", "right")] if isinstance(pair, dict) else []
    return len(sides) == 2 and all(s in (sets or []) for s in sides) and isinstance(pair.get("prompt"), str)


def read_votes(files: Sequence[Path], key: Key) -> list[Vote]:
    """All votes of files that belong to the key's page, one file a voter."""
    found: list[Vote] = []
    of: dict[str, Path] = {}
    for path in files:
        document = read_json(path, FILES, AGAIN, MOST_BYTES)
        page, voter, votes = (document.get(k) for k in ("page", "voter", "votes"))
        if not (isinstance(page, str) and isinstance(voter, str) and isinstance(votes, list)):
            raise UserError(FILES, f"{path} holds no votes", AGAIN)
        if page != key.page:
            instruction = "give the key.json of that page with --key"
            raise UserError(FILES, f"{path} is of page {page[:32]}, the key of page {key.page}", instruction)
        if voter in of:
            found_twice = f"{of[voter]} and {path} are both of voter {voter[:60]!r}"
            raise UserError(FILES, found_twice, "give one of them, or change the name in one")
        of[voter] = path
        found += _checked(path, voter, votes, len(key.pairs))
    if not found:
        raise UserError(FILES, "no votes in the files given", "vote on the blind page and save")
    return found


def _checked(path: Path, voter: str, votes: list, num: int) -> list[Vote]:
    found: dict[int, Vote] = {}
    for entry in votes:
        pair, choice = (entry.get(k) for k in ("pair", "choice")) if isinstance(entry, dict) else (None, None)
        if not (type(pair) is int and 0 <= pair < num and choice in CHOICES) or pair in found:
            twice = type(pair) is int and pair in found
            what = f"votes twice on pair {pair}" if twice else f"holds the vote {str(entry)[:60]!r}"
            raise UserError(FILES, f"{path} {what}", AGAIN)
        found[pair] = Vote(voter, pair, str(choice))
    return list(found.values())


def score_of(vote: Vote, key: Key, name: str) -> float:
    """1, 1/2 or 0 for the set of that name, which is on one side of the pair."""
    if vote.choice == "tie":
        return 0.5
    return float(key.pairs[vote.pair][vote.choice] == name)


def tally(votes: list[Vote], key: Key) -> dict[str, Any]:
    """Win rates of every two sets with intervals, by voter and by prompt; the share of votes for the left."""
    duels = []
    for a, b in combinations(key.sets, 2):
        own = [v for v in votes if {key.pairs[v.pair]["left"], key.pairs[v.pair]["right"]} == {a, b}]
        if own:
            duels.append(_duel(own, key, a, b))
    decided = [v for v in votes if v.choice != "tie"]
    left = sum(v.choice == "left" for v in decided) / len(decided) if decided else None
    return {
        "page": key.page,
        "votes": len(votes),
        "voters": len({v.voter for v in votes}),
        "left_share": left,
        "duels": duels,
    }


def _duel(votes: list[Vote], key: Key, a: str, b: str) -> dict[str, Any]:
    scores = [score_of(v, key, a) for v in votes]
    found: dict[str, Any] = {"set": a, "against": b}
    found |= {k: scores.count(v) for k, v in (("wins", 1.0), ("ties", 0.5), ("losses", 0.0))}
    found |= _rate(votes, scores)
    low, high = found["low"], found["high"]
    found["verdict"] = "better" if low > 0.5 else "worse" if high < 0.5 else "undecided"
    found["agreement"] = _agreement(votes)
    found["by_voter"] = {k: _rate(*chosen) for k, chosen in _split(votes, scores, lambda v: v.voter)}
    by_prompt = _split(votes, scores, lambda v: key.pairs[v.pair]["prompt"])
    found["by_prompt"] = {k: _rate(*chosen) for k, chosen in by_prompt}
    return found


def _split(votes: list[Vote], scores: list[float], name_of) -> list[tuple[str, tuple[list, list]]]:
    """(name, (its votes, their scores)) for each name, in order."""
    groups: dict[str, tuple[list, list]] = {}
    for vote, score in zip(votes, scores):
        group = groups.setdefault(name_of(vote), ([], []))
        group[0].append(vote)
        group[1].append(score)
    return sorted(groups.items())


def _rate(votes: list[Vote], scores: list[float]) -> dict[str, Any]:
    """Mean over pairs of the mean over voters, its interval, and of how many pairs and votes."""
    by_pair: dict[int, list[float]] = {}
    for vote, score in zip(votes, scores):
        by_pair.setdefault(vote.pair, []).append(score)
    means = torch.tensor([sum(s) / len(s) for s in by_pair.values()], dtype=torch.float64)
    decided = bool(((means == 0) | (means == 1)).all())  # a share of pairs: no tie, and all voters agree
    low, high = (share_of(means) if decided else mean_of(means)).interval()
    rate = {"win_rate": float(means.mean()), "low": max(low, 0.0), "high": min(high, 1.0)}
    return {**rate, "pairs": len(means), "votes": len(votes)}


def _agreement(votes: list[Vote]) -> float | None:
    """Share of pairs of voters who say the same of a pair of images; None where no two saw the same."""
    by_pair: dict[int, list[str]] = {}
    for vote in votes:
        by_pair.setdefault(vote.pair, []).append(vote.choice)
    same = [x == y for choices in by_pair.values() for x, y in combinations(choices, 2)]
    return sum(same) / len(same) if same else None


def markdown(found: dict[str, Any], per_prompt: bool = False) -> str:
    """Tables of a tally."""
    people = f"{found['voters']} voter{'s' * (found['voters'] != 1)}"
    lines = ["# Votes", "", f"{found['votes']} votes of {people}.", ""]
    header = ["", "against", "win rate", "wins", "ties", "losses", "pairs", ""]
    rows = [
        [d["set"], d["against"], _shown(d), d["wins"], d["ties"], d["losses"], d["pairs"], d["verdict"]]
        for d in found["duels"]
    ]
    lines += [*table(header, rows), ""]
    if found["voters"] > 1:
        rows = [[d["set"], d["against"], n, _shown(r), r["votes"]] for d, n, r in _each(found, "by_voter")]
        lines += ["## By voter", "", *table(["", "against", "voter", "win rate", "votes"], rows), ""]
        lines += [
            f"- voters agree on {d['agreement']:.0%} of what two of them saw ({d['set']}, {d['against']})"
            for d in found["duels"]
            if d["agreement"] is not None
        ]
    if per_prompt:
        rows = [[d["set"], d["against"], n, _shown(r), r["votes"]] for d, n, r in _each(found, "by_prompt")]
        lines += ["", "## By prompt", "", *table(["", "against", "prompt", "win rate", "votes"], rows), ""]
    lines += ["- win rate: wins and half the ties, mean over pairs of images, with its 95 % interval"]
    if found["left_share"] is not None:
        lines += [f"- of the votes that decide, {found['left_share']:.0%} are for the left side"]
    return "\n".join(lines) + "\n"


def _each(found: dict[str, Any], by: str):
    return [(d, name, rate) for d in found["duels"] for name, rate in d[by].items()]


def _shown(rate: dict[str, Any]) -> str:
    """60 % [48, 71]; an interval needs two pairs."""
    value = f"{rate['win_rate']:.0%}"
    return value if rate["low"] != rate["low"] else f"{value} [{rate['low']:.0%}, {rate['high']:.0%}]"
