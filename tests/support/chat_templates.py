"""Chat templates of model families whose tokenizer comes without one, without tools, images and dates.

What remains is theirs character by character: which messages are accepted, where system text goes, which tokens end an
answer. So an example in tests has the shape that the family's own template gives it.
"""

from __future__ import annotations

# Mistral: the system text stands before the last user message. v1 has the markers as text, v3 as control tokens, and
# tekken has no space before a text.
MISTRAL = """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message["role"] == "user") != (loop.index0 % 2 == 0) %}
        {{- raise_exception("After the optional system message, conversation roles must alternate user/assistant") }}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST]SPACE" + system_message + "\\n\\n" + message["content"] + "CLOSING" }}
        {%- else %}
            {{- "[INST]SPACE" + message["content"] + "CLOSING" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- "SPACE" + message["content"] + eos_token }}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported, with an optional system message first") }}
    {%- endif %}
{%- endfor %}
"""
MISTRAL_V1 = MISTRAL.replace("SPACE", " ").replace("CLOSING", " [/INST]")
MISTRAL_V3 = MISTRAL.replace("SPACE", " ").replace("CLOSING", "[/INST]")
MISTRAL_TEKKEN = MISTRAL.replace("SPACE", "").replace("CLOSING", "[/INST]")

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
