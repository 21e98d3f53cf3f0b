"""A page in the browser to try an export in: fastgen demo --model runs/quickstart/export

It offers what the model takes: a prompt, a label or a picture, its numbers of steps, a guidance scale, the
weight of a LoRA, the teacher beside it. The page is served to this machine alone (127.0.0.1), never shared.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

from fastgen.cli.loopback import HOST, check_port
from fastgen.cli.sample import DTYPES
from fastgen.core.console import documented, run_command
from fastgen.core.errors import UserError
from fastgen.core.paths import expand


def _flags() -> argparse.ArgumentParser:
    flags = documented("fastgen demo", __doc__)
    add = flags.add_argument
    add("--model", required=True, type=expand, help="export folder, LoRA file, run folder, or a teacher")
    add("--base", default="", type=expand, help="base of a LoRA file, if not the one its header names")
    add("--port", type=int, default=7860, help="of the page, on 127.0.0.1")
    add("--dtype", choices=DTYPES, default="fp32", help="of the denoiser")
    add("--device", default="", help="default: cuda if there is one")
    return flags


def main(argv: list[str] | None = None) -> int:
    """Entry point of `fastgen demo`: serves until Ctrl-C; 0, or 2 for a user's mistake."""
    return run_command(_flags(), run, argv)


def run(args: argparse.Namespace) -> int:
    """Load the model and serve its page."""
    import importlib.util

    if importlib.util.find_spec("gradio") is None:
        raise UserError("demo", "gradio is not installed", 'pip install "fastgen-distill[demo]"')
    check_port(args.port)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # no request leaves this machine
    from fastgen.cli.demo_model import DemoModel
    from fastgen.cli.demo_page import STYLE, build, theme

    model = DemoModel(args.model, args.base, args.device, args.dtype)
    with tempfile.TemporaryDirectory(prefix="fastgen-demo-") as folder:
        model.warm_up(Path(folder))
        page = build(model, Path(folder))
        print(f"demo    http://{HOST}:{args.port}   (Ctrl-C ends it)", flush=True)
        page.queue(default_concurrency_limit=1).launch(
            server_name=HOST,
            server_port=args.port,
            share=False,
            quiet=True,
            allowed_paths=[folder],
            head=f"<style>{STYLE}</style>",  # css= would lose its media queries
            theme=theme(),
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
