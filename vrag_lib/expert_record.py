"""What experts did and cost while trajectories were sampled: kept beside the samples, in the data card, and looked at.

    record = keep_record(policy, "results/laptop/synthesis/samples/relocate")
    check_record(record, policy, "results/laptop/synthesis/samples/relocate")

A grounding expert that fails costs one box, not the run (`experts`), so one that is dead or misnamed would leave a set
of trajectories whose boxes are all the planner's, under the name of both. That is told here: some failures are a
warning, nothing but failures an error.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vrag_lib.policy import Policy
from vrag_lib.rendering import read_json, write_atomically
from vrag_lib.synthesis import SynthesisError

logger = logging.getLogger(__name__)

RECORD = "experts.json"


def expert_record(policy: Policy) -> dict[str, Any]:
    """What the experts behind a policy did so far, as plain JSON; empty for a policy that counts nothing.

    counts: of `experts.MultiExpertPolicy` or `NextReplyPolicy`. failed_boxes: boxes that stayed the planner's, by kind
    of failure, and first_failure, the first of them in full. experts: by role the name, and what was asked of an
    endpoint (`endpoint.Usage`).
    """
    roles = {role: getattr(policy, role) for role in ("planner", "grounder", "second") if hasattr(policy, role)}
    failures = [relocation.error for relocation in getattr(policy, "relocations", ()) if relocation.error]
    experts = {
        role: {"name": expert.name} | (expert.usage.as_dict() if hasattr(expert, "usage") else {})
        for role, expert in (roles or {"alone": policy}).items()
    }
    counts = dict(getattr(policy, "counts", {}))
    if not counts and not any(expert.get("requests") or expert.get("cache_hits") for expert in experts.values()):
        return {}
    return {
        "counts": counts,
        "failed_boxes": dict(Counter(error.partition(":")[0] for error in failures)),
        "first_failure": failures[0] if failures else "",
        "experts": experts,
    }


def keep_record(policy: Policy, samples: str | Path) -> dict[str, Any]:
    """Add what the experts did in this run to `experts.json` beside the samples; returns the sum of all runs, empty
    where nothing was counted. Of a run that was killed nothing is known."""
    path = Path(samples) / RECORD
    now = expert_record(policy)
    record = _sum(read_json(path) or {}, now)
    if now:
        write_record(record, path.parent)
    return record


def write_record(record: Mapping[str, Any], folder: str | Path) -> None:
    """`experts.json` in a folder."""
    write_atomically(Path(folder) / RECORD, (json.dumps(record, indent=1) + "\n").encode())


def _sum(before: Any, now: Any) -> Any:
    """Numbers add up, at every depth; of texts the earlier one stays."""
    if isinstance(before, dict) and isinstance(now, dict):
        both = {name: _sum(before[name], now[name]) for name in before.keys() & now.keys()}
        return {name: both.get(name, value) for name, value in (before | now).items()}
    return before + now if isinstance(before, int | float) else before or now


def check_record(record: Mapping[str, Any], policy: Policy, samples: str | Path) -> None:
    """Warns when the grounding expert failed on some boxes. Raises SynthesisError when it did on all of them."""
    counts = record.get("counts", {})
    failed = counts.get("kept_box_failed", 0) + counts.get("kept_box_invalid", 0)
    if not failed:
        return
    what = (
        f"the grounding expert {getattr(policy, 'grounder', policy)!r} located {counts.get('relocated', 0)} of "
        f"{failed + counts.get('relocated', 0)} boxes, the others stayed the planner's own: {record['failed_boxes']}; "
        f"the first: {record['first_failure']}"
    )
    if counts.get("relocated"):
        return logger.warning("%s", what)
    raise SynthesisError(
        f"{what}. Make the endpoint answer, or name a model that it serves (synthesis.grounder=), then remove "
        f"{samples} and run again; or ask for synthesis.variant=planner"
    )
