"""What ``chroma-jax status RUN`` says: how far a run has come, where its wall time went, what interrupted it. Only reads, so the
run may be going on."""

import time
from pathlib import Path

from chroma_jax import config as configs
from chroma_jax.training.metrics import read_lines
from chroma_jax.training.runtime.goodput import read_goodput_log, when

RECENT = 5  # log lines that the rate is a mean of


def status(run: Path) -> dict:
    """Raises: InputError when ``run`` is no run folder."""
    config = configs.load(run)
    lines, metrics = read_goodput_log(run), read_lines(run / "metrics.jsonl")
    trained = [line for line in metrics if any(name.startswith("train/") for name in line)]
    found = sorted(int(p.name) for p in (run / "checkpoints").glob("*") if p.name.isdigit())
    step = max([line["step"] for line in metrics] + found, default=0)
    facts = {
        "run": str(run),
        "kind": next(kind for kind, cls in configs.KINDS.items() if isinstance(config, cls)),
        "step": step,
        "steps": config.training.steps,
        "checkpoints": found,
        "set_aside": sorted(p.name for p in (run / "checkpoints").glob("*.damaged*")),
        "metrics": latest(metrics),
    }
    rates = [line["perf/steps_per_second"] for line in trained[-RECENT:] if line.get("perf/steps_per_second")]
    if rates:
        facts["steps_per_second"] = len(rates) / sum(1 / r for r in rates)
        facts["seconds_left"] = (config.training.steps - step) / facts["steps_per_second"]
    return facts | (accounts(lines) if lines else {})


def latest(metrics: list[dict]) -> dict[str, float]:
    """The newest value of every metric."""
    found: dict[str, float] = {}
    for line in metrics:
        found |= line
    found.pop("step", None)
    return found


def accounts(lines: list[dict]) -> dict:
    """Of a ledger: seconds by kind, the share that was training that lasted, the interruptions, the skipped steps."""
    seconds: dict[str, float] = {}
    kept, skipped, restarts = [], [], []  # kept: lines of steps whose result is part of the run as it is now
    ended, idle, lost = "", 0.0, 0.0
    for line in lines:
        kind = line["kind"]
        seconds[kind] = seconds.get(kind, 0.0) + line["seconds"]
        if kind == "step":
            kept.append(line)
        elif kind == "skipped":
            skipped += line["steps"]
        elif kind == "stop":
            ended = line["why"]
        elif kind == "idle":
            idle = line["seconds"]
        elif kind == "restart":
            at = line["from_step"]
            reached, again = max((step["to_step"] for step in kept), default=at), sum(after(step, at) for step in kept)
            restarts.append(
                {
                    "time": line["time"],
                    "step": at,
                    "why": ended or "ended without a word",
                    "idle_seconds": round(idle, 1),
                    "lost_steps": max(0, reached - at),
                    "lost_seconds": round(again, 1),
                }
            )
            kept = [
                step | {"to_step": min(at, step["to_step"]), "seconds": step["seconds"] - after(step, at)}
                for step in kept
                if step["from_step"] < at
            ]
            skipped = [step for step in skipped if step <= at]
            ended, idle, lost = "", 0.0, lost + again
    seconds["step"] = seconds.get("step", 0.0) - lost
    seconds["lost"] = lost
    whole, last = sum(seconds.values()), lines[-1]
    return {
        "since": lines[0]["time"],
        "last_word": last["time"],
        "silent_seconds": round(time.time() - when(last), 1),
        "ended": ended or None,
        "seconds": {kind: round(value, 3) for kind, value in seconds.items() if value > 0},
        "goodput": round(seconds["step"] / whole, 4) if whole else 0.0,
        "restarts": restarts,
        "skipped_steps": skipped,
    }


def after(line: dict, step: int) -> float:
    """Seconds of a ``step`` line that went into steps after ``step``."""
    count = line["to_step"] - line["from_step"]
    return line["seconds"] * min(count, max(0, line["to_step"] - step)) / count if count else 0.0


MEANING = {
    "step": "training; its share of all is the goodput",
    "compile": "compiling",
    "data_wait": "waiting for data",
    "checkpoint": "saving",
    "evaluate": "evaluating",
    "start": "from the start to the first step",
    "restart": "the same after an interruption",
    "lost": "steps that had to be done again",
    "idle": "nobody worked on it",
}


def described(facts: dict) -> str:
    """For people."""
    newest = f"newest checkpoint at step {facts['checkpoints'][-1]}" if facts["checkpoints"] else "no checkpoint yet"
    lines = [f"{facts['run']}: {facts['kind']}, step {facts['step']} of {facts['steps']}; {newest}"]
    if facts["set_aside"]:
        lines.append(f"damaged checkpoints, set aside: {', '.join(facts['set_aside'])}")
    if facts["step"] >= facts["steps"]:
        lines.append("finished")
    elif facts.get("ended"):
        lines.append(f"ended: {facts['ended']}")
    elif "silent_seconds" in facts:
        lines.append(f"last word {duration(facts['silent_seconds'])} ago")
    if "seconds_left" in facts and facts["step"] < facts["steps"]:
        lines.append(f"{facts['steps_per_second']:.3g} steps a second; {duration(facts['seconds_left'])} left at that rate")
    shown = {n: v for n, v in facts["metrics"].items() if n.startswith(("train/", "valid/")) and v is not None}
    lines += ["", *(f"  {name:<32} {value:.5g}" for name, value in shown.items())]
    if "seconds" in facts:
        whole = sum(facts["seconds"].values())
        lines += ["", f"wall time since {facts['since'][:19]}Z: {duration(whole)}, goodput {facts['goodput']:.1%}"]
        for kind in MEANING:
            if seconds := facts["seconds"].get(kind):
                lines.append(f"  {kind:<12} {duration(seconds):>14} {seconds / whole:>7.1%}   {MEANING[kind]}")
        for r in facts["restarts"]:
            again = f", {r['lost_steps']} steps again ({duration(r['lost_seconds'])})" if r["lost_steps"] else ""
            lines.append(f"restart {r['time'][:19]}Z at step {r['step']}{again}; idle {duration(r['idle_seconds'])}; {r['why']}")
        if skipped := facts["skipped_steps"]:
            lines.append(f"skipped steps: {len(skipped)}, the last ones {', '.join(map(str, skipped[-5:]))}")
    return "\n".join(lines)


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"
