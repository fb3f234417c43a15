"""What the tables of the documents have in common."""

from typing import Any

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
