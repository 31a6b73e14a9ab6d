"""Tools in conversations: Qwen's form by hand, the same by Jinja, and what has no form."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.data.conftest import picture
from transformers import PreTrainedTokenizerFast

from cascadevl.data.conversation import TEMPLATES
from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.data.spans import describe
from cascadevl.data.tiling import TilingConfig
from cascadevl.errors import DataError, RequestError

SMALL: dict[str, Any] = {"tiling": TilingConfig(tile_px=28, max_tiles=4), "tokens_per_tile": 4}

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city, in °C.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}

ASKED = [{"role": "user", "content": "How warm is it?"}]
CALLS = [
    *ASKED,
    {
        "role": "assistant",
        "content": "I look.",
        "tool_calls": [
            {"type": "function", "function": {"name": "weather", "arguments": {"city": "Kyōto"}}},
            {"name": "weather", "arguments": '{"city": "Oslo"}'},
        ],
    },
    {"role": "tool", "name": "weather", "content": "21"},
    {"role": "tool", "name": "weather", "content": [{"type": "text", "text": "3"}]},
    {"role": "assistant", "content": "21 and 3."},
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "content": None, "tool_calls": [{"name": "weather", "arguments": {}}]},
    {"role": "tool", "content": "20"},
]

# Written by hand from the form that Qwen2.5 and Qwen3 publish for their models.
BLOCK = f"""# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{json.dumps(WEATHER, ensure_ascii=False)}
</tools>

For each function call, return a json object with function name and arguments within \
<tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""
TALK = """<|im_start|>user
How warm is it?<|im_end|>
<|im_start|>assistant
I look.
<tool_call>
{"name": "weather", "arguments": {"city": "Kyōto"}}
</tool_call>
<tool_call>
{"name": "weather", "arguments": {"city": "Oslo"}}
</tool_call><|im_end|>
<|im_start|>user
<tool_response>
21
</tool_response>
<tool_response>
3
</tool_response><|im_end|>
<|im_start|>assistant
21 and 3.<|im_end|>
<|im_start|>user
And now?<|im_end|>
<|im_start|>assistant
<tool_call>
{"name": "weather", "arguments": {}}
</tool_call><|im_end|>
<|im_start|>user
<tool_response>
20
</tool_response><|im_end|>
"""


@pytest.fixture(scope="module")
def processor(tokenizer: PreTrainedTokenizerFast) -> CascadeVLProcessor:
    return CascadeVLProcessor(tokenizer, system_message="", **SMALL)


def test_tools_calls_and_results_are_written_as_qwen_does(processor: CascadeVLProcessor) -> None:
    written = processor.apply_chat_template(CALLS, tools=[WEATHER], add_generation_prompt=True)
    system = f"<|im_start|>system\n{BLOCK}<|im_end|>\n"
    assert written == system + TALK + "<|im_start|>assistant\n"


@pytest.mark.parametrize("given", ["", "Be brief.", None])
@pytest.mark.parametrize("own_system", [False, True])
@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_plain_transformers_writes_the_same_with_our_template(
    tokenizer: PreTrainedTokenizerFast,
    given: str | None,
    own_system: bool,
    add_generation_prompt: bool,
) -> None:
    ours = CascadeVLProcessor(tokenizer, system_message=given, **SMALL)
    parts = [{"type": "text", "text": "Say "}, {"type": "text", "text": "little."}]
    talk = [*([{"role": "system", "content": parts}] if own_system else []), *CALLS]
    options = {"tools": [WEATHER, WEATHER], "add_generation_prompt": add_generation_prompt}
    written = ours.apply_chat_template(talk, **options)
    assert written == tokenizer.apply_chat_template(
        talk, chat_template=ours.chat_template, tokenize=False, **options
    )
    before = TEMPLATES["internvl2_5"].system if given is None else given
    before = "Say little." if own_system else before
    gap = "\n\n" if before else ""
    assert written.startswith(f"<|im_start|>system\n{before}{gap}# Tools\n")
    assert written.count("<|im_start|>system") == 1


def test_tokens_are_those_of_the_text_and_a_result_may_show_a_picture(
    processor: CascadeVLProcessor,
) -> None:
    item = {"type": "image", "image": picture(28, 28)}
    talk = [*CALLS[:2], {"role": "tool", "content": [item, {"type": "text", "text": "a dog"}]}]
    example = processor.prompt(talk, tools=[WEATHER])
    text = "".join(span.text for span in describe(example, processor.tokenizer))
    written = processor.apply_chat_template(talk, tools=[WEATHER], add_generation_prompt=True)
    assert text.replace("<img>", "").replace("</img>", "") == written
    assert "<tool_response>\n<IMG_CONTEXT>\na dog\n</tool_response>" in written
    assert example.num_tiles == 1


def test_a_function_is_described_by_its_types_and_docstring(processor: CascadeVLProcessor) -> None:
    def add(first: int, second: int) -> int:
        """Add two numbers.

        Args:
            first: One number.
            second: The other.
        """
        return first + second

    written = processor.apply_chat_template(ASKED, tools=[add])
    (line,) = [line for line in written.splitlines() if line.startswith('{"type"')]
    described = json.loads(line)["function"]
    assert (described["name"], described["description"]) == ("add", "Add two numbers.")
    assert described["parameters"]["properties"]["second"] == {
        "type": "integer",
        "description": "The other.",
    }


def test_thinking_and_tools_go_together(processor: CascadeVLProcessor) -> None:
    written = processor.apply_chat_template(
        ASKED, tools=[WEATHER], thinking=True, force_thinking=True, add_generation_prompt=True
    )
    assert "rigorously" in written.split("# Tools")[0]
    assert written.endswith("<|im_start|>assistant\n<think>\n")


def test_without_tools_nothing_changes(processor: CascadeVLProcessor) -> None:
    plain = processor.apply_chat_template(ASKED)
    assert processor.apply_chat_template(ASKED, tools=None) == plain
    assert processor.apply_chat_template(ASKED, tools=[]) == plain


def test_what_has_no_form_is_refused(
    processor: CascadeVLProcessor, gpt_oss_tokenizer: PreTrainedTokenizerFast
) -> None:
    gpt_oss = CascadeVLProcessor(gpt_oss_tokenizer, template="internvl3_5_gpt_oss", **SMALL)
    with pytest.raises(RequestError, match="cannot be written in the template 'internvl3_5_gpt"):
        gpt_oss.apply_chat_template(ASKED, tools=[WEATHER])
    with pytest.raises(RequestError, match="a tool is 'weather'; give a JSON schema"):
        processor.apply_chat_template(ASKED, tools=["weather"])
    with pytest.raises(DataError, match="message 2 calls a tool, but no tools are given"):
        processor.apply_chat_template(CALLS)
    for calls in ([{"arguments": {}}], [3], {"name": "weather"}):
        with pytest.raises(DataError, match=r"message 1 has the calls?"):
            processor.apply_chat_template(
                [{"role": "assistant", "content": "", "tool_calls": calls}], tools=[WEATHER]
            )
