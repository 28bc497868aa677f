"""Schedules, the denoiser, guidance, samplers and the loss."""
