"""Chat templates: equal to transformers, errors with their line, and bounded work for hostile ones."""

from __future__ import annotations

import contextlib
import itertools

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models

from edgewise.core.checkpoint import Checkpoint
from edgewise.core.errors import EdgewiseError, FormatError, InvalidValueError, collect_notices
from edgewise.data import chat
from edgewise.data.chat import ChatError, ChatTemplate, chat_template_of
from edgewise.data.tokenizer import Tokenizer

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou "
    "are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + "
    "message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ "
    "'<|im_start|>assistant\n' }}{% endif %}")
CHATML = """{% for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content | trim + '<|im_end|>\\n' }}
{% endfor %}
{% if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{% endif %}"""
LLAMA2 = """{% if messages[0]['role'] == 'system' %}
    {% set loop_messages = messages[1:] %}
    {% set system_message = messages[0]['content'] %}
{% else %}
    {% set loop_messages = messages %}
    {% set system_message = false %}
{% endif %}
{% for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- if loop.index0 == 0 and system_message != false %}
        {%- set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}
    {%- else %}
        {%- set content = message['content'] %}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
    {%- elif message['role'] == 'assistant' %}
        {{- ' '  + content.strip() + ' ' + eos_token }}
    {%- endif %}
{%- endfor %}"""
LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" + system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
        {{- '{"name": "' + tool_call.name + '", "parameters": ' }}
        {{- tool_call.arguments | tojson }}
        {{- "}<|eot_id|>" }}
    {%- else %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable and message.content is not string %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""
MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace() %}
{%- set ns.index = 0 %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or (message.tool_calls is defined and message.tool_calls is not none)) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("conversation roles must alternate user/assistant/...") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != "return" %}
                    {%- if val is string %}
                        {{- '"' + key + '": "' + val + '"' }}
                    {%- else %}
                        {{- '"' + key + '": ' + val|tojson }}
                    {%- endif %}
                    {%- if not loop.last %}
                        {{- ", " }}
                    {%- endif %}
                {%- endfor %}
                {{- "}}" }}
            {%- endfor %}
            {{- "][/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" and message.content %}
        {%- generation %}
        {{- " " + message["content"]|trim + eos_token}}
        {%- endgeneration %}
    {%- endif %}
{%- endfor %}"""
GEMMA = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{% for message in messages %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{%- endif -%}
{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}
{{ '<start_of_turn>' + role + '
' + message['content'] | trim + '<end_of_turn>
' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model
'}}{% endif %}"""
MACROS = """{%- macro turn(role, text) -%}
<{{ role }}>{{ caller() if caller else text }}</{{ role }}>
{%- endmacro -%}
{%- for m in messages -%}
    {%- if m.role == 'system' -%}{%- continue -%}{%- endif -%}
    {%- if loop.index > 4 -%}{%- break -%}{%- endif -%}
    {%- set parts = m.content.split(' ') -%}
    {{- turn(m.role, (parts | map('upper') | join('+')) ~ ' ' ~ loop.length ~ '%03d' % parts|length) }}
    {%- if m.content.startswith('I') and 'am' in m.content %}{{ m.content[::-1][:4] }}{% endif -%}
{%- endfor -%}
{{ {'z': 1, 'a': ['<é>', none, true, 1.5]} | tojson }}{{ strftime_now('%Y') | length }}{{ unknown_variable }}
{%- filter replace('a', 'b') %} banana {{ 'a' * 3 }}{% endfilter %}{% set block %} <{{ messages|length }}> {% endset %}
{{ block | trim }} {{ '{:>5}|{}'.format('x', 2 ** 8) }} {{ dict(a=1).items() | list }} {{ [1, 2] + [3] }}
"""
TEMPLATES = {"smollm2": SMOLLM2, "chatml": CHATML, "llama2": LLAMA2, "llama3": LLAMA3, "mistral": MISTRAL,
             "gemma": GEMMA, "macros": MACROS}

CONVERSATIONS = {
    "one": [("user", "Hello")],
    "spaces": [("user", "  two\n\nlines \n")],
    "turns": [("user", "Hi <é>"), ("assistant", "I am here. "), ("user", "Was ist 2 < 3?"), ("assistant", "ja")],
    "system": [("system", "Be brief. "), ("user", "😀 \"quotes\" & {{ braces }}"), ("assistant", "ok"), ("user", "go")],
    "two users": [("user", "a"), ("user", "b")],
}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Says <how> it is", "parameters": {
    "type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]}}}]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


def conversation(name: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in CONVERSATIONS[name]]


@pytest.mark.slow
@pytest.mark.parametrize("template", TEMPLATES)
def test_equals_transformers(template):
    from transformers import PreTrainedTokenizerFast

    raw = tokenizers.Tokenizer(models.BPE({"<s>": 0, "</s>": 1}, []))
    theirs = PreTrainedTokenizerFast(tokenizer_object=raw, **TOKENS, chat_template=TEMPLATES[template])
    ours = ChatTemplate(TEMPLATES[template], TOKENS)
    rendered = 0
    for name, prompt, tools in itertools.product(CONVERSATIONS, (True, False), (None, TOOLS)):
        def expected(name=name, prompt=prompt, tools=tools) -> str:
            return theirs.apply_chat_template(conversation(name), tokenize=False, add_generation_prompt=prompt,
                                              tools=tools)

        try:
            wanted = expected()
        except Exception as error:
            with pytest.raises(ChatError, match=str(error).split("/")[0].split("(")[0]):
                ours.render(conversation(name), add_generation_prompt=prompt, tools=tools)
            continue
        rendered += 1
        assert ours.render(conversation(name), add_generation_prompt=prompt, tools=tools) == wanted, name
    assert rendered >= 12


@pytest.mark.slow
def test_tool_calls_and_reasoning_equal_transformers():
    from transformers import PreTrainedTokenizerFast

    source = LLAMA3 + "{% for m in messages %}{{ m.thinking }}|{{ m.reasoning_content }}{% endfor %}{{ mode }}"
    messages = [{"role": "user", "content": "weather?"},
                {"role": "assistant", "content": "", "reasoning": "hm", "tool_calls": [
                    {"type": "function", "function": {"name": "weather", "arguments": {"place": "Bonn", "n": 1}}}]},
                {"role": "tool", "content": {"degrees": 20.5}}, {"role": "tool", "content": "20"}]
    raw = tokenizers.Tokenizer(models.BPE({"<s>": 0, "</s>": 1}, []))
    theirs = PreTrainedTokenizerFast(tokenizer_object=raw, **TOKENS, chat_template=source)
    expected = theirs.apply_chat_template(messages, tokenize=False, tools=TOOLS, add_generation_prompt=True, mode="x")
    assert ChatTemplate(source, TOKENS).render(messages, tools=TOOLS, mode="x") == expected


def test_smollm2_writes_its_system_message():
    assert ChatTemplate(SMOLLM2).render(conversation("one")) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")
    assert ChatTemplate(SMOLLM2).render(conversation("one"), add_generation_prompt=False).endswith("Hello<|im_end|>\n")


def test_llama2_and_llama3_shapes():
    assert ChatTemplate(LLAMA2, TOKENS).render(conversation("system")) == (
        "<s>[INST] <<SYS>>\nBe brief. \n<</SYS>>\n\n😀 \"quotes\" & {{ braces }} [/INST] ok </s><s>[INST] go [/INST]")
    assert ChatTemplate(LLAMA3, TOKENS).render(conversation("one"), date_string="today") == (
        "<s><|start_header_id|>system<|end_header_id|>\n\nToday Date: today\n\n<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n")


def test_a_refusal_of_the_template_names_its_line():
    with pytest.raises(ChatError, match=r"some-model: the chat template failed at line 2: System role not supported"):
        ChatTemplate(GEMMA, TOKENS, where="some-model").render(conversation("system"))
    with pytest.raises(ChatError, match="at line 3: 'dict object' has no attribute 'nothing'"):
        ChatTemplate("a\n\n{{ messages[0].nothing.more }}").render(conversation("one"))
    with pytest.raises(ChatError, match=r"at line 2: .*'endfor'"):
        ChatTemplate("{% for m in messages %}\n{% endif %}").render(conversation("one"))


def test_messages_are_not_changed_and_strange_objects_do_not_arrive():
    class Rich:
        def save(self) -> str:
            raise AssertionError("a template called a method of a caller's object")

    messages = [{"role": "user", "content": Rich()}]
    assert ChatTemplate("{{ messages[0].content }}{{ messages[0].content.save }}").render(messages) == "<Rich>"
    assert isinstance(messages[0]["content"], Rich)


@pytest.mark.parametrize("bad", ["Hello", b"x", {"role": "user"}, ["Hello"], [{"content": "x"}], [{"role": 1}], [None]])
def test_malformed_messages_are_refused(bad):
    with pytest.raises(InvalidValueError, match="role"):
        ChatTemplate(CHATML).render(bad)


HOSTILE = {
    "class": "{{ ().__class__.__mro__ }}",
    "globals": "{{ raise_exception.__globals__['os'] }}",
    "init": "{{ cycler.__init__.__globals__ }}",
    "format": "{{ '{0.__class__.__mro__}'.format(1).x.y }}",
    "format map": "{{ '{a.__class__.__mro__}'.format_map({'a': 1}).x.y }}",
    "attr": "{{ (messages | attr('__class__')).__mro__ }}",
    "context": "{{ self._TemplateReference__context.environment }}",
    "mutation": "{{ messages.append(1) }}",
    "namespace": "{% set n = namespace() %}{% set n.__class__ = 1 %}",
    "namespace names": "{{ namespace({'_x': 1}) }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}{{ os }}",
    "lipsum": "{{ lipsum.__globals__ }}",
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "filtered loop": "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
    "text in loops": "{% for a in range(99999) %}" + "x" * 5000 + "{% endfor %}",
    "range": "{{ range(10**9) | list }}",
    "repetition": "{{ 'x' * 10**10 }}",
    "list repetition": "{{ [1] * 10**10 }}",
    "negative": "{{ ('x' * 10**6) * 10**6 }}",
    "doubling +": "{% set n=namespace(x='ab') %}{% for a in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "doubling ~": "{% set n=namespace(x='ab') %}{% for a in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "doubling list": "{% set n=namespace(x=[1]) %}{% for a in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "doubling block":
        "{% set n=namespace(x='ab') %}{% for a in range(60) %}{% set n.x %}{{n.x}}{{n.x}}{% endset %}{% endfor %}",
    "squaring": "{% set n=namespace(x=3) %}{% for a in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "power": "{{ 10 ** 10 ** 10 ** 10 }}{{ 9 ** (9 ** 9) }}",
    "width": "{{ 'x'.ljust(10**10) }}",
    "width filter": "{{ 'x' | center(10**10) }}",
    "width format": "{{ '{:9999999999}'.format(1) }}",
    "width given": "{{ '{:{w}}'.format(1, w=10**10) }}",
    "width percent": "{{ '%9999999999d' % 1 }}",
    "width star": "{{ '%*d' % (10**10, 1) }}",
    "width filter format": "{{ '%9999999999d' | format(1) }}",
    "indent": "{{ ('\n' * 10**5) | indent('x' * 10**5) }}",
    "indent json": "{{ [[1]] | tojson(indent=10**10) }}",
    "replace": "{{ ('x' * 10**5) | replace('x', 'y' * 10**5) }}",
    "replace method": "{{ ('x' * 10**5).replace('', 'y' * 10**5) }}",
    "join": "{{ ('x' * 10**5).join(['y'] * 10**5) }}",
    "batch": "{{ [1] | batch(10**10, 0) | list }}",
    "output": "{% for a in range(9999) %}{{ 'y' * 99999 }}{% endfor %}",
    "buffered output": "{% filter upper %}{% for a in range(9999) %}{{ 'y' * 99999 }}{% endfor %}{% endfilter %}",
    "macro": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "recursive loop": "{% for a in range(99999) recursive %}{{ loop(range(99999)) }}{% endfor %}",
    "search": "{% set x = range(99999) | list %}{% for a in range(99999) %}{% if -1 in x %}{% endif %}{% endfor %}",
    "sort": "{% set x = [1] * 10**5 %}{% for a in range(99999) %}{% set y = x | sort %}{% endfor %}",
    "slice": "{% set x = [1] * 10**5 %}{% for a in range(99999) %}{% set y = x[1:] %}{% endfor %}",
    "compare": "{% set x = 'y' * 10**6 %}{% for a in range(99999) %}{% if x == x ~ 'z' %}{% endif %}{% endfor %}",
    "nested": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "division": "{{ 1 / 0 }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_one_error(name):
    """Each of these would read the interpreter's memory, or run or grow without an end."""
    with pytest.raises(EdgewiseError, match="the chat template"):
        ChatTemplate(HOSTILE[name]).render(conversation("turns"))


def test_constant_expressions_are_not_evaluated_while_compiling():
    template = ChatTemplate("{% if false %}{{ 'x' * 10**10 }}{{ 'x' | center(10**10) }}{% endif %}fine")
    assert template.render(conversation("one")) == "fine"


def test_long_conversations_are_within_the_budget():
    messages = [{"role": "user" if i % 2 == 0 else "assistant", "content": "word " * 2000} for i in range(200)]
    for source in TEMPLATES.values():
        assert len(ChatTemplate(source, TOKENS).render(messages)) > 20_000
    assert len(ChatTemplate(LLAMA3, TOKENS).render(messages)) > 200 * 9_990


def test_the_source_of_a_template_is_bounded(monkeypatch):
    monkeypatch.setattr(chat, "MAX_SOURCE_CHARACTERS", 10)
    with pytest.raises(ChatError, match="at most 10"):
        ChatTemplate("x" * 11).render(conversation("one"))


PIECES = ("{{", "}}", "{%", "%}", "{%-", "for", "in", "messages", "if", "endif", "endfor", "set", "=", "x", "'s'", "|",
          "upper", ".", "role", "(", ")", "range", "9", "*", "~", "[", "]", "macro", "endmacro", "not", "loop", "else")


@given(st.text("{}%-+~*|.[]()'\"ab1 \n", max_size=60) | st.lists(st.sampled_from(PIECES), max_size=20).map(" ".join))
@settings(max_examples=300, deadline=None)
def test_any_template_renders_or_is_one_error(source):
    with contextlib.suppress(ChatError):
        assert isinstance(ChatTemplate(source).render([{"role": "user", "content": "x"}]), str)


# --- from a checkpoint ---------------------------------------------------------------------------------------------

def word_tokenizer() -> Tokenizer:
    raw = tokenizers.Tokenizer(models.BPE({"<s>": 0, "</s>": 1, "<unk>": 2, "<pad>": 3}, []))
    return Tokenizer(raw, frozenset({1}), 0)


def checkpoint(template, **metadata) -> Checkpoint:
    given_template = {} if template is None else {"chat_template": template}
    return Checkpoint("llama", {"eos_token_id": [1, 3]}, {}, {**given_template, **metadata}, source="some-model")


def test_tokens_come_from_the_settings_of_the_checkpoint():
    found = chat_template_of(checkpoint("{{ bos_token }}{{ eos_token }}{{ pad_token }}"), word_tokenizer())
    assert found.render(conversation("one")) == "<s></s>"
    keys = {"tokenizer.ggml.bos_token_id": 2, "tokenizer.ggml.padding_token_id": 3, "tokenizer.ggml.eos_token_id": 99}
    found = chat_template_of(checkpoint("{{ bos_token }}{{ eos_token }}{{ pad_token }}", tokenizer=keys),
                             word_tokenizer())
    assert found.render(conversation("one")) == "<unk><pad>"
    assert chat_template_of(checkpoint("{{ bos_token }}!")).render(conversation("one")) == "!"
    named = {"bos_token": {"content": "<begin>", "lstrip": False}, "eos_token": "<end>", "pad_token": None, "x": 1}
    found = chat_template_of(checkpoint("{{ bos_token }}{{ eos_token }}{{ pad_token }}", tokenizer_config=named),
                             word_tokenizer())
    assert found.render(conversation("one")) == "<begin><end>"


@pytest.mark.parametrize("stored", [
    {"default": "plain", "tool_use": "tools {{ tools | length }}"},
    [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools {{ tools | length }}"}],
])
def test_a_template_for_tools_is_used_when_tools_are_given(stored):
    found = chat_template_of(checkpoint(stored))
    assert found.render(conversation("one")) == "plain"
    assert found.render(conversation("one"), tools=TOOLS) == "tools 1"


@pytest.mark.parametrize("bad", [7, {}, [], {"default": 3}, b"bytes"])
def test_a_template_that_is_no_text_is_refused(bad):
    with pytest.raises(FormatError, match="some-model"):
        chat_template_of(checkpoint(bad))


@pytest.mark.parametrize("absent", [None, "", "  \n"])
def test_a_model_without_a_template_gets_a_plain_one_and_a_notice(absent):
    with collect_notices() as notices:
        found = chat_template_of(checkpoint(absent), word_tokenizer())
    assert [n.kind for n in notices] == ["fallback"]
    assert found.render(conversation("system")) == (
        "<s>Be brief. \n\nUser: 😀 \"quotes\" & {{ braces }}\n\nAssistant: ok\n\nUser: go\n\nAssistant:")
    assert found.render(conversation("one"), add_generation_prompt=False) == "<s>User: Hello\n\n"
