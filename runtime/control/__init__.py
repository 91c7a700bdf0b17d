"""The control loop: a robot and a policy at a fixed rate, guarded, watched and traced."""
