"""What `vidgen verify`, benchmarks and tests use: golden cases, example inputs and weights."""
