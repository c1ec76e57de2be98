"""The operations between the products, in their reference forms: plain torch, fixed order of sums.

Each of them reads and writes a few KB per token, but there are many: written as single torch calls they would cost a
step as much time as the weights. `cpu.py` has most of them as one call with the same bits.
Activations are bfloat16 or float32; arithmetic is float32 and the result is rounded to the input's dtype once.

`exp`, `sqrt` and `softplus` are arguments, because no two devices compute them alike, and so is `total`, the sum over
the last dimension, whose order is fixed on the CPU. The defaults define the result there; `table.py` puts torch's own
in their place for other devices.
"""

from collections.abc import Callable

import torch

from dsv4.quant.activation import hadamard, simulate_fp4, simulate_fp8

from .deterministic import Elementwise, exp, sigmoid, silu, softplus, sqrt, tree_sum

LAST_COLUMN = 2**32 - 1
ORDERED_MINUS_INFINITY = -0x7F800001
SMALLEST_SIMILARITY = 1e-6  # of a token and its n-gram, before the root


def inverse_rms(
    x: torch.Tensor, eps: float, *, sqrt: Elementwise = sqrt, total: Elementwise = tree_sum
) -> torch.Tensor:
    """x [..., n] -> 1 / sqrt(mean of the squares + eps), float32 [...]."""
    wide = x.to(torch.float32)
    return 1.0 / sqrt(total(wide * wide) / wide.shape[-1] + eps)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, sqrt: Elementwise = sqrt, total: Elementwise = tree_sum
) -> torch.Tensor:
    """x [..., n] over its root mean square, times weight float32 [n]."""
    factor = inverse_rms(x, eps, sqrt=sqrt, total=total)
    return (x.to(torch.float32) * factor.unsqueeze(-1) * weight).to(x.dtype)


def head_norm(q: torch.Tensor, eps: float, *, sqrt: Elementwise = sqrt, total: Elementwise = tree_sum) -> torch.Tensor:
    """q [T, H, c], each head over its root mean square; in bfloat16 the squares, the mean and the factor are rounded.

    The square root is not rounded to bfloat16, as on a GPU.
    """
    dtype = q.dtype
    squares = (q * q).to(torch.float32)
    mean = (total(squares) / q.shape[-1]).to(dtype)
    root = sqrt((mean.to(torch.float32) + eps).to(dtype).to(torch.float32))
    return q * (1.0 / root).to(dtype).unsqueeze(-1)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [T, m, c] with its last r dims turned: pairs (2i, 2i + 1) by the angle of cos and sin, float32 [T, r / 2].

    x may be overwritten: what is rotated is new, and large.
    """
    r = 2 * cos.shape[-1]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    pairs = torch.unflatten(x[..., -r:].to(torch.float32), -1, (-1, 2))
    even, odd = pairs[..., 0], pairs[..., 1]
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
    return torch.cat((x[..., :-r], turned.to(x.dtype)), dim=-1)


def sinkhorn(
    logits: torch.Tensor, iterations: int, eps: float, exp: Elementwise = exp, total: Elementwise = tree_sum
) -> torch.Tensor:
    """[T, n, n] -> nearly doubly stochastic, float32: softmax over the last dim, then columns, rows, columns, ..."""
    weights = exp(logits - logits.amax(-1, keepdim=True))
    comb = weights / total(weights).unsqueeze(-1) + eps

    def columns(c: torch.Tensor) -> torch.Tensor:
        return c / (total(c.transpose(-1, -2)).unsqueeze(-2) + eps)

    comb = columns(comb)
    for _ in range(iterations - 1):
        comb = columns(comb / (total(comb).unsqueeze(-1) + eps))
    return comb


def hc_split_sinkhorn(
    mixes: torch.Tensor,
    scale: torch.Tensor,
    base: torch.Tensor,
    n: int,
    iterations: int,
    eps: float,
    *,
    exp: Elementwise = exp,
    total: Elementwise = tree_sum,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """mixes [T, (2 + n) n] -> pre [T, n], post [T, n], comb [T, n (from), n (to)], float32."""
    pre = sigmoid(mixes[:, :n] * scale[0] + base[:n], exp) + eps
    post = 2 * sigmoid(mixes[:, n : 2 * n] * scale[1] + base[n : 2 * n], exp)
    logits = torch.unflatten(mixes[:, 2 * n :] * scale[2] + base[2 * n :], -1, (n, n))
    return pre, post, sinkhorn(logits, iterations, eps, exp, total)


def hc_head_weights(
    mixes: torch.Tensor, scale: torch.Tensor, base: torch.Tensor, eps: float, *, exp: Elementwise = exp
) -> torch.Tensor:
    """The weights of the streams at the end of a stack: mixes [T, n] -> float32 [T, n]."""
    return sigmoid(mixes * scale + base, exp) + eps


def _weighted(weights: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """sum_j weights[t, j] * h[t, j] -> float32 [T, D], in the order of j."""
    total = weights[:, 0, None] * h[:, 0].to(torch.float32)
    for j in range(1, h.shape[1]):
        total = total + weights[:, j, None] * h[:, j].to(torch.float32)
    return total


def hc_pre(weights: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """The streams h [T, n, D] as one, weighted by float32 [T, n] -> [T, D] in h's dtype."""
    return _weighted(weights, h).to(h.dtype)


