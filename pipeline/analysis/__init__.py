"""What finished runs found: intervals, paired differences, calibration, imitation, the verdict; pure functions."""
