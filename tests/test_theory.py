"""The guide in `docs/theory.md`: what it quotes and what it shows is there."""

import re
from pathlib import Path

import pytest

from mnist_ddpm import MNISTDDPMScheduler, VariationalBound

ROOT = Path(__file__).resolve().parent.parent
GUIDE = (ROOT / "docs" / "theory.md").read_text(encoding="utf-8")


def quotations():
    """Each quoted piece of code, and the file that was named last before it."""
    for block in re.finditer(r"```(?!bash)\w+\n(.*?)```", GUIDE, re.DOTALL):
        file = re.findall(r"`((?:src|examples)/[\w/]+\.py)`", GUIDE[: block.start()])[-1]
        yield pytest.param(file, block[1].splitlines(), id=block[1].splitlines()[0].strip())


@pytest.mark.parametrize(("file", "lines"), list(quotations()))
def test_quoted_lines_stand_in_the_file(file, lines):
    code = [line.partition("  # ")[0].strip() for line in (ROOT / file).read_text(encoding="utf-8").splitlines()]
    quoted = [line.strip() for line in lines]
    assert any(code[i : i + len(quoted)] == quoted for i in range(len(code)))


def test_costs_of_the_schedules_are_those_of_the_table():
    schedules = [("linear", 1000), ("squaredcos_cap_v2", 1000), ("squaredcos_cap_v2", 4000)]
    bounds = [
        VariationalBound(MNISTDDPMScheduler(num_train_timesteps=T, beta_schedule=name, variance_type="fixed_large"))
        for name, T in schedules
    ]
    costs = [bound.schedule_cost() for bound in bounds]
    for key, row in {"background_decoder": "L_0 of a black", "variance_mismatch": "all L_{t-1} of a"}.items():
        cells = " | ".join(f"{cost[key]:.3f}" for cost in costs)
        assert re.search(rf"^\| {re.escape(row)}[^|]*\| {re.escape(cells)} \|$", GUIDE, re.MULTILINE), cells
