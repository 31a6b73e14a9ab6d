"""Tools in a conversation, written as the chat templates of Qwen2.5 and Qwen3 write them.

The released InternVL templates say nothing of tools; their language models were trained with this
form, which agents and servers expect. The tools stand at the end of the system message, a call
in the assistant's turn and its result in a user turn. GPT-OSS has another form, which is not
written here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

from transformers.utils.chat_template_utils import get_json_schema

from cascadevl.data.conversation import Template
from cascadevl.errors import DataError, RequestError
from cascadevl.types import Message, Part

Tools: TypeAlias = Sequence[object]
"""JSON schemas of functions as mappings, or functions with type hints and a docstring."""

BEFORE = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
AFTER = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments "
    "within <tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)


def has_tools(template: Template) -> bool:
    """Whether tools can be written in a template: in those of the Qwen family."""
    return template.around["user"][0] == "<|im_start|>user\n"


def with_tools(
    messages: Sequence[Message], tools: Tools, template: Template, system: str
) -> tuple[Message, ...]:
    """The same conversation with its tools in the system message.

    Args:
        messages: The turns; results of tools have the role ``tool``.
        tools: What may be called.
        template: The conversation template.
        system: System message where the first turn is none; empty for none.

    Raises:
        RequestError: If the template has no form for tools, or a tool is no function.
    """
    if not has_tools(template):
        raise RequestError(
            f"tools cannot be written in the template {template.name!r}; they can in those of the "
            f"Qwen family, such as 'internvl2_5'"
        )
    before: tuple[Part, ...] = (system,) if system else ()
    if messages and messages[0].role == "system":
        before, messages = messages[0].parts, messages[1:]
    listed = "".join("\n" + _as_json(_schema(tool)) for tool in tools)
    gap = ("\n\n",) if before else ()
    first = Message("system", (*before, *gap, BEFORE + listed + AFTER))
    return first, *_results_as_user(messages)


def _schema(tool: object) -> object:
    if isinstance(tool, Mapping):
        return dict(tool)
    if callable(tool):
        return get_json_schema(tool)
    raise RequestError(f"a tool is {tool!r:.60}; give a JSON schema, or a function")


def _results_as_user(messages: Sequence[Message]) -> list[Message]:
    """Results of tools as user turns, those that follow each other in one."""
    written: list[Message] = []
    previous = ""
    for message in messages:
        if message.role == "tool":
            parts = ("<tool_response>\n", *message.parts, "\n</tool_response>")
            if previous == "tool":
                parts = (*written.pop().parts, "\n", *parts)
            written.append(Message("user", parts))
        else:
            written.append(message)
        previous = message.role
    return written


def calls_as_text(turn: Mapping[str, object], place: str) -> str:
    """The calls of an assistant's turn, as they stand behind what it says.

    Args:
        turn: With ``tool_calls`` as in transformers and HTTP APIs.
        place: Named in errors.

    Raises:
        DataError: Of kind ``message``, if a call has another form.
    """
    calls = turn.get("tool_calls") or ()
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise _error(f"{place} has the calls {calls!r:.60}")
    return "\n".join(_call(call, place) for call in calls)


def _call(call: object, place: str) -> str:
    if isinstance(call, Mapping) and isinstance(call.get("function"), Mapping):
        call = call["function"]
    if not isinstance(call, Mapping) or not isinstance(call.get("name"), str):
        raise _error(f"{place} has the call {call!r:.60}")
    arguments = call.get("arguments", {})
    text = arguments if isinstance(arguments, str) else _as_json(arguments)
    return f'<tool_call>\n{{"name": "{call["name"]}", "arguments": {text}}}\n</tool_call>'


def _error(problem: str) -> DataError:
    remedy = 'write {"name": ..., "arguments": {...}} for each call'
    return DataError(problem, kind="message", remedy=remedy)


def _as_json(value: object) -> str:
    """JSON as transformers' templates write it."""
    return json.dumps(value, ensure_ascii=False)


_JINJA_CALLS = (
    "{% for item in message['tool_calls'] or [] %}"
    "{% set call = item['function'] or item %}"
    "{% if message['content'] or not loop.first %}{{ '\\n' }}{% endif %}"
    "{{ '<tool_call>\\n{\"name\": \"' + call['name'] + '\", \"arguments\": ' }}"
    "{{ call['arguments'] if call['arguments'] is string else call['arguments'] | tojson }}"
    "{{ '}\\n</tool_call>' }}{% endfor %}"
)


def tools_jinja(content: str, text: Callable[[str], str], system: str) -> str:
    """The part of a Jinja template that is used where tools are given.

    Args:
        content: Writes the content of the variable ``message``.
        text: Writes a string as a Jinja expression.
        system: System message where the first turn is none; empty for none.
    """
    default = f"{{% else %}}{text(system + chr(10) * 2)}" if system else ""
    result = (
        "{% if loop.first or messages[loop.index0 - 1]['role'] != 'tool' %}"
        + text("<|im_start|>user")
        + "{% endif %}"
        + text("\n<tool_response>\n")
        + content
        + text("\n</tool_response>")
        + "{% if loop.last or messages[loop.index0 + 1]['role'] != 'tool' %}"
        + text("<|im_end|>\n")
        + "{% endif %}"
    )
    return (
        text("<|im_start|>system\n")
        + "{% if messages[0]['role'] == 'system' %}{% set message = messages[0] %}"
        + content
        + text("\n\n")
        + default
        + "{% endif %}"
        + text(BEFORE)
        + "{% for tool in tools %}{{ '\\n' }}{{ tool | tojson }}{% endfor %}"
        + text(AFTER + "<|im_end|>\n")
        + "{% for message in messages %}"
        + "{% if message['role'] == 'tool' %}"
        + result
        + "{% elif not loop.first or message['role'] != 'system' %}"
        + "{{ '<|im_start|>' + message['role'] + '\\n' }}"
        + content
        + _JINJA_CALLS
        + text("<|im_end|>\n")
        + "{% endif %}{% endfor %}{% if add_generation_prompt %}"
        + text("<|im_start|>assistant\n")
        + "{% endif %}"
    )
