"""Rules against tuned baselines: tasks, optimizers, runs and their cache, figures, reports."""
