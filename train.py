"""Fine-tune XLM-R for text classification.

    python train.py --device cpu                       # laptop or workstation
    torchrun --nproc_per_node=2 train.py               # one machine, several GPUs (or CPU processes)
    sbatch scripts/train.sbatch                        # SLURM cluster, one or many nodes

The loop is in sst2_xlmr/train.py.
"""

from sst2_xlmr.train import main
from sst2_xlmr.util.errors import exit_on_user_error

if __name__ == "__main__":
    exit_on_user_error(main)