def hc_input(
    weights: torch.Tensor,
    h: torch.Tensor,
    norm: torch.Tensor,
    eps: float,
    *,
    as_one: Callable[..., torch.Tensor] = hc_pre,
    normed: Callable[..., torch.Tensor] = rms_norm,
) -> torch.Tensor:
    """The input of a sublayer: the streams as one, as `hc_pre`, then as `rms_norm` with the weight `norm` [D]."""
    return normed(as_one(weights, h), norm, eps)


def hc_post(output: torch.Tensor, h: torch.Tensor, post: torch.Tensor, comb: torch.Tensor) -> torch.Tensor:
    """A sublayer's output [T, D] and the old streams h [T, n, D] -> new: post_k * output + sum_j comb[j, k] h_j."""
    wide = output.to(torch.float32)
    streams = [post[:, k, None] * wide + _weighted(comb[:, :, k], h) for k in range(h.shape[1])]
    return torch.stack(streams, dim=1).to(h.dtype)


def swiglu(
    gate: torch.Tensor, up: torch.Tensor, limit: float, share: torch.Tensor | None, *, exp: Elementwise = exp
) -> torch.Tensor:
    """silu(gate) * up, both [T, n] clamped (gate only from above), times share float32 [T] if there is one."""
    clamped = gate.to(torch.float32).clamp(max=limit)
    activation = silu(clamped, exp) * up.to(torch.float32).clamp(-limit, limit)
    if share is not None:
        activation = share.unsqueeze(-1) * activation
    return activation.to(gate.dtype)


def simulate_key(
    x: torch.Tensor, quantized: int, group: int, *, simulate: Callable[..., torch.Tensor] = simulate_fp8
) -> torch.Tensor:
    """x [..., c] with its first `quantized` dims as in FP8 in groups of `group`, the others as they are."""
    return torch.cat((simulate(x[..., :quantized], group), x[..., quantized:]), dim=-1)


def simulate_index(x: torch.Tensor) -> torch.Tensor:
    """A query or key of the indexer [..., d]: Hadamard rotation, rounded to x's dtype, then through FP4, x's dtype."""
    return simulate_fp4(hadamard(x))


def sqrtsoftplus(x: torch.Tensor, *, softplus: Elementwise = softplus, sqrt: Elementwise = sqrt) -> torch.Tensor:
    """sqrt(log(1 + exp(x))) of float32, any shape: the gate's scores."""
    return sqrt(softplus(x))


def pool(
    kv: torch.Tensor, gate: torch.Tensor, *, exp: Elementwise = exp, total: Elementwise = tree_sum
) -> torch.Tensor:
    """kv and gate float32 [..., tokens] -> [...]: the sum of kv, weighted by the softmax of the gates."""
    weights = exp(gate - gate.amax(-1, keepdim=True))
    return total(kv * (weights / total(weights).unsqueeze(-1)))


