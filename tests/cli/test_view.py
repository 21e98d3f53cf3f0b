"""fastgen-eval view and votes: pages for people, what the blind one keeps to itself, win rates, mistakes."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastgen.cli.evaluate import main
from fastgen.evaluation.metrics.estimate import wilson
from fastgen.evaluation.votes import Key, Vote, tally
from tests.support.browser import CHROMIUM, WIDER, browser

PROMPTS = ["a red boot", "a <b>blue</b> bag", "a coat"]


def pictures(folder, colour, num=6, size=24):
    """Pictures of one colour each, darker by number."""
    folder.mkdir(parents=True)
    for i in range(num):
        Image.new("RGB", (size, size), tuple(max(0, c - 7 * i) for c in colour)).save(folder / f"{i:03d}.png")
    return folder


@pytest.fixture
def two(tmp_path):
    """(reddish set, bluish set, a file of prompts)."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    red, blue = pictures(tmp_path / "red", (250, 40, 40)), pictures(tmp_path / "blue", (40, 40, 250))
    return red, blue, tmp_path / "prompts.txt"


def view(two, out, *argv) -> int:
    red, blue, prompts = two
    return main(["view", *map(str, (red, blue, "--out", out, "--prompts", prompts, *argv))])


def saved(path, key, choose, voter="ann"):
    """A file as the page saves it: `choose` says left, right or tie of a pair of the key, or None."""
    votes = [{"pair": i, "choice": c} for i, pair in enumerate(key["pairs"]) if (c := choose(i, pair))]
    path.write_text(json.dumps({"format": 1, "page": key["page"], "voter": voter, "votes": votes}))
    return path


def side_of(pair, name):
    return "left" if pair["left"] == name else "right"


def test_pages_pair_by_prompt_and_the_blind_one_names_no_set(two, tmp_path, capsys):
    assert view(two, tmp_path / "look", "--names", "teacher", "student") == 0
    key = json.loads((tmp_path / "look/key.json").read_text())
    assert [p["prompt"] for p in sorted(key["pairs"], key=lambda p: p["image"])] == PROMPTS * 2
    assert {p["left"] for p in key["pairs"]} == {"teacher", "student"}, "sides are mixed"
    assert [p["image"] for p in key["pairs"]] != sorted(p["image"] for p in key["pairs"])
    blind = (tmp_path / "look/blind.html").read_text()
    assert not re.search("teacher|student|red/|blue/", blind) and key["page"] in blind
    assert not re.search(r"(src|href)=.?http", blind)
    beside = (tmp_path / "look/side_by_side.html").read_text()
    assert beside.count("<img") == 12 and "a &lt;b&gt;blue" in beside and "<b>" not in beside
    assert view(two, tmp_path / "again", "--names", "teacher", "student") == 0
    assert (tmp_path / "again/key.json").read_text() == (tmp_path / "look/key.json").read_text()
    assert view(two, tmp_path / "other", "--names", "teacher", "student", "--seed", 1) == 0
    other = json.loads((tmp_path / "other/key.json").read_text())
    assert other["pairs"] != key["pairs"] and other["page"] != key["page"]


def test_three_sets_and_fewer_rows(two, tmp_path, capsys):
    third = pictures(tmp_path / "green", (40, 250, 40))
    assert main(["view", *map(str, (*two[:2], third, "--num", 4, "--out", tmp_path / "o"))]) == 0
    key = json.loads((tmp_path / "o/key.json").read_text())
    assert len(key["pairs"]) == 3 * 4 and key["sets"] == ["red", "blue", "green"]


def test_large_pictures_stay_close(tmp_path):
    from fastgen.evaluation.human_view import picture

    image = torch.arange(3 * 300 * 300).remainder(251).reshape(3, 300, 300).byte()
    assert picture(image).startswith("data:image/jpeg") and picture(image[..., :200]).startswith(
        "data:image/png"
    )


