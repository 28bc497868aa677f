"""Training data, optimisation, EMA, checkpoints and the loop."""
