"""`--fast`: what the distilled twins of a model's stages leave to choose (row I10).

A twin of few steps takes exactly those; its guidance is an input and goes as far as it was taught. What was asked and
cannot be is refused, and what the twins fix is written into the settings, so that a PNG's record says what was done.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace

from index.errors import ConfigError
from radt.cascade import Stage, of_stage
from radt.settings import GenerateSettings

TAUGHT = {
    name: getattr(GenerateSettings(), name)
    for name in ("guidance", "guidance_interval", "neighbor_interval", "oscillate_to", "negative_prompt")
}


def settle(settings: GenerateSettings, stages: Sequence[Stage], *, named: Collection[str]) -> GenerateSettings:
    """The settings with the twins' own steps; `named` are those that the user chose, which may not be overruled."""
    twins = [(number, stage) for number, stage in enumerate(stages) if stage.fast is not None]
    if twins and "order" in named:
        raise ConfigError("order would have no effect: a fast twin imitates the mean of both branches at every step")
    for name, value in TAUGHT.items():
        if twins and getattr(settings, name) != value:
            asked = getattr(settings, name)
            raise ConfigError(f"{name} {asked} is not what a fast twin was taught: leave out {name} or --fast")
    for number, stage in twins:
        _check_guidance(of_stage(settings, number), stage)
    halved = {number: stage.fast.steps for number, stage in twins if stage.fast and stage.fast.steps is not None}
    others_above = any(number not in halved for number in range(1, len(stages)))  # which take sr_steps as ever
    for number, steps in halved.items():
        if number and others_above:
            continue  # `Stage.settings` gives this twin its own
        name = "sr_steps" if number else "steps"
        _check_free(settings, name, steps, named)
        settings = replace(settings, sr_steps=steps) if number else replace(settings, steps=steps)
    if len(halved) < len(stages):  # a stage that is no twin still needs a sampler of its own
        return settings
    _check_free(settings, "sampler", "ddim", named)
    return replace(settings, sampler="ddim")


def _check_free(settings: GenerateSettings, name: str, fixed: int | str, named: Collection[str]) -> None:
    if name in named and getattr(settings, name) != fixed:
        raise ConfigError(
            f"a fast twin was distilled to {name} {fixed}, got {getattr(settings, name)}: leave out {name} or --fast"
        )


def _check_guidance(asked: GenerateSettings, stage: Stage) -> None:
    assert stage.fast is not None, stage.info.name
    for name in ("text_guidance", "neighbor_guidance"):
        if getattr(asked, name) > stage.fast.highest_guidance:
            raise ConfigError(
                f"{name} {getattr(asked, name):g} is more than the fast twin of {stage.info.name!r} was taught, "
                f"{stage.fast.highest_guidance:g}: ask for less, or leave out --fast"
            )
