"""What `accelerate` of `diffusers.py` checks, changes and restores."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.attention_processor import (
    CogVideoXAttnProcessor2_0,
    FusedCogVideoXAttnProcessor2_0,
)
from diffusers.models.transformers.cogvideox_transformer_3d import (
    CogVideoXBlock,
    CogVideoXTransformer3DModel,
)
from torch import Tensor, nn

from ..norms.feature_cache import FeatureCache
from . import _forwards
from ._cogvideox import FusedBlock, FusedProcessor, Plan, RotaryAngles, check_norms, refuse_caches

CACHE = "feature_cache"  # its name in the transformer


class Acceleration:
    """An accelerated model; as a context manager it is restored at the end."""

    transformer: CogVideoXTransformer3DModel

    def __init__(self, model: Any, gates: Tensor | Sequence[float] | float | None) -> None:
        self.transformer = check_model(model)
        cache = None if gates is None else feature_cache(self.transformer, gates)
        self._plan = Plan(self.transformer, cache)
        blocks = self.transformer.transformer_blocks
        self._blocks = [FusedBlock(block, i, self._plan) for i, block in enumerate(blocks)]
        self._own = self.transformer.attn_processors  # what restoring puts back
        angles = RotaryAngles()
        self._fused = {
            name: FusedProcessor(angles, type(own) is FusedCogVideoXAttnProcessor2_0)
            for name, own in self._own.items()
        }
        if cache is not None:
            self.transformer.add_module(CACHE, cache)
        self._install()
        self._is_active = True

    def restore(self) -> None:
        """Undoes the acceleration; keeps changes made by others. A second call does nothing."""
        if self._is_active:
            self._uninstall()
            kept = getattr(self.transformer, "original_attn_processors", None)
            if kept is not None:  # by fuse_qkv_projections, which may be undone later
                self.transformer.original_attn_processors = _exchanged(kept, self._fused, self._own)
            if self._plan.cache is not None:
                delattr(self.transformer, CACHE)
            self._is_active = False

    def check(self, **inputs: Any) -> float:
        """The largest difference that acceleration makes to an output.

        Runs the model with and without it, in evaluation mode and without gradients. Gates are
        set to 0 for it: RepVideo then equals CogVideoX, and other gates have no reference.

        Args:
            inputs: what the transformer is called with.

        Raises:
            ValueError: the model is restored already, or has a block cache, which would carry over.
        """
        if not self._is_active:
            raise ValueError("model: expected an accelerated one, got one that is restored")
        if self.transformer.is_cache_enabled:
            raise ValueError("transformer: expected no block cache, got one: disable it first")
        inputs["return_dict"] = False
        with torch.no_grad(), _evaluating(self.transformer):
            with self._gates_of_zero():
                (accelerated,) = self.transformer(**inputs)
            self._uninstall()
            try:
                (expected,) = self.transformer(**inputs)
            finally:
                self._install()
        return (accelerated - expected).abs().max().item()

    def __enter__(self) -> "Acceleration":
        return self

    def __exit__(self, *_: Any) -> None:
        self.restore()

    def _install(self) -> None:
        for fused in self._blocks:
            _forwards.replace(fused.block, fused.forward)
        self._exchange_processors(self._own, self._fused)

    def _uninstall(self) -> None:
        for fused in self._blocks:
            _forwards.put_back(fused.block, fused.forward)
        self._exchange_processors(self._fused, self._own)

    def _exchange_processors(self, old: dict[str, Any], new: dict[str, Any]) -> None:
        processors = self.transformer.attn_processors
        self.transformer.set_attn_processor(_exchanged(processors, old, new))

    @contextmanager
    def _gates_of_zero(self) -> Iterator[None]:
        cache = self._plan.cache
        if cache is not None:
            self._plan.cache = FeatureCache(len(self._blocks), gate=0.0).to(cache.gates.device)
        try:
            yield
        finally:
            self._plan.cache = cache


def _exchanged(
    processors: dict[str, Any], old: dict[str, Any], new: dict[str, Any]
) -> dict[str, Any]:
    """``processors`` with ``old`` replaced by ``new``; one that others have set stays."""
    return {name: new[name] if x is old[name] else x for name, x in processors.items()}


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in was_training.items():
            module.training = training


def check_model(model: Any) -> CogVideoXTransformer3DModel:
    """The transformer of a pipeline, or the model itself; ValueError unless it can be changed."""
    transformer = getattr(model, "transformer", model)
    transformer = getattr(transformer, "_orig_mod", transformer)  # of a compiled one
    if not isinstance(transformer, CogVideoXTransformer3DModel):
        wanted, got = CogVideoXTransformer3DModel.__name__, type(transformer).__name__
        raise ValueError(f"model: expected a {wanted} or a pipeline with one, got {got}")
    for i, block in enumerate(transformer.transformer_blocks):
        _check_block(f"transformer_blocks.{i}", block)
    for name, processor in transformer.attn_processors.items():
        if type(processor) not in (CogVideoXAttnProcessor2_0, FusedCogVideoXAttnProcessor2_0):
            got = type(processor).__name__
            raise ValueError(f"{name}: expected diffusers' own for CogVideoX, got {got}")
    return transformer


def _check_block(name: str, block: nn.Module) -> None:
    if not isinstance(block, CogVideoXBlock):
        raise ValueError(f"{name}: expected a CogVideoXBlock, got {type(block).__name__}")
    if _forwards.is_replaced_by(block, FusedBlock):
        raise ValueError(f"{name}: expected a model that is not accelerated yet, got one that is")
    if not _forwards.can_replace(block) or type(block) is not CogVideoXBlock:
        raise ValueError(f"{name}: expected the forward method of diffusers, got another one")
    check_norms(block, name)


def feature_cache(
    transformer: CogVideoXTransformer3DModel, gates: Tensor | Sequence[float] | float
) -> FeatureCache:
    """A cache with these gates on the model's device; ValueError unless they fit the model."""
    refuse_caches(transformer)
    n_layers, device = len(transformer.transformer_blocks), transformer.device
    if isinstance(gates, (int, float)):
        gates = [gates] * n_layers
    if not isinstance(gates, Tensor):
        gates = torch.tensor([float(gate) for gate in gates])
        if not all(map(math.isfinite, gates.tolist())):
            raise ValueError(f"gates: expected finite numbers, got {gates.tolist()}")
    if gates.shape != (n_layers,):
        raise ValueError(f"gates: expected shape [{n_layers}], got {list(gates.shape)}")
    if not gates.is_floating_point():
        raise ValueError(f"gates: expected a floating-point dtype, got {gates.dtype}")
    if not isinstance(gates, nn.Parameter):
        cache = FeatureCache(n_layers, gate=0.0)
        cache.gates = gates.to(device)
        return cache
    if gates.device != device:
        raise ValueError(f"gates: expected a Parameter on {device}, got one on {gates.device}")
    cache = FeatureCache(n_layers)
    cache.gates = gates
    return cache
