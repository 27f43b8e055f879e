"""The mixture of experts: router, experts, load balance."""
