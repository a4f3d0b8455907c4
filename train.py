"""Fine-tune XLM-R for text classification.

    python train.py --device cpu                       # laptop or workstation
    torchrun --nproc_per_node=2 train.py               # one machine, several GPUs (or CPU processes)
    sbatch scripts/train.sbatch                        # SLURM cluster, one or many nodes

The loop is in sst2_xlmr/train.py. `sst2-xlmr train`, or `torchrun -m sst2_xlmr.train`, starts it from any folder.
"""

from sst2_xlmr.__main__ import main

if __name__ == "__main__":
    main("train")
