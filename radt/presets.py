"""Presets: functions that return a complete run configuration. `radt train PRESET --set key=value` changes a field."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from index.errors import ConfigError
from radt.bundle import CLIP_FOLDER, default_bundle, read_info
from radt.corpora.scenes import Kind
from radt.diffusion.denoiser import Prediction
from radt.diffusion.loss import Weighting
from radt.diffusion.schedule import NoiseSchedule
from radt.settings import GenerateSettings
from radt.training.clip import ClipTrainConfig, clip_emoji
from radt.training.data import DataConfig
from radt.training.distill_run import DistillConfig
from radt.training.emoji_pack import PackConfig
from radt.training.loop import LoopConfig
from radt.training.optim import OptimConfig
from radt.training.recognizer import RecognizerTrainConfig, recognizer_emoji
from radt.training.text_tuning import TextTuning
from radt.unet.unet import UNetConfig

# Scenes of the base stage: what stands alone is learnt soon, what stands in places and beside others takes longer.
DIFFICULT_KINDS: dict[Kind, float] = {"alone": 0.25, "placed": 0.20, "sized": 0.07, "counted": 0.18, "two": 0.30}


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseConfig:
    """A run that trains one stage of the emoji demonstration and writes a bundle."""

    clip: str  # folder of the trained CLIP, in open_clip's local-dir form
    text_encoder: str | None = None  # a transformers model, such as T5, by name or folder; None: the CLIP's text tower
    unet: UNetConfig
    schedule: NoiseSchedule
    prediction: Prediction
    weighting: Weighting
    pack: PackConfig
    data: DataConfig
    optim: OptimConfig
    loop: LoopConfig
    sampling: GenerateSettings
    below: str | None = None  # the bundle whose stages come first; None: this is the first stage
    augmentation: float = 0.5  # the most noise over the picture below, as a time of the schedule
    warp: float = 0.0  # the most that the picture below is bent, in its own pixels
    time_shift: float = 1.0  # above 1: noisy times, at which a picture is laid out, are trained more often
    start: str | None = None  # the folder of a stage that training goes on from, as `bundle/stage0`; None: from nothing
    text_tuning: TextTuning = field(default_factory=TextTuning)  # of the text encoder, after the network

    def __post_init__(self) -> None:
        if not 0 <= self.augmentation <= 1:
            raise ConfigError(f"augmentation is a time from 0 to 1, got {self.augmentation}")
        if not (math.isfinite(self.warp) and self.warp >= 0):
            raise ConfigError(f"warp is in pixels and 0 or more, got {self.warp}")
        if not (math.isfinite(self.time_shift) and self.time_shift > 0):
            raise ConfigError(f"time_shift must be above 0 (1 leaves times as they are), got {self.time_shift}")


def emoji_demo() -> BaseConfig:
    """The base stage of the demonstration: 32x32, 5 M parameters, neighbours at four levels.

    1.5 M pictures: about five hours on two CPU cores, in two processes. What stands where, and which of two things is
    which, is learnt late. The weights inside the package were trained so in several runs, which their card names.
    """
    return BaseConfig(
        clip="runs/clip-emoji/clip",
        unet=UNetConfig(image_size=32, text_width=128, pooled_width=128, text_layers=2),
        schedule=NoiseSchedule(curve="cosine"),
        prediction="v",
        weighting="v",
        pack=PackConfig(num_scenes=30_000, kinds=dict(DIFFICULT_KINDS)),
        data=DataConfig(candidates=2, wrong_prob=0.12, missing_prob=0.05),
        optim=OptimConfig(cooldown_share=0.15),
        loop=LoopConfig(num_steps=24_000),
        time_shift=2.5,
        # By words, because this CLIP cannot know the names of entities held out of its training; by each thing that a
        # prompt names, because a "pink background" finds pink hearts. Two neighbours for each of two things: both are
        # right for 0.80 of the held-out classes that emoji-draw does not ask for, and for 0.74 with K = 2. By these
        # classes the guidance weights were chosen, too.
        # The stage above trusts this one's pictures: noise over them costs what is small.
        sampling=GenerateSettings(
            k=4,
            by="bm25",
            decompose="phrases",
            text_guidance=3.0,
            neighbor_guidance=3.0,
            augmentation_level=0.0,
        ),
    )


def emoji_demo_sr() -> BaseConfig:
    """The stage from 32x32 to 128x128 that ships with radt, trained apart from the one below."""
    below = default_bundle()
    base = emoji_demo()
    return replace(
        base,
        clip=str(below / CLIP_FOLDER),
        below=str(below),
        unet=UNetConfig(
            image_size=128,
            low_res_size=32,
            text_width=128,
            pooled_width=128,
            fold=4,
            channels=(64, 96, 128),
            blocks=(2, 2, 2),
            attention_levels=(2,),
            encoder_neighbor_levels=(1,),
            decoder_neighbor_levels=(0, 1),
        ),
        # A patch of 4x4 pixels has more numbers than the network has channels, so that it can tell a clean picture and
        # not noise (Li and He 2025, Back to Basics): trained for v, 3,200 pictures gave noise; for x0, 1,600 a picture.
        prediction="x0",
        weighting="x0",
        pack=PackConfig(num_scenes=3000),
        data=DataConfig(batch_size=16),
        optim=OptimConfig(),
        loop=LoopConfig(num_steps=5000),
        time_shift=1.0,
        sampling=read_info(below).sampling,
    )


def bottleneck_only(unet: UNetConfig) -> UNetConfig:
    """The same network with neighbours at the coarsest map alone, as Re-Imagen has them (row R9)."""
    return replace(unet, encoder_neighbor_levels=(len(unet.channels) - 1,), decoder_neighbor_levels=())


IMAGEN_TEXT = "google/t5-v1_1-xxl"  # the encoder of Imagen, section 2.1: tokens of width 4096


def imagen_64() -> UNetConfig:
    """Imagen's base network of 2 B parameters (Saharia et al. 2022, appendix F): 512 channels times 1, 2, 3, 4.

    Deviates in the number of blocks, 3 everywhere there: more of them at low resolution bring it to the size named.
    """
    return UNetConfig(
        image_size=64,
        text_width=4096,
        pooled_width=4096,
        channels=(512, 1024, 1536, 2048),
        blocks=(3, 3, 5, 6),
        fold=1,
        embedding_width=2048,
        attention_levels=(1, 2, 3),  # 32, 16 and 8 positions a side
        encoder_neighbor_levels=(2, 3),
        decoder_neighbor_levels=(1, 2),
        heads=8,
        neighbor_heads=8,
        neighbor_key_width=92,  # with 32 position channels, up to 3 neighbours and the sink: 128 in all
        neighbor_value_width=128,
    )


def imagen_256() -> UNetConfig:
    """Imagen's Efficient U-Net from 64x64 to 256x256, 600 M parameters: 128 channels times 1, 2, 4, 8 (appendix F).

    Its first strided convolution is the fold here. 8 blocks at the last level there, 11 here, for the size named.
    """
    return replace(
        imagen_64(),
        image_size=256,
        low_res_size=64,
        channels=(128, 256, 512, 1024),
        blocks=(2, 4, 8, 11),
        fold=2,
        embedding_width=512,
        attention_levels=(3,),
        encoder_neighbor_levels=(3,),
        decoder_neighbor_levels=(2,),
    )


def imagen_1024() -> UNetConfig:
    """Imagen's Efficient U-Net from 256x256 to 1024x1024, 400 M parameters; attention at the coarsest maps alone."""
    return replace(imagen_256(), image_size=1024, low_res_size=256, blocks=(2, 4, 8, 6), fold=4)


