"""RepVideo's feature cache (arXiv 2501.08994), by the name it is imported with.

The functions stand in `norms/feature_cache.py`.
"""

from ..norms.feature_cache import (
    WINDOW,
    CacheWindow,
    FeatureCache,
    Segment,
    mix,
    n_entries,
    segment,
)

__all__ = ["WINDOW", "CacheWindow", "FeatureCache", "Segment", "mix", "n_entries", "segment"]