def best(scores: torch.Tensor, count: int) -> torch.Tensor:
    """scores [T, N], -inf where out of reach -> the best blocks, int32 [T, min(count, N)], best first, then -1.

    Of equal scores the older block is first, whatever N is. Each score becomes an integer that no other block has: the
    bits of the float32, turned so that integers are in the order of the values, above the block's distance from the
    largest number. So a partial selection has one result.
    """
    bits = (scores + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    columns = torch.arange(LAST_COLUMN, LAST_COLUMN - scores.shape[1], -1, device=scores.device)
    chosen = (ordered.to(torch.int64) * 2**32 + columns).topk(min(count, scores.shape[1])).values
    column, value = LAST_COLUMN - (chosen & LAST_COLUMN), chosen >> 32
    return torch.where(value > ORDERED_MINUS_INFINITY, column, -1).to(torch.int32)


def best_in_reach(scores: torch.Tensor, reach: torch.Tensor, count: int) -> torch.Tensor:
    """The same of the first `reach` int64 [T] blocks only."""
    block = torch.arange(scores.shape[1], device=scores.device)
    return best(scores.masked_fill(block >= reach[:, None], -torch.inf), count)


def list_keys(window: torch.Tensor, chosen: torch.Tensor, kept: int) -> torch.Tensor:
    """Rows of the window int32 [T, W] and chosen ones behind its `kept` rows, [T, k], -1 for none -> [T, W + k]."""
    return torch.cat((window, torch.where(chosen < 0, -1, chosen + kept).to(torch.int32)), dim=1)


def choose_experts(scores: torch.Tensor, bias: torch.Tensor, count: int) -> torch.Tensor:
    """scores float32 [T, E] -> the experts with the largest score + bias, largest first, int64 [T, count].

    Of equal ones the lower number is first.
    """
    return (scores + bias).sort(dim=-1, descending=True, stable=True).indices[:, :count]


def expert_weights(scores: torch.Tensor, experts: torch.Tensor, eps: float, factor: float) -> torch.Tensor:
    """The chosen scores over their sum, times `factor`: scores float32 [T, E], experts [T, k] -> float32 [T, k]."""
    chosen = scores.gather(1, experts)
    return chosen / (tree_sum(chosen).unsqueeze(-1) + eps) * factor


def add_experts(outputs: torch.Tensor, experts: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
    """outputs [T, k, D] of the experts [T, k] and of the shared expert [T, D] -> their sum [T, D] in the same dtype.

    In float32, in the order of the experts' numbers, and the shared expert's last.
    """
    order = experts.sort(dim=1, stable=True).indices.unsqueeze(-1)
    total = torch.zeros(len(outputs), outputs.shape[2], dtype=torch.float32, device=outputs.device)
    for slot in range(outputs.shape[1]):
        chosen = order[:, slot : slot + 1].expand(-1, -1, outputs.shape[2])
        total += outputs.gather(1, chosen).squeeze(1)
    return (total + shared.to(torch.float32)).to(outputs.dtype)


def engram_gate(
    h: torch.Tensor,
    keys: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    exp: Elementwise = exp,
    sqrt: Elementwise = sqrt,
    total: Elementwise = tree_sum,
) -> torch.Tensor:
    """How much of an n-gram's value each stream takes: streams h and keys [T, n, D], weight float32 [n, D] -> [T, n].

    The product of both, each over its root mean square and weighted per dimension, over sqrt(D); then the sigmoid of
    its square root, with its sign.
    """
    wide, wide_keys = h.to(torch.float32), keys.to(torch.float32)
    dot = total(wide * weight * wide_keys)
    norms = inverse_rms(wide, eps, sqrt=sqrt, total=total) * inverse_rms(wide_keys, eps, sqrt=sqrt, total=total)
    similarity = dot * norms * h.shape[-1] ** -0.5
    return sigmoid(torch.sign(similarity) * sqrt(similarity.abs().clamp(min=SMALLEST_SIMILARITY)), exp)
