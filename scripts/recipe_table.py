"""Writes recipes/README.md: each recipe's first line and what its header says was measured.

.venv/bin/python scripts/recipe_table.py           # write
.venv/bin/python scripts/recipe_table.py --check   # fail where the file is out of date
"""

import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "recipes"


def read_header(path: Path) -> tuple[str, str]:
    """What a recipe is, and what was measured, from the comment at its head."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# ").strip())
    start = next((i for i, line in enumerate(lines) if line.startswith("Measured:")), None)
    if start is None:
        sys.exit(f"{path}: the header has no line `# Measured: …`")
    return lines[0], " ".join(lines[start:]).removeprefix("Measured:").strip()


def build_table() -> str:
    """The page, as Markdown."""
    rows = [
        f"| `{path.stem}` | {' | '.join(read_header(path))} |"
        for path in sorted(FOLDER.rglob("*.yaml"))
        if path.parent.name != "accelerate"
    ]
    return "\n".join(
        [
            "# Recipes",
            "",
            "Written by `scripts/recipe_table.py` from the recipes' headers. Each result was printed by the",
            "command in the recipe's header; “not run yet” means what it says.",
            "",
            "| recipe | what it is | measured |",
            "|---|---|---|",
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    page, table = FOLDER / "README.md", build_table()
    if "--check" in sys.argv[1:]:
        current = page.is_file() and page.read_text(encoding="utf-8") == table
        sys.exit(0 if current else f"{page} is out of date: run scripts/recipe_table.py")
    page.write_text(table, encoding="utf-8")
