"""`radt train PRESET --out RUN`: prepare what is missing, train, and leave a bundle. The same command again resumes.

A base run's folder holds

    config.json                               the resolved configuration
    corpus/  kb/  pack.safetensors            training entities, their knowledge base, what is trained on
    captions.json                             the captions that the pack holds embedded
    state.safetensors  metrics.jsonl          where training is
    samples/  probe.jsonl                     sheets drawn while training, and what neighbours are worth by then
    bundle/                                   the averaged weights as a model, after every save
    text_tuning.safetensors, text_tuning.jsonl    where fine-tuning the text encoder is, if that was asked for
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from index.atomic import write_bytes
from index.config import from_dict, override, to_dict
from index.errors import ConfigError, ModelError
from radt.presets import PRESETS, BaseConfig, emoji_demo
from radt.training.clip import ClipTrainConfig, train_clip
from radt.training.distill_run import DistillConfig
from radt.training.follow import OnStep
from radt.training.recognizer import RecognizerTrainConfig, train_recognizer
from radt.training.text_tuning import STATE_FILE

if TYPE_CHECKING:
    from radt.resizing import Size
    from radt.training.loop import Objective, Run
    from radt.training.pack import Pack
    from radt.training.precompute import TextReport
    from radt.unet.unet import UNet, UNetConfig

OnStage = Callable[[str], None]
Config = TypeVar("Config", bound=BaseConfig | DistillConfig)

# What may change when a run resumes, as may how long it is.
FREE = ("clip", "start", "below", "bundle", "pack_file", "steps", "halving_updates")
# And of tuning the text encoder once that has begun; before, all of it may.
FREE_TUNING = ("text_tuning.num_steps", "text_tuning.save_every", "text_tuning.log_every")


def train(
    preset: str,
    overrides: Sequence[str],
    out: Path,
    *,
    on_step: OnStep = lambda _: None,
    on_stage: OnStage = lambda _: None,
) -> Path:
    """Run a preset into `out`; returns the folder of the trained model. `overrides` are key=value."""
    if preset not in PRESETS:
        raise ConfigError(f"unknown preset {preset!r}; choose one of {', '.join(PRESETS)}")
    config = override(PRESETS[preset](), *overrides)
    if isinstance(config, ClipTrainConfig):
        return train_clip(config, out, on_step=on_step)
    if isinstance(config, RecognizerTrainConfig):
        return train_recognizer(config, out, on_step=on_step)
    if isinstance(config, DistillConfig):
        return train_twin(config, out, on_step=on_step, on_stage=on_stage)
    return train_base(config, out, name=preset, on_step=on_step, on_stage=on_stage)


def train_base(
    config: BaseConfig, out: Path, *, name: str, on_step: OnStep = lambda _: None, on_stage: OnStage = lambda _: None
) -> Path:
    """Train one stage. Only the number of steps and how often state is kept may change when a run resumes."""
    import torch
    from accelerate import PartialState

    from radt.training.loop import STATE_FILE as RUN_STATE
    from radt.training.loop import Run

    _check_tunable(config, out)
    _check_pack_can_be_made(config, out)
    _check_below(config)
    with PartialState(cpu=not torch.cuda.is_available()).main_process_first():  # of several, one prepares
        out.mkdir(parents=True, exist_ok=True)
        _keep_config(config, out)
        pack = _prepared_pack(config, out, on_stage)
    _check_fits(pack, config)
    _check_made_with(out / "pack.safetensors", config)
    torch.manual_seed(config.loop.seed)
    objective = objective_of(config)
    run = Run(
        _first_network(config, resumes=(out / RUN_STATE).exists()),
        pack,
        out,
        data=config.data,
        optim=config.optim,
        loop=config.loop,
        objective=objective,
    )
    on_stage("training")
    run.train(on_step=on_step, on_save=lambda run: _after_save(run, config, out, name))
    if config.text_tuning.num_steps and run.accelerator.is_main_process:
        on_stage("tuning the text encoder")
        _tune_text(config, out, objective=objective, on_step=on_step, on_stage=on_stage)
    if config.below is not None and not (Path(config.below) / "bundle.json").is_file():
        on_stage(f"trained, and no bundle yet: run this again when the stages below lie in {config.below}")
    return out / "bundle"


def objective_of(config: BaseConfig) -> "Objective":
    """What a stage of this configuration learns to answer."""
    from radt.training.loop import Objective

    return Objective(
        schedule=config.schedule,
        prediction=config.prediction,
        weighting=config.weighting,
        augmentation=config.augmentation,
        warp=config.warp,
        time_shift=config.time_shift,
    )


def _first_network(config: BaseConfig, *, resumes: bool) -> "UNet":
    """The network as training starts: by lot, or with the weights of a stage that was trained before.

    A run that resumes has weights of its own, and needs that stage no more.
    """
    from radt.bundle import load_unet
    from radt.unet.unet import UNet

    network = UNet(config.unet)
    if config.start is not None and not resumes:
        trained = load_unet(Path(config.start))
        theirs = trained.config
        if not theirs.text_layers:  # a refiner may be new, for it starts as the identity
            theirs = replace(theirs, text_layers=config.unet.text_layers)
        if theirs != config.unet:
            raise ConfigError(f"the stage in {config.start!r} is another network than unet asks for; name one like it")
        network.load_state_dict(network.state_dict() | trained.state_dict())
    return network


def train_twin(
    config: DistillConfig, out: Path, *, on_step: OnStep = lambda _: None, on_stage: OnStage = lambda _: None
) -> Path:
    """Distil one stage of a bundle. The twin may be halved further when a run resumes."""
    from radt.bundle import CLIP_FOLDER, load_unet, read_info, text_encoder_of
    from radt.training.distill_run import distill, find_stage
    from radt.training.pack import Pack

    bundle = Path(config.bundle)
    teacher = load_unet(bundle / find_stage(config).name)
    base = replace(
        emoji_demo(),
        clip=str(bundle / CLIP_FOLDER),
        text_encoder=text_encoder_of(bundle, read_info(bundle)),
        unet=teacher.config,
        pack=config.pack,
        data=config.data,
    )
    if config.pack_file is None:
        _check_pack_can_be_made(base, out)
    out.mkdir(parents=True, exist_ok=True)
    _keep_config(config, out)
    pack = _prepared_pack(base, out, on_stage) if config.pack_file is None else Pack.load(Path(config.pack_file))
    _check_fits(pack, base)
    if config.pack_file is None:
        _check_made_with(out / "pack.safetensors", base)
    else:
        _check_made_with(Path(config.pack_file), base, remedy="leave out pack_file, and one is made")
    return distill(config, teacher, pack, out=out, on_step=on_step, on_stage=on_stage)


def _prepared_pack(config: BaseConfig, out: Path, on_stage: OnStage) -> "Pack":
    """The run's pack, made where it is missing: corpus of training entities, its knowledge base, neighbours."""
    from radt.training.pack import Pack

    path = out / "pack.safetensors"
    if not path.exists():
        from index.embedder import ClipEmbedder
        from index.ingest.build import BuildConfig, build
        from index.knowledge_base import KnowledgeBase
        from radt.corpora.emoji import write_emoji
        from radt.text_encoder import load_text_encoder
        from radt.training.emoji_pack import make_emoji_pack
        from radt.training.precompute import CaptionRecorder

        if not Path(config.clip).is_dir():
            raise ModelError(
                f"there is no CLIP folder {config.clip!r}; make it with `radt train clip-emoji --out runs/clip-emoji`"
            )
        on_stage("drawing the corpus of training entities")
        write_emoji(out / "corpus", split="train", num_entities=config.pack.num_entities)
        on_stage("building its knowledge base")
        embedder = ClipEmbedder.load(config.clip)
        kb = KnowledgeBase.create(out / "kb", embedder)
        build(kb, [str(out / "corpus")], BuildConfig(dataset="emoji"))
        recorder = CaptionRecorder(load_text_encoder(config.clip, config.text_encoder))
        pack = make_emoji_pack(
            config.pack,
            image_size=config.unet.image_size,
            kb=kb,
            text_encoder=recorder,
            on_stage=on_stage,
        )
        recorder.captions(len(pack)).save(out)
        encoders = {
            "clip": folder_digest(Path(config.clip)),
            "text_encoder": _named_or_digest(config.text_encoder) or "",
        }
        pack.save(path, {"config": json.dumps(to_dict(config.pack)), **encoders})
    return Pack.load(path)