def test_win_rates_of_several_voters(two, tmp_path, capsys):
    """Ann prefers the first set on five of six pairs, Bob calls all equal: (11/12 + 1/2) / 2, by hand."""
    assert view(two, tmp_path / "look") == 0
    key = json.loads((tmp_path / "look/key.json").read_text())
    ann = saved(tmp_path / "ann.json", key, lambda i, p: side_of(p, "red" if i else "blue"))
    bob = saved(tmp_path / "look/bob.json", key, lambda i, p: "tie", "bob")
    argv = ["votes", str(bob), str(ann), "--out", str(tmp_path / "tally.json"), "--per_prompt"]
    capsys.readouterr()
    assert main(argv) == 0
    found = json.loads((tmp_path / "tally.json").read_text())
    (duel,) = found["duels"]
    assert (duel["wins"], duel["ties"], duel["losses"]) == (5, 6, 1) and found["voters"] == 2
    assert duel["win_rate"] == pytest.approx((5 * 0.75 + 0.25) / 6)
    assert duel["by_voter"]["bob"]["win_rate"] == 0.5 and duel["agreement"] == 0
    ann_only = duel["by_voter"]["ann"]
    low, high = wilson(5, 6)
    assert (ann_only["low"], ann_only["high"]) == pytest.approx((low, high))
    assert set(duel["by_prompt"]) == set(PROMPTS) and duel["low"] <= duel["win_rate"] <= duel["high"]
    out = capsys.readouterr().out
    assert "| red | blue | 67%" in out and "a <b>blue</b> bag" in out and "left side" in out
    assert "agree on 0%" in out


def test_the_interval_is_about_pairs_not_about_votes():
    """Ten people who say the same of four pairs are four scores, not forty."""
    key = Key("p", ["a", "b"], [{"left": "a", "right": "b", "prompt": ""}] * 4)
    votes = [Vote(str(v), pair, "left") for v in range(10) for pair in range(4)]
    (duel,) = tally(votes, key)["duels"]
    assert (duel["low"], duel["high"]) == pytest.approx(wilson(4, 4)) and duel["agreement"] == 1
    assert duel["verdict"] == "better" if wilson(4, 4).low > 0.5 else "undecided"
    (one,) = tally(votes[:1], key)["duels"]
    assert one["verdict"] == "undecided"


def test_mistakes_are_one_line(two, tmp_path, capsys):
    red, blue, prompts = two
    fewer = pictures(tmp_path / "fewer", (9, 9, 9), num=5)
    odd = pictures(tmp_path / "odd", (9, 9, 9))
    (odd / "003.png").rename(odd / "009.png")
    np.savez(tmp_path / "five.npz", arr_0=np.zeros((5, 24, 24, 3), np.uint8))
    out = ("--out", tmp_path / "new")
    for argv, said in (
        (("view", red, *out), "sets: one given"),
        (("view", red, fewer, *out), "fewer lacks 005.png"),
        (("view", red, odd, *out), "odd lacks 003.png"),
        (("view", red, tmp_path / "five.npz", *out), "holds 5 images, red 6"),
        (("view", red, tmp_path / "none", *out), "is not a folder"),
        (("view", red, red, *out), "two sets are called"),
        (("view", red, blue, *out, "--names", "x"), "--names: 1 for 2 sets"),
        (("view", red, blue, *out, "--num", 0), "--num: found 0"),
        (("view", red, blue, "--out", prompts), "is a file"),
    ):
        assert main([str(a) for a in argv]) == 2
        error = capsys.readouterr().err.strip().splitlines()
        assert error[-1].startswith("error: ") and said in error[-1], error
    assert not (tmp_path / "new").exists()
    assert view(two, tmp_path / "look") == 0
    before = (tmp_path / "look/key.json").read_bytes()
    assert view(two, tmp_path / "look", "--seed", 2) == 2 and "holds" in capsys.readouterr().err
    assert (tmp_path / "look/key.json").read_bytes() == before


def test_sets_of_other_prompts_do_not_pair(tmp_path, capsys):
    sets = []
    for name, texts in (("a", "xy"), ("b", "zy")):
        folder = pictures(tmp_path / name, (200, 90, 20), num=2)
        images = [{"file": f"{i:03d}.png", "condition": t} for i, t in enumerate(texts)]
        (folder / "samples.json").write_text(json.dumps({"images": images}))
        sets.append(folder)
    assert main(["view", *map(str, (*sets, "--out", tmp_path / "o"))]) == 2
    assert "image 0 is of 'x' in a, of 'z' in b" in capsys.readouterr().err


