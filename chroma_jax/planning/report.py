"""Plans as pages to read."""

from collections.abc import Sequence
from typing import Literal

from chroma_jax.planning.plan import DoesNotFit, TrainingPlan
from chroma_jax.planning.stream import StreamPlan

GIB = 2.0**30
TIGHT = 0.05  # share of memory that should stay free: the runtime and fragmentation take some


def page(plan: TrainingPlan, dollars_per_chip_hour: float | None = None) -> str:
    """One plan: memory, FLOPs, time and what an hour brings."""
    m, total_flops = plan.memory, sum(plan.flops.values())
    mesh = " × ".join(f"{axis} {n}" for axis, n in plan.mesh.items() if n > 1) or "one device"
    devices = " (two devices a chip)" if plan.topology.startswith("tpu7x") else ""
    lines = [
        f"{plan.topology}: {plan.chips} chips{devices}, mesh {mesh}, {plan.step}, {plan.global_batch_size} rows",
        "",
        "HBM of a device, GiB",
    ]
    kinds = {
        "trained weights": m.trained,
        "frozen weights": m.frozen,
        "optimizer state": m.optimizer,
        "batch": m.batch,
        "activations, gradients": m.activations,
        "program": m.program,
    }
    lines += [f"  {name:<28}{value / GIB:>9.2f}" for name, value in kinds.items()]
    lines += [total_line(m.total, m.capacity), ""]
    unit, scale = ("TFLOP", 1e12) if total_flops > 1e12 else ("GFLOP", 1e9)
    lines += [f"FLOPs of the model a step, {unit}"]
    lines += [f"  {part.replace('_', ' '):<28}{value / scale:>9.1f}" for part, value in plan.flops.items() if value]
    lines += [
        f"  {'total':<28}{total_flops / scale:>9.1f}",
        "",
        "Time of a step, ms (compiler's cycle estimates × turns of loops)",
    ]
    lines += [f"  {name:<28}{seconds * 1e3:>9.1f}" for name, seconds in list(plan.compute.items())[:12]]
    rest = sum(list(plan.compute.values())[12:])
    lines += [f"  {'everything else':<28}{rest * 1e3:>9.1f}"] if rest else []
    lines += [f"  {'computing in all':<28}{plan.compute_seconds * 1e3:>9.1f}"]
    lines += ["Collectives, ms on their links, and of these waited for"]
    for t in plan.traffic[:10]:
        name = f"{t.kind} over {t.axes}"
        lines += [f"  {name:<28}{t.seconds * 1e3:>9.1f}{t.waited * 1e3:>9.1f}  {t.bytes / 1e9:.2f} GB in {t.count}"]
    lines += [f"  {'all':<28}{plan.link_seconds * 1e3:>9.1f}{plan.waited_seconds * 1e3:>9.1f}", ""]
    lines += [
        f"predicted step      {plan.step_seconds * 1e3:9.1f} ms",
        f"bound by the roof   {plan.roof_seconds * 1e3:9.1f} ms (products {total_flops / plan.peak_flops * 1e3:.1f},"
        f" HBM {plan.hbm_seconds * 1e3:.1f}, links {plan.link_seconds * 1e3:.1f})",
        f"mfu         {plan.mfu:9.1%} of {plan.peak_flops / 1e15:.2f} PFLOP/s",
    ]
    hours = 3600 / plan.step_seconds
    millions, sound = plan.positions * hours / 1e6, plan.sound_seconds * hours / 3600
    brought = f"{millions:9.0f} million positions at most, {sound:,.0f} hours of replies"
    lines += ["an hour             " + (brought if plan.positions else f"{sound:9,.0f} hours of sound")]
    if dollars_per_chip_hour is not None:
        cost = plan.chips * dollars_per_chip_hour
        each = (
            f"{1e3 * cost / millions:.2f} $ a billion positions" if plan.positions else f"{cost / sound:.4f} $ an hour of sound"
        )
        lines += [f"cost                {cost:9,.0f} $ an hour, {each}"]
    lines += unestimated_line(plan.unestimated)
    if plan.unknown_loops:
        lines += [f"counted once, as their loop does not say how often it turns: {plan.unknown_loops} operations"]
    lines += [f"compiled in {plan.compile_seconds:.0f} s, effort {plan.effort}"]
    return "\n".join(lines) + "\n"


def total_line(total: float, capacity: float) -> str:
    free = 1 - total / capacity
    verdict = "fits" if free >= TIGHT else "fits, but leaves too little" if free >= 0 else "DOES NOT FIT"
    return f"  {'total':<28}{total / GIB:>9.2f} of {capacity / GIB:.2f}: {verdict}, {free:.1%} free"


def unestimated_line(found: dict[str, int]) -> list[str]:
    """A line, where there is something to say."""
    named = ", ".join(f"{count} × {kind}" for kind, count in list(found.items())[:6])
    return [f"without an estimate, counted by the bytes that they move: {named}"] if named else []


