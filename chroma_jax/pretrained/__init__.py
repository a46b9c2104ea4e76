"""Weights that come with the code: one folder per name, in the released model's layout, with a card that says what they are."""

from pathlib import Path

HERE = Path(__file__).parent


def found(run: Path) -> Path:
    """The folder that ``run`` is, or, where there is no such folder, that of the shipped weights of this name."""
    run = Path(run)
    shipped = HERE / run
    return shipped if not run.exists() and len(run.parts) == 1 and (shipped / "config.json").is_file() else run
