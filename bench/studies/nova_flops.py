"""Operations of NOVA's encoders for one frame of 480 x 768 video, in every order, counted.

    python bench/studies/nova_flops.py

Nothing is computed: models are on the meta device. All layers of a half cost the same but the last,
so the count at two depths gives that at any depth. The set-causal order needs a model that was
trained with that mask.
"""

from __future__ import annotations

import argparse
import sys

import torch
from torch.utils.flop_counter import FlopCounterMode

from vidgen.nova.model.config import Arch, Decoder, Encoder, NovaConfig
from vidgen.nova.model.transformer import NovaTransformer
from vidgen.nova.sampling.draws import RandomDraws
from vidgen.nova.sampling.frames import CausalFrames, Frames, ReleasedFrames, SortedFrames
from vidgen.nova.sampling.guidance import Guidance
from vidgen.ops import EAGER

ORDERS: dict[str, tuple[type[Frames], str]] = {
    "released": (ReleasedFrames, "masked"),
    "ours": (SortedFrames, "masked"),
    "set-causal, cached": (CausalFrames, "set_causal"),
}
DEPTH = 32


def count(order: str, depth: int, n_sets: int) -> int:
    """With guidance, the denoising loop left out."""
    kind, spatial_attention = ORDERS[order]
    arch = Arch(Encoder(1, 1024, 16), Encoder(depth, 1024, 16, depth // 2), Decoder(1, 4))
    config = NovaConfig(arch=arch, spatial_attention=spatial_attention)
    device = torch.device("meta")
    with device:
        model = NovaTransformer(config, EAGER)
    draws = RandomDraws((1, config.image_dim, *config.latent_size), None, torch.float32, device)
    condition = torch.empty(2, config.n_video_tokens, config.width, device=device)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        kind(model, [], Guidance(), draws, n_sets).make(condition)
    return counter.get_total_flops()


def main() -> None:
    parser = argparse.ArgumentParser(description="Operations of NOVA's encoders for one frame")
    parser.add_argument("--sets", type=int, default=64)
    args = parser.parse_args()
    released = None
    for order in ORDERS:
        two, four = (count(order, depth, args.sets) for depth in (2, 4))
        total = two + (four - two) * (DEPTH - 2) // 2
        released = released or total
        ratio = f"{released / total:.2f} x fewer than released"
        sys.stdout.write(f"{order:20} {total / 1e12:7.2f} TFLOP   {ratio}\n")


if __name__ == "__main__":
    main()
