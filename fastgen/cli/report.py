"""The page of a run: headline, pictures, curves. fastgen report runs/quickstart

fastgen report runs/quickstart --serve        in the browser, always current, also while the run trains
fastgen report runs/a runs/b [--out PAGE]     several runs on one page: what was changed, and what it did

Without --serve the page is written once: of one run to RUN/report/index.html, of several to --out. Served
pages are seen by this machine alone (127.0.0.1).
"""

import argparse
import contextlib
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from fastgen.cli.loopback import HOST, check_port
from fastgen.core.console import documented, run_command
from fastgen.core.errors import UserError
from fastgen.core.files import write_text
from fastgen.core.paths import expand

SAFE = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}


def _flags() -> argparse.ArgumentParser:
    flags = documented("fastgen report", __doc__)
    add = flags.add_argument
    add("runs", nargs="+", type=expand, metavar="RUN", help="run folder; several are compared")
    add("--out", default="", type=expand, metavar="PAGE", help="of several runs; default: runs.html")
    add("--serve", action="store_true", help="serve the page until Ctrl-C instead of writing it")
    add("--port", type=int, default=7861, help="of the served page, on 127.0.0.1")
    return flags


def main(argv: list[str] | None = None) -> int:
    """Entry point of `fastgen report`; 0, or 2 for a user's mistake."""
    return run_command(_flags(), run, argv)


def run(args: argparse.Namespace) -> int:
    """Write the page, or serve it."""
    from fastgen.evaluation.report import write_report
    from fastgen.evaluation.run_files import check_run
    from fastgen.training.run_folder import in_use

    folders = [check_run(Path(name), "RUN") for name in args.runs]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError("RUN", "found the same run twice", "give different runs")
    if args.out and Path(args.out).suffix != ".html":
        raise UserError("--out", f"found {args.out}", "give a .html file")
    if args.out and (args.serve or len(folders) == 1):
        raise UserError("--out", f"found {args.out}", "leave it out: it is for several runs, written once")
    if args.serve:
        return serve(folders, args.port)
    if len(folders) == 1:
        target = write_report(folders[0], in_use(folders[0]))
    else:
        target = Path(args.out or "runs.html")
        write_text(target, current_page(folders))
    print(f"report  {target}")
    return 0


def current_page(folders: list[Path]) -> str:
    """The page of a run, or of several, as they are now."""
    from fastgen.evaluation.report import report_page
    from fastgen.evaluation.report_runs import runs_page
    from fastgen.training.run_folder import in_use

    running = any(in_use(folder) for folder in folders)
    return report_page(folders[0], running) if len(folders) == 1 else runs_page(folders, running)


def serve(folders: list[Path], port: int) -> int:
    """Answer each request for / with the page as the folders are then."""
    check_port(port)
    current_page(folders)  # what cannot be shown is said before anything is served
    server = ThreadingHTTPServer((HOST, port), _handler(folders, port))
    print(f"report  http://{HOST}:{port}   (Ctrl-C ends it)", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print("")
    finally:
        server.server_close()
    return 0


def _handler(folders: list[Path], port: int) -> type[BaseHTTPRequestHandler]:
    hosts = (f"{HOST}:{port}", f"localhost:{port}")

    class Handler(BaseHTTPRequestHandler):
        """The page at /, to readers on this machine who asked for this address."""

        def do_GET(self) -> None:  # noqa: N802 (named by the library)
            if self.headers.get("Host") not in hosts or self.path.partition("?")[0] != "/":
                return self._answer(404, "text/plain", "not found\n")
            try:
                self._answer(200, "text/html", current_page(folders))
            except UserError as error:  # a file of the run broke meanwhile
                self._answer(500, "text/plain", f"{error}\n")

        def _answer(self, code: int, kind: str, text: str) -> None:
            data = text.encode()
            self.send_response(code)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(data)))
            for name, value in SAFE.items():
                self.send_header(name, value)
            with contextlib.suppress(ConnectionError):  # the reader has left
                self.end_headers()
                self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            """Nothing: the terminal keeps the address."""

    return Handler


if __name__ == "__main__":
    sys.exit(main())
