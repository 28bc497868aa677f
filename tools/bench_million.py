"""The README's commands, one after the other, on a million pairs: what each takes, and what it says.

    python tools/bench_million.py --work runs/bench/million [--pairs 1000000] [--ram 8G]

Every command is a process of its own, as a user runs it, with the model inside the package. Memory is the largest
sum over the command and its children of what each has to itself plus its share of what they share (PSS), looked at
four times a second. A command that fails, or does not do what it is for, ends the run. Prints markdown; the last line
is one JSON document. Of a work folder that has pairs, those are taken; its knowledge base is made anew.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import psutil

HERE = Path(__file__).resolve().parent
PICTURE = HERE.parent / "radt" / "models" / "emoji-demo" / "contact-sheet.png"
QUERY = "a red vepo next to a green lopu"


class Step(NamedTuple):
    """A command after `radt`, whether it did what it is for, and what of its answer is worth a word."""

    arguments: list[str]
    did: Callable[[dict[str, Any]], bool]
    says: Callable[[dict[str, Any]], str]


def steps(pairs: str, kb: str, *, count: int, ram: str) -> list[Step]:
    """What a user does with a large knowledge base, in the README's order."""
    return [
        Step(
            ["index", "plan", pairs, "--ram", ram, "--recall", "0.95"],
            lambda answer: answer["sources"]["pairs"] == count,
            _planned,
        ),
        Step(
            ["index", "build", pairs, "--kb", kb, "--ram", ram, "--recall", "0.95"],
            lambda answer: answer["pairs_added"] == answer["pairs_total"] == count,
            lambda answer: (
                f"{answer['pairs_per_second']:.0f} pairs/s, waits for {answer['bottleneck']}, "
                f"recall@10 {answer['recall_at_10']:.3f}"
            ),
        ),
        Step(
            ["index", "build", pairs, "--kb", kb, "--ram", ram, "--recall", "0.95"],
            lambda answer: answer["pairs_added"] == 0 and answer["shards_done"] == 0,
            lambda answer: f"{answer['shards_unchanged']} shards unchanged",
        ),
        Step(["index", "query", QUERY, "--kb", kb], lambda answer: len(answer["hits"]) == 5, _took),
        Step(
            ["index", "query", QUERY, "--kb", kb, "--where", "caption LIKE '%garden%'"],
            lambda answer: len(answer["hits"]) == 5 and all("garden" in caption for caption in _captions(answer)),
            _took,
        ),
        Step(["index", "query", QUERY, "--kb", kb, "--exact"], lambda answer: len(answer["hits"]) == 5, _took),
        Step(
            ["index", "query", QUERY, "--kb", kb, "-k", "4", "--by", "bm25", "--decompose", "phrases"],
            lambda answer: len(answer["parts"]) == 2,
            lambda answer: f"{_query_ms(answer):.0f} ms, parts {', '.join(answer['parts'])}",
        ),
        Step(
            ["index", "add", str(PICTURE), "--caption", "Zorbo: my robot", "--kb", kb],
            lambda answer: len(answer["ids"]) == 1,
            lambda answer: "searchable",
        ),
        Step(
            ["index", "query", "Zorbo", "--kb", kb],
            lambda answer: _captions(answer)[0] == "Zorbo: my robot",
            lambda answer: f"first of {len(answer['hits'])}; {_query_ms(answer):.0f} ms",
        ),
        Step(
            ["index", "remove", "--where", "caption LIKE 'Zorbo%'", "--kb", kb],
            lambda answer: answer["removed"] == 1,
            lambda answer: "removed 1",
        ),
        Step(
            ["index", "query", "Zorbo", "--kb", kb],
            lambda answer: "Zorbo: my robot" not in _captions(answer),
            lambda answer: "not among the hits",
        ),
        Step(
            ["index", "compact", "--kb", kb, "--keep", "1"],
            lambda answer: answer["pairs"] == count and answer["versions_removed"] > 0,
            lambda answer: "purged, merged, folded in",
        ),
        Step(
            ["index", "verify", "--kb", kb],
            lambda answer: answer["sound"],
            lambda answer: f"{answer['sampled']} of {answer['rows']:,} rows: sound",
        ),
        Step(
            ["index", "stats", "--kb", kb],
            lambda answer: answer["pairs"] == count,
            lambda answer: f"{answer['pairs']:,} pairs",
        ),
        Step(
            [
                "index",
                "neighbors",
                f"{pairs}/00000.tar",
                "--kb",
                kb,
                "--by",
                "clip",
                "--out",
                f"{kb}-neighbors.parquet",
            ],
            lambda answer: answer["shards_done"] == 1 and answer["pairs"] > answer["short"],
            lambda answer: f"{answer['pairs'] / answer['seconds']:.0f} training pairs/s, the model's loading included",
        ),
        Step(
            ["generate", "a vepo on an orange background", "--kb", kb, "-n", "2", "--out", f"{kb}-pictures"],
            lambda answer: len(answer["images"]) == 2,
            lambda answer: "two pictures",
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--ram", default="8G", help="given to plan and build")
    given = parser.parse_args()
    pairs, kb = given.work / "pairs", given.work / "kb"
    subprocess.run([sys.executable, HERE / "make_pairs.py", pairs, "--num", str(given.pairs)], check=True)
    shutil.rmtree(kb, ignore_errors=True)
    Path(f"{kb}-neighbors.parquet").unlink(missing_ok=True)
    print(f"{given.pairs:,} pairs, {os.cpu_count()} processors of {platform.machine()}, {date.today()}\n")
    print("| `radt ...` | s | peak MiB | |\n|---|---:|---:|---|")
    lines = []
    for step in steps(str(pairs), str(kb), count=given.pairs, ram=given.ram):
        seconds, peak, answer = run(step.arguments)
        if not step.did(answer):
            sys.exit(f"radt {' '.join(step.arguments)} did not do what it is for: {json.dumps(answer)[:2000]}")
        shown = " ".join(step.arguments).replace(str(pairs), "PAIRS").replace(str(kb), "KB")
        print(f"| `{shown}` | {seconds:.1f} | {peak:.0f} | {step.says(answer)} |", flush=True)
        lines.append({"command": shown, "seconds": seconds, "peak_mib": peak})
    print(json.dumps({"pairs": given.pairs, "peak_mib": max(line["peak_mib"] for line in lines), "lines": lines}))


def run(arguments: list[str]) -> tuple[float, float, dict[str, Any]]:
    """Seconds, peak MiB, and what the command answers with `--json`."""
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "radt.cli", *arguments, "--json"], stdout=subprocess.PIPE, text=True
    )
    peak = Peak(process.pid)
    out, _ = process.communicate()
    seconds = time.perf_counter() - started
    if process.returncode:
        sys.exit(f"radt {' '.join(arguments)} ended with {process.returncode}")
    return seconds, peak.stop(), json.loads(out)


