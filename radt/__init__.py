"""Generation: text-to-image diffusion with a memory its user owns. Start reading at `radt/pipeline.py`."""

__version__ = "0.1.0"
