"""A small serving loop over one cache, and the requests that it serves."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from books import assert_pages_add_up
from caches import new_cache
from pools import assert_same_bits

LAYERS = 2


@dataclass
class Request:
    """A prompt and the tokens that follow it, `[layers, (q, k, v), heads, tokens, D]`."""

    prompt: int
    steps: int
    chunk: int  # tokens of the prompt per `extend`; 0: in one `prefill`
    tokens: tuple = ()
    outputs: list = field(default_factory=list)

    def draw(self, cfg, seed):
        generator = torch.Generator().manual_seed(seed)
        self.tokens = tuple(
            torch.randn(LAYERS, heads, self.prompt + self.steps, cfg.D, generator=generator).to(
                getattr(torch, cfg.dtype)
            )
            for heads in (cfg.H, cfg.H_kv, cfg.H_kv)
        )
        return self

    def part(self, layer, first, count):
        return [x[layer, :, first : first + count] for x in self.tokens]


class Server:
    """Serves requests on the rows of one cache: prompts join as rows become free."""

    def __init__(self, cfg, rows, **options):
        self.cache = new_cache(cfg, rows, num_layers=LAYERS, **options)
        self.running = [None] * rows  # (request, tokens done) of every row
        for row in range(rows):
            self.cache.free(row)

    def serve(self, requests):
        waiting = list(requests)
        while waiting or any(self.running):
            for row, held in enumerate(self.running):
                if held is None and waiting:
                    self._admit(row, waiting.pop(0))
            self._step()
            assert_pages_add_up(self.cache)
            for row, held in enumerate(self.running):
                if held and held[1] == held[0].prompt + held[0].steps:
                    self.cache.free(row)
                    self.running[row] = None

    def _admit(self, row, request):
        if request.chunk:
            self.running[row] = (request, 0)
            return
        for i in range(LAYERS):
            _, k, v = request.part(i, 0, request.prompt)
            self.cache.layer(i).prefill(k[None], v[None], rows=[row])
        self.running[row] = (request, request.prompt)

    def _step(self):
        """A decode if no prompt is under way, else an extend of one token or a chunk per row."""
        counts = [self._due(held) for held in self.running]
        is_decode = all(held is None or held[1] >= held[0].prompt for held in self.running)
        found = [self._layer_step(i, counts, is_decode) for i in range(LAYERS)]
        for row, (held, n) in enumerate(zip(self.running, counts, strict=True)):
            if held:
                outputs = [out[row, :, :n] for out in found]
                held[0].outputs.append((n, is_decode, torch.stack(outputs)))
                self.running[row] = (held[0], held[1] + n)

    def _due(self, held):
        if held is None:
            return 0
        request, done = held
        return min(request.chunk, request.prompt - done) if done < request.prompt else 1

    def _layer_step(self, i, counts, is_decode):
        cfg, n = self.cache.cfg, max(counts)
        q, k, v = (
            torch.full((len(counts), heads, n, cfg.D), torch.nan, dtype=self.cache.dtype)
            for heads in (cfg.H, cfg.H_kv, cfg.H_kv)
        )
        for row, (held, count) in enumerate(zip(self.running, counts, strict=True)):
            if held:
                for x, part in zip((q, k, v), held[0].part(i, held[1], count), strict=True):
                    x[row, :, :count] = part
        layer = self.cache.layer(i)
        if is_decode:
            return layer.decode(q[:, :, 0], k[:, :, 0], v[:, :, 0])[:, :, None]
        return layer.extend(q, k, v, lengths=counts)


def assert_served_as_alone(cfg, request, **options):
    """Fail unless the request's outputs are those of a cache of its own."""
    alone, done = new_cache(cfg, num_layers=LAYERS, **options), 0
    if not request.chunk:
        for i in range(LAYERS):
            _, k, v = request.part(i, 0, request.prompt)
            alone.layer(i).prefill(k[None], v[None])
        done = request.prompt
    for n, is_decode, outputs in request.outputs:
        for i in range(LAYERS):
            q, k, v = (x[None] for x in request.part(i, done, n))
            if is_decode:
                found = alone.layer(i).decode(q[:, :, 0], k[:, :, 0], v[:, :, 0])[:, :, None]
            else:
                found = alone.layer(i).extend(q, k, v)
            assert_same_bits(outputs[i], found[0], f"token {done} layer {i}")
        done += n
    assert done == request.prompt + request.steps
