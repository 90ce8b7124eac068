"""What the integer compute modes of `attend` compute, in plain torch: one row, split by split."""

import torch

from kivi_tvm import layout, reference


def in_units(x, peak, planes):
    """`x` as multiples of the 127th of `peak`, or 256 times finer."""
    gain = 127 * 256 ** (planes - 1) / peak.clamp(min=1e-12)
    return (x * gain).round() / gain


def attended(cfg, q, k, v, scale):
    """(output `[H, D]`, log-sum-exp `[H]`) of every split; `q [H, D]`, `k, v [H_kv, T, D]` float32.

    The packed tokens are the first ones.
    """
    key = cfg.kernel_key()
    tokens = layout.packed_values(cfg, k.shape[1])
    keys = reference.quantize_key(
        k[:, : layout.packed_keys(cfg, k.shape[1])], cfg.key_bits, cfg.G_k
    )
    values = reference.quantize_value(v[:, :tokens], cfg.value_bits, cfg.G_v)
    q = q.unflatten(0, (cfg.H_kv, cfg.M)) * (scale * torch.tensor(2.0).log().reciprocal())
    found = []
    for first in range(0, tokens, key.split_tokens):
        last = min(first + key.split_tokens, tokens)
        chunks = [
            _chunk(cfg, q, keys, values, slice(at, min(at + key.chunk_tokens, last)))
            for at in range(first, last, key.chunk_tokens)
        ]
        top = torch.stack([c[0] for c in chunks]).amax(0)
        total = sum(c[1] * (c[0] - top).exp2() for c in chunks)
        out = sum(c[2] * (c[0] - top).exp2()[..., None] for c in chunks)
        lse = (top + total.log2()) * torch.tensor(2.0).log()
        found.append(((out / total[..., None]).flatten(0, 1), lse.flatten()))
    return found


def _chunk(cfg, q, keys, values, part):
    """Maximum, sum and output of the tokens `part`."""
    score = _scores(cfg, q, keys, part)
    top = score.amax(-1)
    prob = (score - top[..., None]).exp2()
    return top, prob.sum(-1), _outputs(cfg, prob, values, part)


def _scores(cfg, q, keys, part):
    planes, middle = _planes(cfg), (2**cfg.key_bits - 1) / 2
    groups = slice(part.start // cfg.G_k, -(-part.stop // cfg.G_k))
    scale, zero = (x[:, groups].float() for x in (keys.scale, keys.zero))  # [H_kv, groups, D]
    peak = (q.abs() * scale.amax(1, keepdim=True)).amax(-1)  # of the whole chunk, [H_kv, M]
    folded = in_units(q[:, None] * scale[:, :, None], peak[:, None, :, None], planes)
    group = torch.arange(part.start, part.stop) // cfg.G_k - groups.start
    score = torch.einsum("htmd,htd->hmt", folded[:, group], keys.code[:, part].float() - middle)
    return score + torch.einsum("hmd,htd->hmt", q, (zero + scale * middle)[:, group])


def _outputs(cfg, prob, values, part):
    planes, middle = _planes(cfg), (2**cfg.value_bits - 1) / 2
    scale, zero = (x[:, part].float() for x in (values.scale, values.zero))  # [H_kv, t, groups]
    folded = torch.einsum("hmt,htg->hmgt", prob, scale)
    folded = in_units(folded, folded.amax(-1, keepdim=True), planes)
    code = values.code[:, part].float().unflatten(-1, (-1, cfg.G_v)) - middle
    out = torch.einsum("hmgt,htgd->hmgd", folded, code)
    out += torch.einsum("hmt,htg->hmg", prob, zero + scale * middle)[..., None]
    return out.flatten(-2)


def _planes(cfg):
    return 2 if cfg.kernel_key().compute == "int8x2" else 1
