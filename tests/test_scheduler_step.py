"""The benchmark of the schedulers runs and writes down what it says."""

import json

import pytest
import scheduler_step


def test_it_writes_every_case_with_its_command(tmp_path):
    output = tmp_path / "new" / "result.json"
    argv = ["--rounds", "1", "--num_inference_steps", "2", "--device", "cpu", "--output", str(output)]
    report = scheduler_step.main(scheduler_step.parse_args(argv))
    assert json.loads(output.read_text(encoding="utf-8")) == report
    assert len(report["rows"]) == 2 * len(scheduler_step.SHAPES) * 3
    assert {row["work"] for row in report["rows"]} == {"step", "add_noise", "loop"}
    for row in report["rows"]:
        assert row["ratio"] == pytest.approx(row["ours_us"] / row["diffusers_us"], rel=0.05, abs=1e-3)
    assert report["command"].startswith("python benchmarks/scheduler_step.py --rounds 1")


def test_a_senseless_number_of_rounds_is_refused(capsys):
    with pytest.raises(SystemExit):
        scheduler_step.parse_args(["--rounds", "0"])
    assert "--rounds: must be 1 or more, got 0" in capsys.readouterr().err
