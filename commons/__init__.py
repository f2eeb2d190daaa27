"""The parts of the suite that its entry scripts share."""
