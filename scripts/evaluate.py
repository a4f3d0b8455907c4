"""`sst2-xlmr evaluate` from a checkout; see sst2_xlmr/programs/evaluate.py."""

from sst2_xlmr.__main__ import main

if __name__ == "__main__":
    main("evaluate")