class Peak(threading.Thread):
    """The most memory a process and its children have had, in MiB."""

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self._root, self._peak, self._ended = psutil.Process(pid), 0, threading.Event()
        self.start()

    def run(self) -> None:
        while not self._ended.wait(0.25):
            with suppress(psutil.Error):  # one of them has ended meanwhile
                family = [self._root, *self._root.children(recursive=True)]
                self._peak = max(self._peak, sum(each.memory_full_info().pss for each in family))

    def stop(self) -> float:
        self._ended.set()
        self.join()
        return self._peak / 2**20


def _planned(answer: dict[str, Any]) -> str:
    plan = answer["plan"]
    seconds = sum(plan["seconds"].values())
    return f"{plan['structure']['kind']}, {seconds:.0f} s, {plan['memory']['building'] / 2**20:.0f} MiB expected"


def _took(answer: dict[str, Any]) -> str:
    return f"{_query_ms(answer):.0f} ms after {answer['timings_ms']['load'] / 1e3:.1f} s for the model"


def _captions(answer: dict[str, Any]) -> list[str]:
    return [hit["caption"] for hit in answer["hits"]]


def _query_ms(answer: dict[str, Any]) -> float:
    return float(sum(spent for name, spent in answer["timings_ms"].items() if name != "load"))


if __name__ == "__main__":
    main()
