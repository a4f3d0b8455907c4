"""`sst2-xlmr evaluate` from a checkout; see sst2_xlmr/programs/evaluate.py."""

from sst2_xlmr.programs.evaluate import main
from sst2_xlmr.util.errors import exit_on_user_error

if __name__ == "__main__":
    exit_on_user_error(main)
