"""`aepo bench`, and the baseline that it measures against."""