def precompute_text(
    preset: str, overrides: Sequence[str], out: Path, *, on_stage: OnStage = lambda _: None
) -> "TextReport":
    """Make a run's pack, every caption in it embedded, and stop: the same command without this trains from it."""
    from radt.text_encoder import load_text_encoder
    from radt.training.precompute import Captions, report_text

    if preset not in PRESETS:
        raise ConfigError(f"unknown preset {preset!r}; choose one of {', '.join(PRESETS)}")
    config = override(PRESETS[preset](), *overrides)
    if not isinstance(config, BaseConfig):
        raise ConfigError(f"preset {preset!r} does not train on embedded captions; --precompute-text has no effect")
    _check_pack_can_be_made(config, out)
    _check_below(config)
    out.mkdir(parents=True, exist_ok=True)
    _keep_config(config, out)
    pack = _prepared_pack(config, out, on_stage)
    _check_fits(pack, config)
    _check_made_with(out / "pack.safetensors", config)
    encoder = load_text_encoder(config.clip, config.text_encoder)
    return report_text(pack, Captions.load(out, pack), encoder, data=config.data, num_steps=config.loop.num_steps)


def _check_tunable(config: BaseConfig, out: Path) -> None:
    if not config.text_tuning.num_steps and (out / STATE_FILE).exists():
        raise ConfigError(
            f"the text encoder of the run in {str(out)!r} was tuned, and its bundle would lose that: name "
            f"text_tuning.num_steps again, or delete {STATE_FILE}"
        )
    if config.text_tuning.num_steps and config.below is not None:
        raise ConfigError("text_tuning is for a first stage: the stages below were trained with the encoder as it is")
    if config.text_tuning.num_steps and not Path(config.clip).is_dir():
        raise ConfigError(f"text_tuning needs the text encoder, and there is no CLIP folder {config.clip!r}")


