"""`eagle-moe doctor`: what is installed, what is missing, and why something cannot be imported."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, packages_distributions, requires, version

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PURPOSES = {
    "train": "training from a checkout",
    "suite": "the built-in suite and its report",
    "eval": "scores by lmms-eval",
    "wandb": "logging to Weights & Biases",
    "search": "expert search on several machines",
    "deepspeed": "ZeRO training",
    "flash": "FlashAttention-2 in the language model",
    "quant": "8- and 4-bit weights",
    "web": "chat in a browser",
    "serve": "answers over HTTP",
    "dev": "tests and linters",
    "dev-extras": "tests of what the pinned versions do not go with",
}
"""What each extra of the package is for."""


@dataclass(frozen=True)
class Finding:
    """One requirement: its extra ("" = always needed), what is installed, what is wrong if any."""

    extra: str
    requirement: str
    installed: str | None
    problem: str | None


def examine() -> list[Finding]:
    """A finding per requirement of the installed package, the needed ones first."""
    try:
        declared = [Requirement(text) for text in requires("eagle-moe") or ()]
    except PackageNotFoundError:
        raise ValueError("eagle-moe is not installed here. Run: pip install -e .") from None
    modules = _modules()
    found = []
    for extra in ("", *PURPOSES):
        for requirement in declared:
            marker = requirement.marker
            needed = marker is None or marker.evaluate({"extra": extra})
            if needed and (marker is not None) == bool(extra) and requirement.name != "eagle-moe":
                found.append(_examine(extra, requirement, modules))
    return found


def _modules() -> dict[str, list[str]]:
    """Distribution -> the modules that it installs."""
    modules: dict[str, list[str]] = {}
    for module, distributions in packages_distributions().items():
        for name in distributions:
            modules.setdefault(canonicalize_name(name), []).append(module)
    return modules


def _examine(extra: str, requirement: Requirement, modules: dict[str, list[str]]) -> Finding:
    wanted = f"{requirement.name}{requirement.specifier}"
    try:
        installed = version(requirement.name)
    except PackageNotFoundError:
        return Finding(extra, wanted, None, None if extra else "not installed")
    if not requirement.specifier.contains(installed, prereleases=True):
        return Finding(extra, wanted, installed, f"needs {requirement.specifier}")
    names = modules.get(canonicalize_name(requirement.name), [])
    public = [name for name in names if not name.startswith("_")]
    # The module named like its distribution if there is one; else any of them will tell.
    like = requirement.name.replace("-", "_").lower()
    for name in sorted(public, key=lambda name: name.lower() != like)[:1]:
        try:
            import_module(name)
        except Exception as error:  # whatever it is, it is the diagnosis
            return Finding(extra, wanted, installed, f"{type(error).__name__}: {error}")
    return Finding(extra, wanted, installed, None)


def accelerators() -> list[str]:
    """Names of the devices that torch sees, or why it sees none."""
    import torch

    if torch.cuda.is_available():
        names = map(torch.cuda.get_device_name, range(torch.cuda.device_count()))
        return [f"{name} (CUDA {torch.version.cuda})" for name in names]
    if torch.backends.mps.is_available():
        return ["Apple GPU (mps)"]
    why = "no CUDA device is visible" if torch.version.cuda else "this torch has no CUDA"
    return [f"CPU only: {why}"]


def run_doctor() -> int:
    """Print the examination. Returns 1 if something needed, or something installed, is broken."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    findings = examine()
    table = Table("for", "needs", "installed", "", box=box.SIMPLE)
    for finding in findings:
        purpose = f"{finding.extra}: {PURPOSES[finding.extra]}" if finding.extra else "always"
        state = finding.problem or ("ok" if finding.installed else "optional")
        table.add_row(purpose, finding.requirement, finding.installed or "-", state)
    console = Console()
    console.print(f"eagle-moe {version('eagle-moe')}, Python {platform.python_version()}")
    console.print("\n".join(accelerators()))
    console.print(table)
    missing = dict.fromkeys(f.extra for f in findings if f.extra and f.installed is None)
    for extra in missing:
        console.print(f"{PURPOSES[extra]}: pip install 'eagle-moe\\[{extra}]'")
    return int(any(finding.problem for finding in findings))
