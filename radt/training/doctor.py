"""`radt doctor RUN`: is this training well? Looks at what a run left on disk, and changes nothing.

    loss        a number, and not far above that of a run of the same preset that ended well
    gradient    neither growing nor leaping
    neighbours  worth something, and told apart: read off a fixed batch (`radt/training/probe.py`)
    dropping    text and neighbours are left out as often as was asked for, so that guidance has both branches
    leaks       nothing held out in any input or target, no scene's own record among its neighbours: an error

What it compares with is in `radt/training/reference.py`. docs/training.md says what to do about each finding.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from index.errors import CorpusError, UserError
from radt.finding import AnyFinding
from radt.presets import BaseConfig
from radt.training.checkpoint import load_state, without_prefix
from radt.training.data import DataConfig, draw_batch
from radt.training.distill_run import DistillConfig
from radt.training.leaks import Leak, leaks_in_corpus, leaks_in_pictures, leaks_in_targets, leaks_in_texts, own_records
from radt.training.loop import METRICS_FILE
from radt.training.pack import Pack
from radt.training.precompute import Captions
from radt.training.probe import Reading, probe
from radt.training.reference import Curve
from radt.training.run import objective_of
from radt.training.run_folder import History, Lines, RunFolder
from radt.unet.unet import UNet

FAR_ABOVE = 1.5  # times the reference: windows of one run differ by a tenth, other data settings made it 1.3
LEAP = 10.0  # times the median of the lines before; healthy runs leapt up to 3 times
GROWN = 4.0  # times the smallest stretch of the run; healthy runs grew up to 2 times
STRETCHES = 10
LEAST_LINES = 10
LEAST_GAIN = 0.003  # of the loss; the shipped stages have 0.10 and 0.02
SHARE_OF_GAIN = 0.25  # of the reference's
TELLS_APART = 0.2  # (right - wrong) / (right + wrong); a uniform attention has 0, the shipped stages 0.8 and 0.7
LEAST_ATTENTION = 0.02  # of right and wrong together; the rest is the sink's
EARLY = 0.1  # of a run's steps: before, neighbours need not count for anything
DRAWN, DRAWN_AT_ONCE = 4096, 256
SIGMAS = 4.5  # of a binomial share: once in 150,000 by chance
RARE = 0.01  # a branch seen less often is not learnt
MORE_DROPPED = 0.1  # than asked for
TOLD = 3  # leaks that are named


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding(AnyFinding):
    """One thing looked at of a run."""

    state: Literal["ok", "warning", "error", "unknown"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Diagnosis:
    """All findings, and the histories they are of."""

    folder: Path
    preset: str
    findings: tuple[Finding, ...]
    histories: tuple[History, ...]

    @property
    def is_well(self) -> bool:
        """Whether no finding is an error. A warning is for people to judge."""
        return all(finding.state != "error" for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        found = [finding.to_json() for finding in self.findings]
        return {"run": str(self.folder), "preset": self.preset, "well": self.is_well, "findings": found}

    def lines(self) -> list[str]:
        """For people: a mark, a name, what was found, and below it what to do."""
        marks = {"ok": "ok      ", "warning": "WARNING ", "error": "ERROR   ", "unknown": "unknown "}
        width = max(len(finding.name) for finding in self.findings)
        text = [f"{self.folder}: a run of {self.preset}, or what is most like it"]
        for finding in self.findings:
            text.append(f"{marks[finding.state]}{finding.name:<{width}}  {finding.detail}")
            text += [f"{'':8}{'':<{width}}  -> {finding.remedy}"] if finding.remedy else []
        counts = {state: sum(each.state == state for each in self.findings) for state in ("error", "warning")}
        return [*text, ", ".join(f"{n} {state}{'' if n == 1 else 's'}" for state, n in counts.items())]


def examine_run(folder: Path, on_stage: Callable[[str], None] = lambda _: None) -> Diagnosis:
    """Look at everything a run folder has to show, the cheap things first."""
    run = RunFolder(folder)
    findings = [finding for history in run.histories for finding in judge_history(history)]
    if not findings:
        findings = [Finding(name="loss", state="unknown", detail=f"no {METRICS_FILE} holds a line yet")]
    if isinstance(run.config, BaseConfig):
        on_stage("reading what neighbours are worth")
        findings.append(judge_life(run))
    if isinstance(run.config, BaseConfig | DistillConfig):
        on_stage("drawing batches")
        findings.append(_looked_at("dropping", lambda: judge_dropping(run.pack, run.config.data)))
        on_stage("looking for leaks")
        findings += judge_leaks(run)
    elif isinstance(run.config, str):
        findings.append(Finding(name="config", state="unknown", detail=run.config))
    return Diagnosis(folder=folder, preset=run.preset, findings=tuple(findings), histories=tuple(run.histories))


def judge_history(history: History) -> Iterator[Finding]:
    """What the logged numbers tell: whether they are numbers, the gradient, and the loss beside the reference."""
    before = f"{history.phase}: " if history.phase else ""
    yield replace(judge_finite(history.lines), name=f"{before}loss")
    finite = tuple(line for line in history.lines if _is_finite(line))
    with_norm = tuple(line for line in finite if "grad_norm" in line)
    if with_norm:
        yield replace(judge_gradient(with_norm), name=f"{before}gradient")
    yield replace(judge_loss(finite, history.curve), name=f"{before}reference curve")


def judge_finite(lines: Lines) -> Finding:
    """Whether loss and gradient were numbers to the end."""
    spoiled = [line for line in lines if not _is_finite(line)]
    if spoiled:
        first = spoiled[0]
        return Finding(
            name="loss",
            state="error",
            detail=f"diverged at step {first['step']:.0f}: loss {first['loss']}, grad_norm {first.get('grad_norm')}",
            remedy="start again with a lower optim.lr or a longer optim.warmup_steps, or with loop.precision=no",
        )
    last = lines[-1]
    recent = statistics.median(line["loss"] for line in lines[-LEAST_LINES:])
    detail = f"{recent:.4g} at step {last['step']:.0f}, {last['images_seen']:,.0f} images seen"
    return Finding(name="loss", state="ok", detail=detail)


def judge_gradient(lines: Lines) -> Finding:
    """Whether the norm of the gradient leaps, or grows from stretch to stretch."""
    norms = [line["grad_norm"] for line in lines]
    if len(norms) < 2 * LEAST_LINES:
        return Finding(name="gradient", state="ok", detail=f"{norms[-1]:.3g}; too few lines to judge")
    leaps = [
        (line["step"], norm / before)
        for place, (line, norm) in enumerate(zip(lines, norms, strict=True))
        if place >= LEAST_LINES
        and norm > LEAP * (before := statistics.median(norms[place - LEAST_LINES : place]))
        and before > 0
    ]
    size = max(LEAST_LINES, len(norms) // STRETCHES)
    stretches = [statistics.median(norms[i : i + size]) for i in range(len(norms) % size, len(norms), size)]
    if min(stretches) == 0:
        return Finding(
            name="gradient",
            state="warning",
            detail=f"is 0 over {size} lines together: nothing is learnt there",
            remedy="see that optim.lr is above 0 and the loss no constant; loop.precision=no keeps small gradients",
        )
    growth = stretches[-1] / min(stretches)
    remedy = "lower optim.lr, lengthen optim.warmup_steps, or lower optim.max_grad_norm, in another --out"
    if leaps:
        step, times = max(leaps, key=lambda leap: leap[1])
        detail = f"leaps {len(leaps)} times, at step {step:.0f} to {times:.0f} times what it was before"
        return Finding(name="gradient", state="warning", detail=detail, remedy=remedy)
    if growth > GROWN:
        detail = f"grows: {stretches[-1]:.3g} now, {growth:.1f} times its smallest stretch"
        return Finding(name="gradient", state="warning", detail=detail, remedy=remedy)
    return Finding(name="gradient", state="ok", detail=f"{stretches[-1]:.3g}, without leaps")


def judge_loss(lines: Lines, curve: Curve | None) -> Finding:
    """Whether the loss is far above that of the preset's reference run at as many images seen."""
    name = "reference curve"
    if curve is None or not lines:
        return Finding(name=name, state="unknown", detail="there is none for such a run")
    recent = lines[-max(LEAST_LINES, len(lines) // (2 * STRETCHES)) :]
    seen = statistics.median(line["images_seen"] for line in recent)
    expected = curve.loss_at(seen)
    if expected is None:
        return Finding(name=name, state="ok", detail="too early to compare")
    ratio = statistics.median(line["loss"] for line in recent) / expected
    beyond = f"; its curve ends at {curve.points[-1].images_seen:,.0f}" if seen > curve.points[-1].images_seen else ""
    detail = f"{ratio:.2f} times the loss of the reference at {seen:,.0f} images seen{beyond}"
    if ratio > FAR_ABOVE:
        remedy = "compare the settings with the reference's (docs/training.md); a rate too high or too low is usual"
        return Finding(name=name, state="warning", detail=detail, remedy=remedy)
    return Finding(name=name, state="ok", detail=detail)


def judge_life(run: RunFolder) -> Finding:
    """Whether neighbours are worth anything, by the newest reading, taken now where the run has left none."""
    name = "neighbours"
    assert isinstance(run.config, BaseConfig)
    try:
        step, images_seen, reading = newest_reading(run)
    except UserError as error:
        return Finding(name=name, state="unknown", detail=str(error))
    curve = run.histories[0].curve if run.histories else None
    expected = None if curve is None else curve.gain_at(images_seen)
    return judge_reading(reading, early=step < EARLY * run.config.loop.num_steps, expected=expected)


def judge_reading(reading: Reading, *, early: bool, expected: float | None) -> Finding:
    """What a probe says; `expected` is the worth of neighbours in the reference run at as many images seen."""
    name = "neighbours"
    both = reading.attention_right + reading.attention_wrong
    apart = (reading.attention_right - reading.attention_wrong) / both if both else 0.0
    beside = "" if expected is None else f" (the reference: {expected:.1%})"
    detail = (
        f"a right one takes {reading.gain:.1%} off the loss{beside}, {reading.gain_over_shuffled:.1%} beside a wrong "
        f"one; attention: right {reading.attention_right:.2f}, wrong {reading.attention_wrong:.2f}, none "
        f"{reading.attention_sink:.2f}"
    )
    dead = []
    if reading.gain < LEAST_GAIN or (expected is not None and reading.gain < SHARE_OF_GAIN * expected):
        dead.append("they are worth next to nothing")
    if both < LEAST_ATTENTION:
        dead.append("nearly all attention goes to none of them")
    elif apart < TELLS_APART:
        dead.append("right and wrong ones get nearly the same attention")
    if not dead or early:
        return Finding(name=name, state="ok", detail=detail + ("; early yet" if dead else ""))
    remedy = (
        "see what samples/ shows; more pack.candidates that are right, a lower data.wrong_prob, and neighbours at "
        "finer levels of the network (unet.decoder_neighbor_levels) bring them to life"
    )
    return Finding(name=name, state="warning", detail=f"{'; '.join(dead)}: {detail}", remedy=remedy)


def newest_reading(run: RunFolder) -> tuple[int, float, Reading]:
    """The step, the images seen by then, and the reading. A UserError where neither reading nor state is there."""
    config = run.config
    assert isinstance(config, BaseConfig)
    fields = Reading.__dataclass_fields__
    state = run.folder / "state.safetensors"
    probes = run.histories[0].probes if run.histories else ()
    written = [line for line in probes if fields.keys() <= line.keys()]
    if written:
        last = written[-1]
        values: dict[str, Any] = {field: last[field] for field in fields}
        return int(last["step"]), last["images_seen"], Reading(**values)
    if not state.exists():
        raise CorpusError("nothing was saved yet")
    tensors, facts = load_state(state)
    network = UNet(config.unet)
    network.load_state_dict(without_prefix("ema", tensors))
    objective = objective_of(config)
    reading = probe(network.eval(), run.pack, data=config.data, objective=objective, seed=config.loop.seed)
    if reading is None:
        raise CorpusError("no scene of the pack has a neighbour")
    return int(facts["step"]), int(facts["step"]) * _images_a_step(run), reading


def _images_a_step(run: RunFolder) -> float:
    """By the log, which knows how many processes there were; before there is one, those of one process."""
    if not run.histories:
        assert isinstance(run.config, BaseConfig)
        return run.config.data.batch_size
    last = run.histories[0].lines[-1]
    return last["images_seen"] / last["step"]


def judge_dropping(pack: Pack, data: DataConfig) -> Finding:
    """Whether text and neighbours are left out as often as asked for, in batches drawn as training draws them."""
    name = "dropping"
    text, neighbors = data.drop_text_prob, prob_of_no_neighbors(pack, data)
    found_text, found_neighbors = drawn_shares(pack, data)
    detail = (
        f"no text in {found_text:.3f} of the examples ({text:.3f} expected), no neighbour in {found_neighbors:.3f} "
        f"({neighbors:.3f} expected, of which {data.drop_neighbors_prob:.3f} was asked for)"
    )
    wrong, remedy = "", ""
    for field, found, expected in (
        ("drop_text_prob", found_text, text),
        ("drop_neighbors_prob", found_neighbors, neighbors),
    ):
        if abs(found - expected) > SIGMAS * math.sqrt(expected * (1 - expected) / DRAWN) + 1 / DRAWN:
            wrong, remedy = "not as often as asked for", "a mistake of the program: report it with config.json"
        elif expected < RARE:
            wrong, remedy = "a branch of guidance is hardly ever trained", f"set data.{field} to about 0.1"
    if not wrong and neighbors > data.drop_neighbors_prob + MORE_DROPPED:
        wrong = "many examples see no neighbour"
        remedy = "lower data.missing_prob, or see why scenes of the pack have no candidates"
    if wrong:
        return Finding(name=name, state="warning", detail=f"{wrong}: {detail}", remedy=remedy)
    return Finding(name=name, state="ok", detail=detail)


def drawn_shares(pack: Pack, data: DataConfig) -> tuple[float, float]:
    """The shares of examples without text and without a neighbour, among some thousands drawn on 2x2 pixels.

    K is one lot a batch, so that few batches would show a share by the luck of their K: each K has as many batches.
    """
    dots = replace(pack, layers=pack.layers[:, :2, :2], pictures=pack.pictures[:, :2, :2])
    rounds = math.ceil(DRAWN / DRAWN_AT_ONCE / len(data.num_neighbors))
    batches = [
        draw_batch(dots, replace(data, batch_size=DRAWN_AT_ONCE, num_neighbors=(k,)), torch.Generator().manual_seed(i))
        for i, k in enumerate(data.num_neighbors * rounds)
    ]
    text = torch.cat([~batch.text.mask.any(dim=1) for batch in batches])
    neighbors = torch.cat([~batch.neighbors.mask.any(dim=1) for batch in batches])
    return text.float().mean().item(), neighbors.float().mean().item()


def prob_of_no_neighbors(pack: Pack, data: DataConfig) -> float:
    """The exact probability that an example sees no neighbour at all: dropped, or each of the K missing by itself.

    K places are drawn from c candidates, of which h hold one: j of the K are empty with hypergeometric probability.
    A place with a neighbour loses it with `missing_prob`; an empty one gets a wrong one with `wrong_prob` first.
    """
    total = 0.0
    for k in data.num_neighbors:
        held = (pack.scene_neighbors[:, : max(k, data.candidates)] >= 0).sum(dim=1)
        c = min(max(k, data.candidates), pack.scene_neighbors.shape[1])
        for h, scenes in enumerate(torch.bincount(held, minlength=c + 1).tolist()):
            total += scenes / len(pack) * _prob_all_missing(c, h, min(k, c), data) / len(data.num_neighbors)
    return data.drop_neighbors_prob + (1 - data.drop_neighbors_prob) * total


def _prob_all_missing(c: int, h: int, k: int, data: DataConfig) -> float:
    empty = 1 - (1 - data.missing_prob) * data.wrong_prob
    ways = [math.comb(c - h, j) * math.comb(h, k - j) for j in range(k + 1)]
    return sum(way * empty**j * data.missing_prob ** (k - j) for j, way in enumerate(ways)) / math.comb(c, k)


def judge_leaks(run: RunFolder) -> Iterator[Finding]:
    """Whether anything held out, or a scene's own record, reached training. Each source is looked at by itself."""
    folder = run.folder

    def captions() -> Iterator[Leak]:
        kept = Captions.load(folder, run.pack)
        return leaks_in_texts([*kept.scenes, *kept.pictures], where="captions.json")

    def pictures() -> Iterator[Leak]:
        from radt.corpora.emoji import GlyphRenderer

        return leaks_in_pictures(run.pack, GlyphRenderer())

    def targets() -> list[Leak]:
        from radt.corpora.emoji import GlyphRenderer

        assert isinstance(run.config, BaseConfig | DistillConfig)
        return leaks_in_targets(run.pack, Captions.load(folder, run.pack), run.config.pack, GlyphRenderer())

    def own() -> Iterator[Leak]:
        from radt.corpora.emoji import GlyphRenderer

        assert isinstance(run.config, BaseConfig | DistillConfig)
        return own_records(run.pack, Captions.load(folder, run.pack), run.config.pack, GlyphRenderer())

    sources: dict[str, Callable[[], Iterable[Leak]]] = {
        "corpus": lambda: leaks_in_corpus(folder / "corpus"),
        "captions": captions,
        "pictures": pictures,
        "targets": targets,
        "own records": own,
    }
    for name, source in sources.items():
        yield _looked_at(f"leaks: {name}", lambda source=source: _judge_leak(list(source())))  # type: ignore[misc]


def _judge_leak(leaks: Sequence[Leak]) -> Finding:
    if not leaks:
        return Finding(name="leaks", state="ok", detail="none")
    some = "; ".join(leak.what for leak in leaks[:TOLD])
    more = f"; and {len(leaks) - TOLD:,} more" if len(leaks) > TOLD else ""
    remedy = "delete pack.safetensors, corpus and kb, and run the command again: what was trained so far is no evidence"
    return Finding(name="leaks", state="error", detail=f"{some}{more}", remedy=remedy)


def _looked_at(name: str, judge: Callable[[], Finding]) -> Finding:
    """A finding under its name; that something cannot be looked at, for want of a file, is one too."""
    try:
        return replace(judge(), name=name)
    except (UserError, OSError) as error:
        return Finding(name=name, state="unknown", detail=str(error))


def _is_finite(line: Mapping[str, float]) -> bool:
    return all(math.isfinite(line.get(name, 0.0)) for name in ("loss", "grad_norm"))
