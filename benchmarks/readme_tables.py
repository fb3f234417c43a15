"""Write the figures of the README from `benchmarks/results/*.json`, or check that they are what stands there."""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SECTION = re.compile(r"(?<=<!-- results:begin -->\n).*?(?=<!-- results:end -->)", re.DOTALL)

Result = dict[str, Any]


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, rule, *rows])


def origins(results: dict[str, Result]) -> str:
    """How each result was made, a line each."""
    versions = "torch {torch}, diffusers {diffusers}"
    return "\n".join(
        f"- `{result['command']}` ({result['machine']}; {versions.format_map(result['versions'])})"
        for result in results.values()
    )


def scores(results: dict[str, Result]) -> str:
    """What `examples/evaluate.py` wrote: a row for each file, each score beside that of real test images."""

    def cell(result: Result, name: str, digits: str) -> str:
        return " / ".join(format(result[of][name], digits) for of in ("scores", "floor"))

    def shares(result: Result) -> str:
        class_shares = result["scores"]["class_shares"]
        return f"{min(class_shares):.1%} to {max(class_shares):.1%}"

    columns = {"fid": ".2f", "kid": ".4f", "precision": ".3f", "recall": ".3f", "confident_share": ".1%"}
    rows = [
        [name, f"{result['num_images']['samples']:,}", *(cell(result, *c) for c in columns.items()), shares(result)]
        for name, result in results.items()
    ]
    titles = ["FID", "KID", "precision", "recall", "confidence >= 0.9", "rarest to most frequent digit"]
    return (
        "Samples / as many real test images, against the training images, on the features of the MNIST classifier\n"
        "that comes with the package (not Inception's, so these are no scores to compare with other papers'):\n\n"
        + f"{table(['', 'images', *titles], rows)}\n\n{origins(results)}"
    )


def schedulers(results: dict[str, Result]) -> str:
    """What `benchmarks/every_scheduler.py` wrote: a row for each scheduler."""
    (result,) = results.values()
    rows = [
        [f"`{score['class']}`", f"{score['confident_share']:.1%}", f"{score['confidence']:.3f}"]
        for score in result["schedulers"].values()
    ]
    return (
        f"One model through each scheduler by `from_config`, {result['num_inference_steps']} steps, "
        f"{result['num_images']} images each:\n\n"
        f"{table(['', 'confidence >= 0.9', 'mean confidence'], rows)}\n\n"
        "![The same noise through each of them, in the order of the table](assets/schedulers.png)\n\n"
        f"{origins(results)}"
    )


def classifier(results: dict[str, Result]) -> str:
    """What `examples/train_classifier.py` wrote: one sentence."""
    (result,) = results.values()
    return (
        f"The classifier that reads the digits is right on {result['test_accuracy']:.2%} of the "
        f"{result['num_test_images']:,} test images.\n\n{origins(results)}"
    )


def training(results: dict[str, Result]) -> str:
    """What `benchmarks/training_curve.py` wrote: one sentence on the run that made the weights of the package."""
    (result,) = (result["training"] for result in results.values())
    return (
        f"The weights of the package: {result['steps']:,} steps in {result['seconds'] / 60:.0f} minutes, "
        f"{result['images_per_second']} images per second; mean loss of the last {result['loss_window']} steps "
        f"{result['loss'][-1]:.4f}.\n\n- `{result['command']}` ({result['machine']})"
    )


def scheduler_step(results: dict[str, Result]) -> str:
    """What `benchmarks/scheduler_step.py` wrote: a row for a scheduler and a shape, a column for a kind of work."""
    (result,) = results.values()
    columns = list(dict.fromkeys(row["work"] for row in result["rows"]))
    ratios: dict[tuple[str, ...], dict[str, str]] = {}
    for row in result["rows"]:
        shape = " x ".join(map(str, row["shape"]))
        ratios.setdefault((row["scheduler"], shape, row["device"]), {})[row["work"]] = f"{row['ratio']:.2f}"
    rows = [[", ".join(key), *(of_work[work] for work in columns)] for key, of_work in ratios.items()]
    threads = result["machine"]["threads"]
    names = [result["machine"]["cpu"], f"threads: {threads}", result["machine"]["gpu"]]
    return (
        "Our time as a multiple of that of diffusers' scheduler of the same name (less is better).\n"
        "`set_timesteps` is asked for another number of steps each time, and places them exactly;\n"
        "`set_same_timesteps` and `loop` ask for the same number again, as repeated sampling does, and find the\n"
        "table of the last request.\n\n"
        f"{table(['', *(f'`{work}`' for work in columns)], rows)}\n\n"
        f"- `python benchmarks/scheduler_step.py --num_threads {threads}` ({', '.join(filter(None, names))})"
    )


