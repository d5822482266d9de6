"""What was found in finished runs: intervals, paired differences, calibration, imitation, and the verdict. Pure functions."""
