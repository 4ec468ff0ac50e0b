"""Sample from a run's model.

python -m palign.cli.generate --workdir=runs/dpo --prompt="Once upon a time" --samples=3
"""

from collections.abc import Sequence

from palign.cli import app


def main(arguments: Sequence[str]) -> None:
    """Parses the command line and prints samples."""
    parser = app.parser("palign.cli.generate", __doc__)
    parser.add_argument("--workdir", required=True, help="of a run; @STEP, @last or @best behind it")
    parser.add_argument("--prompt", action="append", default=[], help="may be given several times")
    parser.add_argument("--message", action="append", default=[], help="what a user says, under the chat template")
    parser.add_argument("--prompts", default="", help="a data file whose prompts are used")
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=1.0, help="0: the most likely token")
    parser.add_argument("--top_k", type=int, default=0, help="0: all")
    parser.add_argument("--top_p", type=float, default=1.0, help="1: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--format", choices=("text", "json", "alpaca_eval"), default="text", help="of what is printed")
    parser.add_argument("--json", dest="format", action="store_const", const="json", help="a line a prompt, as data")
    given = vars(parser.parse_args(arguments))

    from palign.data.readers import read_records
    from palign.data.records import Message

    prompts, messages, file = (given.pop(name) for name in ("prompt", "message", "prompts"))
    prompts += [(Message("user", text),) for text in messages]
    prompts += [record.prompt for record in read_records(file)[0]] if file else []
    if not prompts:
        raise ValueError("no prompt: give --prompt=TEXT, --message=TEXT or --prompts=FILE")

    from palign.generate.texts import WRITERS, check_instructions, generate
    from palign.train.metrics import Reporter
    from palign.train.sources import load_run

    form, workdir = given.pop("format"), given.pop("workdir")
    if form == "alpaca_eval":
        check_instructions(prompts, given["samples"])
    app.use_compilation_cache()
    loaded = load_run(workdir)
    with Reporter("generate", len(prompts)) as progress:
        drawn = generate(loaded.lm, loaded.params, loaded.tokenizer, prompts, progress=progress, **given)
    for line in WRITERS[form](zip(prompts, drawn, strict=True), workdir, file):
        print(line)


if __name__ == "__main__":
    raise SystemExit(app.run(main))
