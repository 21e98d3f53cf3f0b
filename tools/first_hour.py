"""The first hour of a new user, done and written down: docs/first_hour.md and its pictures.

  python -m tools.first_hour    installs into a fresh environment and runs every step in an empty folder

Each step is a command as a user types it; the page keeps what it printed and how long it took. Needs
playwright and Chromium for the pictures of pages: pip install -e ".[demo]" playwright.
"""

import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/first_hour.md"
FIGURES = ROOT / "docs/figures/first_hour"
MOST_LINES = 44
"""lines of a step's output that the page shows"""
PICTURES = """
from pathlib import Path
from fastgen.data.bundled import load_images
from fastgen.data.media import to_pil
found, folder = load_images("tinted"), Path("pictures")
folder.mkdir()
for i in range(60):
    to_pil(found.images[i] / 255).resize((64, 64)).save(folder / f"{i:02d}.png")
    if i < 58:
        (folder / f"{i:02d}.txt").write_text(found.captions[i])
"""
PLAIN = """
import sys
sys.modules["fastgen"] = None  # importing it fails from here on
exec(open("card.py").read())
print(type(pipe).__name__, "drew sample.png")
"""


class Hour:
    """Commands run one after another in one folder, and the page that they make."""

    def __init__(self, folder: Path):
        self.folder, self.bin = folder, folder / "venv/bin"
        self.lines: list[str] = []
        self.total = 0.0

    def step(
        self, title: str, shown: str, words: list[str], codes: tuple[int, ...] = (0,), stop_after: str = ""
    ) -> None:
        """Run a command; `stop_after` sends Ctrl-C once that is in its output."""
        start = time.monotonic()
        process = subprocess.Popen(
            words,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            preexec_fn=hear_ctrl_c,
        )
        output = []
        for line in process.stdout or ():
            output.append(line.rstrip())
            if stop_after and stop_after in line:
                process.send_signal(signal.SIGINT)
                stop_after = ""
        code, seconds = process.wait(), time.monotonic() - start
        if code not in codes:
            raise SystemExit(f"{title}: exit code {code}\n" + "\n".join(output[-30:]))
        self.write(title, shown, output, seconds, code)

    def fastgen(self, title: str, arguments: str, **how) -> None:
        """A step of the installed command."""
        self.step(title, f"fastgen {arguments}", [str(self.bin / "fastgen"), *arguments.split()], **how)

    def write(self, title: str, shown: str, output: list[str], seconds: float, code: int = 0) -> None:
        """One section of the page."""
        self.total += seconds
        ended = f", exit code {code}" if code else ""
        text = [self.public(line) for line in output]
        if len(text) > MOST_LINES:
            text = [*text[: MOST_LINES // 2], "...", *text[-MOST_LINES // 2 :]]
        self.lines += [
            f"## {title}",
            "",
            "```text",
            f"$ {shown}",
            *text,
            "```",
            "",
            f"*{seconds:.0f} s{ended}*",
            "",
        ]
        print(f"{title}: {seconds:.0f} s", flush=True)

    def public(self, line: str) -> str:
        """A line without the places of this machine."""
        line = line.replace(f"{self.folder}/", "").replace(str(self.folder), ".").replace(f"{ROOT}/", "")
        line = re.sub(r"Linux-\S+", "Linux", line)
        return re.sub(r"/(?:tmp|home|root|opt|work)/\S*?([^/\s]+)(?=\s|$)", r"\1", line)

    def picture(self, name: str, text: str) -> None:
        self.lines += [f"![{text}](figures/first_hour/{name})", ""]


def hear_ctrl_c() -> None:
    """Commands of a shell's background ignore SIGINT unless told otherwise."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def shoot(address: str, file: Path, height: int, act=None) -> None:
    """A picture of a page, `height` pixels of it, after act(page)."""
    from tests.support.browser import browser

    with browser() as open_page:
        page, problems = open_page(address, 1300, height)
        page.wait_for_timeout(1000)
        if act:
            act(page)
        page.screenshot(path=file)
        assert not problems, problems


def demo(hour: Hour, model: str) -> None:
    """Serve an export, type a prompt, wait for the pictures."""
    from tests.support.ports import free_port

    port, start = free_port(), time.monotonic()
    command = [str(hour.bin / "fastgen"), "demo", "--model", model, "--port", str(port)]
    log = hour.folder / "demo.log"
    with log.open("w") as file:
        server = subprocess.Popen(command, cwd=hour.folder, stdout=file, stderr=subprocess.STDOUT)
    while socket.socket().connect_ex(("127.0.0.1", port)):
        assert server.poll() is None, log.read_text()
        time.sleep(0.2)

    def act(page) -> None:
        page.fill("#prompt textarea", "a blue dress on a grey background")
        page.check("#compare input")
        page.click("#draw")
        page.wait_for_selector("#teacher img", timeout=120_000)
        page.wait_for_timeout(1500)

    shoot(f"http://127.0.0.1:{port}", FIGURES / "demo.png", 900, act)
    server.terminate()
    server.wait()
    hour.write(
        "A page to click",
        f"fastgen demo --model {model}",
        log.read_text().splitlines(),
        time.monotonic() - start,
    )
    hour.picture("demo.png", "four pictures of a typed prompt beside the teacher's, with times")


def tiny_sdxl(folder: Path) -> None:
    """A Stable Diffusion XL pipeline of random weights, as small as the tests' one."""
    sys.path.insert(0, str(ROOT))
    from tests.families.cases.unets import sdxl_folder

    sdxl_folder(folder)


def out_of_the_box(hour: Hour) -> None:
    install = f"{sys.executable} -m venv venv && venv/bin/pip install --quiet -e '{ROOT}[demo]' 2> pip.log"
    hour.step("Install", 'python -m venv venv && venv/bin/pip install -e ".[demo]"', ["bash", "-c", install])
    hour.fastgen("What is there", "doctor")
    hour.fastgen("Quick start", "train")
    report = (hour.folder / "runs/quickstart/report/index.html").as_uri()
    shoot(report, FIGURES / "report.png", 1500)
    hour.picture("report.png", "the report: headline, samples beside the teacher's, the way there")
    sample = (
        "sample --model runs/quickstart/export --labels 0-9 --num_images 20 --out drawn --compare_teacher"
    )
    hour.fastgen("Draw", sample)


def of_one_s_own(hour: Hour) -> None:
    make = f"{hour.bin / 'python'} -c '{PICTURES}' && ls pictures | wc -l"
    title = "Sixty pictures of one's own, two of them without a caption"
    hour.step(title, "ls pictures | wc -l", ["bash", "-c", make])
    own = "train --method lcm --teacher tinted-sd --data.images pictures --max_steps 60 --output_dir runs/own"
    hour.fastgen("Distil on them", own)
    tiny_sdxl(hour.folder / "sdxl")
    mine = "train --method lcm --teacher ./sdxl --data.images pictures --max_steps 30 --eval.num_samples 20"
    title = "A Stable Diffusion XL folder of one's own (tiny, random weights), stopped by Ctrl-C"
    mine += " --output_dir runs/sdxl"
    hour.fastgen(title, mine, codes=(75,), stop_after="lcm: 1/")
    hour.fastgen("Go on", f"{mine} --resume")


def out_of_the_house(hour: Hour) -> None:
    export = hour.folder / "runs/own/export"
    card = (export / "README.md").read_text()
    (export / "card.py").write_text(card.split("```python\n")[1].split("```")[0])
    (export / "plain.py").write_text(PLAIN)
    title = "The LoRA in plain diffusers: the code of its card, where fastgen cannot be imported"
    run = f"cd {export} && {hour.bin / 'python'} plain.py"
    hour.step(title, "cd runs/own/export && python card.py", ["bash", "-c", run])
    shutil.copy(export / "sample.png", FIGURES / "plain.png")
    hour.picture("plain.png", "what the code of the card drew")
    hour.fastgen("Measure again", "eval --run runs/own --num_samples 200")
    demo(hour, "runs/own/export")
    hour.fastgen("A slip", "train --method dmd2 --teacher tinted-sd --data.images pictuers", codes=(2,))


def main() -> None:
    shutil.rmtree(FIGURES, ignore_errors=True)
    FIGURES.mkdir(parents=True)
    head = [
        "# The first hour",
        "",
        "What a new user types and sees, on two processor cores without a GPU; recorded by "
        "`python -m tools.first_hour`.",
        "The log is that of a pipe: a terminal shows one bar in place of the lines of progress.",
        "",
    ]
    with tempfile.TemporaryDirectory() as folder:
        hour = Hour(Path(folder).resolve())
        for part in (out_of_the_box, of_one_s_own, out_of_the_house):
            part(hour)
    minutes = f"*All of it: {hour.total / 60:.0f} minutes.*"
    PAGE.write_text("\n".join([*head, *hour.lines, minutes, ""]))


if __name__ == "__main__":
    main()
