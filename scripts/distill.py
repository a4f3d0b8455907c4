"""`sst2-xlmr distill` from a checkout; see sst2_xlmr/programs/distill.py."""

from sst2_xlmr.__main__ import main

if __name__ == "__main__":
    main("distill")
