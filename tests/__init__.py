"""The suite. A package by name, because torch-fidelity installs a `tests` of its own, which would be found instead."""
