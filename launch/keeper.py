"""The keeper of a rank, by the name that launchers start it by:

torchrun --nproc-per-node 2 -m pipeserve.launch.keeper --control HOST:PORT
"""

from pipeserve.stage.keeper_command import main

if __name__ == "__main__":
    main()
