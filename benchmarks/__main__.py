"""`python -m benchmarks`: measure, print a table, keep it."""

from __future__ import annotations

import argparse
import importlib
import time
from pathlib import Path

import torch

from benchmarks.harness import FULL, SMOKE, environment, markdown, write_between_markers, write_json
from benchmarks.summary import summary

FAMILIES = ("fixed_point", "training", "ode", "stiff", "qp", "convex", "scaling", "profile")
HERE = Path(__file__).parent
README, TABLES = HERE.parent / "README.md", HERE / "TABLES.md"


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"of {', '.join(FAMILIES)}; default: all")
    parser.add_argument(
        "--smoke", action="store_true", help="run everything briefly and keep nothing; only errors count"
    )
    parser.add_argument("--rounds", type=int, help="measure each timing so often")
    parser.add_argument("--threads", type=int, help="of PyTorch; default: its own choice")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder for the numbers, as JSON")
    parser.add_argument(
        "--write-tables", action="store_true", help="put them into TABLES.md, and a summary into README.md"
    )
    chosen = parser.parse_args()
    if unknown := [name for name in chosen.families if name not in FAMILIES]:
        parser.error(f"there is no family {unknown[0]!r}; there are: {', '.join(FAMILIES)}")
    if chosen.rounds is not None and chosen.rounds < 1:
        parser.error("--rounds must be at least 1")
    if chosen.smoke and chosen.write_tables:
        parser.error("--smoke measures nothing worth writing into tables")
    return chosen


def main() -> None:
    chosen = options()
    if chosen.threads is not None:
        torch.set_num_threads(chosen.threads)
    effort = SMOKE if chosen.smoke else FULL
    if chosen.rounds is not None:
        effort = type(effort)(**{**vars(effort), "rounds": chosen.rounds})
    for name in chosen.families or FAMILIES:
        start = time.perf_counter()
        family = importlib.import_module(f"benchmarks.{name}")
        where = environment(family.PACKAGES)
        rows = family.run(effort)
        versions = ", ".join(f"{package} {version}" for package, version in where["versions"].items())
        caption = family.CAPTION.format(rounds=effort.rounds)
        caption += f" {where['cpu']}, {where['threads']} threads; {versions}; {where['date'][:10]}."
        table = markdown(rows, family.PEER, caption)
        print(f"\n{table}\n\n{time.perf_counter() - start:.0f} s")
        if not chosen.smoke:
            write_json(chosen.results / f"{name}.json", rows, where, effort)
            print(f"Numbers: {chosen.results / name}.json")
        if chosen.write_tables:
            write_between_markers(TABLES, name, table)
            print(f"Table: {TABLES}")
    if chosen.write_tables:
        write_between_markers(README, "summary", summary(chosen.results))


if __name__ == "__main__":
    main()
