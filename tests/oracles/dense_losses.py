"""What `losses.dense` makes of whole sequences of logits, in float64 loops."""

import numpy as np

from tests.oracles import distill_losses


def token_logps(logits, ids, mask):
    out = np.zeros(np.shape(ids))
    for b in range(out.shape[0]):
        for t in range(1, out.shape[1]):
            if mask[b][t]:
                out[b, t] = distill_losses.log_softmax([float(z) for z in logits[b][t - 1]])[ids[b][t]]
    return out


def aligndistil(student, dpo, reverse, mask, **options):
    out = np.zeros(len(mask))
    for b in range(len(mask)):
        predicting = [t - 1 for t in range(1, len(mask[b])) if mask[b][t]]
        for t in predicting:
            vectors = ([float(z) for z in logits[b][t]] for logits in (student, dpo, reverse))
            out[b] += distill_losses.aligndistil(*vectors, **options) / len(predicting)
    return out


def predicting(mask):
    """For each row the pairs (position that predicts, position of the token) of its response."""
    return [[(t - 1, t) for t in range(1, len(row)) if row[t]] for row in mask]


def vector(logits, b, t):
    return [float(z) for z in logits[b][t]]


def sequence_kl(logits, reference, mask):
    return np.array(
        [
            sum(distill_losses.kl(vector(reference, b, source), vector(logits, b, source)) for source, _ in steps)
            for b, steps in enumerate(predicting(mask))
        ]
    )


def alignment_logps(logits, ids, mask):
    out = []
    for b, steps in enumerate(predicting(mask)):
        total = 0.0
        for source, t in steps:
            p = distill_losses.softmax(vector(logits, b, source))
            total += np.log(p[ids[b][t]]) - np.log(sum(q * q for q in p))
        out.append(total / max(len(steps), 1))
    return np.array(out)


def shared_and_tail_logps(logits, ids, mask, shared_lengths):
    shared, tail = np.zeros(len(mask)), np.zeros(len(mask))
    for b, steps in enumerate(predicting(mask)):
        for k, (source, t) in enumerate(steps):
            logp = distill_losses.log_softmax(vector(logits, b, source))[ids[b][t]]
            (shared if k < shared_lengths[b] else tail)[b] += logp
    return shared, tail


def extrapolated_sequence_logps(logits, reference, ids, mask, weight):
    out = np.zeros(len(mask))
    for b, steps in enumerate(predicting(mask)):
        for source, t in steps:
            mixed = distill_losses.combine(vector(logits, b, source), vector(reference, b, source), weight, 1 - weight)
            out[b] += distill_losses.log_softmax(mixed)[ids[b][t]]
    return out
