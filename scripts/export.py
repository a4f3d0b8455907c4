"""`sst2-xlmr export` from a checkout; see sst2_xlmr/programs/export.py."""

from sst2_xlmr.__main__ import main

if __name__ == "__main__":
    main("export")
