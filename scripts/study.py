"""`sst2-xlmr study` from a checkout; see sst2_xlmr/programs/study.py."""

from sst2_xlmr.__main__ import main

if __name__ == "__main__":
    main("study")