def _tune_text(config: BaseConfig, out: Path, *, objective: "Objective", on_step: OnStep, on_stage: OnStage) -> None:
    """Fine-tune the text encoder of the finished run (row I2); the bundle then carries the tuned one."""
    from radt.text_encoder import load_text_encoder
    from radt.training.pack import Pack
    from radt.training.text_tuning import tune_bundle

    tune_bundle(
        out,
        Pack.load(out / "pack.safetensors"),
        encoder=load_text_encoder(config.clip, config.text_encoder),
        objective=objective,
        data=config.data,
        tuning=config.text_tuning,
        on_step=on_step,
        on_stage=on_stage,
    )


def _check_pack_can_be_made(config: BaseConfig, out: Path) -> None:
    """Refuse a rectangular network, and too many neighbours, before a pack of squares is made with fewer."""
    if not (out / "pack.safetensors").exists():
        _check_candidates(config, config.pack.candidates)
        _check_size((config.unet.image_size, config.unet.image_size), config.unet)


def _check_candidates(config: BaseConfig, held: int) -> None:
    if config.data.most_candidates > held:
        raise ConfigError(
            f"data asks for {config.data.most_candidates} candidates a scene (candidates, num_neighbors), and the pack "
            f"holds {held} (pack.candidates)"
        )


def _check_size(found: "Size", network: "UNetConfig") -> None:
    if found != network.size:
        height, width = network.size
        own = "" if height == width else ", or bring a pack.safetensors of your own, since those made here hold squares"
        raise ConfigError(
            f"the pack's pictures are {found[0]}x{found[1]} and the network draws {height}x{width}: change unet{own}"
        )


def _check_fits(pack: "Pack", config: BaseConfig) -> None:
    network = config.unet
    _check_size(pack.size, network)
    _check_candidates(config, pack.scene_neighbors.shape[1])
    for what, found, taken in (
        ("text tokens", pack.scene_text.tokens.shape[1], network.text_width),
        ("pooled text", pack.scene_text.pooled.shape[1], network.pooled_width),
    ):
        if found != taken:
            raise ConfigError(f"the pack holds {what} of width {found} and the network takes {taken}: change unet")


def _check_made_with(
    pack: Path, config: BaseConfig, *, remedy: str = "delete the pack, or choose another --out"
) -> None:
    """Refuse to train on one encoder's embeddings and ship another. No CLIP folder, no bundle, nothing to check.

    A pack that says nothing of its text encoder is of an older version, and taken at its word about its CLIP alone.
    """
    from radt.training.pack import read_facts

    if not Path(config.clip).is_dir():
        return
    facts = read_facts(pack)
    if facts.get("clip") != folder_digest(Path(config.clip)):
        raise ConfigError(f"{pack} was made with another CLIP than {config.clip}: {remedy}")
    own = _named_or_digest(config.text_encoder) or ""
    if facts.get("text_encoder", own) != own:
        name = config.text_encoder or f"the one in {config.clip}"
        raise ConfigError(f"{pack} was made with another text encoder than {name}: {remedy}")


def _check_below(config: BaseConfig) -> None:
    """Refuse, before any work, to train above stages that this one cannot be joined to; they may not be there yet."""
    from radt.bundle import stages_below

    if config.below is not None and (Path(config.below) / "bundle.json").is_file():
        if Path(config.clip).is_dir():
            _check_same_encoder(config)
        stages_below(Path(config.below), config.unet)


