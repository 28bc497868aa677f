"""Plans for 100 million and 5 billion pairs, from unit costs that `radt index plan` measured: bytes, hours, machines.

    radt index plan SOURCE --model ViT-B-32/untrained --json > costs.json
    python tools/plan_on_paper.py costs.json [--ram 64G] [--processors 16] [--embed-rate 4000]

The probe's costs are those of one machine; `--processors` and `--embed-rate` (images a second that a GPU embeds) stand
for another. Decoding is by one thread there and by as many as there are processors here. Prints a markdown table.
"""

import argparse
import dataclasses
import json
from pathlib import Path

from index.config import from_dict
from index.ingest.plan import Plan, StageCost, UnitCosts, make_plan
from index.search.sizes import gigabytes, parse_bytes

CASES = ((10**6, 1), (10**8, 1), (10**8, 8), (5 * 10**9, 50), (5 * 10**9, 200))
COLUMNS = (
    *("pairs", "machines", "searcher", "disk, each", "memory building", "memory serving"),
    *("pairs/s, each", "held up by", "hours", "machine hours"),
)


def row(plan: Plan) -> list[str]:
    structure = plan.structure
    place = "in memory" if structure.vectors == "memory" else "on disk"
    form = f"{structure.kind}, {structure.shards} shards, vectors {place}"
    return [
        f"{plan.pairs:,}",
        str(plan.machines),
        form if structure.kind == "scann" else structure.kind,
        gigabytes(plan.total_bytes),
        gigabytes(plan.memory["building"]),
        gigabytes(plan.memory["serving"]),
        f"{plan.pairs_per_second:,.0f}",
        plan.bottleneck,
        f"{plan.hours:,.1f}",
        f"{plan.machines * plan.hours:,.0f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("costs", type=Path)
    parser.add_argument("--ram", default="64G")
    parser.add_argument("--processors", type=int, default=16)
    parser.add_argument("--embed-rate", type=float)
    options = parser.parse_args()
    costs = from_dict(UnitCosts, json.loads(options.costs.read_text())["costs"])
    if options.embed_rate:
        seconds = 1 / options.embed_rate
        costs = dataclasses.replace(costs, embed=StageCost(seconds=seconds, processor_seconds=0.1 * seconds))
    print(f"{costs.dim} numbers a vector, {options.processors} processors and {options.ram} for the searcher")
    print("unit costs from", costs.measured_on, "\n")
    print("| " + " | ".join(COLUMNS) + " |")
    print("|" + "---|" * len(COLUMNS))
    for pairs, machines in CASES:
        plan = make_plan(pairs, costs, ram=parse_bytes(options.ram), processors=options.processors, machines=machines)
        print("| " + " | ".join(row(plan)) + " |")


if __name__ == "__main__":
    main()
