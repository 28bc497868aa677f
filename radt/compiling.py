"""Networks made ready to draw: laid out for the device and, where asked, compiled (`radt generate --compile`).

Compiling takes a minute or two, the first time on a machine, for every size of batch and number of neighbours; after
that each step is faster, by how much is in `docs/generation.md`. Pictures differ from uncompiled ones by rounding.
"""

import os
import shutil

import torch

from index.errors import ConfigError
from radt.unet.unet import UNet


def prepare(unet: UNet, *, device: str, compiled: bool = False) -> UNet:
    """Lay the weights out with channels last, on a GPU and for compiled code, and compile the network where asked.

    On a CPU uncompiled convolutions gain nothing from that layout, and keep theirs so that their bits stay. Shapes are
    static: another batch size or number of neighbours is compiled again. On a GPU a step is replayed as a CUDA graph.

    Raises:
        ConfigError: there is no C++ compiler, without which nothing can be compiled.
    """
    if compiled or device != "cpu":
        unet.to(memory_format=torch.channels_last)
    if compiled:
        check_compiler()
        mode = "default" if device == "cpu" else "reduce-overhead"
        unet.compile(dynamic=False, mode=mode)
        predict_rows = torch.compile(unet.predict_rows, dynamic=False, mode=mode)
        unet.predict_rows = predict_rows  # type: ignore[method-assign]
    return unet


def check_compiler() -> None:
    """Raise a ConfigError where torch would find no C++ compiler."""
    if not any(shutil.which(name) for name in (os.environ.get("CXX"), "g++", "clang++") if name):
        raise ConfigError("compiling needs a C++ compiler: install g++ (or name one in CXX), or draw without --compile")
