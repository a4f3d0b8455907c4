"""`sst2-xlmr fetch` from a checkout; see sst2_xlmr/programs/fetch.py."""

from sst2_xlmr.programs.fetch import main
from sst2_xlmr.util.errors import exit_on_user_error

if __name__ == "__main__":
    exit_on_user_error(main)
