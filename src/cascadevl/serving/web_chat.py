"""The web chat: a page that asks a server about pictures, and shows what became of them.

Needs the extra ``web``. Answers and file names are shown as text, never as HTML: a model may write
anything, and pictures may be named so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from cascadevl.errors import CascadeVLError
from cascadevl.serving.web_client import About, Answer, Turn, WebClient
from cascadevl.serving.web_display import (
    as_text,
    candidates_as_html,
    display,
    empty,
    facts_of,
    question_of,
)
from cascadevl.serving.web_tiles import paint

_THINKING = {"as the model likes": None, "on": True, "off": False}
_CSS = """
.candidate {margin: 0.6em 0; padding: 0.6em; border: 1px solid #8884; border-radius: 6px}
button[title="Share"] {display: none}
"""
"""The second line takes away a button by which a picture would be published."""


@dataclass(frozen=True, slots=True)
class WebChat:
    """The functions behind the page.

    Attributes:
        client: Asks the server.
        about: What is served.
    """

    client: WebClient
    about: About

    def ask(
        self,
        said: Mapping[str, Any],
        turns: list[Turn],
        thinking: str,
        temperature: float,
        max_tokens: float,
        budget: str | None,
    ) -> Iterator[tuple[Any, ...]]:
        """Answer what was said; conversation, text box, turns, paintings and facts each time."""
        question = question_of(said)
        if question is None:
            yield display(turns), said, turns, gr.skip(), gr.skip()
            return
        asked = [*turns, question]
        wishes = self._wishes(thinking, temperature, max_tokens, budget)
        answer = Answer()
        yield display(asked), empty(), asked, [], ""
        try:
            for answer in self.client.stream(asked, wishes):
                yield display(asked, answer), gr.skip(), gr.skip(), gr.skip(), gr.skip()
        except CascadeVLError as error:
            gr.Warning(str(error))
            yield display(turns), dict(said), turns, gr.skip(), gr.skip()
            return
        reply = Turn(text=answer.text, reasoning=answer.reasoning, is_answer=True)
        whole = [*asked, reply]
        yield display(whole), gr.skip(), whole, *self._taken(whole, answer)

    def _taken(self, turns: Sequence[Turn], answer: Answer) -> tuple[Any, str]:
        """Paintings of the conversation's pictures, and what the answer took."""
        abilities = self.about.abilities
        files = [file for turn in turns for file in turn.files]
        tokens = answer.usage["prompt_tokens_details"]["tokens_per_tile"]
        facts = facts_of(answer.usage, answer.seconds, abilities["tokens_per_tile"])
        return paint(files, tokens, abilities), facts

    def best(
        self, said: Mapping[str, Any], number: float, select: str, thinking: str, max_tokens: float
    ) -> str:
        """Several answers with their scores."""
        question = question_of(said)
        if question is None:
            return "<p>Ask something first.</p>"
        wishes = {**self._wishes(thinking, 0.7, max_tokens, ""), "select": select}
        try:
            return candidates_as_html(self.client.best([question], wishes, int(number)))
        except CascadeVLError as error:
            raise gr.Error(str(error)) from error

    def _wishes(
        self, thinking: str, temperature: float, max_tokens: float, budget: str | None
    ) -> dict[str, object]:
        return {
            "model": self.about.name,
            "thinking": _THINKING[thinking],
            "temperature": float(temperature),
            "max_tokens": int(max_tokens),
            "visual_budget": (budget or "").strip() or None,
        }


def build(chat: WebChat) -> gr.Blocks:
    """The page.

    Args:
        chat: The functions behind it.
    """
    abilities = chat.about.abilities
    title = f"{chat.about.name} - cascadevl"
    with gr.Blocks(title=title, fill_height=True, analytics_enabled=False) as page:
        turns = gr.State([])
        gr.Markdown(f"### {as_text(chat.about.name)}")
        with gr.Accordion("Wishes", open=False), gr.Row():
            thinking = gr.Dropdown(list(_THINKING), value="as the model likes", label="Thinking")
            temperature = gr.Slider(0, 2, 0, step=0.1, label="Temperature")
            max_tokens = gr.Slider(1, 8192, 512, step=1, label="Most tokens of an answer")
            budget = gr.Textbox(
                label="Visual budget",
                placeholder="50%, full, compressed, threshold=0.4",
                visible=bool(abilities["routes"]),
            )
        with gr.Tab("Chat"):
            talk = gr.Chatbot(
                show_label=False,
                elem_id="talk",
                buttons=["copy"],
                allow_tags=False,
                allow_file_downloads=False,
                height=480,
            )
            said = _text_box("Ask, and drop pictures here", "said")
            anew = gr.Button("New conversation", size="sm")
        with gr.Tab("Tiles"):
            gr.Markdown("Blue tiles keep all their visual tokens, orange ones are compressed.")
            with gr.Row():
                with gr.Column(scale=3):
                    paintings = gr.Gallery(
                        show_label=False, preview=True, height=460, buttons=["fullscreen"]
                    )
                with gr.Column(scale=2):
                    facts = gr.Markdown(elem_id="facts")
        with gr.Tab("Best of N"):
            question = _text_box("Ask once, and get several answers", "question")
            with gr.Row():
                number = gr.Slider(2, 16, 4, step=1, label="N")
                selects = list(abilities["selects"])
                select = gr.Dropdown(selects, value=selects[0], label="Chosen by")
            found = gr.HTML(elem_id="candidates")
        wishes = [thinking, temperature, max_tokens, budget]
        outputs = [talk, said, turns, paintings, facts]
        said.submit(chat.ask, [said, turns, *wishes], outputs, api_visibility="private")
        for forget in (anew.click, talk.clear):
            forget(lambda: ([], empty(), [], [], ""), None, outputs, api_visibility="private")
        question.submit(
            chat.best,
            [question, number, select, thinking, max_tokens],
            found,
            api_visibility="private",
        )
    return page


def _text_box(placeholder: str, name: str) -> gr.MultimodalTextbox:
    return gr.MultimodalTextbox(
        placeholder=placeholder,
        elem_id=name,
        file_types=["image"],
        file_count="multiple",
        sources=["upload"],
        show_label=False,
        max_plain_text_length=100_000,
    )


def launch(chat: WebChat, *, host: str, port: int | None, max_file: str) -> tuple[gr.Blocks, str]:
    """Show the page to whoever comes.

    Args:
        chat: The functions behind it.
        host: Address to listen at.
        port: Port to listen at; None for any that is free.
        max_file: Largest file that is taken, as ``20mb``.

    Returns:
        The page, which runs until it is closed, and its address.
    """
    page = build(chat)
    plain = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        max_file_size=max_file,
        footer_links=[],
        ssr_mode=False,
        theme=plain,
        css=_CSS,
    )
    return page, address
