"""`sst2-xlmr serve` from a checkout; see sst2_xlmr/programs/serve.py."""

from sst2_xlmr.__main__ import main

if __name__ == "__main__":
    main("serve")
