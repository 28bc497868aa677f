"""Thin a finished run's metrics into a reference curve that ships in the package: `radt doctor RUN` compares with it.

python tools/make_reference_curve.py runs/sr --preset emoji-demo-sr --source "radt train emoji-demo-sr, 5,000 steps"
python tools/make_reference_curve.py runs/fast/guided --preset emoji-demo-fast --config runs/fast/config.json ...
"""

import argparse
import json
from pathlib import Path

from index.config import to_dict
from radt.presets import BaseConfig
from radt.training.doctor import newest_reading
from radt.training.loop import METRICS_FILE
from radt.training.probe import PROBE_FILE
from radt.training.reference import Curve, Life, thin
from radt.training.run_folder import RunFolder, read_lines

CURVES = Path(__file__).parents[1] / "radt" / "training" / "curves"


def main() -> None:
    arguments = read_arguments()
    folder, config = arguments.run, arguments.config or arguments.run / "config.json"
    raw = json.loads(config.read_text())
    # Where things lay on the machine that trained is of no use to anybody, but whether there was a start is.
    for name in ("clip", "start", "below", "bundle", "pack_file"):
        if raw.get(name) is not None:
            raw[name] = Path(raw[name]).name
    life = [
        Life(**{name: line[name] for name in ("images_seen", "gain", "attention_right", "attention_wrong")})
        for line in read_lines(folder / PROBE_FILE)
    ]
    run = RunFolder(folder) if arguments.config is None else None
    if not life and run is not None and isinstance(run.config, BaseConfig):  # no readings yet: take one now
        life = [last_life(run)]
    phase = "" if arguments.config is None else folder.name
    curve = Curve(
        preset=arguments.preset,
        phase=phase,
        source=arguments.source,
        config=raw,
        points=thin(read_lines(folder / METRICS_FILE)),
        life=tuple(life),
    )
    name = "-".join(part for part in (arguments.preset, phase, "started" if raw.get("start") else "") if part)
    CURVES.mkdir(exist_ok=True)
    path = CURVES / f"{name}.json"
    path.write_text(json.dumps(rounded(to_dict(curve)), indent=1) + "\n")
    print(f"{path}: {len(curve.points)} points, {len(curve.life)} readings")


def last_life(run: RunFolder) -> Life:
    _, images_seen, reading = newest_reading(run)
    return Life(
        images_seen=images_seen,
        gain=reading.gain,
        attention_right=reading.attention_right,
        attention_wrong=reading.attention_wrong,
    )


def rounded(value):
    """Four figures are enough to draw by."""
    if isinstance(value, dict):
        return {name: part if name == "config" else rounded(part) for name, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--preset", required=True)
    parser.add_argument("--source", required=True, help="the command, how many steps, when and on what")
    parser.add_argument("--config", type=Path, help="of a phase: the config.json of the distillation")
    return parser.parse_args()


if __name__ == "__main__":
    main()
