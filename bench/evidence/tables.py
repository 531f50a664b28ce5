"""Markdown tables, and how numbers stand in them."""

import statistics


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, padded so that it also reads well in a terminal."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    rule = ["-" * width for width in widths]
    lines = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in (header, rule, *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def counted(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def spread(values: list[float], form: str = ".2f") -> str:
    """Mean ± standard deviation; of one value, the value."""
    mean = f"{statistics.mean(values):{form}}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):{form}}"


def spell(settings: dict) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in settings.items() if name != "prior_bias") + (
        ", prior bias" if settings.get("prior_bias") else ""
    )
