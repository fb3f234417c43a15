"""Write the figures of README and guide from `benchmarks/results/*.json`, or check that they are what stands there.

Each document has sections, between `<!-- name:begin -->` and `<!-- name:end -->`, of some kinds of result each.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = (ROOT / "README.md", ROOT / "benchmarks" / "README.md", ROOT / "docs" / "theory.md")
SECTION = re.compile(r"<!-- (?P<name>\w+):begin -->\n.*?<!-- (?P=name):end -->", re.DOTALL)

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


def properties(results: dict[str, Result]) -> str:
    """What `benchmarks/properties.py` wrote: one sentence."""
    (result,) = results.values()
    return (
        f"Searched cases of good and of bad input: {result['cases']:,}, of which {result['accepted_share']:.0%} were "
        f"accepted and checked,\nand the others refused by an error that names the argument. "
        f"Failures: {len(result['failures'])}.\n\n{origins(results)}"
    )


def noise_table(results: dict[str, Result]) -> str:
    """What `benchmarks/sampling_noise.py` wrote: a row for a kind of noise, a column for a number of steps."""
    (result,) = results.values()
    steps = list(dict.fromkeys(n for cells in result["noise_table"].values() for n in cells))
    rows = [
        [name, *(f"{cells[n]['fid']:.2f}" if n in cells else "" for n in steps)]
        for name, cells in result["noise_table"].items()
    ]
    return (
        f"FID of {result['settings']['num_images']} samples of the package's weights, by the number of steps "
        f"(as many real images: {result['floor']['fid']:.2f}):\n\n"
        f"{table(['', *(f'{n} steps' for n in steps)], rows)}\n\n{origins(results)}"
    )


def schedules(results: dict[str, Result]) -> str:
    """What `benchmarks/schedules.py` wrote: a row for a schedule and a seed."""
    (result,) = results.values()
    runs = result["runs"]
    steps = list(next(iter(runs.values()))["fid"])
    rows = [
        [
            name.replace("-", ", seed "),
            f"{run['bits_per_dim']['total']:.3f}",
            f"{run['bits_per_dim']['L_0']:.3f}",
            *(f"{run['fid'][n]['fid']:.2f}" for n in steps),
        ]
        for name, run in runs.items()
    ]
    titles = ["bits per dimension", "of them L_0", *(f"FID, {n} steps" for n in steps)]
    picture = (
        "![alpha_bar and SNR of both schedules, loss and bound over t, FID over steps](../assets/schedules.png)\n\n"
    )
    return f"{picture}{table(['', *titles], rows)}\n\n{origins(results)}"


def likelihood(results: dict[str, Result]) -> str:
    """What `benchmarks/likelihood.py` wrote: a row for each choice that is changed."""
    (result,) = results.values()
    rows = [
        [name, f"{bound['total']:.3f} +- {bound['standard_error']:.3f}", f"{bound['L_0']:.3f}", f"{bound['L_T']:.3f}"]
        for name, bound in result["likelihood"].items()
    ]
    return (
        f"After {result['settings']['max_train_steps']:,} steps, with all choices, with one of them changed, and with "
        "none of them:\n\n"
        f"{table(['', 'bits per dimension', 'of them `L_0`', 'of them `L_T`'], rows)}\n\n{origins(results)}"
    )


def bits_per_dim(results: dict[str, Result]) -> str:
    """What `examples/evaluate.py --bits_per_dim` wrote: a row for each model."""
    parts = ("total", "standard_error", "L_T", "sum of L_{t-1}", "L_0")
    rows = []
    for result in results.values():
        bound, words = result["bits_per_dim"], result["command"].split()
        model = f"`{words[words.index('--model') + 1]}`, {bound['variance_type']}"
        rows.append([model, f"{bound['num_images']:,}", *(f"{bound[part]:.3f}" for part in parts)])
    titles = ["test images", "bits per dimension, at most", "standard error", *(f"`{part}`" for part in parts[2:])]
    return f"{table(['', *titles], rows)}\n\n{origins(results)}"


def recipes(results: dict[str, Result]) -> str:
    """What `benchmarks/recipes.py` wrote: a row for each change."""
    (result,) = results.values()
    settings, floor = result["settings"], result["floor"]["fid"]
    fid = {change: recipe["fid"] for change, recipe in result["recipes"].items()}
    chance = abs(fid["another seed"] - fid["none"])

    def verdict(change: str) -> str:
        difference = fid[change] - fid["none"]
        return "as good" if abs(difference) <= chance else "better" if difference < 0 else "worse"

    rows = [
        [
            change,
            f"{recipe['training_images_per_second']:.0f}",
            f"{recipe['fid']:.2f}",
            f"{recipe['confident_share']:.0%}",
            verdict(change),
        ]
        for change, recipe in result["recipes"].items()
    ]
    titles = ["images per second", "FID", "confidence >= 0.9", "than the default, which is kept"]
    return (
        f"After {settings['minutes']:g} minutes of training on {result['threads']} thread(s); "
        f"{settings['num_images']:,} samples in {settings['num_inference_steps']} DDIM steps; "
        f'floor {floor:.2f}.\n"As good" is what differs by no more than another seed does:\n\n'
        f"{table(['change', *titles], rows)}\n\n{origins(results)}"
    )


def time_to_quality(results: dict[str, Result]) -> str:
    """What `benchmarks/time_to_quality.py` wrote: FID over time for each contender, sampling, aims."""
    (result,) = results.values()
    contenders, sampling = result["contenders"], result["sampling"]
    scored = {name: {round(point["minutes"], 1): point for point in c["curve"]} for name, c in contenders.items()}
    sampled = {name: {point["num_inference_steps"]: point for point in points} for name, points in sampling.items()}
    minutes = sorted({m for points in scored.values() for m in points})
    together = max(m for m in minutes if all(m in points for points in scored.values()))
    speed = {
        name: (scored[name][together]["steps"] - 1) * c["batch_size"] / (60 * scored[name][together]["minutes"])
        for name, c in contenders.items()
    }

    training_rows = [
        [
            f"`{name}`",
            f"{c['parameters'] / 1e6:.1f} M",
            f"{speed[name]:.0f}",
            f"{speed[name] / speed['stock']:.1f}",
            *(f"{scored[name][m]['fid']:.1f}" if m in scored[name] else "" for m in minutes),
        ]
        for name, c in contenders.items()
    ]
    training_titles = ["parameters", "images per second", "times stock", *(f"FID, {m:g} min" for m in minutes)]
    sampling_rows = [
        [f"`{name}`", str(steps), f"{point['samples_per_second']:.1f}", f"{point['fid']:.2f}"]
        for name, points in sampled.items()
        for steps, point in points.items()
    ]

    ours, stock = sampled["ours"], sampled["stock"]
    best = min(point["fid"] for point in ours.values())
    aims = [
        ["training images per second, times `stock`", "at least 10", f"{speed['ours'] / speed['stock']:.1f}"],
        ["training images per second, times `tuned`", "at least 3", f"{speed['ours'] / speed['tuned']:.1f}"],
        [
            "FID after 10 minutes",
            f"below {scored['stock'][60]['fid']:.1f}, `stock` after 60",
            f"{scored['ours'][10]['fid']:.1f}",
        ],
        [
            "samples per second in 50 steps, times `stock`",
            "at least 10",
            f"{ours[50]['samples_per_second'] / stock[50]['samples_per_second']:.1f}",
        ],
        ["FID in 10 steps, times that in 1000", "at most 2", f"{ours[10]['fid'] / ours[1000]['fid']:.2f}"],
        ["FID in 10 steps, times the best of any number", "", f"{ours[10]['fid'] / best:.2f}"],
    ]
    return (
        f"Training on {result['threads']} threads; images per second over the first {together:g} minutes, in which "
        f"all took turns;\nFID of {result['num_images']:,} samples in {result['num_inference_steps']} DDIM steps "
        f"(as many real images: {result['floor']['fid']:.2f}):\n\n"
        f"{table(['', *training_titles], training_rows)}\n\n"
        "![Time against FID, and samples per second against FID](assets/time_to_quality.png)\n\n"
        "Sampling, at the end of each training:\n\n"
        f"{table(['', 'DDIM steps', 'samples per second', 'FID'], sampling_rows)}\n\n"
        f"What was aimed at:\n\n{table(['', 'aim', '`ours`'], aims)}\n\n{origins(results)}"
    )


# by a key that only this kind of result has
KINDS = {
    "training": training,
    "scores": scores,
    "contenders": time_to_quality,
    "schedulers": schedulers,
    "test_accuracy": classifier,
    "rows": scheduler_step,
    "sampling_memory": memory,
    "tested_versions": tested_versions,
    "kills": kills,
    "cases": properties,
    "recipes": recipes,
    "bits_per_dim": bits_per_dim,
    "likelihood": likelihood,
    "runs": schedules,
    "noise_table": noise_table,
}
SECTIONS = {
    "results": ("training", "scores", "contenders", "schedulers", "test_accuracy", "rows"),
    "recipes": ("recipes",),
    "robustness": ("sampling_memory", "tested_versions", "kills", "cases"),
    "likelihood": ("bits_per_dim", "likelihood"),
    "schedules": ("runs",),
    "sampling_noise": ("noise_table",),
}


def section(name: str, folder: Path) -> str:
    """A section: what there is of each of its kinds, and the commands."""
    results = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    parts = []
    for key in SECTIONS[name]:
        if of_kind := {stem: result for stem, result in results.items() if key in result}:
            parts.append(KINDS[key](of_kind) + "\n")
    return "\n".join(parts)


def updated(text: str, folder: Path) -> str:
    """A document with its sections as they should be."""

    def rewrite(old: re.Match[str]) -> str:
        name = old["name"]
        return f"<!-- {name}:begin -->\n{section(name, folder)}<!-- {name}:end -->"

    return SECTION.sub(rewrite, text)


def main(argv: list[str] | None = None) -> None:
    """Write the sections, or check them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a document is out of date")
    args = parser.parse_args(argv)
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        new = updated(text, ROOT / "benchmarks" / "results")
        if args.check and new != text:
            sys.exit(f"error: {path.relative_to(ROOT)} is out of date: run `python benchmarks/readme_tables.py`")
        if not args.check:
            path.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
