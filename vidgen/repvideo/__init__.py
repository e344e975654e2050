"""RepVideo (arXiv 2501.08994): CogVideoX whose layers see the mean of earlier ones."""
