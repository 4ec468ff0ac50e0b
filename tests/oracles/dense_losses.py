"""Response log-probabilities and AlignDistil from whole sequences of logits, in float64 loops."""

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