def imagen_stage(unet: UNetConfig, *, below: str | None = None, num_scenes: int = 12000) -> BaseConfig:
    """One stage of the large cascade, trained as Imagen says (section 4.1, appendix F), for a machine with GPUs."""
    return replace(
        emoji_demo(),
        text_encoder=IMAGEN_TEXT,
        unet=unet,
        below=below,
        pack=PackConfig(num_scenes=num_scenes),
        data=DataConfig(),
        optim=OptimConfig(lr=1e-4, warmup_steps=10_000),
        loop=LoopConfig(num_steps=2_500_000, ema_decay=0.9999, save_every=10_000, compile=True),
        time_shift=1.0,
    )


def emoji_demo_fast() -> DistillConfig:
    """The twin of the shipped base stage: one row a step, guidance as an input, and 8 steps."""
    return DistillConfig(
        bundle=str(default_bundle()),
        optim=OptimConfig(lr=2e-4, warmup_steps=50, cooldown_share=1.0),
        pack=emoji_demo().pack,
        data=replace(emoji_demo().data, batch_size=32),
        loop=LoopConfig(num_steps=1600),
        halving_updates=1000,
    )


def tiny() -> BaseConfig:
    """A base stage that trains in seconds: what the tests use, and a first look at the loop. It draws nothing well."""
    return BaseConfig(
        clip="runs/clip-emoji/clip",
        unet=UNetConfig(
            image_size=32,
            text_width=128,
            pooled_width=128,
            channels=(16, 32),
            blocks=(1, 1),
            fold=4,
            embedding_width=32,
            attention_levels=(1,),
            encoder_neighbor_levels=(1,),
            decoder_neighbor_levels=(0,),
            heads=2,
        ),
        schedule=NoiseSchedule(curve="cosine"),
        prediction="v",
        weighting="v",
        pack=PackConfig(num_scenes=40),
        data=DataConfig(batch_size=4),
        optim=OptimConfig(warmup_steps=2),
        loop=LoopConfig(num_steps=8, save_every=4, log_every=1, precision="no"),
        sampling=GenerateSettings(steps=4),
    )


PRESETS: dict[str, Callable[[], BaseConfig | DistillConfig | ClipTrainConfig | RecognizerTrainConfig]] = {
    "emoji-demo": emoji_demo,
    "emoji-demo-sr": emoji_demo_sr,
    "emoji-demo-fast": emoji_demo_fast,
    "clip-emoji": clip_emoji,
    "recognizer-emoji": recognizer_emoji,
    "tiny": tiny,
    "imagen-64": lambda: imagen_stage(imagen_64()),
    "imagen-256": lambda: imagen_stage(imagen_256(), below="runs/imagen-64/bundle", num_scenes=3000),
    "imagen-1024": lambda: imagen_stage(imagen_1024(), below="runs/imagen-256/bundle", num_scenes=300),
}
