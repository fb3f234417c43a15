"""Write the tables of the documents from `benchmarks/results/*.json`, or check them with --check.

A section of a document stands between `<!-- name:begin -->` and `<!-- name:end -->`.
"""

import argparse
import json
import re
import sys
from pathlib import Path

import training_tables as of_training
from tables import Result, origins, table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = (
    ROOT / "README.md",
    *(ROOT / "docs" / f"{name}.md" for name in ("results", "theory", "labels", "few_steps")),
)
SECTION = re.compile(r"<!-- (?P<name>\w+):begin -->\n.*?<!-- (?P=name):end -->", re.DOTALL)


def scores(results: dict[str, Result]) -> str:
    """Scores by `examples/evaluate.py`: a row for each file, each score beside its real-data baseline."""
    columns = {
        "FID": ("fid", ".2f"),
        "KID": ("kid", ".4f"),
        "precision": ("precision", ".3f"),
        "recall": ("recall", ".3f"),
        "confidence >= 0.9": ("confident_share", ".1%"),
        "two-sample accuracy": ("two_sample_accuracy", ".1%"),
        "levels snapped": ("two_sample_accuracy_snapped", ".1%"),
        "black pixels": ("pixels_0", ".1%"),
    }

    def cell(result: Result, name: str, digits: str) -> str:
        values = [result[of].get(name) for of in ("scores", "floor")]
        return " / ".join("-" if value is None else format(value, digits) for value in values)

    rows = [
        [name, f"{result['num_images']['samples']:,}", *(cell(result, *column) for column in columns.values())]
        for name, result in results.items()
    ]
    return f"{table(['', 'images', *columns], rows)}\n\n{origins(results)}"


def schedulers(results: dict[str, Result]) -> str:
    """One model through all schedulers, by `benchmarks/every_scheduler.py`."""
    (result,) = results.values()
    rows = [
        [f"`{name}`", f"{score['confident_share']:.1%}", f"{score['confidence']:.3f}"]
        for name, score in result["schedulers"].items()
    ]
    return (
        f"{result['num_inference_steps']} steps, {result['num_images']} images each:\n\n"
        f"{table(['', 'confidence >= 0.9', 'mean confidence'], rows)}\n\n{origins(results)}"
    )


def classifier(results: dict[str, Result]) -> str:
    """The classifier's accuracy, by `examples/train_classifier.py`."""
    (result,) = results.values()
    accuracy, count = result["test_accuracy"], result["num_test_images"]
    return f"The classifier is right on {accuracy:.2%} of the {count:,} test images.\n\n{origins(results)}"


def scheduler_step(results: dict[str, Result]) -> str:
    """Times by `benchmarks/scheduler_step.py`: a row for a scheduler and a shape, a column for a kind of work."""
    all_rows = [row for result in results.values() for row in result["rows"]]
    columns = list(dict.fromkeys(row["work"] for row in all_rows))
    ratios: dict[str, dict[str, str]] = {}
    for row in all_rows:
        name = f"{row['scheduler']}, {' x '.join(map(str, row['shape']))}, {row['device']}"
        ratios.setdefault(name, {})[row["work"]] = f"{row['ratio']:.2f}"
    rows = [[name, *(of_work[work] for work in columns)] for name, of_work in ratios.items()]
    return f"{table(['', *(f'`{work}`' for work in columns)], rows)}\n\n{origins(results)}"


def noise_table(results: dict[str, Result]) -> str:
    """FID by `benchmarks/sampling_noise.py`: a row for a kind of noise, a column for a number of steps."""
    (result,) = results.values()
    steps = list(dict.fromkeys(n for cells in result["noise_table"].values() for n in cells))
    rows = [
        [name, *(f"{cells[n]['fid']:.2f}" if n in cells else "" for n in steps)]
        for name, cells in result["noise_table"].items()
    ]
    return (
        f"FID of {result['settings']['num_images']} samples of the weights of 0.1.0, by the number of steps "
        f"(real-data baseline: {result['floor']['fid']:.2f}):\n\n"
        f"{table(['', *(f'{n} steps' for n in steps)], rows)}\n\n{origins(results)}"
    )


def winners(of_samplers: dict[str, Result]) -> dict[str, str]:
    """The sampler with the lowest FID at each number of evaluations, in ascending order."""
    evaluations = sorted({n for cells in of_samplers.values() for n in cells}, key=int)
    return {
        n: min((name for name in of_samplers if n in of_samplers[name]), key=lambda name: of_samplers[name][n]["fid"])
        for n in evaluations
    }


def few_steps(results: dict[str, Result]) -> str:
    """FID by `benchmarks/few_steps.py`: a row for a sampler, a column for a number of evaluations of the network."""
    (result,) = results.values()
    best = winners(result["few_steps"])
    rows = []
    for name, cells in result["few_steps"].items():
        fids = {n: f"{cell['fid']:.2f}" for n, cell in cells.items()}
        rows.append([name, *(f"**{fids[n]}**" if name == best[n] else fids.get(n, "") for n in best)])
    return (
        f"FID of {result['settings']['num_images']:,} samples by the evaluations of the network that a sample takes "
        f"(real-data baseline: {result['floor']['fid']:.2f}).\nBold: the lowest of a column.\n\n"
        f"{table(['', *best], rows)}\n\n"
        f"![FID over evaluations, a line for each sampler](few_steps.png)\n\n{origins(results)}"
    )


