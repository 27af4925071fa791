"""Read the scalars of a run's TensorBoard event files, whatever the order of their names."""

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def scalars(run: Path) -> dict[str, dict[int, float]]:
    """Values by tag and step, steps in order; of a step that was logged twice, the later value.

    TensorBoard reads a folder's files by name. Names end in a counter of the process,
    and `.9` sorts after `.10`.
    """
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    by_tag = {}
    for tag in events.Tags()["scalars"]:
        written = sorted(events.Scalars(tag), key=lambda event: event.wall_time)
        by_tag[tag] = dict(sorted({event.step: event.value for event in written}.items()))
    return by_tag
