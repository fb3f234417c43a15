"""The guide in `docs/theory.md`: what it quotes and what it shows is there."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
GUIDE = (ROOT / "docs" / "theory.md").read_text(encoding="utf-8")


def quotations():
    """Each quoted piece of code, and the file that was named last before it."""
    for block in re.finditer(r"```(?!bash)\w+\n(.*?)```", GUIDE, re.DOTALL):
        file = re.findall(r"`((?:src|examples)/[\w/]+\.py)`", GUIDE[: block.start()])[-1]
        yield pytest.param(file, block[1].splitlines(), id=block[1].splitlines()[0].strip())


@pytest.mark.parametrize(("file", "lines"), list(quotations()))
def test_quoted_lines_stand_in_the_file(file, lines):
    code = [line.strip() for line in (ROOT / file).read_text(encoding="utf-8").splitlines()]
    quoted = [line.strip() for line in lines]
    assert any(code[i : i + len(quoted)] == quoted for i in range(len(code)))


def commands():
    """Each command that the guide gives, in words."""
    for block in re.finditer(r"```bash\n(.*?)```", GUIDE, re.DOTALL):
        for line in block[1].splitlines():
            yield pytest.param(shlex.split(line), id=line[:60])


@pytest.mark.parametrize("words", list(commands()))
def test_commands_are_understood(words):
    """The flags alone; to run them takes hours."""
    (script,) = (word for word in words if word.endswith(".py"))
    module = importlib.import_module(Path(script).stem)
    assert (ROOT / script).exists()
    module.parse_args(words[words.index(script) + 1 :])


def test_every_formula_of_the_document_is_there():
    assert {int(n) for n in re.findall(r"\bD(\d+)\b", GUIDE)} >= set(range(1, 15))


def test_every_picture_is_there():
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", GUIDE)
    assert len(pictures) >= 3
    for picture in pictures:
        assert (ROOT / "docs" / picture).exists(), picture
