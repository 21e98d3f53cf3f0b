"""`python -m fastgen.families --write FILE`: the table between its marks, and nothing lost."""

import pytest

from fastgen.families.__main__ import BEGIN, END, main

# name -> content of the file; None: missing
WRONG = {
    "missing": None,
    "folder": "",
    "binary": b"\xff\xfe",
    "no marks": b"a\n",
    "no end": f"a\n{BEGIN}\nold\nPRECIOUS\n".encode(),
    "no begin": f"a\n{END}\nPRECIOUS\n".encode(),
    "end first": f"{END}\nPRECIOUS\n{BEGIN}\n".encode(),
    "two blocks": f"{BEGIN}\n{END}\nPRECIOUS\n{BEGIN}\n{END}\n".encode(),
}


@pytest.mark.parametrize("name", WRONG)
def test_refused_in_one_line_and_nothing_is_lost(name, tmp_path, capsys, monkeypatch):
    file, content = tmp_path / "a.md", WRONG[name]
    if name == "folder":
        file.mkdir()
    elif content is not None:
        file.write_bytes(content)
    monkeypatch.setattr("sys.argv", ["families", "--write", str(file)])
    with pytest.raises(SystemExit) as left:
        main()
    err = capsys.readouterr().err
    assert left.value.code == 2 and err.count("\n") == 1 and err.startswith("error: --write"), err
    assert not isinstance(content, bytes) or file.read_bytes() == content


def test_the_block_alone_is_renewed(tmp_path, monkeypatch):
    file = tmp_path / "a.md"
    file.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    monkeypatch.setattr("sys.argv", ["families", "--write", str(file)])
    main()
    text = file.read_text()
    assert text.startswith(f"before\n{BEGIN}\n| family |") and text.endswith(f"{END}\nafter\n")
    assert "old" not in text
