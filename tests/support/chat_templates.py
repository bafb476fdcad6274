"""Chat templates in small, each with what a family's real one takes of Jinja; and conversations."""

from hypothesis import strategies as st

TEMPLATES = {
    "chatml": (
        "{%- for m in messages %}\n"
        "    {{- '<|im_start|>' + m.role + '\\n' + m.content | trim + '<|im_end|>\\n' }}\n"
        "{%- endfor %}\n"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "llama 2": (
        "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
        "{% set system = messages[0]['content'] %}{% else %}{% set rest = messages %}"
        "{% set system = false %}{% endif %}{% for m in rest %}"
        "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate, user first') }}{% endif %}"
        "{% if loop.index0 == 0 and system %}{% set text = '<<SYS>>' + system + '<</SYS>>' "
        "+ m['content'] %}{% else %}{% set text = m['content'] %}{% endif %}"
        "{% if m['role'] == 'user' %}{{ bos_token ~ '[INST] ' ~ text.strip() ~ ' [/INST]' }}"
        "{% else %}{{ ' ' ~ text.strip() ~ ' ' ~ eos_token }}{% endif %}{% endfor %}"
    ),
    "llama 3.1": (
        "{{- bos_token }}\n{%- if not date_string is defined %}\n"
        "    {%- set date_string = strftime_now('%B %Y') %}\n{%- endif %}\n"
        "{{- 'Today: ' + date_string + '\\n' }}\n"
        "{%- if tools is not none %}\n    {%- for t in tools %}\n"
        '        {{- t | tojson(indent=4) }}\n        {{- "\\n\\n" }}\n    {%- endfor %}\n'
        "{%- endif %}\n{%- for m in messages %}\n"
        "    {%- if m.tool_calls is defined and m.tool_calls %}\n"
        "        {%- if not m.tool_calls | length == 1 %}\n"
        "            {{- raise_exception('one call at once') }}\n        {%- endif %}\n"
        "        {%- set call = m.tool_calls[0].function %}\n"
        "        {{- '{\"name\": \"' + call.name + '\", ' }}\n"
        "        {{- '\"parameters\": ' }}\n        {{- call.arguments | tojson }}\n"
        "        {{- '}<|eom_id|>' }}\n"
        "    {%- elif m.role == 'tool' or m.role == 'ipython' %}\n"
        "        {%- if m.content is mapping or m.content is iterable %}\n"
        "            {{- m.content | tojson }}\n        {%- else %}\n"
        "            {{- m.content }}\n        {%- endif %}\n    {%- else %}\n"
        "        {{- '<|' + m.role + '|>' + m['content'] | trim + '<|eot_id|>' }}\n"
        "    {%- endif %}\n{%- endfor %}\n{%- if add_generation_prompt %}{{- '<|assistant|>' }}"
        "{%- endif %}"
    ),
    "mistral": (
        "{%- set ns = namespace(index=0, ids=[]) %}{%- for m in messages %}"
        "{%- if m.role == 'user' %}{%- set ns.index = ns.index + 1 %}"
        "{{- '[INST]' ~ ns.index ~ m.content }}{%- elif m.role == 'assistant' %}"
        "{%- if m.content %}{{- m.content }}{%- endif %}"
        "{%- for call in m.tool_calls or [] %}"
        "{%- if call.id is not defined or call.id | length < 3 %}"
        "{{- raise_exception('ids have 3 letters or more') }}{%- endif %}"
        "{{- call.function.arguments | string | replace('\"', '') }}{{- call | tojson }}"
        "{%- endfor %}{{- eos_token }}{%- else %}{%- continue %}{%- endif %}{%- endfor %}"
    ),
    "hermes": (
        "{%- macro kind(of) %}{%- if of is string %}str{%- elif of is mapping %}"
        "{{- 'dict[' + of.keys() | list | sort | join(',') + ']' }}{%- elif of is sequence %}"
        "{{- 'list' }}{%- else %}{{- of }}{%- endif %}{%- endmacro %}"
        "{%- for tool in tools or [] %}{%- if tool.function is defined %}"
        "{%- set tool = tool.function %}{%- endif %}"
        '{{- \'{"type": "function", "function": \' }}{{- tool | tojson }}'
        "{{- kind(tool.parameters) }}{%- for name, p in (tool.parameters or {}).items() %}"
        "{{- name ~ ': ' ~ kind(p) }}{%- endfor %}{%- endfor %}"
        "{%- for m in messages %}{{- m.role ~ '\\n' ~ m.content ~ '\\n' }}"
        "{%- for call in m.tool_calls | default([]) %}<tool_call>\n"
        "{{- dict(name=call.function.name, arguments=call.function.arguments) | tojson }}"
        "\n</tool_call>{%- endfor %}"
        "{%- if not loop.last and loop.nextitem.role != m.role %}{{- '<|end|>' }}{%- endif %}"
        "{%- endfor %}"
    ),
    "qwen 3": (
        "{%- set ns = namespace(last=messages | length - 1, seeks=true) %}"
        "{%- for m in messages[::-1] %}{%- set index = (messages | length - 1) - loop.index0 %}"
        "{%- if ns.seeks and m.role == 'user' and not (m.content.startswith('<tool')"
        " and m.content.endswith('>')) %}{%- set ns.seeks = false %}{%- set ns.last = index %}"
        "{%- endif %}{%- endfor %}{%- for m in messages %}"
        "{%- set thought = '' %}{%- set said = m.content %}"
        "{%- if m.reasoning_content is string %}{%- set thought = m.reasoning_content %}"
        "{%- elif '</think>' in said %}"
        "{%- set thought = said.split('</think>')[0].rstrip('\\n').split('<think>')[-1] %}"
        "{%- set said = said.split('</think>')[-1].lstrip('\\n') %}{%- endif %}"
        "{%- if loop.index0 > ns.last and thought %}{{- '<think>' + thought + '</think>' }}"
        "{%- endif %}{{- said }}{%- endfor %}{%- if enable_thinking is defined and "
        "enable_thinking is false %}{{- '<think></think>' }}{%- endif %}"
    ),
    "generation": (
        "{% for m in messages %}\n    {% if m['role'] == 'assistant' %}\n"
        "        {% generation %}{% set said = m['content'] %}{{ said }}<|end|>\n"
        "        {% endgeneration %}\n    {% else %}\n{{ m['content'] }}\n"
        "        {% if m['content'] == 'stop' %}{% break %}{% endif %}\n    {% endif %}\n"
        "{% endfor %}\n"
    ),
    "gpt-oss": (
        "{%- for m in messages %}{%- if 'thinking' in m %}"
        "{{- '<|analysis|>' + m.thinking }}{%- endif %}{{- m.content }}"
        "{%- if 'name' in m %}{{- m['name'] | tojson(separators=(',', ':'), sort_keys=true) }}"
        "{%- endif %}{%- endfor %}{{- 'Reasoning: ' + (reasoning_effort | default('medium')) }}"
    ),
    "gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}{{ '<start>' + m['role'] + '\\n' + m['content'] | trim }}"
        "{% endfor %}"
    ),
    "documents": (
        "{% for d in documents %}{{ d.title ~ ': ' ~ d['text'] }}{% else %}none{% endfor %}"
        "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | list }}"
        "{{ messages | map(attribute='content') | join('|') | upper }}"
    ),
    "of nothing": "{{ missing }}{{ eos_token }}{{ dict.fromkeys(['a', 'b'], 1) }}",
}

