"""Where the work goes: matrices of one shape pooled into buckets."""
