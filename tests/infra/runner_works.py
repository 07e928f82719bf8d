"""Works for the runner's tests; workers import this module by name."""

from __future__ import annotations

import os
import signal
import time
import uuid
from pathlib import Path
from typing import Any

from infra.ledger import ShardData, Stage
from infra.runner import SystemicFailure
from infra.shards import sample_key, write_tar

ROWS = 3


class ToyWork:
    """Writes ROWS small members a shard; misbehaves on the shards that the config names."""

    def __init__(self, stage: Stage, config: dict[str, Any]) -> None:
        self.stage, self.config = stage, config
        if config.get("log"):
            self.note("build")

    def run(self, shard: int) -> ShardData:
        config = self.config
        if config.get("log"):
            self.note(f"run {shard}")
        if meeting := config.get("meeting"):
            meeting.wait(60)
        if shard in config.get("kill", []):
            time.sleep(config.get("linger", 0))
            os.kill(os.getpid(), signal.SIGKILL)
        if shard in config.get("fail", []):
            raise ValueError(f"shard {shard} is broken")
        if shard in config.get("lost_gpu", []):
            import torch

            raise torch.AcceleratorError("CUDA error: device-side assert triggered")
        if shard in config.get("systemic", []):
            raise SystemicFailure("the network is down")
        if shard in config.get("fail_once", []) and not self.marked(shard):
            raise OSError("a hiccup")
        time.sleep(config.get("seconds", 0))
        keys = [sample_key(shard, row) for row in range(ROWS)]
        content = f"{self.stage.fingerprint} {{}}"
        if config.get("unsteady"):  # other bytes each time, as a network on a GPU may
            content += uuid.uuid4().hex
        members = [(f"{key}.txt", content.format(key).encode()) for key in keys]
        statuses = [(key, "ok", "") for key in keys] + [(sample_key(shard, ROWS), "http_404", "")]
        outputs = {name: write_tar(members) for name in self.stage.outputs}
        told = {name: config.get(name, {}) for name in ("waited", "queues")}
        if config.get("ends"):
            self.note(f"end {shard}")
        if config.get("threads"):
            told["info"] = {"threads": int(os.environ["OMP_NUM_THREADS"])}
        return ShardData(keys, outputs, statuses, seconds=0.1, **told)

    def run_with(self, others: list[ToyWork], shard: int) -> list[ShardData]:
        self.note(f"with {len(others)} others {shard}")
        if self.config.get("alone"):
            raise ValueError("they do not fit together")
        return [work.run(shard) for work in (self, *others)]

    def marked(self, shard: int) -> bool:
        path = Path(self.config["folder"]) / f"mark-{shard}"
        existed = path.exists()
        path.touch()
        return existed

    def note(self, text: str) -> None:
        with (Path(self.config["folder"]) / "log").open("a") as file:
            file.write(f"{self.stage.name} {text}\n")

    def close(self) -> None:
        if self.config.get("log"):
            self.note("close")


def build(store_url: str, stage: Stage, config: dict[str, Any]) -> ToyWork:
    if config.get("unbuildable"):
        raise FileNotFoundError("no weights")
    return ToyWork(stage, config)
