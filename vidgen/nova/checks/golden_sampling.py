"""Golden cases of NOVA's schedules, guidance and sampling loops: recomputes what they record."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from vidgen.common.golden import Results, Where, check_fixed
from vidgen.ops import EAGER, Ops

from ..model.config import NovaConfig
from ..model.embeddings import patchify
from ..model.weights import load_transformer
from ..sampling.guidance import Guidance
from ..sampling.sampler import SamplingConfig, sample, text_condition
from ..sampling.schedules import (
    DDPM,
    FlowMatching,
    MaskRatio,
    masked_counts,
    read_schedule,
    set_sizes,
)
from ..sampling.steps import Step
from ..text import TextFeatures
from .golden_models import prompts

Tensors = dict[str, Tensor]


def schedules(
    config: dict[str, Any],
    w: Tensors,
    inputs: Tensors,
    ops: Ops,
    outputs: Sequence[str],
    meanings: Mapping[str, str],
) -> Results:
    """Tables of schedules; their arguments are in the names of the outputs."""
    return {name: torch.as_tensor(_table(name, meanings[name], config)) for name in outputs}


def _table(name: str, meaning: str, config: Mapping[str, Any]) -> Any:
    check_fixed(config["mask_ratio"], {"dist": "truncated normal"})
    ratio = {key: x for key, x in config["mask_ratio"].items() if key != "dist"}
    for pattern, make in (
        (r"num_preds_N(\d+)_S(\d+)", lambda n, s: set_sizes(int(n), int(s))),
        (r"mask_len_N(\d+)_S(\d+)", lambda n, s: masked_counts(int(n), int(s))),
        (r"fm_(?:diffusers_|repo_)?(set)?shift([\d.]+)_n(\d+)_(t|sigma)", _flow_matching),
        (r"fm_train_(t|sigma)", _flow_matching_training),
        (r"ddpm_acp_(\w+)", lambda betas: DDPM(beta_schedule=betas).alphas_cumprod),
        (r"ddpm_(t|prev)_([a-z]+)_n(\d+)", _ddpm_timesteps),
        (r"mask_ratio_draws", lambda: _draws(MaskRatio(**ratio), meaning)),
        (r"mask_ratio_stats", lambda: _pair(MaskRatio(**ratio).mean_and_std)),
    ):
        if named := re.fullmatch(pattern, name):
            return make(*named.groups())
    raise ValueError(f"outputs: expected the name of a table, got {name}")


def _flow_matching(later: str | None, shift: str, n_steps: str, what: str) -> Tensor:
    """``later``: whether the shift was set after construction with shift 1."""
    schedule = FlowMatching(shift=float(shift), table_shift=1.0 if later else None)
    sigmas = schedule.sigmas(int(n_steps))
    return sigmas if what == "sigma" else sigmas[:-1] * schedule.num_train_timesteps


def _flow_matching_training(what: str) -> Tensor:
    schedule = FlowMatching()
    sigmas = schedule.training_sigmas()
    return sigmas if what == "sigma" else sigmas * schedule.num_train_timesteps


def _ddpm_timesteps(what: str, spacing: str, n_steps: str) -> list[int]:
    timesteps = DDPM(timestep_spacing=spacing).timesteps(int(n_steps))
    return timesteps if what == "t" else [*timesteps[1:], -1]


def _draws(ratio: MaskRatio, meaning: str) -> Tensor:
    """As many mask ratios as recorded, from NumPy's uniform numbers, as SciPy draws them."""
    import numpy as np

    numbers = re.search(r"(\d+) draws.*seed (\d+)", meaning)
    if numbers is None:
        raise ValueError(f"meaning: expected a count of draws and a seed, got {meaning}")
    count, seed = map(int, numbers.groups())
    return ratio.quantile(torch.from_numpy(np.random.RandomState(seed).random_sample(count)))


