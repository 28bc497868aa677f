"""Benchmarks and the measures they report."""
