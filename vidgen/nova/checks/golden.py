"""Golden cases of NOVA: set-masked attention, and `KINDS` for `vidgen verify`."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vidgen.common.golden import check_fixed
from vidgen.ops import IntervalMask, Ops

from . import golden_models, golden_sampling, golden_training, golden_vae

Tensors = dict[str, Tensor]


def set_mask(rank: Tensor) -> Tensor:
    """The mask of the sorted tokens, put back in the tokens' own order: bool [B or 1, T, T]."""
    order = torch.atleast_2d(rank).argsort(dim=-1, stable=True)
    dense = IntervalMask.from_ranks(torch.atleast_2d(rank).gather(1, order)).to_dense()
    back = order.argsort(dim=-1)
    by_query = dense.gather(1, back[:, :, None].expand_as(dense))
    return by_query.gather(2, back[:, None, :].expand_as(dense))


def set_attention(config: dict[str, Any], w: Tensors, inputs: Tensors, ops: Ops) -> Tensors:
    """Set-masked attention: the operator, the module around it, and permuted tokens."""
    check_fixed(config, {"scale": "1/sqrt(head_dim)"})
    rank = inputs["rank"]
    results = {"mask": set_mask(rank).squeeze(0)}

    q, k, v = (inputs[name].requires_grad_() for name in "qkv")
    out, lse = ops.set_masked_attention(q, k, v, rank, return_lse=True)
    results |= {"o": out, "lse": lse}
    grads = torch.autograd.grad(out, (q, k, v), inputs["grad_o"])
    results |= zip(("grad_q", "grad_k", "grad_v"), grads, strict=True)

    if "x" in inputs:
        x = inputs["x"].requires_grad_()
        qkv = F.linear(x, w["qkv.weight"], w.get("qkv.bias"))
        heads = qkv.unflatten(-1, (3, config["heads"], -1)).permute(2, 0, 3, 1, 4)
        out = ops.set_masked_attention(*heads.unbind(), rank)
        y = F.linear(out.transpose(1, 2).flatten(2), w["proj.weight"], w.get("proj.bias"))
        results |= {"y": y, "grad_x": torch.autograd.grad(y, x, inputs["grad_y"])[0]}

    if "perm" in inputs:
        perm = inputs["perm"]
        rank_perm = rank.expand(perm.shape).gather(1, perm)
        index = perm[:, None, :, None].expand(q.shape)
        permuted = (x.detach().gather(2, index) for x in (q, k, v))
        o_perm = ops.set_masked_attention(*permuted, rank_perm)
        results |= {"rank_perm": rank_perm, "o_perm": o_perm}
    return results


KINDS = {
    **golden_models.KINDS,
    **golden_sampling.KINDS,
    **golden_training.KINDS,
    **golden_vae.KINDS,
    "set_attention": set_attention,
}