_letters = st.text(st.sampled_from("ab <>&'\"\\\n\t{}%\u00e9\u4e2d\U0001f389"), max_size=12)
_content = st.one_of(
    _letters, st.sampled_from(["stop", "<tool_response>x>", "<think>\na\n</think>\n\nb", " a "])
)
_json = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-9, 9), st.just(0.5), _letters),
    lambda inner: st.one_of(
        st.lists(inner, max_size=2), st.dictionaries(st.sampled_from("abc"), inner, max_size=2)
    ),
    max_leaves=4,
)
_object = st.dictionaries(st.sampled_from(["a", "b", "type"]), _json, max_size=2)
_call = st.fixed_dictionaries(
    {"type": st.just("function"),
     "function": st.fixed_dictionaries({"name": st.just("look"), "arguments": _object})},
    optional={"id": st.sampled_from(["1", "call_1"])},
)  # fmt: skip
_message = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool"]), "content": _content},
    optional={
        "tool_calls": st.lists(_call, min_size=1, max_size=2),
        "name": _letters,
        "reasoning_content": st.one_of(st.none(), _letters),
        "reasoning": _letters,
        "thinking": _letters,
    },
)
CONVERSATIONS = st.lists(_message, min_size=1, max_size=4)
_tool = st.fixed_dictionaries(
    {"type": st.just("function"),
     "function": st.fixed_dictionaries({"name": _letters}, optional={"parameters": _object})},
)  # fmt: skip
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "tools": st.lists(_tool, max_size=2),
        "documents": st.lists(
            st.fixed_dictionaries({"title": _letters, "text": _letters}), max_size=2
        ),
        "add_generation_prompt": st.booleans(),
        "continue_final_message": st.booleans(),
        "enable_thinking": st.booleans(),
        "reasoning_effort": st.just("low"),
        "date_string": st.just("today"),
        "bos_token": st.just("<given>"),
    },
).filter(lambda one: not (one.get("continue_final_message") and one.get("add_generation_prompt")))
