"""Benchmarks of hpkernels: `python -m benchmarks` prints the README's table and writes a results file."""
