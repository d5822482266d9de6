"""Chat templates of model families whose tokenizer comes without one, without tools, images and dates.

What remains is theirs character by character: which messages are accepted, where system text goes, which tokens end an
answer. So an example in tests has the shape that the family's own template gives it.
"""

from __future__ import annotations

# Mistral: v1 has its markers as text and the system text in the first user message. From v3 on they are control tokens,
# and the system text is in a user message only if that is the last of all messages: before an answer it is missing.
MISTRAL = """\
{%- set has_system = messages[0].role == "system" %}
{%- set system = messages[0].content + "\\n\\n" if has_system else "" %}
{{- bos_token }}
{%- for message in (messages[1:] if has_system else messages) %}
    {%- if message.role != ("user" if loop.index0 % 2 == 0 else "assistant") %}
        {{- raise_exception("After the optional system message, user and assistant must alternate") }}
    {%- elif message.role == "user" %}
        {{- "OPENING" + (system if loop.PLACE else "") + message.content + "CLOSING" }}
    {%- else %}
        {{- ANSWER + eos_token }}
    {%- endif %}
{%- endfor %}
"""


def mistral(*, opening: str, closing: str, place: str, answer: str) -> str:
    words = {"OPENING": opening, "CLOSING": closing, "PLACE": place, "ANSWER": answer}
    template = MISTRAL
    for word, text in words.items():
        template = template.replace(word, text)
    return template


MISTRAL_V1 = mistral(opening="[INST] ", closing=" [/INST]", place="first", answer='" " + message.content')
MISTRAL_V3 = mistral(opening="[INST] ", closing="[/INST]", place="last", answer='" " + message.content | trim')
MISTRAL_TEKKEN = mistral(opening="[INST]", closing="[/INST]", place="last", answer="message.content")

# gpt-oss (harmony): system text becomes the developer's instructions, an answer stands in the channel "final", and only
# the last answer ends with <|return|>. Reasoning (`thinking`) is kept in the last answer alone.
GPT_OSS = """\
{{- "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\\n" }}
{{- "Knowledge cutoff: 2024-06\\n\\nReasoning: " + (reasoning_effort or "medium") + "\\n\\n" }}
{{- "# Valid channels: analysis, commentary, final. Channel must be included for every message.<|end|>" }}
{%- if messages[0].role in ("developer", "system") %}
    {{- "<|start|>developer<|message|># Instructions\\n\\n" + messages[0].content + "\\n\\n<|end|>" }}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- for message in loop_messages %}
    {%- if message.role == "user" %}
        {{- "<|start|>user<|message|>" + message.content + "<|end|>" }}
    {%- elif message.role == "assistant" and loop.last and not add_generation_prompt %}
        {%- if message.thinking %}
            {{- "<|start|>assistant<|channel|>analysis<|message|>" + message.thinking + "<|end|>" }}
        {%- endif %}
        {{- "<|start|>assistant<|channel|>final<|message|>" + message.content + "<|return|>" }}
    {%- elif message.role == "assistant" %}
        {{- "<|start|>assistant<|channel|>final<|message|>" + message.content + "<|end|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|start|>assistant" }}
{%- endif %}
"""

# Phi-3: each marker is an added token that swallows the white space behind it (rstrip), so line breaks leave no token.
PHI3 = """\
{%- for message in messages %}
    {{- "<|" + message.role + "|>\\n" + message.content + "<|end|>\\n" }}
{%- endfor %}
{{- "<|assistant|>\\n" if add_generation_prompt else eos_token }}
"""
