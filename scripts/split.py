"""`sst2-xlmr split` from a checkout; see sst2_xlmr/programs/split.py."""

from sst2_xlmr.__main__ import main

if __name__ == "__main__":
    main("split")