def test_votes_that_cannot_be_read(two, tmp_path, capsys):
    assert view(two, tmp_path / "look") == 0 and view(two, tmp_path / "other", "--seed", 3) == 0
    key, other = (json.loads((tmp_path / d / "key.json").read_text()) for d in ("look", "other"))
    good = saved(tmp_path / "good.json", key, lambda i, p: "left")
    strange = saved(tmp_path / "strange.json", other, lambda i, p: "left")
    same = saved(tmp_path / "same.json", key, lambda i, p: "right")
    empty = saved(tmp_path / "empty.json", key, lambda i, p: None)
    entries = {"choice": [{"pair": 0, "choice": "up"}], "pair": [{"pair": 99, "choice": "left"}]}
    entries["twice"] = [{"pair": 0, "choice": "left"}] * 2
    for name, votes in entries.items():
        text = {"page": key["page"], "voter": "z", "votes": votes}
        (tmp_path / f"{name}.json").write_text(json.dumps(text))
    capsys.readouterr()
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "list.json").write_text("{}")
    key_flag = ("--key", tmp_path / "look/key.json")
    for argv, said in (
        ((good,), "key.json does not exist"),
        ((strange, *key_flag), f"is of page {other['page']}, the key of page {key['page']}"),
        ((good, same, *key_flag), "are both of voter 'ann'"),
        ((empty, *key_flag), "no votes in the files"),
        ((tmp_path / "choice.json", *key_flag), "holds the vote"),
        ((tmp_path / "pair.json", *key_flag), "holds the vote"),
        ((tmp_path / "twice.json", *key_flag), "votes twice on pair 0"),
        ((tmp_path / "broken.json", *key_flag), "broken.json"),
        ((tmp_path / "list.json", *key_flag), "holds no votes"),
        ((tmp_path / "none.json", *key_flag), "none.json"),
        ((good, "--key", good), "is no key of a blind page"),
    ):
        assert main(["votes", *map(str, argv)]) == 2
        error = capsys.readouterr().err.strip().splitlines()
        assert len(error) == 1 and error[0].startswith("error: ") and said in error[0], error


@pytest.mark.skipif(not CHROMIUM, reason="no chromium here")
def test_a_person_votes_in_a_browser(two, tmp_path, capsys):
    """By mouse and keys; progress outlives a reload; the saved file is what `votes` reads."""
    assert view(two, tmp_path / "look") == 0
    key = json.loads((tmp_path / "look/key.json").read_text())
    with browser() as open_page:
        page, problems = open_page((tmp_path / "look/blind.html").as_uri(), 900, 700)
        page.fill("#voter", "Ann B")
        page.locator("#left").click()
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowDown")
        page.reload()
        assert page.locator("#count").inner_text() == "pair 4 of 6, 3 voted"
        assert page.locator("#voter").input_value() == "Ann B"
        page.keyboard.press("Backspace")
        assert "on" in page.locator("#tie").get_attribute("class")
        page.locator("#right").click()
        assert page.locator("#prompt").inner_text() == key["pairs"][3]["prompt"]
        if folder := os.environ.get("FASTGEN_SCREENSHOTS"):
            page.screenshot(path=Path(folder) / "blind.png", full_page=True)
        with page.expect_download() as download:
            page.locator("#save").click()
        download.value.save_as(tmp_path / "ann.json")
        assert download.value.suggested_filename == "votes-Ann_B.json" and problems == []
        assert page.evaluate(WIDER) == []
        narrow, _ = open_page((tmp_path / "look/side_by_side.html").as_uri(), 400, 700)
        assert narrow.evaluate(WIDER) == []
        if folder:
            narrow.screenshot(path=Path(folder) / "side_by_side.png")
    said = json.loads((tmp_path / "ann.json").read_text())
    assert [(v["pair"], v["choice"]) for v in said["votes"]] == [(0, "left"), (1, "right"), (2, "right")]
    assert "red" not in (tmp_path / "ann.json").read_text()
    assert main(["votes", str(tmp_path / "ann.json"), "--key", str(tmp_path / "look/key.json")]) == 0
    assert "3 votes of 1 voter" in capsys.readouterr().out
