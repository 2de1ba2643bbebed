"""QAT by several processes of Paddle's own launcher: on as many GPUs where there are so many, else on the processor.

The job goes into a folder, `python -m paddle.distributed.launch` starts the processes on it, and the one that leads
leaves the plan and the learning curve there.
"""

from __future__ import annotations

import json
import math
import os
import runpy
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import onnx

from quant.child import (
    Limits,
    answer,
    child_command,
    child_environment,
    ending,
    follow_parent,
    last_line,
    raise_answer,
    run_child,
)
from quant.conversion import load_feeds, save_feeds
from quant.graph import Graph
from quant.plan import QuantPlan, load_plan
from quant.program import import_paddle
from quant.qat import Evaluation, distil
from quant.recipe import Training
from quant.runtime import Feed, onnx_session
from quant.sensitivity import output_error
from quant.simulation import simulated_session
from quant.storage import scratch
from quant.team import launched_team

_SCRIPT = "from pathlib import Path\n\nfrom quant.launch import train\n\ntrain(Path(__file__).parent)\n"
"""What each process runs: the launcher takes files alone, and one inside of the package would hide other modules."""


def distil_together(
    prepared: Graph,
    plan: QuantPlan,
    feeds: Sequence[Feed],
    held_out: Sequence[Feed],
    settings: Training,
    *,
    seed: int,
    threads: int,
    bias_pictures: int = 0,
    checkpoint: Path | None = None,
) -> tuple[QuantPlan, list[Evaluation]]:
    """What `distil` gives, by `settings.processes` of them.

    Args:
        held_out: pictures that the error is measured on.
        bias_pictures: as of `distil`.
        threads: of each process.

    Raises:
        NotTrainable, InputError: as of `distil`.
    """
    with scratch() as folder:
        onnx.save(prepared.to_model(), str(folder / "prepared.onnx"))
        plan.save(folder / "plan")
        save_feeds(folder / "learned", feeds)
        save_feeds(folder / "held_out", held_out)
        (folder / "train.py").write_text(_SCRIPT, encoding="utf-8")
        job = {
            "settings": settings.model_dump(),
            "seed": seed,
            "threads": threads,
            "bias_pictures": bias_pictures,
            "checkpoint": str(checkpoint or ""),
            "learned": len(feeds),
            "held_out": len(held_out),
        }
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        _launch(folder, settings.processes)
        curve = json.loads((folder / "curve.json").read_text(encoding="utf-8"))
        return load_plan(folder / "found"), [Evaluation(**point) for point in curve]


def train(folder: Path) -> None:
    """What each process does with the job in a folder."""
    answer(folder, lambda: _train(folder))


def _train(folder: Path) -> None:
    team, job = launched_team(), json.loads((folder / "job.json").read_text(encoding="utf-8"))
    graph, threads = Graph(onnx.load(str(folder / "prepared.onnx"))), job["threads"]
    held_out = load_feeds(folder / "held_out", job["held_out"])
    exact_session = onnx_session(graph.to_light_model(), threads)
    exact = [exact_session.run(feed) for feed in held_out] if team.leads else []
    found, curve = distil(
        graph,
        load_plan(folder / "plan"),
        load_feeds(folder / "learned", job["learned"]),
        Training.model_validate(job["settings"]),
        lambda plan: output_error(simulated_session(graph, plan, threads), held_out, exact),
        seed=job["seed"],
        threads=threads,
        bias_pictures=job["bias_pictures"],
        checkpoint=Path(job["checkpoint"]) if job["checkpoint"] else None,
        team=team,
    )
    if team.leads:
        found.save(folder / "found")
        (folder / "curve.json").write_text(json.dumps([asdict(point) for point in curve]), encoding="utf-8")


def _launch(folder: Path, processes: int) -> None:
    """Run the launcher to its end; everything ends with this process."""
    import psutil

    log, limits = folder / "launcher.log", Limits(math.inf, psutil.virtual_memory().total)
    arguments, environment = places(processes)
    code = run_child(child_command("quant.launch", folder, *arguments), log, child_environment(**environment), limits)
    if code:
        raise_answer(folder, code)
        said = [f"{file.name}: {last_line(file)}" for file in sorted((folder / "log").glob("workerlog.*"))]
        raise RuntimeError(f"the training of {processes} processes failed; {'; '.join(said) or ending(code, log)}")


def places(processes: int) -> tuple[list[str], dict[str, str]]:
    """Arguments of the launcher, and variables of its environment, that say where the processes run."""
    found = import_paddle().device.cuda.device_count()
    if found < processes:
        # Paddle's launcher would give each process a GPU of its own, of which there are too few.
        return ["--nproc_per_node", str(processes), "--backend", "gloo"], {"CUDA_VISIBLE_DEVICES": ""}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "") or ",".join(map(str, range(found)))
    return ["--devices", ",".join(visible.split(",")[:processes])], {}


def main() -> None:
    """Paddle's launcher as a child of this project, and its processes as its own children."""
    follow_parent()
    os.environ.update(child_environment())
    folder, places = Path(sys.argv[1]), sys.argv[2:]
    sys.argv[1:] = [*places, "--log_dir", str(folder / "log"), str(folder / "train.py")]
    runpy.run_module("paddle.distributed.launch", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
