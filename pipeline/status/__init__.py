"""Runs and captures from their folders alone: at work, silent, failed, finished."""
