"""From an assessment to the page that shows it."""

import importlib.metadata
import platform
import shlex
import sys
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from olvae.evaluation.report.content import Column, Cost, Page, Row, Score, Shown, UsedWeights
from olvae.evaluation.results import EQUAL, Evaluation, used_weights
from olvae.evaluation.runner import Assessment
from olvae.evaluation.statistics import difference, mean, pooled_psnr
from olvae.metrics.registry import METRICS

__all__ = ["page_of"]


PACKAGES = ("open-litevae", "torch", "torchmetrics", "torch-fidelity", "lpips", "diffusers", "pillow", "numpy")


def page_of(assessment: Assessment, evaluation: Evaluation) -> Page:
    """All that is known, for :func:`~olvae.evaluation.report.page.write_page`."""
    content = evaluation.as_dict()
    images, protocol, first = content["images"], content["protocol"], evaluation.results[0]
    names = [
        name for name in METRICS if any(name in row["metrics"] or name in row["skipped"] for row in content["results"])
    ]
    own = {row["target"] for row in content["results"]}
    return Page(
        title=f"{first.target}: {protocol['name']}, {protocol['size']} px",
        when=datetime.now().astimezone(),
        command=shlex.join([sys.argv[0].rpartition("/")[2], *sys.argv[1:]]),
        protocol=protocol,
        protocol_hash=content["protocol_hash"],
        columns=[Column(name, METRICS[name].label, METRICS[name].better, METRICS[name].digits) for name in names],
        rows=[Row(row["target"], row["n"], {n: _score(row, n) for n in names}) for row in content["results"]],
        data=f"{images['n']} images of {images['source']}, sha256 {images['sha256'][:16]}…",
        reference=first.target if len(evaluation.results) > 1 else "",
        differences=[Row(r.target, r.n, _differences(evaluation, r.per_image)) for r in evaluation.results[1:]],
        costs=[
            Cost(
                name,
                cost.parameters,
                cost.encode_macs + cost.decode_macs,
                cost.encode_images_per_s,
                cost.decode_images_per_s,
                cost.peak_memory_bytes,
                cost.device,
            )
            for name, cost in evaluation.costs.items()
        ],
        cost_note=_cost_note(evaluation),
        galleries=[
            Shown(name, METRICS[assessment.ranked_by].label, gallery.examples())
            for name, gallery in assessment.galleries.items()
            if name in own
        ],
        bands=assessment.bands,
        artefacts=assessment.artefacts,
        weights=[
            UsedWeights(METRICS[name].label, **file)
            for name, file in used_weights(result.details for result in evaluation.results).items()
        ],
        warnings=evaluation.warnings(),
        environment={
            "Python": platform.python_version(),
            **{name: _version(name) for name in PACKAGES},
        },
    )


def _score(row: Mapping[str, Any], name: str) -> Score:
    if row["skipped"].get(name) == EQUAL:
        return Score(float("inf"), None, EQUAL)
    if name not in row["metrics"]:
        return Score(None, None, row["skipped"].get(name, "not computed"))
    ends = row.get("intervals", {}).get(name)
    return Score(row["metrics"][name], (ends[0], ends[1]) if ends else None)


def _differences(evaluation: Evaluation, values: Mapping[str, Mapping[str, float]]) -> dict[str, Score]:
    """Of a contender's images and the first one's, with the interval of the paired difference."""
    scores = {}
    for name, ours in values.items():
        theirs = evaluation.results[0].per_image.get(name)
        pooled = name == "psnr" and evaluation.protocol.psnr == "pooled"
        found = difference(ours, theirs, statistic=pooled_psnr if pooled else mean) if theirs else None
        if found is not None:
            scores[name] = Score(found.value, (found.low, found.high))
    return scores


def _cost_note(evaluation: Evaluation) -> str:
    if not evaluation.costs:
        return ""
    cost = next(iter(evaluation.costs.values()))
    return (
        f"Operations of one image of {evaluation.protocol.size} px; speed and memory of batches of {cost.batch_size}, "
        "float32, in this run; memory is what a batch takes beyond weights and images."
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
