"""Members and baselines that are made here: fine-tuning on a task each, on all together, on parts of one data set."""
