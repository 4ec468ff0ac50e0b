"""Renders a chat template in a process of its own, where a hostile one can be stopped; `palign.data.chat` starts it.

A template is a program from wherever the model came from. Jinja's sandbox keeps it from Python's objects, but not from
using up time and memory, and no thread or signal handler interrupts one long operation of the interpreter. A process
can: the kernel ends it when its processor time is over, and it gets no more memory than it is allowed.

The first line of the input is the set-up `{"template", "variables", "seconds", "memory", "output"}`, every other one a
list of `[messages, add_generation_prompt]`. Each is answered by one line: `{"error"}`, or `{"rendered"}` with `{"text",
"spans"}` for each.
"""

import datetime
import json
import re
import resource
import signal
import sys
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

# Around what a {% generation %} block writes, until the whole text is there. `palign.data.chat` refuses messages with
# such characters, which stand for nothing in Unicode.
OPEN, CLOSE = "\ufdd1", "\ufdd2"
# What `strftime_now` reads: a date that does not move, or a run that goes on tomorrow would see other data.
TODAY = datetime.datetime(2024, 7, 26)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`: what the assistant writes."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Any) -> str:
        return f"{OPEN}{caller()}{CLOSE}"


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _compile(source: str) -> jinja2.Template:
    """The template with what transformers gives one."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = TODAY.strftime
    return environment.from_string(source)


def _spans(marked: str) -> tuple[str, list[tuple[int, int]]]:
    """The text without the marks, and where what they enclosed begins and ends."""
    text, spans, start = "", [], 0
    for part in re.split(f"([{OPEN}{CLOSE}])", marked):
        if part == OPEN:
            start = len(text)
        elif part == CLOSE:
            spans.append((start, len(text)))
        else:
            text += part
    return text, spans


def _render(template: jinja2.Template, variables: dict[str, str], request: Any, most: int) -> dict[str, Any]:
    messages, add_generation_prompt = request
    marked = template.render(
        messages=messages, add_generation_prompt=add_generation_prompt, tools=None, documents=None, **variables
    )
    if len(marked) > most or len(marked.encode()) > most:
        return {"error": f"writes {len(marked):,} characters; expected at most {most:,} bytes"}
    text, spans = _spans(marked)
    return {"text": text, "spans": spans}


def _answer(function: Any, *arguments: Any, seconds: float) -> Any:
    """Calls a function under the limit of processor time, at whose end the kernel ends the process."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        return function(*arguments)
    except MemoryError:
        return {"error": "uses too much memory"}
    except Exception as error:  # whatever a template raises
        return {"error": f"raises {type(error).__name__}: {' '.join(str(error)[:400].split())[:200]}"}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def main() -> None:
    """Answers lines until the input ends."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process
    setup = json.loads(sys.stdin.readline())
    if sys.platform == "linux":  # elsewhere the limit is refused or has no effect
        resource.setrlimit(resource.RLIMIT_AS, (setup["memory"], setup["memory"]))
    limit = {"seconds": setup["seconds"]}
    template = _answer(_compile, setup["template"], **limit)
    ready = isinstance(template, jinja2.Template)
    print(json.dumps({} if ready else template), flush=True)
    for line in sys.stdin:
        arguments = ((template, setup["variables"], request, setup["output"]) for request in json.loads(line))
        answers = [_answer(_render, *each, **limit) for each in arguments] if ready else [template]
        failed = next((answer for answer in answers if "error" in answer), None)
        print(json.dumps(failed or {"rendered": answers}), flush=True)


if __name__ == "__main__":
    main()
