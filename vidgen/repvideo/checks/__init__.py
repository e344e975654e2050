"""For `vidgen verify`, benchmarks and tests: golden cases, example steps, small models."""
