"""What runs on the robot: torch-free execution of an engine directory."""
