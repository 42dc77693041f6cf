"""From token log-probabilities to a number a response: the sum, LD-DPO's damping, WPO's weights.

The token log-probabilities come from train/models/lm_head.py, response after response in one long
tensor.

Legend: T scored tokens, N responses, B pairs.
"""

import torch


def sum_per_response(values, lengths):
    """The sum of token values a response: (T,) nats, (N,) tokens -> (N,) nats in fp64.

    torch adds a segment's values up one after the other: in fp32 a real answer of 800 tokens and
    5,483 nats comes out 3.6e-3 nats off, and what follows are differences of such sums. In fp64
    what is lost lies far below the fp32 values' last digit; there are few responses, so what is
    computed with their scores costs nothing. One reduction a segment in a fixed order, so it is
    deterministic on CUDA as well.
    """
    values = values.double()
    if not lengths.numel():  # the empty batch: (0,) either way, and still part of the graph
        return values
    # unsafe=True leaves out the check that the lengths add up to T, which would wait for the device
    return torch.segment_reduce(values, "sum", lengths=lengths, unsafe=True)


def per_token(of_each, lengths, values):
    """(N,) a number a response -> (T,) the same at each of its tokens, of which `values`, (T,), says
    how many there are: torch would otherwise add the lengths up and wait for the device.
    """
    return of_each.repeat_interleave(lengths, output_size=values.shape[0])


def damped(values, lengths, alpha):
    """LD-DPO's token values: past the shorter response of each pair they count `alpha` times.
    (T,) nats, (2B,) tokens -> (T,) nats.

    Liu et al. 2024 (arXiv 2409.06411), the equation of its modified likelihood: log p of the first
    l_p tokens plus alpha log p of the excess, l_p the pair's shorter length. For policy and
    reference alike, as in TRL.
    """
    starts = lengths.cumsum(0) - lengths  # (2B,) each response's first token
    place = torch.arange(values.shape[0], device=values.device)
    place = place - per_token(starts, lengths, values)  # (T,) within its response
    shorter = lengths.view(-1, 2).amin(1)  # (B,) l_p
    shared = per_token(shorter.repeat_interleave(2), lengths, values)  # (T,)
    return torch.where(place < shared, values, alpha * values)


def wpo_weights(logps, log_p2, lengths):
    """WPO's weight of each response, without gradient: (T,) nats, (T,), (N,) tokens -> (N,).

    Zhou et al. 2024 (arXiv 2406.11827), equation 2 with its sampled alignment: the mean over tokens
    of log p - log sum_v p_v^2, exponentiated; 1 where tokens are as likely as the policy's own
    draws. A pair's weight is the product.
    """
    return torch.exp(sum_per_response(logps.detach() - log_p2, lengths) / lengths.clamp(min=1))
