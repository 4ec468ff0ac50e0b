"""Chat templates in the manner of well-known families, in a few lines each, and what they should write.

This file imports nothing, so that the script which makes the fixture can read it under another interpreter.
"""

CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

# The same, with what is learned marked.
MARKED = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}
    {%- else %}
        {{- message.content + '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

# The same in a macro, where places in the output are not known yet: transformers' masks are wrong there.
MARKED_IN_MACRO = (
    "{%- macro turn(message) %}"
    + MARKED.partition("{%- for message in messages %}")[2].partition("{%- endfor %}")[0]
    + "{%- endmacro %}{%- for message in messages %}{{ turn(message) }}{% endfor %}"
    + MARKED.partition("{%- endfor %}")[2]
)

# Marks the text alone and leaves the token that ends the turn out.
MARKED_WITHOUT_END = MARKED.replace(
    "{{ message.content + '<|im_end|>' }}{% endgeneration %}",
    "{{ message.content }}{% endgeneration %}{{ '<|im_end|>' }}",
)

LLAMA = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

GEMMA = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set first = messages[0]['content'] + '\\n\\n' %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set first = '' %}
    {%- set turns = messages %}
{%- endif %}
{%- for message in turns %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif %}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
    {{- '<start_of_turn>' + role + '\\n' + (first if loop.first else '') }}
    {{- message['content'] | trim }}{{ '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}
"""

MISTRAL = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}
        {{- '[INST] ' + message['content'] + ' [/INST]' }}
    {%- elif message['role'] == 'assistant' %}
        {{- ' ' + message['content'] + eos_token }}
    {%- endif %}
{%- endfor %}
"""

# No control token at all.
PLAIN = """\
{%- for message in messages %}{{ '\\n\\n' + message.role + ':' + message.content }}{% endfor %}
{%- if add_generation_prompt %}{{ '\\n\\nassistant:' }}{% endif %}
"""

# Takes the thoughts out of all but the last turn, so a turn is written otherwise once another follows.
FORGETTING = CHATML.replace(
    "message.content", "(message.content if loop.last else message.content.split('</think>')[-1])"
)

TEMPLATES = {
    "chatml": CHATML, "marked": MARKED, "marked in macro": MARKED_IN_MACRO, "marked without end": MARKED_WITHOUT_END,
    "llama": LLAMA, "gemma": GEMMA, "mistral": MISTRAL, "plain": PLAIN,
}  # fmt: skip

SPECIALS = [
    "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<start_of_turn>", "<end_of_turn>",
]  # fmt: skip

CONVERSATIONS = {
    "one turn": [("user", "How are you?"), ("assistant", "Fine, thank you. And you?")],
    "two turns": [
        ("user", "Name a fruit."), ("assistant", "An apple."), ("user", "Another\none?"), ("assistant", "A café."),
    ],
    "system": [("system", "Be brief."), ("user", "日本語?"), ("assistant", "No. 😀")],
    "empty answer": [("user", "Say nothing."), ("assistant", "")],
}  # fmt: skip
