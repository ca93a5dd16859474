"""What the verb `tune` is made of; loads no torch: each trial is a `train` in a process of its own."""
