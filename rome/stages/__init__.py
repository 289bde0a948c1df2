"""One file for each kind of training; they wire the learner to rollouts, engines and files."""
