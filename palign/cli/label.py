"""Make ranked lists: K responses to each prompt, given or sampled from a model, scored by a function or a reward model.

python -m palign.cli.label --input=prompts.jsonl --output=lists.jsonl --responses_from=runs/sft --samples=8 \
    --reward_model=models/reward
"""

from collections.abc import Sequence

from palign.cli import app


def main(arguments: Sequence[str]) -> None:
    """Parses the command line and writes the lists."""
    parser = app.parser("palign.cli.label", __doc__)
    parser.add_argument("--input", required=True, help="prompts, or prompts with responses: any data that is read")
    parser.add_argument("--output", required=True, help="a .jsonl file of prompt, responses, scores")
    parser.add_argument("--scorer", default="", metavar="MODULE:FUNCTION", help="(prompt, response) -> number")
    parser.add_argument("--reward_model", default="", help="a run's workdir or a Hugging Face model, of one value")
    parser.add_argument("--responses_from", default="", help="a run's workdir or a Hugging Face model, to sample from")
    parser.add_argument("--batch_size", type=int, default=16, help="prompts at a time")
    sampled = parser.add_argument_group("sampling")
    sampled.add_argument("--samples", type=int, help="of each prompt (4)")
    sampled.add_argument("--max_new_tokens", type=int, help="of a response (128)")
    sampled.add_argument("--temperature", type=float, help="0: the most likely token (1)")
    sampled.add_argument("--top_k", type=int, help="0: all (0)")
    sampled.add_argument("--top_p", type=float, help="1: all (1)")
    sampled.add_argument("--seed", type=int, help="of all draws (0)")
    given = vars(parser.parse_args(arguments))

    from palign.train.label import Sampling, label

    settings = {name: given.pop(name) for name in Sampling._fields}
    settings = {name: value for name, value in settings.items() if value is not None}
    if settings and not given["responses_from"]:
        raise ValueError(f"--{next(iter(settings))} has no effect without --responses_from, the model to sample from")
    app.use_compilation_cache()
    label(given.pop("input"), given.pop("output"), sampling=Sampling(**settings), **given)


if __name__ == "__main__":
    raise SystemExit(app.run(main))
