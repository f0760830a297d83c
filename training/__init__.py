"""Training runs that can go on: checkpoints, the trainer around the step, rounds of boosting, replay."""
