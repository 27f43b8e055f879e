"""Which devices work on which matrices, how the tiles travel, and what that costs."""
