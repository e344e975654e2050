"""Random layouts through the attention engine for as long as asked.

Every case has a seed of its own. A failing one is printed with the calls that build its mask, and
``--seed N --cases 1`` runs just that one again.
"""

import argparse
import random
import sys
import time
from dataclasses import replace

import torch

from vidgen_kernels import interval_attention
from vidgen_kernels.attention import configs
from vidgen_kernels.common.launch import is_interpreted
from vidgen_kernels.testing import Recipe, check_attention, random_layout, random_qkv

HEAD_DIMS = [1, 4, 12, 16, 17, 24, 32, 64, 80]
HEADS = [(1, 1), (2, 1), (2, 2), (3, 1), (4, 2)]
TILES = [(16, 16), (16, 32), (32, 16), (64, 64)]
SCALES = [None, None, 0.0, -0.4, 1.3]


def run_case(seed: int, device: str, described: list[str]) -> None:
    """Checks one random case; ``described`` receives what it was, before it can fail."""
    rng = random.Random(seed)
    interpreted = is_interpreted()
    as_tensors, max_tokens = rng.random() < 0.5, rng.choice([8, 33, 64, 64, 130])
    layout = random_layout(rng, max_tokens, device, as_tensors)
    heads, kv_heads = rng.choice(HEADS)
    head_dim, scale = rng.choice(HEAD_DIMS), rng.choice(SCALES)
    tiles, use = rng.choice(TILES), rng.choice(["out", "lse", "out lse"])
    described += [
        call(layout.recipe) + ("  # lengths as tensors" if as_tensors else ""),
        f"heads {heads}, key heads {kv_heads}, head dim {head_dim}, fp64, softmax_scale {scale}, "
        f"loss of {use!r}, tiles {tiles if interpreted else 'n/a'}",
    ]
    configs.INTERPRETER = replace(configs.INTERPRETER, block_m=tiles[0], block_n=tiles[1])

    def attend(q, k, v):
        return interval_attention(q, k, v, layout.mask, softmax_scale=scale, return_lse=True)

    qkv = random_qkv(layout.dense, heads, kv_heads, head_dim, seed=seed)
    check_attention(attend, qkv, layout.dense, scale, use)


def call(recipe: Recipe) -> str:
    """The Python expression that builds a mask."""
    kind, args = recipe

    def show(name: str, value) -> str:
        if name == "masks":
            return "[" + ", ".join(map(call, value)) + "]"
        if name == "mask":
            return call(value)
        return (
            f"torch.tensor({value})"
            if name.startswith("rank") and value is not None
            else repr(value)
        )

    names = "" if kind in ("pack", "pad_text", "from_ranks", "full") else "{}="
    shown = (names.format(name) + show(name, value) for name, value in args.items())
    return f"IntervalMask.{kind}({', '.join(shown)})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="how long (default: 10)")
    parser.add_argument("--seed", type=int, help="first seed (default: from the clock)")
    parser.add_argument("--cases", type=int, help="stop after this many cases")
    args = parser.parse_args()
    first = int(time.time()) if args.seed is None else args.seed
    device = "cuda" if torch.cuda.is_available() and not is_interpreted() else "cpu"
    path = "interpreted" if is_interpreted() else {"cuda": "cuda", "cpu": "portable"}[device]
    end = time.monotonic() + 60 * args.minutes
    n_cases, shown = 0, 0.0
    while time.monotonic() < end and n_cases != args.cases:
        seed, described = first + n_cases, []
        try:
            run_case(seed, device, described)
        except Exception as problem:
            flags = f"--seed {seed} --cases 1"
            lines = [f"\nFAILED on the {path} path: {problem}", *described]
            environment = "TRITON_INTERPRET=1 " if is_interpreted() else ""
            lines.append(f"again: {environment}python tests/kernels/attention/fuzz.py {flags}")
            print("\n".join(lines), flush=True)
            return 1
        n_cases += 1
        now = time.monotonic()
        if now - shown >= 1:
            left = max(0.0, end - now) / 60
            status = f"{path}: {n_cases} cases, seeds {first}..{seed}, {left:.1f} minutes left"
            print("\r" + status, end="", file=sys.stderr, flush=True)
            shown = now
    print(f"\n{n_cases} cases passed on the {path} path, seeds from {first}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
