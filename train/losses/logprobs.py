"""Token log-probabilities from hidden states and the head's weight, without the (tokens x
vocabulary) tensor.

The head is worked off in chunks of tokens sized by a byte budget. The last chunk is kept for the
backward pass, which overwrites it with its gradient; the others are computed a second time. The
softmax, its logarithm and every sum run in fp32 (fp64 for fp64 weights), whatever the matrix
product's type.

Legend: T scored tokens, V vocabulary, H hidden size, N responses.
"""

import torch


def score(values, lengths):
    """The sum of token values a response: (T,) values, response after response, (N,) lengths ->
    (N,) nats.

    One reduction a segment in a fixed order, so it is deterministic on CUDA as well.
    """
    if not lengths.numel():  # the empty row: (0,) either way, and still part of the graph
        return values
    return torch.segment_reduce(values, "sum", lengths=lengths, unsafe=True)


def damped(values, lengths, alpha):
    """LD-DPO's token values: past the shorter response of each pair they count `alpha` times. (T,),
    (2B,) -> (T,).

    Liu et al. 2024 (arXiv 2409.06411), the equation of its modified likelihood: log p of the first
    l_p tokens plus alpha log p of the excess, l_p the pair's shorter length. For policy and
    reference alike, as in TRL.
    """
    place = torch.arange(values.shape[0], device=values.device)
    place = place - (lengths.cumsum(0) - lengths).repeat_interleave(
        lengths
    )  # (T,) within its response
    shared = lengths.view(-1, 2).amin(1).repeat_interleave(2).repeat_interleave(lengths)
    return torch.where(place < shared, values, alpha * values)


def weights(logps, log_p2, lengths):
    """WPO's weight of each response, without gradient: (T,) nats, (T,), (N,) lengths -> (N,).

    Zhou et al. 2024 (arXiv 2406.11827), equation 2 with its sampled alignment: the mean over tokens
    of log p - log sum_v p_v^2, exponentiated; 1 where tokens are as likely as the policy's own
    draws. A pair's weight is the product.
    """
    return torch.exp(score(logps.detach() - log_p2, lengths) / lengths.clamp(min=1))
