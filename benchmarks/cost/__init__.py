"""What serving costs: one trunk with eight heads against what people use today, on the same server, in the same run."""
