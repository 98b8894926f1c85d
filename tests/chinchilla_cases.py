"""A small ChinchillaLM, and the same by loops over queries and keys in fp64."""

import math

import pytest
import torch
import torch.nn.functional as F
from module_cases import FP32, randomized

from flamingo_fast.models.chinchilla import ChinchillaLM, relative_context
from flamingo_fast.models.config import LanguageModelConfig
from flamingo_fast.testing.inputs import random_tensor

FP64 = torch.float64
VOCAB = 37
CONFIG = LanguageModelConfig(vocab_size=VOCAB, dim=24, depth=3, heads=2, dim_head=8)
EPS = 1e-5


def make_lm(dtype=FP32):
    return randomized(ChinchillaLM(CONFIG), std=0.2).to(dtype).eval()


def make_ids(batch=2, length=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCAB, (batch, length), generator=generator, device="cpu")
    return ids.to(torch.get_default_device())


def make_cache(kind, length=16):
    cache_utils = pytest.importorskip("transformers.cache_utils")
    if kind == "dynamic":
        return cache_utils.DynamicCache()
    return cache_utils.Cache(layers=[cache_utils.StaticLayer(length) for _ in range(CONFIG.depth)])


def embedding_of_distance(distance, dim):
    """Section 3.3's R, in Transformer-XL's order: sines, then cosines."""
    frequencies = [10_000 ** (-2 * k / dim) for k in range(math.ceil(dim / 2))]
    sines = [math.sin(distance * each) for each in frequencies]
    cosines = [math.cos(distance * each) for each in frequencies]
    return torch.tensor((sines + cosines)[:dim], dtype=FP64)


def oracle_attention(attn, normed, attention_mask=None):
    """Transformer-XL's equations, one query, key and head at a time; of fp64 (B, L, D)."""
    batch, length, dim = normed.shape
    heads, width = attn.heads, attn.dim_head
    w_q, w_k, w_v = attn.to_qkv.weight.chunk(3)
    b_q, b_k, b_v = attn.to_qkv.bias.chunk(3)
    rows = []
    for b in range(batch):
        for i in range(length):
            seen = [
                j for j in range(i + 1) if attention_mask is None or attention_mask[b, j] or j == i
            ]
            by_head = []
            for h in range(heads):
                of_head = slice(h * width, (h + 1) * width)
                q = w_q[of_head] @ normed[b, i] + b_q[of_head]
                scores, values = [], []
                for j in seen:
                    k = w_k[of_head] @ normed[b, j] + b_k[of_head]
                    r = attn.to_position.weight[of_head] @ embedding_of_distance(i - j, dim)
                    score = (q + attn.content_bias[h]) @ k + (q + attn.position_bias[h]) @ r
                    scores.append(score / math.sqrt(width))
                    values.append(w_v[of_head] @ normed[b, j] + b_v[of_head])
                weights = torch.stack(scores).softmax(0)
                by_head.append(weights @ torch.stack(values))
            rows.append(attn.to_out.weight @ torch.cat(by_head) + attn.to_out.bias)
    return torch.stack(rows).view(batch, length, dim)


def oracle_layer(layer, x, attention_mask=None):
    normed = F.rms_norm(x, x.shape[-1:], layer.norm_attn.weight, EPS)
    x = x + oracle_attention(layer.self_attn, normed, attention_mask)
    norm, up, _, down = layer.mlp
    hidden = F.rms_norm(x, x.shape[-1:], norm.weight, EPS) @ up.weight.mT + up.bias
    return x + F.gelu(hidden) @ down.weight.mT + down.bias


def oracle_lm(lm, x, attention_mask=None):
    """Logits of fp64 embeddings."""
    for layer in lm.layers:
        x = oracle_layer(layer, x, attention_mask)
    hidden = F.rms_norm(x, x.shape[-1:], lm.model.norm.weight, EPS)
    return hidden @ lm.model.embed_tokens.weight.mT


def outputs_and_gradients(module, call, x):
    x = x.detach().clone().requires_grad_()
    out = call(module, x)
    module.zero_grad()
    out.backward(random_tensor(tuple(out.shape), FP64, seed=99).to(out.dtype))
    gradients = {name: each.grad for name, each in module.named_parameters()}
    return {"out": out.detach(), "x": x.grad, **gradients}


def attend(attn, x):
    return attn(x, relative_context(x))
