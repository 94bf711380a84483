"""Run the notebooks from top to bottom, as `make notebooks` does, and fail where a cell fails."""

import argparse
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
SECONDS = 1200  # for a cell, on a machine that has other work


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="notebooks; by default all")
    parser.add_argument("--save", action="store_true", help="write the outputs into the notebooks")
    arguments = parser.parse_args()
    for path in [HERE / name for name in arguments.names] or sorted(HERE.glob("*.ipynb")):
        began = time.perf_counter()
        notebook = nbformat.read(path, as_version=4)
        NotebookClient(
            notebook, timeout=SECONDS, kernel_name="python3", resources={"metadata": {"path": HERE}}
        ).execute()
        if arguments.save:
            for cell in notebook.cells:
                cell.metadata.pop("execution", None)  # times, which differ from run to run
                if "outputs" in cell:  # without what libraries of this machine warn of
                    cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            nbformat.write(notebook, path)
        print(f"{path.name}: {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
