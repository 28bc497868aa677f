"""Plans for 100 million and 5 billion pairs from measured unit costs: bytes, hours, machines.

    python tools/plan_on_paper.py [tools/unit_costs.json] [--ram 64G] [--processors 16] [--gpu-rate 4000]

The file names for each figure where it was measured. What follows for other sizes is by the arithmetic of `radt index
plan`; the second table holds it beside what was measured, at the size at which it was. The machines of the plan are
assumed, and so are two things of them: work that is spread over processors goes as many times faster as there are, and
`--gpu-rate` pictures a second are what one GPU embeds (no figure of ours: nothing here was measured on one; without it
the plan has no GPUs). Near-duplicates have hours of their own, because a build can leave them out; where vectors are on
disk, what reading them takes is not in those hours, for want of a measurement. Prints markdown tables.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from index.ingest.plan import Plan, StageCost, UnitCosts, make_plan
from index.search.sizes import choose_structure, gigabytes, parse_bytes, scann_build_seconds

COSTS = Path(__file__).resolve().parent / "unit_costs.json"
CASES = ((10**8, 1), (10**8, 8), (5 * 10**9, 50), (5 * 10**9, 200))
NOTHING = StageCost(seconds=0.0, processor_seconds=0.0)
COLUMNS = (
    *("pairs", "machines", "network on", "searcher of each", "disk, each", "disk, all", "memory building"),
    *("memory serving", "pairs/s, each", "held up by", "hours: pairs", "index", "duplicates", "machine hours"),
)


def unit_costs(figures: dict[str, Any]) -> UnitCosts:
    """Reading, decoding and writing are one figure, which stands in the place of decoding: all processors share it."""
    pipeline = figures["pipeline_pairs_per_second"]
    whole = pipeline["processors"] / pipeline["value"]
    network = figures["network_processor_ms"]["value"] / 1e3
    return UnitCosts(
        dim=figures["dim"],
        read=NOTHING,
        decode=StageCost(seconds=whole, processor_seconds=whole),
        embed=StageCost(seconds=0.0, processor_seconds=network),
        write=NOTHING,
        row_bytes=figures["row_bytes"]["value"],
        caption_bytes=figures["caption_bytes"]["value"],
        source_bytes=0.0,
        process_bytes=figures["process_bytes"]["value"],
        measured_on=figures["machine"],
    )


def on_gpu(costs: UnitCosts, rate: float) -> UnitCosts:
    """The network takes no processor then."""
    return replace(costs, embed=StageCost(seconds=1 / rate, processor_seconds=0.0))


def row(plan: Plan, network: str) -> list[str]:
    structure = plan.structure
    place = "in memory" if structure.vectors == "memory" else "on disk"
    form = f"{structure.kind}, {structure.shards} {'shard' if structure.shards == 1 else 'shards'}, vectors {place}"
    hours = {name: seconds / 3600 for name, seconds in plan.seconds.items()}
    index_hours = sum(hours.values()) - hours["pairs"] - hours["duplicates"]
    return [
        f"{plan.pairs:,}",
        str(plan.machines),
        network,
        form,
        gigabytes(plan.total_bytes),
        gigabytes(plan.machines * plan.total_bytes),
        gigabytes(plan.memory["building"]),
        gigabytes(plan.memory["serving"]),
        f"{plan.pairs_per_second:,.0f}",
        {"decode": "read, decode, write", "embed": "network"}.get(plan.bottleneck, plan.bottleneck),
        *(f"{value:,.1f}" for value in (hours["pairs"], index_hours, hours["duplicates"])),
        f"{plan.machines * plan.hours:,.0f}",
    ]


def checks(figures: dict[str, Any], costs: UnitCosts) -> list[list[str]]:
    """What was measured, and what the plan's arithmetic says of the same size."""
    searcher, build, duplicates = figures["searcher"], figures["searcher_build"], figures["duplicates"]
    structure = choose_structure(searcher["rows"], costs.dim, kind="scann", ram=10**12)
    plan = make_plan(figures["word_index"]["rows"], costs, processors=1, ram=10**12)
    building = scann_build_seconds(build["rows"], costs.dim)
    smaller = make_plan(duplicates["rows"], replace(costs, dim=duplicates["dim"]), processors=1, ram=10**12)
    return [
        ["searcher on disk", gigabytes(searcher["disk_bytes"]), gigabytes(structure.disk_bytes)],
        ["searcher in memory", gigabytes(searcher["memory_bytes"]), gigabytes(structure.serving_bytes)],
        ["searcher, processor s", f"{build['processor_seconds']:.0f}", f"{building:.0f}"],
        ["word index on disk", gigabytes(figures["word_index"]["disk_bytes"]), gigabytes(plan.bytes["word index"])],
        ["id index on disk", gigabytes(figures["id_index"]["disk_bytes"]), gigabytes(plan.bytes["id index"])],
        ["duplicates, processor s", f"{duplicates['processor_seconds']:.1f}", f"{smaller.seconds['duplicates']:.1f}"],
    ]


def print_table(columns: tuple[str, ...], rows: list[list[str]]) -> None:
    print("\n| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for cells in rows:
        print("| " + " | ".join(cells) + " |")


def print_figures(figures: dict[str, Any]) -> None:
    rows = []
    for name, figure in figures.items():
        if isinstance(figure, dict):
            values = [f"{what.replace('_', ' ')} {value:,.10g}" for what, value in figure.items() if what != "from"]
            rows.append([name.replace("_", " "), ", ".join(values), figure["from"]])
    print_table(("unit cost", "measured", "by"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("costs", type=Path, nargs="?", default=COSTS)
    parser.add_argument("--ram", default="64G", help="for the searcher, on each machine")
    parser.add_argument("--processors", type=int, default=16)
    parser.add_argument("--gpu-rate", type=float, help="pictures a second that one GPU embeds: an assumption")
    options = parser.parse_args()
    figures = json.loads(options.costs.read_text())
    costs = unit_costs(figures)
    networks = {"processors": costs}
    if options.gpu_rate:
        networks[f"a GPU ({options.gpu_rate:,.0f}/s, assumed)"] = on_gpu(costs, options.gpu_rate)
    print(f"Measured on {figures['machine']}; {costs.dim} numbers a vector.")
    print(
        f"Assumed: machines of {options.processors} processors, and {options.ram} for the searcher; processors scale."
    )
    print_figures(figures)
    print_table(("at the size that was measured", "measured", "by the plan's arithmetic"), checks(figures, costs))
    size = {"ram": parse_bytes(options.ram), "processors": options.processors}
    plans = []
    for pairs, machines in CASES:
        for network, these in networks.items():
            plans.append(row(make_plan(pairs, these, machines=machines, **size), network))
    print_table(COLUMNS, plans)


if __name__ == "__main__":
    main()
