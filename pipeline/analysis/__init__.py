"""What finished runs say: intervals, paired differences, calibration, imitation, and the verdict. Pure functions."""
