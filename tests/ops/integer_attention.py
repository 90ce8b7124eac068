"""What the integer compute modes of `attend` compute, in plain torch: one row, split by split."""

import torch

from kivi_tvm import layout, reference


def in_units(x, planes):
    """`x` with its last dimension as multiples of the 127th of its largest, or 256 times finer."""
    gain = 127 * 256 ** (planes - 1) / x.abs().amax(-1, keepdim=True).clamp(min=1e-30)
    return (x * gain).round() / gain


def attended(cfg, q, k, v, scale):
    """(output `[H, D]`, log-sum-exp `[H]`) of every split; `q [H, D]`, `k, v [H_kv, T, D]` float32.

    The packed tokens are the first ones.
    """
    key = cfg.kernel_key()
    planes = 2 if key.compute == "int8x2" else 1
    tokens = layout.packed_values(cfg, k.shape[1])
    keys = reference.quantize_key(
        k[:, : layout.packed_keys(cfg, k.shape[1])], cfg.key_bits, cfg.G_k
    )
    values = reference.quantize_value(v[:, :tokens], cfg.value_bits, cfg.G_v)
    q = q.unflatten(0, (cfg.H_kv, cfg.M)) * (scale * torch.tensor(2.0).log().reciprocal())
    group = torch.arange(tokens) // cfg.G_k
    # [H_kv, groups, M, D]: the query of every group of keys
    folded = in_units(q[:, None] * keys.scale.float()[:, :, None], planes)
    score = torch.einsum("htmd,htd->hmt", folded[:, group], keys.code[:, :tokens].float())
    score += torch.einsum("hmd,htd->hmt", q, keys.zero.float()[:, group])
    found = []
    for first in range(0, tokens, key.split_tokens):
        last = min(first + key.split_tokens, tokens)
        chunks = [
            _chunk(cfg, score, values, slice(at, min(at + key.chunk_tokens, last)), planes)
            for at in range(first, last, key.chunk_tokens)
        ]
        top = torch.stack([c[0] for c in chunks]).amax(0)
        total = sum(c[1] * (c[0] - top).exp2() for c in chunks)
        out = sum(c[2] * (c[0] - top).exp2()[..., None] for c in chunks)
        lse = (top + total.log2()) * torch.tensor(2.0).log()
        found.append(((out / total[..., None]).flatten(0, 1), lse.flatten()))
    return found


def _chunk(cfg, score, values, part, planes):
    """Maximum, sum and output of the tokens `part`."""
    top = score[..., part].amax(-1)
    prob = (score[..., part] - top[..., None]).exp2()
    scale, zero = (x[:, part].float() for x in (values.scale, values.zero))  # [H_kv, t, groups]
    folded = in_units(torch.einsum("hmt,htg->hmgt", prob, scale), planes)
    code = values.code[:, part].float().unflatten(-1, (-1, cfg.G_v))
    out = torch.einsum("hmgt,htgd->hmgd", folded, code)
    out += torch.einsum("hmt,htg->hmg", prob, zero)[..., None]
    return top, prob.sum(-1), out.flatten(-2)
