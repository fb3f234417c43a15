"""The tables of `readme_tables.py` that show trainings: their time, their quality, their speed."""

from tables import Result, origins, table


def runs(results: dict[str, Result]) -> str:
    """Runs that made weights of the package, one after the other, by `benchmarks/training_curve.py`."""
    lines = []
    for result in results.values():
        run = result.get("training") or result["distillation"]
        cost = f"{run['images']:,} images in {run['steps']:,} steps and {run['seconds'] / 60:.0f} minutes"
        if "training" in result:  # the loss of a generator says nothing
            cost += f", mean loss of the last {run['loss_window']} steps {run['loss'][-1]:.4f}"
        lines.append(f"- `{run['command']}`: {cost}, {run['images_per_second']} images per second ({run['machine']})")
    return "\n".join(lines)


def recipes(results: dict[str, Result]) -> str:
    """Short trainings by `benchmarks/recipes.py`: a row for each change."""
    (result,) = results.values()
    settings = result["settings"]
    rows = [
        [
            change,
            f"{recipe['training_images_per_second']:.0f}",
            f"{recipe['fid']:.2f}",
            f"{recipe['confident_share']:.0%}",
            f"{recipe['error']:.4f}",
            f"{recipe['error_by_tenth_of_t'][0]:.4f}",
        ]
        for change, recipe in result["recipes"].items()
    ]
    titles = ["images per second", "FID", "confidence >= 0.9", "error of v", "in the lowest tenth of t"]
    return (
        f"After {settings['images']:,} images on {result['threads']} thread(s); {settings['num_images']:,} samples in "
        f"{settings['num_inference_steps']} DDIM steps; real-data baseline {result['floor']['fid']:.2f}. The error is "
        f"that on test images:\n\n{table(['change', *titles], rows)}\n\n{origins(results)}"
    )


def epochs(results: dict[str, Result]) -> str:
    """A training by `benchmarks/epochs.py`: a row for each pipeline that it kept."""
    (result,) = results.values()
    settings, samplers = result["settings"], ("ddpm", "ddim")
    rows = [
        [
            number,
            *(f"{scores[name]['fid']:.2f}" for name in samplers),
            *(f"{scores[name]['confident_share']:.1%}" for name in samplers),
        ]
        for number, scores in result["epochs"].items()
    ]
    titles = [f"{of}, {name.upper()}" for of in ("FID", "confidence >= 0.9") for name in samplers]
    floor = result["floor"]
    return (
        f"{settings['num_images']:,} samples in {settings['num_inference_steps']} steps, without guidance (real test "
        f"images: FID {floor['fid']:.2f}, confidence {floor['confident_share']:.1%}):\n\n"
        f"{table(['epochs', *titles], rows)}\n\n"
        f"![A row for each, from the same noise: by DDPM, then by DDIM](epochs.png)\n\n{origins(results)}"
    )


def gpu(results: dict[str, Result]) -> str:
    """Images per second by `benchmarks/gpu.py`, ours and diffusers'; then how each of its parts was run."""
    (result,) = results.values()
    parts = result["gpu"]
    rows = [
        [
            f"{row['work']}, {row['house']}, {row['way']}",
            f"{row['batch_size']:,}",
            f"{row['images_per_second']:,.0f}",
            f"{row['gflops_per_image']:.1f}",
            "" if row["share_of_peak"] is None else f"{row['share_of_peak']:.1%}",
            f"{row['first_seconds']:.0f}",
        ]
        for row in sorted(parts["speed"]["rows"], key=lambda row: row["work"], reverse=True)
        if "error" not in row
    ]
    titles = ["batch", "images per second", "GFLOP per image", "share of the bf16 peak", "first steps, s"]
    figures = {part: parts[part] for part in ("speed", "training", "tests")}
    return f"{table(['', *titles], rows)}\n\n{origins(figures)}"


def schedules(results: dict[str, Result]) -> str:
    """Linear and cosine betas, by `benchmarks/schedules.py`: a row for a schedule and a seed."""
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
    return f"{table(['', *titles], rows)}\n\n{origins(results)}"


def likelihood(results: dict[str, Result]) -> str:
    """Training for likelihood, by `benchmarks/likelihood.py`: a row for each choice that is changed."""
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


def scored_minutes(result: Result) -> dict[str, dict[float, Result]]:
    """What `benchmarks/time_to_quality.py` measured of each contender, by the minute of its training, rounded."""
    return {
        name: {round(point["minutes"]): point for point in contender["curve"]}
        for name, contender in result["contenders"].items()
    }


def training_speed(result: Result, minute: float) -> dict[str, float]:
    """Images per second of each contender from its second step to that minute."""
    return {
        name: (points[minute]["steps"] - 1)
        * result["contenders"][name]["batch_size"]
        / (60 * points[minute]["minutes"])
        for name, points in scored_minutes(result).items()
    }


def time_to_quality(results: dict[str, Result]) -> str:
    """FID over time by `benchmarks/time_to_quality.py`, for each contender; and sampling after training."""
    (result,) = results.values()
    scored = scored_minutes(result)
    minutes = sorted({m for points in scored.values() for m in points})
    together = max(m for m in minutes if all(m in points for points in scored.values()))
    speed = training_speed(result, together)
    training_rows = [
        [
            f"`{name}`",
            f"{contender['parameters'] / 1e6:.1f} M",
            f"{speed[name]:.0f}",
            *(f"{scored[name][m]['fid']:.1f}" if m in scored[name] else "" for m in minutes),
        ]
        for name, contender in result["contenders"].items()
    ]
    sampling_rows = [
        [
            f"`{name}`",
            str(point["num_inference_steps"]),
            point["sampler"],
            f"{point['samples_per_second']:.1f}",
            f"{point['fid']:.2f}",
        ]
        for name, points in result["sampling"].items()
        for point in points
    ]
    training_titles = ["parameters", "images per second", *(f"FID, {m:g} min" for m in minutes)]
    return (
        f"Training on {result['threads']} threads. Images per second are over the first {together:g} minutes. FID is "
        f"of {result['num_images']:,} samples in\n{result['num_inference_steps']} DDPM steps (real-data baseline: "
        f"{result['floor']['fid']:.2f}):\n\n{table(['', *training_titles], training_rows)}\n\n"
        "Sampling at the end of each training:\n\n"
        f"{table(['', 'steps', 'sampler', 'samples per second', 'FID'], sampling_rows)}\n\n{origins(results)}"
    )


def comparison(results: dict[str, Result]) -> str:
    """The race in few rows: ours and the course's U-Net, as it comes and tuned."""
    (result,) = results.values()
    scored, speed = scored_minutes(result), training_speed(result, 10)
    contenders = ("ours", "stock", "tuned")
    rows = [
        *(
            [f"FID after {m} min of training", *(f"{scored[name][m]['fid']:.1f}" for name in contenders)]
            for m in (1, 10, 20)
        ),
        ["training images per second", *(f"{speed[name]:.0f}" for name in contenders)],
        ["samples per second, 50 steps", *(f"{scored[name][20]['samples_per_second']:.1f}" for name in contenders)],
    ]
    return (
        f"Measured on {result['machine']}, {result['threads']} threads, all in turns. FID of {result['num_images']} "
        f"samples, real images: {result['floor']['fid']:.1f}. If our learning rate falls to 0 by then, it is "
        f"{scored['ours_decayed'][10]['fid']:.1f} after 10 minutes. More tables and all commands: "
        "[docs/results.md](docs/results.md).\n\n"
        f"{table(['', 'this package', 'U-Net of the Hugging Face diffusion course', 'the same, tuned'], rows)}"
    )