def _check_same_encoder(config: BaseConfig) -> None:
    """Refuse to join stages that read prompts by different encoders."""
    from radt.bundle import CLIP_FOLDER, read_info, text_encoder_of

    if config.below is None:
        return
    below = Path(config.below)
    theirs = text_encoder_of(below, read_info(below))
    for what, field, one, other in (
        ("CLIP", "clip", str(below / CLIP_FOLDER), config.clip),
        ("text encoder", "text_encoder", theirs, config.text_encoder),
    ):
        if _named_or_digest(one) != _named_or_digest(other):
            raise ConfigError(
                f"the stages in {config.below!r} were trained with another {what} than {other!r}, so they cannot be "
                f"one model: take theirs with --set {field}={one or 'null'}, or name a bundle of the same {what} with "
                "--set below=..."
            )


def _named_or_digest(encoder: str | None) -> str | None:
    """An encoder by its content where it is a folder, else by its name."""
    return folder_digest(Path(encoder)) if encoder is not None and Path(encoder).is_dir() else encoder


def folder_digest(folder: Path) -> str:
    """A hash of the names and contents of a folder's files, which needs none of the packages that read them."""
    state = blake2b(digest_size=16)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        state.update(path.relative_to(folder).as_posix().encode() + b"\0" + blake2b(path.read_bytes()).digest())
    return state.hexdigest()


def _keep_config(config: BaseConfig | DistillConfig, out: Path) -> None:
    """Write the configuration on the first start; refuse to resume under one that would change what is computed."""
    path = out / "config.json"
    if path.exists():
        free = FREE_TUNING if (out / STATE_FILE).exists() else ("text_tuning.",)
        old = _computed(_read_config(path, type(config)), free)
        changed = [key for key, value in _computed(config, free).items() if value != old[key]]
        if changed:
            tuning = all(key.startswith("text_tuning.") for key in changed)
            remedy = f"delete {STATE_FILE} in it to tune anew" if tuning else "choose another --out"
            raise ConfigError(f"{str(out)!r} was started with another {', '.join(changed)}; {remedy}")
    write_bytes(path, (json.dumps(to_dict(config), indent=1) + "\n").encode())


def _read_config(path: Path, kind: type[Config]) -> Config:
    """The configuration a run was started with; a field that was added since has its default."""
    try:
        return from_dict(kind, json.loads(path.read_text()))
    except ValueError as error:  # ConfigError and JSONDecodeError both
        raise ConfigError(
            f"{str(path)!r} is not the configuration of such a run ({error}); choose another --out"
        ) from error


def _computed(config: BaseConfig | DistillConfig, free: tuple[str, ...]) -> dict[str, Any]:
    """The fields that may not change half-way, by their dotted names; `free` are beginnings of some that may."""
    fixed = {name: getattr(config.loop, name) for name in ("seed", "precision", "ema_decay")}
    values = {**to_dict(config), "loop": fixed}
    free = ("sampling.", *free)  # settings of the bundle
    return {name: value for name, value in _dotted(values) if name not in FREE and not name.startswith(free)}


def _dotted(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _after_save(run: "Run", config: BaseConfig, out: Path, name: str) -> None:
    """Leave the averaged weights as a bundle, a sheet of what they draw, and what they make of their neighbours."""
    from radt.bundle import StageInfo, stages_below, write_bundle
    from radt.training.probe import keep_reading, probe
    from radt.training.samples import draw_samples
    from radt.training.text_tuning import find_tuned
    from radt.unet.unet import UNet

    if not run.accelerator.is_main_process:
        return
    averaged = UNet(config.unet)
    averaged.load_state_dict(run.ema.state())
    averaged.eval()
    draw_samples(averaged, run.pack, config, out / "samples" / f"{run.step:07d}.png")
    keep_reading(
        out,
        step=run.step,
        images_seen=run.step * config.data.batch_size * run.accelerator.num_processes,
        reading=probe(
            averaged.to(run.accelerator.device),
            run.pack,
            data=config.data,
            objective=objective_of(config),
            seed=config.loop.seed,
        ),
    )
    below = None if config.below is None else Path(config.below)
    is_complete = below is None or (below / "bundle.json").is_file()  # the stages below may be in training, too
    if Path(config.clip).is_dir() and is_complete:
        _check_same_encoder(config)
        number = 0 if below is None else len(stages_below(below, config.unet))
        stage = StageInfo(name=f"stage{number}", prediction=config.prediction, schedule=config.schedule)
        write_bundle(
            out / "bundle",
            name=name,
            clip=Path(config.clip),
            unets=[averaged],
            stages=[stage],
            sampling=config.sampling,
            text_encoder=find_tuned(out, averaged) or config.text_encoder,
            below=below,
        )
