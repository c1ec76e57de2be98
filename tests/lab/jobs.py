"""A conversion in the test's own process, with its own progress callback."""

from pathlib import Path

from dsv4.convert.checkpoint.reader import Checkpoint
from dsv4.convert.plan.plan import make_plan
from dsv4.convert.plan.settings import Settings
from dsv4.convert.write.run import Job
from dsv4.convert.write.shards.resources import decide_resources


def job_of(source: Path, settings: Settings, output: Path, workers: int = 1) -> Job:
    """The job of converting a folder, with this number of workers."""
    checkpoint = Checkpoint.open(source)
    plan = make_plan(checkpoint, settings)
    return Job(checkpoint, plan, output, decide_resources(plan, workers))
