"""The stage program of `loss_cost.py`: an emulated one that takes a while to load."""

import os
import time

from pipeserve.launch.emulated import stage

LOAD_S = float(os.environ["LOAD_S"])


class Loading(stage.EmulatedCompute):
    def take_memory(self, num_blocks: int) -> None:
        time.sleep(LOAD_S)
        super().take_memory(num_blocks)


if __name__ == "__main__":
    stage.EmulatedCompute = Loading
    stage.main()
