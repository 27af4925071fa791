"""Loss curves of a run, read back from its TensorBoard events, so that resumed runs are whole."""

from pathlib import Path

from olvae.figures import plot_curves
from olvae.runs import Run

__all__ = ["draw_curves"]


def draw_curves(run: Run) -> Path | None:
    """Draw every scalar of training and validation over the steps into ``images/curves.png``.

    Returns:
        The picture, or None if nothing was logged yet.
    """
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    events = EventAccumulator(str(run.path / "tensorboard"), size_guidance={SCALARS: 2000})
    events.Reload()
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for tag in sorted(events.Tags()["scalars"]):
        if tag.startswith(("train/", "val/")):
            last_at = {event.step: event.value for event in events.Scalars(tag)}  # a resumed step counts once
            steps = sorted(last_at)
            curves[tag] = ([float(step) for step in steps], [last_at[step] for step in steps])
    if not curves:
        return None
    path = run.images / "curves.png"
    plot_curves(curves, path)
    return path
