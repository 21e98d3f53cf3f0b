"""The demo's page: inputs that the model takes, its pictures with their time, the teacher's beside them."""

import itertools
from pathlib import Path
from typing import Any

from fastgen.cli.demo_model import DemoModel, Request, save
from fastgen.core.errors import NotFinite, UserError
from fastgen.export.markdown import escape

EXAMPLE = "a red dress on a grey background"
STYLE = """
.gradio-container {max-width: 1200px !important; margin: auto}
img {image-rendering: pixelated}
h3, p {overflow-wrap: anywhere}
footer {display: none !important}
@media (max-width: 640px) {
    .gradio-container, .gradio-container * {min-width: 0 !important; max-width: 100vw}
    .row {flex-direction: column}
    .grid-container {grid-template-columns: repeat(2, 1fr) !important}
}
"""
MOST_KEPT = 60
"""pictures in the gallery of what was made"""


def theme() -> Any:
    """Without fonts from elsewhere: no request leaves the reader's machine."""
    import gradio

    return gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])


def build(model: DemoModel, folder: Path) -> Any:
    """The page of a model; its pictures are written to `folder`."""
    import gradio as gr

    count = itertools.count()
    with gr.Blocks(title=f"fastgen: {model.model}", analytics_enabled=False) as page:
        made = gr.State([])
        gr.Markdown(f"### {_title(model)}")
        with gr.Row():
            with gr.Column(scale=1):
                inputs = _inputs(model)
                button = gr.Button("Draw", variant="primary", elem_id="draw")
                said = gr.Markdown(elem_id="said")
            with gr.Column(scale=2), gr.Row():
                own = _gallery("student" if model.loaded.is_student else "model", "own")
                teacher = _gallery("teacher", "teacher", model.has_teacher)
        history = gr.Gallery(label="made so far", columns=8, height="auto", elem_id="history")

        def drawn(*values):
            *given, kept = values
            request = Request(**{name: _value(name, v) for name, v in zip(inputs, given)})
            try:
                found = model.draw(request)
            except (UserError, NotFinite) as error:
                said = f"**{escape(' '.join(str(error).split()))}**"
                return gr.skip(), gr.skip(), said, gr.skip(), kept
            files = [save(one, folder, next(count) * 100) for one in found]
            kept = [*files[0], *kept][:MOST_KEPT]
            return files[0], files[1] if len(files) > 1 else [], _times(found), kept, kept

        outputs = [own, teacher, said, history, made]
        given = [*inputs.values(), made]
        button.click(drawn, given, outputs, api_visibility="private")
        if "prompt" in inputs:
            inputs["prompt"].submit(drawn, given, outputs, api_visibility="private")
    return page


def _title(model: DemoModel) -> str:
    info = model.loaded.info
    if info is None:
        return escape(Path(model.model).name)
    base = Path(info.base.replace(":", "/")).name
    what = f"{info.objective} student of {base}" if info.is_student else "a generator"
    return escape(f"{info.name}: {what}")


def _gallery(label: str, name: str, visible: bool = True) -> Any:
    import gradio as gr

    return gr.Gallery(label=label, columns=2, object_fit="contain", elem_id=name, visible=visible)


def _inputs(model: DemoModel) -> dict[str, Any]:
    """The inputs of the page, by field of `Request`: those that this model takes."""
    import gradio as gr

    found: dict[str, Any] = {}
    if model.takes_text:
        found["prompt"] = gr.Textbox(label="prompt", value=EXAMPLE, lines=2, max_lines=6, elem_id="prompt")
    if model.labels:
        found["label"] = gr.Dropdown(model.labels, value=model.labels[0], label="class", elem_id="label")
    if model.takes_image:
        found["image"] = gr.Image(label="image", type="filepath", elem_id="image")
    found["steps"] = gr.Dropdown(model.step_choices, value=model.steps, label="steps", elem_id="steps")
    found["seed"] = gr.Number(label="seed", value=0, precision=0, minimum=0, elem_id="seed")
    found["num_images"] = gr.Slider(1, 8, value=4, step=1, label="pictures", elem_id="num_images")
    if model.guidance_range is not None:
        low, high = model.guidance_range
        found["guidance"] = gr.Slider(low, high, value=model.guidance, label="guidance", elem_id="guidance")
    if model.is_lora:
        found["weight"] = gr.Slider(0, 2, value=1, step=0.05, label="LoRA weight", elem_id="weight")
    if model.has_teacher:
        found["compare"] = gr.Checkbox(value=False, label="beside the teacher", elem_id="compare")
    return found


def _value(name: str, value: Any) -> Any:
    """A value of the page as `Request` takes it; cleared fields are their defaults."""
    if value is None:
        return Request.__dataclass_fields__[name].default
    return int(value) if name in ("steps", "seed", "num_images") else value


def _times(found: list) -> str:
    """What each contender took, and how much faster the first is."""
    lines = [f"{one.name}: {one.seconds:.3g} s and {one.nfe} network calls a picture" for one in found]
    if len(found) > 1:
        lines.append(f"{found[1].seconds / max(found[0].seconds, 1e-9):.1f} times as fast")
    return "\n\n".join(lines)
