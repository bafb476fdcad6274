"""Writes the table of model families into docs/models.md, from the registry and the tests' list.

python bench/models_table.py        (--check: change nothing, exit 1 if it is out of date)
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- table: python bench/models_table.py -->\n", "<!-- end of table -->\n"

sys.path.insert(0, str(ROOT / "tests" / "support"))

from checkpoints import PIPELINES, TINY  # noqa: E402

from pipeserve.stages.config.families import FAMILIES  # noqa: E402
from pipeserve.stages.config.families.family import Family  # noqa: E402


def table() -> str:
    """One row a family, as Markdown."""
    head = "| family | models | differs from Llama by | tested with the flags of | as processes |\n"
    return head + "|---|---|---|---|---|\n" + "".join(_row(family) for family in FAMILIES)


def _row(family: Family) -> str:
    kinds = {name: kind for name, kind in TINY.items() if kind.family == family.name}
    architectures = ", ".join(f"`{name}`" for name in family.architectures)
    flags = "; ".join(kind.like for kind in kinds.values())
    served = family.name == "Llama" or any(name in PIPELINES for name in kinds)
    cells = (f"{family.name}<br>{architectures}", family.models, family.differs or "-", flags)
    return f"| {' | '.join(cells)} | {'yes' if served else 'no'} |\n"


def with_table(page: str) -> str:
    """`page` with the table between its marks."""
    before, rest = page.split(BEGIN)
    return before + BEGIN + table() + END + rest.split(END)[1]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    is_check = parser.parse_args().check
    page = PAGE.read_text("utf-8")
    if is_check:
        return int(page != with_table(page))
    PAGE.write_text(with_table(page), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