def few_steps_best(results: dict[str, Result]) -> str:
    """What wins at each number of evaluations by `benchmarks/few_steps.py`, a line each."""
    (result,) = results.values()
    of_samplers = result["few_steps"]
    return "\n".join(
        f"- {n}: {name} (FID {of_samplers[name][n]['fid']:.2f})" for n, name in winners(of_samplers).items()
    )


def timestep_grid(results: dict[str, Result]) -> str:
    """Timesteps by `benchmarks/timestep_grid.py`, and how far from the reference they end, on the search's images."""
    (result,) = results.values()
    rows = [
        [n, ", ".join(map(str, grid["timesteps"])), f"{grid['error']:.3f}", f"{grid['error_of_trailing']:.3f}"]
        for n, grid in result["grids"].items()
    ]
    columns = ["steps", "found", "RMS error of pixels", "of equally spaced ones"]
    return f"{table(columns, rows)}\n\n{origins(results)}"


def guidance(results: dict[str, Result]) -> str:
    """Guidance by labels or by guides, by `benchmarks/guidance.py`, a table for each result."""
    return "\n\n".join(f"{guidance_table(result)}\n\n{origins({name: result})}" for name, result in results.items())


def guidance_table(result: Result) -> str:
    """A row for a guide, an interval and a scale."""
    rows = result.get("guides") or result["guidance"]
    columns = {
        "FID": ("fid", ".2f"),
        "precision": ("precision", ".3f"),
        "recall": ("recall", ".3f"),
        "confidence >= 0.9": ("confident_share", ".1%"),
    }
    if "read_as_asked" in rows[0]:
        columns["read as asked"] = ("read_as_asked", ".1%")

    def cells(scores: Result) -> list[str]:
        return [format(scores[name], digits) for name, digits in columns.values()]

    def guide(row: Result) -> list[str]:
        if "guides" not in result:
            return []
        if not row["guide"]:
            return ["none", "", ""]
        return [row["guide"], f"{2 * row['parameters'] / 1e6:.2f} MB", f"{row['relative_cost']:.2f}"]

    head = ["guide", "in float16", "relative time"] if "guides" in result else []
    lines = [
        [*guide(row), f"{row['guidance_scale']:g}", "{:g} to {:g}".format(*row["guidance_interval"]), *cells(row)]
        for row in rows
    ]
    lines.append(["real test images", *[""] * (len(head) + 1), *cells(result["floor"])])
    settings = result["settings"]
    return (
        f"{settings['num_images']:,} samples each, {settings['num_inference_steps']} steps of "
        f"`{settings['scheduler']}`:\n\n{table([*head, 'scale', 't / T', *columns], lines)}"
    )


def bits_per_dim(results: dict[str, Result]) -> str:
    """The bound by `examples/evaluate.py --bits_per_dim`: a row for each model."""
    parts = ("total", "standard_error", "L_T", "sum of L_{t-1}", "L_0")
    rows = []
    for result in results.values():
        bound, words = result["bits_per_dim"], result["command"].split()
        model = f"`{words[words.index('--model') + 1]}`, {bound['variance_type']}"
        rows.append([model, f"{bound['num_images']:,}", *(f"{bound[part]:.3f}" for part in parts)])
    titles = ["test images", "bits per dimension, at most", "standard error", *(f"`{part}`" for part in parts[2:])]
    return f"{table(['', *titles], rows)}\n\n{origins(results)}"


# each section: the key that its results have and no others, and what makes the section of them
SECTIONS = {
    "comparison": ("contenders", of_training.comparison),
    "training": ("training", of_training.runs),
    "distillation": ("distillation", of_training.runs),
    "scores": ("scores", scores),
    "race": ("contenders", of_training.time_to_quality),
    "schedulers": ("schedulers", schedulers),
    "classifier": ("test_accuracy", classifier),
    "scheduler_step": ("rows", scheduler_step),
    "recipes": ("recipes", of_training.recipes),
    "gpu": ("gpu", of_training.gpu),
    "epochs": ("epochs", of_training.epochs),
    "bits_per_dim": ("bits_per_dim", bits_per_dim),
    "likelihood": ("likelihood", of_training.likelihood),
    "schedules": ("runs", of_training.schedules),
    "sampling_noise": ("noise_table", noise_table),
    "few_steps": ("few_steps", few_steps),
    "few_steps_best": ("few_steps", few_steps_best),
    "timestep_grid": ("grids", timestep_grid),
    "guidance": ("guidance", guidance),
    "guides": ("guides", guidance),
}


def section(name: str, folder: Path = RESULTS) -> str:
    """The text of a section."""
    key, write = SECTIONS[name]
    results = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    of_kind = {stem: result for stem, result in results.items() if key in result}
    return write(of_kind) if of_kind else f"`benchmarks/results/` holds no result with `{key}` yet."


def updated(text: str) -> str:
    """A document with its sections as they should be."""
    return SECTION.sub(
        lambda old: f"<!-- {old['name']}:begin -->\n{section(old['name'])}\n<!-- {old['name']}:end -->", text
    )


def main(argv: list[str] | None = None) -> None:
    """Write the sections, or check them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a document is out of date")
    args = parser.parse_args(argv)
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        new = updated(text)
        if args.check and new != text:
            sys.exit(f"error: {path.relative_to(ROOT)} is out of date. Run python benchmarks/readme_tables.py.")
        if not args.check:
            path.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
