"""What is on the page, and what happens on a click."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import closing
from functools import wraps
from pathlib import Path
from typing import Any

from eagle_moe.web.desk import Desk
from eagle_moe.web.pictures import Example
from eagle_moe.web.talk import Talk

TITLE = "Ask about images"
WAITING = 32
"""Questions that may wait for the model; whoever comes later is told that the queue is full."""
FORGET = 3600
"""Seconds after which the conversation of a visitor who went away is forgotten."""
CLEAN = (600, 24 * 3600)
"""Seconds: look for uploaded files this often, and delete those that are older than that."""
UNBOUNDED = 10**9
"""Characters that may be pasted into the question: the limits are told by an error, which is better
than a text that silently becomes a file."""
BUSY: dict[str, Any] = {"submit_btn": False, "stop_btn": True}
IDLE: dict[str, Any] = {"submit_btn": True, "stop_btn": False}
"""Of the question's box, while the model writes and while it does not."""
LABELS = """() => {
  document.querySelector('#question textarea').setAttribute('aria-label', 'Question');
  const name = (image) => { image.alt = decodeURIComponent(image.src.split('/').pop()); };
  const chat = document.querySelector('#chat');
  new MutationObserver(() => chat.querySelectorAll('.user img[alt=""]').forEach(name))
    .observe(chat, {childList: true, subtree: true, attributeFilter: ['src', 'alt']});
}"""
"""For screen readers: gradio leaves the box without a label, and images without words."""
CSS = Path(__file__).with_name("page.css")


def build_page(desk: Desk, examples: Sequence[Example]) -> Any:
    """The page as `gradio.Blocks`, with its queue."""
    import gradio as gr

    actions = Actions(desk, examples)
    pick = told(actions.pick)
    pick.__annotations__ = {"event": gr.SelectData}  # how gradio knows what to hand in
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=CLEAN) as page:
        gr.HTML(f"<h1>{TITLE}</h1><p class='faint'>{desk.description}</p>", padding=False)
        talk = gr.State(time_to_live=FORGET)
        with gr.Row(elem_id="columns"):
            with gr.Column(scale=3, min_width=320):
                chat = _chat(examples)
                question = _question()
                with gr.Row():
                    again = gr.Button("Ask again", elem_id="again", min_width=120)
                    fresh = gr.Button("New conversation", elem_id="fresh", min_width=120)
            with gr.Column(scale=2, min_width=320):
                experts = gr.CheckboxGroup(
                    desk.experts,
                    value=desk.experts,
                    label="Experts",
                    info="Switch some off and ask, or ask again: the answer without them appears "
                    "beside the answer of all.",
                    elem_id="experts",
                )
                gr.HTML(f"<p class='faint'>{desk.silencing}</p>", padding=False)
                weigh = gr.Button("What did each expert add?", elem_id="weigh")
                added = gr.HTML(elem_id="added", padding=False)
        model: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model"}
        shown = [chat, talk, question]
        asking = [
            question.submit(
                told(actions.ask), [question, experts, talk], shown, api_name="ask", **model
            ),
            chat.example_select(pick, [experts, talk], shown, api_visibility="private", **model),
            again.click(told(actions.again), [experts, talk], shown, api_name="again", **model),
        ]
        weighing = weigh.click(told(actions.weigh), [talk], [added], api_name="weigh", **model)
        question.stop(
            actions.stop, None, [question], cancels=asking, queue=False, api_visibility="private"
        )
        gr.on(
            [fresh.click, chat.clear],
            actions.forget,
            None,
            [*shown, added],
            cancels=[*asking, weighing],
            queue=False,
            api_name="forget",
        )
        page.load(None, js=LABELS)
    return page.queue(max_size=WAITING, default_concurrency_limit=1)


def make_theme() -> Any:
    """Plain, in the fonts of the visitor's machine: gradio's own come from elsewhere."""
    import gradio as gr

    return gr.themes.Soft(
        primary_hue="blue",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )


def _chat(examples: Sequence[Example]) -> Any:
    import gradio as gr

    return gr.Chatbot(
        label="Conversation",
        show_label=False,
        height="60vh",
        min_height=320,
        placeholder="Drop an image below and ask about it, or try one of these.",
        examples=[
            {"icon": str(example.image), "text": example.question, "display_text": example.question}
            for example in examples
        ],
        buttons=["copy"],
        allow_file_downloads=False,
        feedback_options=None,
        elem_id="chat",
    )


