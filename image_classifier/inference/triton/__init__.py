"""A Triton server behind the seam, and the verb that starts and stops one."""
