"""The entropy of attention on a GPU, in one pass over the keys: a Triton kernel.

Needs a GPU and Triton, which torch's CUDA builds include; ``stats.query_entropy`` has a portable version. Attention
itself stays PyTorch's, so its output is unchanged to the bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _entropy_kernel(
    query,
    key,
    entropy,
    query_batch_stride,
    query_head_stride,
    query_stride,
    query_channel_stride,
    key_batch_stride,
    key_head_stride,
    key_stride,
    key_channel_stride,
    num_heads,
    num_queries,
    num_keys,
    scale,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Online softmax (Milakov & Gimelshein 2018), tiled as in FlashAttention-2, with one more running sum.

    With the maximum ``m`` so far, beside ``total = Σ e^(s−m)`` it keeps ``moment = Σ e^(s−m)·(s−m)``. Where the maximum
    grows by δ, both shrink by ``e^−δ`` and the moment loses ``δ·total``. The entropy is ``log total − moment / total``.
    Only differences from the maximum are summed, so large scores do no harm.
    """
    head = tl.program_id(1)
    batch = head // num_heads
    query += batch * query_batch_stride + head % num_heads * query_head_stride
    key += batch * key_batch_stride + head % num_heads * key_head_stride
    rows = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    channels = tl.arange(0, PADDED_DIM)
    q = tl.load(
        query + rows[:, None] * query_stride + channels[None, :] * query_channel_stride,
        mask=(rows[:, None] < num_queries) & (channels[None, :] < HEAD_DIM),
        other=0.0,
    )
    maximum = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    moment = tl.zeros([QUERIES], tl.float32)
    for first in range(0, num_keys, KEYS):
        columns = first + tl.arange(0, KEYS)
        k = tl.load(
            key + columns[None, :] * key_stride + channels[:, None] * key_channel_stride,
            mask=(columns[None, :] < num_keys) & (channels[:, None] < HEAD_DIM),
            other=0.0,
        )
        scores = tl.dot(q, k, input_precision="ieee").to(tl.float32) * scale
        inside = columns[None, :] < num_keys
        scores = tl.where(inside, scores, float("-inf"))
        grown = tl.maximum(maximum, tl.max(scores, 1))
        # The first tile has no maximum to leave: −inf − m would make 0 · inf of it.
        delta = tl.where(maximum == float("-inf"), 0.0, grown - maximum)
        shrink = tl.exp(-delta)
        difference = tl.where(inside, scores - grown[:, None], 0.0)
        weights = tl.where(inside, tl.exp(difference), 0.0)
        moment = shrink * (moment - delta * total) + tl.sum(weights * difference, 1)
        total = shrink * total + tl.sum(weights, 1)
        maximum = grown
    tl.store(entropy + head * num_queries + rows, tl.log(total) - moment / total, mask=rows < num_queries)


def query_entropy(query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
    """Exact entropy of each query's attention, ``[B, H, Nq]`` float32 in nats, from ``[B, H, N, D]`` of any strides."""
    batch, heads, num_queries, dim = query.shape
    entropy = torch.empty(batch, heads, num_queries, dtype=torch.float32, device=query.device)
    queries, keys = 64, 64
    grid = (triton.cdiv(num_queries, queries), batch * heads)
    _entropy_kernel[grid](
        query,
        key,
        entropy,
        *query.stride(),
        *key.stride(),
        heads,
        num_queries,
        key.shape[2],
        scale,
        HEAD_DIM=dim,
        PADDED_DIM=max(16, triton.next_power_of_2(dim)),
        QUERIES=queries,
        KEYS=keys,
    )
    return entropy
