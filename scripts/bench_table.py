"""The table that the benchmarks print."""

import statistics


def print_table(heading: str, rates: dict[str, list[float]]) -> None:
    """A Markdown table: median, range, and the median ratio to the first row, round by round.

    Args:
        heading: of the column of names.
        rates: images per second of each round, by the row's name.
    """
    first = next(iter(rates))
    print(f"| {heading} | images/s | min–max | × {first} |\n|---|---|---|---|")
    for name, values in rates.items():
        ratio = statistics.median(value / base for value, base in zip(values, rates[first]))
        middle = statistics.median(values)
        print(f"| {name} | {middle:,.0f} | {min(values):,.0f}–{max(values):,.0f} | {ratio:.2f} |")
