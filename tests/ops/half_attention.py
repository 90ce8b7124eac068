"""What mode "half" of `attend` computes, in plain torch: one row, split by split."""

import torch

from kivi_tvm import layout, reference
from kivi_tvm.ops.attend_half import WARPS
from kivi_tvm.ops.fragments import TOKENS


def half(x):
    """Rounded to float16, as float32."""
    return x.half().float()


def exponent(x):
    """The least `e` with `|x| < 2^e`."""
    return torch.frexp(x).exponent


def attended(cfg, q, k, v, scale):
    """(output `[H, D]`, log-sum-exp `[H]`) of every split; `q [H, D]`, `k, v [H_kv, T, D]` float32.

    The packed tokens are the first ones. A work-group's warps take tiles in turn.
    """
    key = cfg.kernel_key()
    tokens = layout.packed_values(cfg, k.shape[1])
    keys = reference.quantize_key(
        k[:, : layout.packed_keys(cfg, k.shape[1])], cfg.key_bits, cfg.G_k
    )
    values = reference.quantize_value(v[:, :tokens], cfg.value_bits, cfg.G_v)
    q = q.unflatten(0, (cfg.H_kv, cfg.M))
    found = []
    split = layout.split_tokens(key, tokens, key.split_tokens)
    for first in range(0, tokens, split):
        last = min(first + split, tokens)
        tiles = [slice(at, min(at + TOKENS, last)) for at in range(first, last, TOKENS)]
        warps = [_warp(cfg, q, keys, values, tiles[w::WARPS], scale) for w in range(WARPS)]
        warps = [warp for warp in warps if warp]
        top = torch.stack([w[0] for w in warps]).amax(0)
        total = sum(w[1] * (w[0] - top).exp2() for w in warps)
        out = sum(w[2] * (w[0] - top).exp2()[..., None] for w in warps)
        lse = (top + total.log2()) * torch.tensor(2.0).log()
        found.append(((out / total[..., None]).flatten(0, 1), lse.flatten()))
    return found


def _warp(cfg, q, keys, values, tiles, scale):
    """What was subtracted from scores, the sum and the output of a warp's tiles."""
    ref = torch.full(q.shape[:2], -torch.inf)
    total, out = torch.zeros(q.shape[:2]), torch.zeros(q.shape)
    for part in tiles:
        score = _scores(cfg, q, keys, part, scale)
        step = values.scale[:, part].float()
        # for which float16 holds every probability, and its product with the token's scales
        lift = (exponent(step.amax((1, 2))) - 15).clamp(min=-15)
        new_ref = torch.maximum(ref, score.amax(-1) + lift[:, None])
        prob = (score - new_ref[..., None]).exp2()
        total = total * (ref - new_ref).exp2() + prob.sum(-1)
        out = out * (ref - new_ref).exp2()[..., None] + _outputs(cfg, half(prob), values, part)
        ref = new_ref
    return (ref, total, out) if tiles else None


def _scores(cfg, q, keys, part, scale):
    unit = torch.exp2(exponent(q.abs().amax(-1, keepdim=True)).float())
    near = half(q / unit)
    groups = torch.arange(part.start, part.stop) // cfg.G_k
    step, zero = (x[:, groups].float() for x in (keys.scale, keys.zero))  # [H_kv, t, D]
    folded = half(near[:, None] * step[:, :, None])
    score = torch.einsum("htmd,htd->hmt", folded, keys.code[:, part].float())
    score += torch.einsum("hmd,htd->hmt", near, zero)
    return score * unit * (scale * torch.tensor(2.0).log().reciprocal())


def _outputs(cfg, prob, values, part):
    step, zero = (x[:, part].float() for x in (values.scale, values.zero))  # [H_kv, t, groups]
    folded = half(torch.einsum("hmt,htg->hmgt", prob, step))
    code = values.code[:, part].float().unflatten(-1, (-1, cfg.G_v))
    out = torch.einsum("hmgt,htgd->hmgd", folded, code)
    out += torch.einsum("hmt,htg->hmg", prob, zero)[..., None]
    return out.flatten(-2)
