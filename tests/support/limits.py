"""A limit that only what goes on and on reaches."""

# CPU seconds. What is held to it takes milliseconds, and a second when garbage of earlier tests is collected meanwhile;
# comparing all with all, or a pattern that backtracks for ever, takes minutes.
WITHOUT_END = 20.0