def memory(results: dict[str, Result]) -> str:
    """What `benchmarks/memory.py` wrote: a row for training and for each number of sampled images."""
    (result,) = results.values()
    training = result["training_memory"]
    rows = [[f"training, {training['steps']} steps", f"{training['peak_bytes'] / 2**20:,.0f}"]]
    rows += [
        [f"sampling {row['num_images']:,} images to files", f"{row['peak_bytes'] / 2**20:,.0f}"]
        for row in result["sampling_memory"]
    ]
    return (
        "Peak memory of a process (its largest resident set, with Python and PyTorch in it): training at the\n"
        f"defaults of `examples/train.py`, and sampling {result['batch_size']['sampling']} images at a time by "
        "`examples/sample.py`:\n\n"
        f"{table(['', 'MiB'], rows)}\n\n{origins(results)}"
    )


def tested_versions(results: dict[str, Result]) -> str:
    """What `benchmarks/versions.py` wrote: a column for each set of versions."""
    (result,) = results.values()
    runs = dict(sorted(result["tested_versions"].items(), reverse=True))  # the oldest first
    names = list(next(iter(runs.values()))["installed"])
    rows = [[name, *(run["installed"][name] for run in runs.values())] for name in names]
    rows += [[f"tests {word}", *(str(run[word]) for run in runs.values())] for word in ("passed", "skipped", "failed")]
    commands = "\n".join(f"- `{run['command']}` ({run['machine']})" for run in runs.values())
    return f"All tests, on the oldest and the newest versions:\n\n{table(['', *runs], rows)}\n\n{commands}"


def kills(results: dict[str, Result]) -> str:
    """What `benchmarks/kills.py` wrote: how many runs ended in which way, and that it made no difference."""
    (result,) = results.values()
    counts = {kind: count for kind, count in result["kills"].items() if kind != "total"}
    seconds, damaged = result["seconds_from_signal_to_exit"], result["damaged_checkpoints_passed_over"]
    rows = [[ENDS[kind], str(count)] for kind, count in counts.items()]
    return (
        f"{result['chains']} training runs of 12 steps were ended before their time, {result['kills']['total']} times "
        "in all, and resumed\nfrom the latest checkpoint. Of these runs, "
        f"{len(result['failures'])} differ in any bit from one that was left alone, in\n"
        f"{result['files_compared']} files: weights, average, optimizer, log, pictures, pipeline. Checkpoints damaged "
        f"by a kill: {damaged['by kills']}; damaged by\nhand, found and passed over: {damaged['by hand']}. From "
        f"SIGTERM or SIGINT to the exit: {seconds['median']:.1f} s (median), {seconds['max']:.1f} s (at most), of a "
        f"tiny U-Net.\n\n{table(['', 'times'], rows)}\n\n{origins(results)}"
    )


ENDS = {
    "kill": "SIGKILL between two operations on files",
    "tear": "killed inside a write",
    "tear log": "killed inside a line of the log",
    "full": "disk full, from one operation on",
    "term": "SIGTERM at an operation",
    "int": "SIGINT at an operation",
    "term twice": "SIGTERM twice in a row",
    "random kill": "SIGKILL at a random moment",
    "random term": "SIGTERM at a random moment",
    "random int": "SIGINT at a random moment",
}

# by a key that only this kind of result has
KINDS = {
    "training": training,
    "scores": scores,
    "schedulers": schedulers,
    "test_accuracy": classifier,
    "rows": scheduler_step,
    "sampling_memory": memory,
    "tested_versions": tested_versions,
    "kills": kills,
}


def section(folder: Path) -> str:
    """The README's section on results: what there is of each kind, and the commands."""
    results = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    parts = []
    for key, render in KINDS.items():
        if of_kind := {name: result for name, result in results.items() if key in result}:
            parts.append(render(of_kind) + "\n")
    return "\n".join(parts)


def main(argv: list[str] | None = None) -> None:
    """Write the section, or check it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the README is out of date")
    args = parser.parse_args(argv)
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    updated = SECTION.sub(lambda _: section(ROOT / "benchmarks" / "results"), text)
    if args.check:
        if updated != text:
            sys.exit("error: README.md is out of date: run `python benchmarks/readme_tables.py`")
    else:
        readme.write_text(updated, encoding="utf-8")


if __name__ == "__main__":
    main()
