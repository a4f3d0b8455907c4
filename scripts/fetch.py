"""`sst2-xlmr fetch` from a checkout; see sst2_xlmr/programs/fetch.py."""

from sst2_xlmr.__main__ import main

if __name__ == "__main__":
    main("fetch")
