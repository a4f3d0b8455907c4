"""`sst2-xlmr predict` from a checkout; see sst2_xlmr/programs/predict.py."""

from sst2_xlmr.__main__ import main

if __name__ == "__main__":
    main("predict")
