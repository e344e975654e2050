"""Golden cases, example inputs and random weights, for `vidgen verify`, benchmarks and tests."""
