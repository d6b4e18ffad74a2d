"""CPU benchmarks: `pytest benchmarks/ --benchmark-only`, `python -m benchmarks.ops`, `python -m benchmarks.bars`."""