def _question() -> Any:
    import gradio as gr

    question: Any = gr.MultimodalTextbox(
        label="Question",
        placeholder="Drop or paste images, type a question; Enter sends",
        file_types=["image"],
        file_count="multiple",
        max_plain_text_length=UNBOUNDED,
        autofocus=True,
        elem_id="question",
    )
    keep = question.async_move_resource_to_block_cache

    async def keep_uploaded(file: str | Path | None) -> str | None:
        if str(file).startswith(("http:", "https:")):  # gradio would fetch it, from this machine
            raise gr.Error("Upload images: addresses are not opened.", print_exception=False)
        kept: str | None = await keep(file)
        return kept

    question.async_move_resource_to_block_cache = keep_uploaded
    return question


class Actions:
    """What the buttons do. Each visitor's `Talk` is kept by gradio and handed in and out."""

    def __init__(self, desk: Desk, examples: Sequence[Example]) -> None:
        self.desk, self.examples = desk, examples

    def ask(self, question: Any, on: Sequence[str], talk: Talk | None) -> Iterator[Any]:
        """Answer what is in the question's box; give it back if it cannot be answered."""
        talk = talk or Talk(self.desk)
        files = [Path(file) for file in question["files"]]
        pieces = talk.ask(question["text"], files, self._off(on))
        return self._show(talk, pieces, question)

    def pick(self, event: Any, on: Sequence[str], talk: Talk | None) -> Iterator[Any]:
        """Ask the example that was clicked."""
        talk = talk or Talk(self.desk)
        example = self.examples[event.index]
        pieces = talk.ask(example.question, [example.image], self._off(on))
        return self._show(talk, pieces, None)

    def again(self, on: Sequence[str], talk: Talk | None) -> Iterator[Any]:
        """Answer the last question again, without the experts that are off."""
        talk = talk or Talk(self.desk)
        return self._show(talk, talk.again(self._off(on)), None)

    def weigh(self, talk: Talk | None) -> Iterator[str]:
        """What each expert added to the last answer, as HTML."""
        talk = talk or Talk(self.desk)
        yield talk.added()

    def stop(self) -> Any:
        """The answer is stopped by gradio, and the next question can be asked."""
        import gradio as gr

        return gr.update(**IDLE)

    def forget(self) -> Any:
        """Begin anew."""
        import gradio as gr

        return [], None, gr.update(value=None, **IDLE), ""

    def _show(self, talk: Talk, pieces: Generator[None], restored: Any) -> Iterator[Any]:
        """The conversation after every piece. The question's box is emptied with the first, and
        holds `restored` if there is a mistake in it."""
        import gradio as gr

        box = gr.update(value=None, **BUSY)
        with closing(pieces):
            try:
                for _ in pieces:
                    yield bubbles(talk), talk, box
                    box = gr.skip()
            except ValueError:
                yield bubbles(talk), talk, gr.update(value=restored, **IDLE)
                raise
        yield bubbles(talk), talk, gr.update(**IDLE)

    def _off(self, on: Sequence[str]) -> set[str]:
        return set(self.desk.experts) - set(on)


def bubbles(talk: Talk) -> list[dict[str, Any]]:
    """The conversation as gradio shows it: answers to one question side by side."""
    shown: list[dict[str, Any]] = []
    for turn in talk.turns:
        images = [{"path": str(one.thumbnail), "alt_text": one.name} for one in turn.images]
        shown.append({"role": "user", "content": [*images, turn.question]})
        for silenced, answer in turn.answers.items():
            text = answer.strip() or "…"
            if len(turn.answers) > 1:
                text = f"**{seeing(talk.desk.experts, silenced)}**\n\n{text}"
            shown.append({"role": "assistant", "content": text})
    return shown


def seeing(experts: Sequence[str], silenced: Collection[str]) -> str:
    """Whose answer it is, in words."""
    on = [name for name in experts if name not in silenced]
    off = [name for name in experts if name in silenced]
    if not on or not off:
        return "every expert" if on else "no expert"
    return f"without {' and '.join(off)}" if len(off) <= len(on) else f"only {' and '.join(on)}"


def told(action: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """A person's mistake, a `ValueError`, becomes a message on the page; the server goes on."""
    import gradio as gr

    @wraps(action)
    def run(*arguments: Any) -> Iterator[Any]:
        try:
            yield from action(*arguments)
        except ValueError as error:
            raise gr.Error(str(error), title="Not answered", print_exception=False) from None

    return run
