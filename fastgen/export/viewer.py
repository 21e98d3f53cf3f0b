"""A page that shows assets from all around, with everything inside: `viewer.html` of an export, and the part
of a report that does the same.
"""

import base64
import html

from fastgen.core.paths import asset

STYLE = """
figure.viewer { margin: 0; max-width: 520px; }
figure.viewer canvas { width: 100%; aspect-ratio: 1; display: block; border-radius: 10px; cursor: grab;
  touch-action: none; }
figure.viewer button { font: inherit; font-size: 13px; margin: 6px 6px 0 0; padding: 3px 10px;
  border-radius: 99px; border: 1px solid #8888; background: none; color: inherit; cursor: pointer; }
figure.viewer button[aria-pressed=true] { background: #8883; }
figure.viewer .said { font-size: 13px; opacity: .75; margin: 6px 0 0; }
"""
MOST = 100_000
"""Gaussians that a page holds of an asset: the large and opaque ones, which come first"""
HOW = "Drag to turn, wheel or two fingers to come nearer; arrow keys turn too."
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; \
style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>body {{ margin: 24px auto; max-width: 560px; padding: 0 20px; font: 16px/1.5 system-ui, sans-serif; \
color-scheme: light dark; overflow-wrap: anywhere; }}{style}</style>
</head>
<body>
<h1>{title}</h1>
{figure}
<script>
{script}
</script>
</body>
</html>
"""


def viewer_page(title: str, splats: dict[str, bytes], elevation: float = 15.0) -> str:
    """A page of its own; splats: .splat files by what they are called."""
    figure = viewer_figure(splats, elevation)
    return PAGE.format(title=html.escape(title), style=STYLE, figure=figure, script=viewer_script())


def viewer_script() -> str:
    """What makes figures of `viewer_figure` move; once on a page, after them."""
    return asset("viewer.js").read_text(encoding="utf-8")


def viewer_figure(splats: dict[str, bytes], elevation: float = 15.0) -> str:
    """The part of a page that shows assets, the first one first."""
    texts = {name: base64.b64encode(data[: 32 * MOST]).decode() for name, data in splats.items()}
    buttons = [
        f'<button type="button" aria-pressed="false" data-splat="{data}">{html.escape(name)}</button>'
        for name, data in texts.items()
    ]
    return (
        f'<figure class="viewer" data-azimuth="0" data-elevation="{elevation:g}" data-distance="2.2">'
        '<canvas width="720" height="720" tabindex="0" role="img" aria-label="3D view"></canvas>'
        f'<figcaption>{"".join(buttons)}<p class="said">{HOW}</p></figcaption></figure>'
    )
