"""What a method, a statistic or a kind of task of one's own is tested by; needs pytest."""
