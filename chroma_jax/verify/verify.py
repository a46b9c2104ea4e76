"""Runs a suite of golden cases and reports every compared quantity."""

import fnmatch
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax

from chroma_jax.utils.errors import InputError
from chroma_jax.verify import audio, generate, models
from chroma_jax.verify.case import Case, Check, Checks

# A case's kind is its folder name, matched as a pattern.
KINDS: dict[str, Callable[[Case], Checks]] = {
    "features": audio.features,
    "audio_encoder": models.audio_encoder,
    "thinker": models.thinker,
    "backbone": models.backbone,
    "decoder": models.decoder,
    "codec": audio.codec,
    "train_grad": models.train_grad,
    "gen_*": generate.generation,
}


class CaseResult(NamedTuple):
    """One case: its checks, or why it could not be run."""

    case: str
    checks: list[Check]
    error: str | None = None

    @property
    def passed(self) -> bool:
        return self.error is None and all(check.passed for check in self.checks)


def cases(folder: Path) -> list[Path]:
    """The case folders of a suite; a folder that is itself a case is a suite of one.

    Raises: InputError when there is none.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    if (folder / "outputs.safetensors").exists():
        return [folder]
    found = sorted(p for p in folder.iterdir() if (p / "outputs.safetensors").exists())
    if not found:
        raise InputError(f"{folder}: no golden case in it (a folder with outputs.safetensors)")
    return found


def verify(folder: Path) -> Iterator[CaseResult]:
    """Yields the result of each case as it is done; products in float32 on every device."""
    for path in cases(folder):
        kind = next((k for k in KINDS if fnmatch.fnmatch(path.name, k)), None)
        if kind is None:
            yield CaseResult(path.name, [], f"unknown kind of case (known: {', '.join(KINDS)})")
            continue
        try:
            with jax.default_matmul_precision("highest"):
                case = Case(path)
                yield CaseResult(path.name, [*KINDS[kind](case), *case.left_out()])
        except Exception as e:  # a broken case must not hide the others
            yield CaseResult(path.name, [], f"{type(e).__name__}: {e}")


def table(result: CaseResult, *, every: bool) -> str:
    """Lines for the terminal: each quantity, or (``every`` false) the failed ones and the worst."""
    if result.error is not None:
        return f"FAIL  {result.case:<18} {result.error}"
    worst = max(result.checks, key=lambda c: c.difference / c.tolerance if c.tolerance else (1e9 if c.difference else 0))
    shown = result.checks if every else [c for c in result.checks if not c.passed] or [worst]
    head = f"{'ok' if result.passed else 'FAIL':<5} {result.case:<18} {len(result.checks)} quantities"
    rows = [
        f"{'' if c.passed else 'FAIL':<5} {result.case:<18} {c.quantity:<70} {c.difference:10.2e}  ≤ {c.tolerance:.2e}"
        for c in shown
    ]
    return "\n".join([head, *rows])