def stream_page(plan: StreamPlan) -> str:
    """A plan of the streaming decode steps: memory, and how much of a frame's time they take."""
    kinds = {"weights": plan.weights, "caches and state": plan.caches, "temporary": plan.temporary, "program": plan.program}
    where = "one chip" if plan.chips == 1 else f"each of {plan.chips} chips that share the model"
    decode_steps = (plan.pair, plan.frame)

    def line(name: str, values: Sequence[float], mean: float, note: str = "") -> str:
        return f"  {name:<28}" + "".join(f"{value:>9.2f}" for value in (*values, mean)) + f"  {note}".rstrip()

    times = {"HBM at full bandwidth": "hbm_seconds", "cycles of the compiler": "compute_seconds"}
    times |= {"links": "link_seconds", "cycles and links": "seconds"} if plan.chips > 1 else {}
    lines = [
        f"{plan.topology}, {where}: {plan.rows} conversations, weights {plan.weight_type}, caches {plan.cache_type} of"
        f" {plan.positions} positions",
        "",
        "HBM of a device, GiB",
        *(f"  {name:<28}{value / GIB:>9.2f}" for name, value in kinds.items()),
        total_line(plan.total, plan.capacity),
        "",
        f"A decode step of {plan.budget * 1e3:.0f} ms      {'':<13}{'pair':>9}{'frame':>9}{'mean':>9}",
        line("bytes to be read, GB", [t.read / 1e9 for t in decode_steps], plan.of_frame("read") / 1e9),
        line(
            "bytes moved, GB",
            [t.hbm_bytes / 1e9 for t in decode_steps],
            plan.of_frame("hbm_bytes") / 1e9,
            f"{plan.of_frame('hbm_bytes') / plan.of_frame('read') - 1:+.1%}",
        ),
    ]
    for name, field in times.items():
        mean = plan.of_frame(field)
        lines += [
            line(f"{name}, ms", [getattr(t, field) * 1e3 for t in decode_steps], mean * 1e3, f"RTF {mean / plan.budget:.3f}")
        ]
    lines += unestimated_line(plan.pair.unestimated)
    if unknown := plan.pair.unknown_loops + plan.frame.unknown_loops:
        lines += [f"counted once, as their loop does not say how often it turns: {unknown} operations"]
    seconds = sum(t.compile_seconds for t in decode_steps)
    lines += [f"compiled in {seconds:.0f} s, effort {plan.effort}; cycles are too many for products of few rows"]
    return "\n".join(lines) + "\n"


def stream_table(found: Sequence[dict]) -> str:
    """Several plans of the streaming decode steps, as `chroma_jax.planning.stream.plans` gives them. Of a frame, in the mean:
    bytes to be read, and moved; milliseconds by bytes and by cycles, and the longest decode step's; both over the frame's
    time."""
    columns = ("GiB", "read GB", "moved GB", "over", "bytes ms", "cycles ms", "longest", "RTF b.", "RTF c.")
    lines = [f"{'topology':<10}{'slots':>6} {'weights':<9} {'caches':<9}" + "".join(f"{name:>10}" for name in columns)]
    for plan in found:
        head = f"{plan['topology']:<10}{plan['rows']:>6} {plan['weight_type']:<9} {plan['cache_type']:<9}"
        if not plan["fits"]:
            lines += [f"{head}{plan['needed'] / GIB:>10.2f}  DOES NOT FIT in {plan['capacity'] / GIB:.2f} GiB"]
            continue
        f = plan["per_frame"]
        values = [f"{plan['total'] / GIB:.2f}", *(f"{f[name] / 1e9:.2f}" for name in ("read", "hbm_bytes"))]
        values += [f"{f['bytes_over_read'] - 1:+.1%}"]
        values += [f"{f[name] * 1e3:.2f}" for name in ("hbm_seconds", "seconds", "tick_seconds")]
        values += [f"{f[name]:.3f}" for name in ("byte_rtf", "cycle_rtf")]
        lines += [head + "".join(f"{value:>10}" for value in values)]
    return "\n".join(lines) + "\n"


HELP = {
    "train": (
        "fewer rows a step (--training.global_batch_size), or the same in pieces (--training.gradient_accumulation_steps);",
        "rematerialisation (--model.backbone.remat full, --model.reasoner.text.remat full); more fsdp in the mesh;",
        "frozen weights in bfloat16 (--precision.frozen); fewer of the Decoder's frames (--loss.decoder_frame_fraction)",
    ),
    "stream": (
        "fewer conversations (--slots) or positions (--positions); weights or caches of a byte a number (--weights int8,",
        "--cache int8); more chips that share the model (--topology v5e:2x2)",
    ),
}


def does_not_fit(error: DoesNotFit, step: Literal["train", "stream"] = "train") -> str:
    """By how much, what is large, and what to change."""
    lines = [f"DOES NOT FIT: {error}", ""]
    lines += ["the largest buffers, GiB"] if error.buffers else []
    lines += [f"  {b.bytes / GIB:>8.2f}  {b.shape[:70]}  {b.operator[:90]}" for b in error.buffers]
    first, *rest = HELP[step]
    return "\n".join([*lines, "", f"what helps: {first}", *rest]) + "\n"


def table(found: Sequence[tuple[str, TrainingPlan | DoesNotFit]]) -> str:
    """Several plans, the fastest per row first. found: (what was tried, its outcome)."""

    def rank(item):
        plan = item[1]
        return (1, 0.0) if isinstance(plan, DoesNotFit) else (0, plan.step_seconds / plan.global_batch_size)

    lines = [f"{'mesh, rows, rematerialisation':<58}{'ms/step':>9}{'rows/s':>9}{'used':>7}{'GiB':>8}{'free':>7}"]
    for name, plan in sorted(found, key=rank):
        if isinstance(plan, DoesNotFit):
            lines += [f"{name:<58}{'–':>9}{'–':>9}{'–':>7}{plan.needed / GIB:>8.2f}{'none':>7}"]
            continue
        speed = plan.global_batch_size / plan.step_seconds
        memory = f"{plan.memory.total / GIB:>8.2f}{plan.memory.free:>7.0%}"
        lines += [f"{name:<58}{plan.step_seconds * 1e3:>9.1f}{speed:>9.1f}{plan.mfu:>7.1%}{memory}"]
    return "\n".join(lines) + "\n"
