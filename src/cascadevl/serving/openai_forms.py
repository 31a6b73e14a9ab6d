"""What form an answer must have: that of a call of a tool, or of a JSON schema."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from cascadevl.errors import RequestError
from cascadevl.serving.openai_schema import (
    ChatRequest,
    JsonObjectFormat,
    JsonSchemaFormat,
    NamedTool,
    Tool,
)


def tool_shown(tool: Tool) -> dict[str, object]:
    """A tool as prompts show it, without what was not given.

    Args:
        tool: The tool.
    """
    given = tool.function
    function: dict[str, object] = {"name": given.name}
    if given.description is not None:
        function["description"] = given.description
    if given.parameters is not None:
        function["parameters"] = given.parameters
    return {"type": "function", "function": function}


def must_call(body: ChatRequest) -> bool:
    """Whether the whole answer is to be a call.

    Args:
        body: The request.
    """
    return isinstance(body.tool_choice, NamedTool) or body.tool_choice == "required"


def answer_schema(body: ChatRequest) -> str | None:
    """The JSON schema that an answer must follow, if any.

    Args:
        body: The request.

    Raises:
        RequestError: If wishes exclude each other, or name a tool that is not there.
    """
    format_ = body.response_format
    wanted: dict[str, Any] | None = None
    if isinstance(format_, JsonObjectFormat):
        wanted = {"type": "object"}
    elif isinstance(format_, JsonSchemaFormat):
        wanted = format_.json_schema.schema_
    if not must_call(body):
        if body.tool_choice == "auto" and not body.tools:
            raise RequestError("tool_choice is given, but no tools are; name them in tools")
        return None if wanted is None else json.dumps(wanted)
    if wanted is not None:
        raise RequestError("tool_choice asks for a call and response_format for JSON; choose one")
    return json.dumps(_call_schema(_wanted_tools(body)))


def _wanted_tools(body: ChatRequest) -> list[Tool]:
    tools = body.tools or []
    if isinstance(body.tool_choice, NamedTool):
        name = body.tool_choice.function.name
        tools = [tool for tool in tools if tool.function.name == name]
        if not tools:
            raise RequestError(f"tool_choice names {name!r}, which is none of the tools")
    if not tools:
        raise RequestError("tool_choice asks for a call, but no tools are given")
    return tools


@dataclass(slots=True)
class _Definitions:
    """Definitions of the schemas of several tools, which stand at the root together."""

    found: dict[str, Any] = field(default_factory=dict)

    def take(self, tool: Tool) -> Any:
        """Parameters of a tool without their definitions, which are kept."""
        parameters = dict(tool.function.parameters or {"type": "object"})
        for key in ("$defs", "definitions"):
            mine = parameters.pop(key, None)
            if not isinstance(mine, dict):
                continue
            ours = self.found.setdefault(key, {})
            assert isinstance(ours, dict)
            for name, schema in mine.items():
                if ours.setdefault(name, schema) != schema:
                    raise RequestError(
                        f"two tools define {name!r} differently, and a call may be of either; "
                        f"rename one, or name the tool in tool_choice"
                    )
        return parameters


def _call_schema(tools: Sequence[Tool]) -> dict[str, Any]:
    """The schema of a call of one of the tools."""
    definitions = _Definitions()
    calls: list[Any] = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool.function.name},
                "arguments": definitions.take(tool),
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    return {"anyOf": calls, **definitions.found}
