"""Scripts that `deepspeed` launches, and their command line."""
