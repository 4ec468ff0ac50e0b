"""BCO's underlying-distribution matching: weights that make the thumbs-down prompts look like the thumbs-up ones.

A logistic regression on the reference's hidden states tells which prompts got a thumbs-up; a thumbs-down then weighs
by the odds that its prompt would have got one. The fitted classifier is kept in the workdir, so that a run that goes on
and an evaluation see the same weights.
"""

import dataclasses
import functools
import io
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from palign import losses
from palign.data.loader import Dataset
from palign.data.tokenize import TokenTree
from palign.eval.per_target import per_row
from palign.models.protocol import LanguageModel, Params
from palign.sharding.processes import is_main
from palign.train.metrics import say
from palign.train.prepare import Prepared
from palign.types import Batch

CLASSIFIER = "prompt_classifier.npz"
MOST_PROMPTS = 4096  # that the classifier is fitted on


def match_prompts(
    data: Prepared, lm: LanguageModel, params: Params, mesh: Mesh, workdir: epath.Path, *, seed: int
) -> Prepared:
    """Gives every data set weights, where thumbs-up and thumbs-down stand behind different prompts.

    Args:
        data: of the run. Records with one response and a score other than 0 are thumbs.
        lm: the model.
        params: the reference, whose hidden state at a prompt's last token stands for the prompt.
        mesh: the devices.
        workdir: where the classifier is kept.
        seed: of the sample that it is fitted on.
    """
    if not _differ(data.train.trees):
        say("bco: thumbs-up and thumbs-down share their prompts, or there is one kind only: nothing to match")
        return data
    classifier = _classifier(data.train, lm, params, mesh, workdir / CLASSIFIER, seed)

    def weigh(dataset: Dataset) -> Dataset:
        embeddings = embed_prompts(dataset, lm, params, mesh)
        probability = losses.desirable_probability(classifier, jnp.asarray(embeddings))
        desirable = np.asarray([thumb(tree) >= 0 for tree in dataset.trees])  # what is no thumb weighs 1
        return dataclasses.replace(
            dataset, weights=np.asarray(losses.udm_weights(probability, jnp.asarray(desirable))).tolist()
        )

    return data._replace(train=weigh(data.train), evals={name: weigh(part) for name, part in data.evals.items()})


def thumb(tree: TokenTree) -> int:
    """+1 or -1 for a single response that was liked or disliked, else 0."""
    return int(np.sign(tree.scores[0])) if len(tree.scores) == 1 else 0


def _differ(trees: Sequence[TokenTree]) -> bool:
    liked, disliked = ({tree.prompt.tobytes() for tree in trees if thumb(tree) == sign} for sign in (1, -1))
    return bool(liked) and bool(disliked) and liked != disliked


def _classifier(dataset, lm, params, mesh, file, seed) -> losses.PromptClassifier:
    if file.is_file():
        stored = np.load(io.BytesIO(file.read_bytes()))
        return losses.PromptClassifier(jnp.asarray(stored["kernel"]), jnp.asarray(stored["bias"]))
    judged = [i for i, tree in enumerate(dataset.trees) if thumb(tree)]
    chosen = sorted(np.random.default_rng(seed).permutation(judged)[:MOST_PROMPTS].tolist())
    liked = np.asarray([thumb(dataset.trees[i]) > 0 for i in chosen])
    embeddings = embed_prompts(dataset, lm, params, mesh)[chosen]
    classifier = losses.fit_prompt_classifier(jnp.asarray(embeddings), jnp.asarray(liked))
    right = np.asarray(losses.desirable_probability(classifier, jnp.asarray(embeddings)) > 0.5) == liked
    say(f"bco: {right[liked].mean():.0%} of thumbs-up and {right[~liked].mean():.0%} of thumbs-down prompts told apart")
    if is_main():
        temporary = file.with_suffix(".tmp.npz")
        with temporary.open("wb") as opened:
            np.savez(opened, kernel=np.asarray(classifier.kernel), bias=np.asarray(classifier.bias))
        temporary.replace(file)
    return classifier


def embed_prompts(dataset: Dataset, lm: LanguageModel, params: Params, mesh: Mesh) -> np.ndarray:
    """The hidden state that predicts each example's first response token: `[examples, D]` float32."""
    found: list[np.ndarray] = [np.empty(0)] * len(dataset.trees)
    for values, _, members in per_row(dataset, _first_sources(lm), params, mesh):
        for e, member in enumerate(members):
            found[member] = values[e]
    return np.stack(found)


@functools.cache
def _first_sources(lm: LanguageModel) -> Callable[[Params, Batch], jax.Array]:
    def embed(params, batch):
        G, K = batch.valid.shape[1:]
        hidden = lm.hidden(params, batch)
        slots = jnp.arange(G) * K + 1  # an example's first response
        first = jax.vmap(lambda row: jnp.argmax(row[None] == slots[:, None], axis=-1))(batch.target_slot)
        columns = jnp.take_along_axis(batch.target_source, first, axis=1)
        return jnp.take_along_axis(hidden, columns[..., None], axis=1).astype(jnp.float32)

    return embed
