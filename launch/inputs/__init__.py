"""What a user gives: flags, prompts, workloads, traces."""
