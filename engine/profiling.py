"""A trace of a few training steps."""

from pathlib import Path

import torch
from yacs.config import CfgNode

from logger import get_logger
from utils import distributed


def step_profiler(config: CfgNode, folder: Path) -> torch.profiler.profile | None:
    """Traces PROFILE steps, after 5 others, to `trace_rank_<rank>.json` (chrome://tracing, ui.perfetto.dev)."""
    if not config.PROFILE:
        return None
    path = folder / f"trace_rank_{distributed.rank()}.json"

    def write(profiler: torch.profiler.profile) -> None:
        try:
            profiler.export_chrome_trace(str(path))
        except (OSError, RuntimeError) as error:  # a full disk costs the trace, not the run
            get_logger().warning("%s could not be written: %s", path, error)
            return
        table = profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=15, max_name_column_width=50)
        get_logger().info("profile of %d steps: %s\n%s", config.PROFILE, path, table)

    steps = torch.profiler.schedule(skip_first=4, wait=0, warmup=1, active=config.PROFILE, repeat=1)
    return torch.profiler.profile(schedule=steps, on_trace_ready=write, acc_events=True)
