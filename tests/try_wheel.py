"""What a user gets: the wheel, and nothing of the checkout, runs the README's ten lines and the demo.

    make dist
    python tests/try_wheel.py                          # with this Python
    python tests/try_wheel.py python3.10 python3.13    # with these
    python tests/try_wheel.py --quick                  # the demo on a short document, which takes a minute

Only the standard library is needed. What the wheel holds is looked at first.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
TEN_LINES = re.search(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)[1]
SAID = re.search(r"print\(.*# (.*)", TEN_LINES)[1]
NAMES_THE_CACHE = "from hf_quest import CACHE_NAME; print(CACHE_NAME)"
FINDS_ITS_SOURCES = """
import pathlib, hf_quest
package = pathlib.Path(hf_quest.__file__).parent
assert "site-packages" in package.parts, package
assert (package / "csrc" / "bindings.cpp").exists()
"""
MOST_BYTES = 14 << 20  # of which the model inside is 12


def look_into(wheel):
    """Fail for what is in the wheel and should not be, or is missing."""
    archive = zipfile.ZipFile(wheel)
    names = archive.namelist()
    sources = {f"hf_quest/{path.relative_to(ROOT)}" for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    missing = sources - set(names)
    stray = [name for name in names if not re.match(r"hf_quest(_cli|-[\d.]+\w*\.dist-info)?/", name) or "test" in name]
    (about,) = (name for name in names if name.endswith(".dist-info/METADATA"))
    said = archive.read(about).decode()
    broken = re.findall(r"\]\((?!https?://)[^)]*\)", said)  # where the repository's files are not
    if broken or TEN_LINES not in said:
        sys.exit(f"{about} is not the README, or links to {broken}")
    size = wheel.stat().st_size
    if missing or stray or size > MOST_BYTES:
        sys.exit(f"{wheel.name}: {size:,} bytes, without {sorted(missing)}, with {stray}")
    print(f"{wheel.name}: {size:,} bytes, {len(names)} files", flush=True)


def run(command, folder):
    """The output of a command, which is shown if it fails."""
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout[-4000:]}")
    return done.stdout


def demo(programs, folder, is_quick):
    """What the demo says about its answers: key points right of its own document, or that it read a short file."""
    command = [programs / "hf-quest", "demo", "--device", "cpu"]
    if is_quick:
        shown = run([*command, ROOT / "README.md", "--budget", "64", "--max-new-tokens", "8"], folder)
        (share,) = re.findall(r"share of the KV cache read\W+100 %\W+([\d.]+) %", shown)
        return f"{share} % of the KV cache read"
    (points,) = re.findall(r"key points right\W+(\d+ of \d+)\W+(\d+ of \d+)", run(command, folder))
    return f"key points right: {points[0]} dense, {points[1]} with Quest"


def try_with(python, wheel, is_quick):
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        start = time.perf_counter()
        run([python, "-m", "venv", folder / "venv"], folder)
        programs = folder / "venv" / "bin"
        run([programs / "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt", wheel], folder)
        installed = time.perf_counter()
        run([programs / "python", "-c", FINDS_ITS_SOURCES], folder)
        name = run([programs / "python", "-c", NAMES_THE_CACHE], folder).split()[-1]
        (folder / "ten_lines.py").write_text(re.sub(r"\bcache=", f"{name}=", TEN_LINES))
        printed = run([programs / "python", "ten_lines.py"], folder)
        if SAID not in printed:
            sys.exit(f"The ten lines print {printed!r} and not {SAID}.")
        run([programs / "hf-quest", "doctor"], folder)
        said = demo(programs, folder, is_quick)
        version = run([programs / "python", "--version"], folder).strip()
        print(
            f"{version}: installed in {installed - start:.0f} s, the ten lines and the demo in "
            f"{time.perf_counter() - installed:.0f} s; {said}",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("pythons", nargs="*", default=[sys.executable], help="interpreters to try it with")
    parser.add_argument("--quick", action="store_true", help="let the demo read README.md, in place of a long document")
    arguments = parser.parse_args()
    (wheel,) = (ROOT / "dist").glob("*.whl")
    look_into(wheel)
    for python in arguments.pythons:
        try_with(python, wheel, arguments.quick)


if __name__ == "__main__":
    main()