def _pair(numbers: tuple[float, float]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def sampler_guidance(
    config: dict[str, Any],
    w: Tensors,
    inputs: Tensors,
    ops: Ops,
    outputs: Sequence[str],
    meanings: Mapping[str, str],
) -> Results:
    """Latents after every step with given predictions, and guided predictions.

    The names of the outputs tell the schedules, their descriptions the arguments of guidance.
    """
    results: Results = {}
    for name in outputs:
        if name.startswith("cfg"):
            results[name] = _guided(meanings[name], config, inputs)
        elif name.startswith("ddpm") and name.endswith("_t"):
            timesteps = _ddpm(name.removesuffix("_t")).timesteps(config["n_steps"])
            results[name] = torch.tensor(timesteps)
        elif name.startswith("ddpm"):
            results[name] = _run(_ddpm(name).steps(config["n_steps"]), inputs, ops)
        else:
            schedule = FlowMatching(shift=float(name.removeprefix("fm_shift")))
            results[name] = _run(schedule.steps(config["n_steps"]), inputs, ops)
    return results


def _ddpm(name: str) -> DDPM:
    named = re.fullmatch(r"ddpm_(\w+)_([a-z]+)_(no)?clip_(\w+)", name)
    if named is None:
        raise ValueError(f"outputs: expected the name of a DDPM schedule, got {name}")
    betas, spacing, no_clip, variance = named.groups()
    return DDPM(
        beta_schedule=betas,
        timestep_spacing=spacing,
        clip_sample=not no_clip,
        variance_type=variance,
    )


def _run(steps: Sequence[Step], inputs: Tensors, ops: Ops) -> Tensor:
    x, found = inputs["x0"], []
    for step, prediction, noise in zip(
        steps, inputs["model_out"], inputs["ddpm_noise"], strict=True
    ):
        x = step(x, prediction, ops, noise=noise)
        found.append(x)
    return torch.stack(found)


def _guided(meaning: str, config: Mapping[str, Any], inputs: Tensors) -> Tensor:
    numbers = {key: float(x) for key, x in re.findall(r"(\w+)'?[:=] ?(-?[\d.]+)", meaning)}
    options = {key: x for key, x in config.items() if key.startswith("guidance")} | numbers
    guidance = Guidance(**options)
    if guidance.min_guidance_scale is not None:
        named = re.search(r"of (\d+)", meaning)
        n_sets = int(named.group(1)) if named else config["n_steps"]
        scales = [guidance.scale(k, n_sets) for k in range(n_sets)]
        return torch.tensor(scales, dtype=torch.float64)
    predictions = inputs[f"pred{guidance.n_branches}"]
    return guidance.combine(predictions, guidance.guidance_scale)[0]


class RecordedDraws:
    """`Draws` that a case recorded."""

    def __init__(self, inputs: Tensors) -> None:
        self.inputs = inputs
        self.starts = iter(inputs["noise"])
        self.steps = iter(inputs.get("ddpm_noise", ()))

    def order(self, n_tokens: int) -> Tensor:
        return self.inputs["order"][:, :, 0]

    def start(self) -> Tensor:
        return next(self.starts)

    def during(self, n_steps: int) -> Tensor:
        return torch.stack([next(self.steps) for _ in range(n_steps)])


def loop(config: dict[str, Any], w: Tensors, inputs: Tensors, ops: Ops) -> Results:
    """A whole sampling run from text features to latents.

    Eager ops run in the released order, fused ops in ours, which computes features and samples only
    for the tokens of a set: others are not compared.
    """
    order = "official" if ops is EAGER else "sorted"
    model = load_transformer(_chosen(config, NovaConfig), w, ops)
    sampling = _sampling_config(config, order)
    draws = RecordedDraws(inputs)
    given = inputs["image_latent"][:, :, None] if "image_latent" in inputs else None
    with torch.no_grad():
        flow = {**config, **config.get("extra", {})}.get("motion_flow")
        features = _features(config, inputs)
        condition = text_condition(model, features, sampling.guidance, flow)
        temporal, z = _recorded(model.video_encoder), _recorded(model.image_encoder.norm)
        latents = torch.cat([*sample(model, condition, sampling, draws, given=given)], dim=2)
        slots = torch.cat(temporal, dim=1).unflatten(1, (-1, model.config.n_video_tokens))
        conditions = model.video_encoder.frame_conditions(slots)
    n_given = 0 if given is None else given.shape[2]
    sizes = [n for n in set_sizes(model.config.n_tokens, sampling.num_inference_steps) if n]
    first = _Set(draws.order(0)[:, : sizes[0]])
    last = _Set(draws.order(0)[:, -sizes[-1] :])
    tokens = patchify(latents[:, :, n_given], model.config.patch)
    if order != "official":  # only the features of a set's own tokens were computed
        z = [first.placed(z[0], model.config.n_tokens), last.placed(z[-1], model.config.n_tokens)]
    return {
        "latents": latents,
        "cond": condition,
        "set_sizes": torch.tensor(sizes),
        "c": conditions.transpose(0, 1)[n_given:],
        "temporal": slots.transpose(0, 1),
        "z_first": first.among(z[0]),
        "z_last": last.among(z[-1]),
        "sample_first": first.among(tokens),
    }


class _Set:
    """Tokens ``ids`` [B, n], the same in all branches."""

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids

    def among(self, x: Tensor) -> Where:
        """``x`` [G B, N, D] of all tokens of a frame, compared only in the set."""
        chosen = x.new_zeros(*x.shape[:2], 1, dtype=torch.bool)
        return Where(x, chosen.scatter(1, self._index(x), True))

    def placed(self, x: Tensor, n_tokens: int) -> Tensor:
        """``x`` [G B, n, D] of the set's tokens at their places in ``[G B, N, D]``; others 0."""
        index = self._index(x).expand(-1, -1, x.shape[-1])
        return x.new_zeros(len(x), n_tokens, x.shape[-1]).scatter(1, index, x)

    def _index(self, x: Tensor) -> Tensor:
        """``[G B, n, 1]``."""
        return self.ids.repeat(len(x) // len(self.ids), 1)[:, :, None]


def _recorded(module: nn.Module) -> list[Tensor]:
    """A list to which everything is added that the module returns from now on."""
    found: list[Tensor] = []

    def keep(module: nn.Module, args: tuple, output: Any) -> None:
        found.append(output)

    module.register_forward_hook(keep)
    return found


def _sampling_config(config: Mapping[str, Any], order: str) -> SamplingConfig:
    options = {**config, **config.get("extra", {})}
    schedule = {key: x for key, x in config["sampler"].items() if key != "class"}
    schedule = read_schedule({**schedule, "_class_name": config["sampler"]["class"]})
    if "flow_shift" in options and isinstance(schedule, FlowMatching):  # set after construction
        schedule = replace(schedule, shift=options["flow_shift"], table_shift=schedule.shift)
    own = _chosen(options, SamplingConfig)
    guidance = Guidance(**_chosen(options, Guidance))
    return SamplingConfig(**{**own, "guidance": guidance, "schedule": schedule, "order": order})


def _chosen(options: Mapping[str, Any], cls: type) -> dict[str, Any]:
    """The options that are fields of a dataclass."""
    return {f.name: options[f.name] for f in fields(cls) if f.name in options}


def _features(config: dict[str, Any], inputs: Tensors) -> TextFeatures:
    """Prompts and negative prompts: none, one for all, or one for each.

    A case does not store the features of empty prompts.
    """
    texts = prompts(config, inputs, config["text_token_dim"])
    negative: dict[int, Tensor] = {}
    for name, x in inputs.items():
        named = re.fullmatch(r"\w*?(prompt|neg|uncond)\w*?(\d*)", name)
        if named and not re.fullmatch(r"prompt\d+", name):
            negative[int(named[2] or 0)] = x
    empty = inputs["noise"].new_empty(0, config["text_token_dim"])
    count = len(texts) if max(negative, default=0) else 1
    rows = [negative.get(i, empty) for i in range(count)]
    return TextFeatures(texts, rows * (len(texts) // count))


KINDS: dict[str, Callable[..., Results]] = {
    "schedules": schedules,
    "sampler_guidance": sampler_guidance,
    "loop_t2i": loop,
    "loop_t2v": loop,
    "loop_i2v": loop,
}
